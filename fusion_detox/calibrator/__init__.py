"""The ``Calibrator``: its folder on disk, how one is found by name, and its model card.

``decoding`` and everything above it may import this package.
"""
