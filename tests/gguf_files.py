"""Small GGUF files, written as llama.cpp's converter does."""

import json

import pytest


def write_gguf(path, model, tokenizer, *, tied=False):
    """Write a Llama as llama.cpp does, in float32."""
    gguf = pytest.importorskip("gguf")
    config, spec = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("fake")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(spec["vocab"], key=spec["vocab"].get))
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))  # the first is a control token
    writer.add_token_merges([" ".join(pair) for pair in spec["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
    }
    weights = model.state_dict()
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    for name, weight in weights.items():
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        for kind, count in heads.items():
            if f"{kind}_proj" in name:  # llama.cpp orders the rotary dimensions otherwise
                halves = weight.reshape(count, 2, -1, weight.shape[1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, weight.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()
