"""Paraphrase sets made by a language model: sentences in, toxic and neutral wordings out.

The hard negatives of contrastive perplexity (arXiv 2401.08491, section 3.3). The work has two
steps, so that nothing that was paid for is lost: ``writers`` ask a model and every answer is kept
at once (``answer_file``); ``filters`` then judge the answers, as often as the thresholds change.
"""
