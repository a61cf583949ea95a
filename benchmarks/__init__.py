"""Measurements behind the numbers in the README, and the training of the shipped scorers."""
