"""Metrics of generated text and of harmless text, with intervals. Only evaluation imports them."""
