"""Text from a model, fused or not, reproducible row by row; and what fusion did to each token.

``scoring``, ``training``, ``evaluation`` and ``cli`` may import this package.
"""
