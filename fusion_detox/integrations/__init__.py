"""Adapters for other decoding and evaluation tools, one module per tool.

``continuous_batching`` is for continuous batching in transformers, ``lm_eval`` is for EleutherAI's
lm-evaluation-harness, and ``playground`` is a page made with Gradio. Each module but
the last imports its tool, so import it only when you use it. Only ``cli`` may import this package.
"""
