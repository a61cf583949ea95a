"""The ``Calibrator``, its folder on disk, finding one by name, and its model card.

``decoding`` and everything above it may import this package.
"""
