"""Projecting a calibrator's distributions to a target's vocabulary, through the bytes of tokens.

``calibrator`` and the rooms above it may import this package. It knows a calibrator only as
``CalibratorLike``, the few attributes that it reads.
"""
