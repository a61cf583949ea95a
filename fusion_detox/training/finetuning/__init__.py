"""The same objectives, and DPO, on a model itself, as a LoRA adapter."""
