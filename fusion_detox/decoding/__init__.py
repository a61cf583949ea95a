"""One decoding step of the calibrator: target ids to text, text to next-token log-probs.

``alignment``, ``processor`` and everything above them may import this package.
"""
