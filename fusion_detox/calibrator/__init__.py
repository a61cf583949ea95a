"""The ``Calibrator``, its folder on disk, finding one by name, and its model card.

It builds on the rooms before it in CONTRIBUTING's table; ``decoding`` and the rooms after it may
import it.
"""
