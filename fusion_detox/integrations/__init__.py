"""Adapters for other decoding and evaluation tools, one module per tool.

``lm_eval`` is for EleutherAI's lm-evaluation-harness. The others serve models: ``vllm`` and
``vllm_v2``, ``continuous_batching`` (transformers), ``llama_cpp``, ``onnx_genai``, ``mlx_lm``,
``sglang``, ``tensorrt_llm`` and ``lmdeploy``. They share ``steps`` (one step for rows of several
requests), ``server_settings`` and ``workers`` (processors that a worker process loads by name).
``metrics`` counts what is fused, and ``prometheus`` exports that. ``playground`` is a page made
with Gradio. Each module but that one imports its tool, so import it only when you use it. Only
``cli`` may import this package.
"""
