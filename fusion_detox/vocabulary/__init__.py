"""Projecting a calibrator's distributions to a target's vocabulary, through the bytes of tokens.

It builds on the rooms before it in CONTRIBUTING's table; ``calibrator`` and the rooms after it may
import it. It accesses a calibrator only through ``CalibratorLike``, which declares the few
attributes that it reads.
"""
