"""``finetune``: training a LoRA adapter with a contrastive objective or DPO.

``pipeline`` runs it, ``config`` holds its settings, ``adapter`` loads the model and writes the
adapter, ``dpo`` prepares ``trl``, and ``card`` writes the model card. Imported by the command line.
"""
