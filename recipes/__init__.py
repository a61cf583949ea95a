"""How the shipped English calibrator and the demo target were made; see ``README.md``."""
