"""From text files to blocks of tokens: corpora, pairs, splits, packing."""
