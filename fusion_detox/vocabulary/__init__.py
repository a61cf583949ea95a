"""Projecting a calibrator's distributions to a target's vocabulary, through the bytes of tokens.

``calibrator`` and everything above it may import this package. It accesses a calibrator only
through ``CalibratorLike``, which declares the few attributes that it reads.
"""
