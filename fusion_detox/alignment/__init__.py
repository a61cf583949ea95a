"""The aligned rules (arXiv 2506.01266): learn an alignment, save it, and apply it when decoding.

``alignment`` learns the matrix, ``infonce`` holds the paper's loss, ``store`` reads and writes
alignments, and ``aligned_rule`` applies one. It builds on the rooms before it in CONTRIBUTING's
table; ``processor`` and the rooms after it may import it.
"""
