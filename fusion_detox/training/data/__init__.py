"""Training data: documents and paraphrase sets, their split, a tokenizer, and blocks of token ids.

Only :mod:`fusion_detox.training` and the commands that call it may import this package.
"""
