"""Contrastive objectives on paraphrase sets, used to train calibrators and LoRA adapters.

``objectives`` holds the losses (arXiv 2401.08491 and two of ours), ``batches`` makes the input,
``measure`` evaluates held-out anchors, and ``trainer`` runs the training. Imported by
``training.pipeline`` and ``training.finetuning``.
"""
