"""Generate text from a model with or without fusion, and explain what fusion did to each token.

``sampling`` draws completions, ``completion_file`` stores them, and ``explain`` shows which tokens
fusion made less likely. ``scoring``, ``training``, ``evaluation``, ``integrations`` and ``cli`` may
import this package.
"""

HELD_BACK_NATS = 1.0
"""A token counts as held back if fusion makes it at least e times less likely."""
