"""The rules that fuse hidden states (arXiv 2506.01266): learn an alignment, store it, apply it.

``processor`` and everything above it may import this package.
"""
