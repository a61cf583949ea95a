"""Paraphrase sets written by a language model: the hard negatives of arXiv 2401.08491, section 3.3.

A writer (``local``, ``endpoint``) asks a model for toxic and neutral paraphrases of each sentence.
``answer_file`` stores every raw answer immediately, and ``filters`` then decides which to keep. The
two steps are separate, so new thresholds cost no new requests. ``pipeline`` is the entry point.
Only the command line and :mod:`fusion_detox.training` itself import from here.
"""
