"""The ``Calibrator``, its folder on disk, finding one by name, and its model card.

``decoding`` and the rooms above it may import this package.
"""
