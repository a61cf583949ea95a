"""Reading and writing files: whole, resumable, and with nothing that runs code.

Every room of the package may import it; it imports :mod:`fusion_detox.errors` alone.
"""
