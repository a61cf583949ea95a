"""One decoding step of the calibrator: target ids to text, text to next-token log-probs.

It builds on the rooms before it in CONTRIBUTING's table; ``alignment`` and the rooms after it
may import it.
"""
