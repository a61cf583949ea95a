"""Prompt sets in the formats of RealToxicityPrompts, ToxiGen, BOLD, HateCheck and XSTest.

All of :mod:`fusion_detox.evaluation` and the command line may import this package.
"""
