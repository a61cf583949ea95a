"""Damage, kills and races: what the library does when its surroundings fail."""
