"""The map from a calibrator's vocabulary to a target's, through the bytes of their tokens.

``calibrator`` and everything above it may import this package; it knows a calibrator only by the
few attributes that it reads.
"""
