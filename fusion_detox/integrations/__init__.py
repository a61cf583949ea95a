"""Adapters for other decoding and evaluation tools, one module per tool.

``continuous_batching`` is for continuous batching in transformers, ``vllm`` is for vLLM, and
``lm_eval`` is for EleutherAI's lm-evaluation-harness. ``metrics`` counts what is fused, and
``prometheus`` exports that. Each module imports its tool, so import it only when you use
it. Only ``cli`` may import this package.
"""
