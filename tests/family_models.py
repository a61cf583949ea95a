"""A tiny model and a tokenizer for every family that docs/families.md lists.

This is not a test: test_families.py and test_examples.py run it with ``runpy``. Nothing is trained;
the random weights are large, so that distributions are peaked and mistakes show.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion_detox.vocabulary.token_table import ENGLISH

TEXTS = [
    "The weather was fine, so we walked to the river and had lunch there.",
    "You are a complete idiot and nobody wants to hear your stupid opinion.",
    "What a damn stupid thing to say! Shut up, you idiot. It doesn't matter.",
    "In 1987 the town built a new school; 240 pupils came in the first year.",
    "    if value > 10:\n\treturn the_value * 2  # twice\n\n\n",
    "Zürich, naïve café, 東京, emoji 🙂, Ελλάδα.",
]
PLAIN = [text for text in TEXTS if text.isascii()] + [ENGLISH]
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The shape of the published templates, without tools and system prompts.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _byte_level(
    specials: list[str], size: int, splits: list[Any] | None = None, normalizer: Any = None
) -> Tokenizer:
    own = splits is None
    parts = [*(splits or []), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)]
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = parts[0] if own else pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return tokenizer


def _sentencepiece(specials: list[str], size: int, dummy_prefix: bool) -> Tokenizer:
    """BPE over ``▁`` with byte fallback; Llama 1 and 2 prepend a space, Gemma does not."""
    replace = normalizers.Replace(" ", "▁")
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trained.train_from_iterator(
        PLAIN, trainers.BpeTrainer(vocab_size=size - 256, show_progress=False)
    )
    learned = json.loads(trained.to_str())["model"]
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(learned["vocab"], key=learned["vocab"].get)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: id for id, name in enumerate(names)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizer if dummy_prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _unigram(specials: list[str], size: int) -> Tokenizer:
    """SentencePiece Unigram with NFKC and without byte fallback, like T5's."""
    parts = {
        "normalizer": normalizers.NFKC(),
        "pre_tokenizer": pre_tokenizers.Metaspace(),
        "decoder": decoders.Metaspace(),
    }
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    for name, part in parts.items():
        setattr(pieces, name, part)
    pieces.train_from_iterator(PLAIN, trainer)
    # Its own trainer gives a different vocabulary on each run. With some of them, the model repeats
    # one token whatever fusion does.
    ranked = sorted(pieces.get_vocab().items(), key=lambda item: item[1])
    vocabulary = [(piece, -0.1 * rank) for piece, rank in ranked]
    found = Tokenizer(models.Unigram(vocabulary, unk_id=specials.index("<unk>")))
    for name, part in parts.items():
        setattr(found, name, part)
    return found


def _wrap(tokenizer: Tokenizer, before: str, after: str = "", **roles: Any) -> Any:
    """Wrap it as ``transformers`` does, with the special tokens that it adds around a text."""
    template = roles.pop("chat_template", None)
    tokenizer.add_special_tokens([t for t in roles.pop("more", ()) if isinstance(t, str)])
    around = [token for token in (before, after) if token]
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*([before] if before else []), "$A", *([after] if after else [])]),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in around],
        )
    # Published tokenizers declare their outputs; otherwise transformers 4 adds token_type_ids.
    roles.setdefault("model_input_names", ["input_ids", "attention_mask"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    wrapped.chat_template = template
    return wrapped


END = "<|endoftext|>"


def _neox() -> Any:
    tokenizer = _byte_level([END, "<|padding|>"], 380, normalizer=normalizers.NFC())
    # Runs of spaces are added tokens, but not special ones.
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (2, 4)])
    return _wrap(tokenizer, "", bos_token=END, eos_token=END, unk_token=END)


def _falcon() -> Any:
    splits = [
        pre_tokenizers.Punctuation(behavior="contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
    ]
    tokenizer = _byte_level([">>TITLE<<", ">>QUESTION<<", END], 380)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return _wrap(tokenizer, "", eos_token=END)


def _split(pattern: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]


def _llama2(*more: str, **roles: Any) -> Any:
    tokenizer = _sentencepiece(["<unk>", "<s>", "</s>"], 420, dummy_prefix=True)
    return _wrap(
        tokenizer, "<s>", more=more, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **roles
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {
    # No padding token; the same token begins and ends a text.
    "gpt2": lambda: _wrap(_byte_level([END], 380), "", bos_token=END, eos_token=END),
    "neox": _neox,
    # Each text begins with the token that also ends it.
    "opt": lambda: _wrap(
        _byte_level(["<s>", "<pad>", "</s>", "<unk>"], 380),
        "</s>",
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ),
    "bloom": lambda: _wrap(
        _byte_level(
            ["<unk>", "<s>", "</s>", "<pad>"],
            380,
            _split(r" ?[^(\s|[.,!?…。，、।۔،])]+"),
        ),
        "",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ),
    "llama2": _llama2,
    "mistral": lambda: _llama2("[INST]", "[/INST]", chat_template=MISTRAL),
    "phi3": lambda: _llama2("<|user|>", "<|assistant|>", "<|end|>", chat_template=PHI3),
    "llama3": lambda: _wrap(
        _byte_level(["<|begin_of_text|>", "<|eot_id|>"], 380, _split(GPT4)),
        "<|begin_of_text|>",
        more=("<|start_header_id|>", "<|end_header_id|>"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=LLAMA3,
    ),
    # No BOS token.
    "qwen": lambda: _wrap(
        _byte_level([END, "<|im_start|>", "<|im_end|>"], 380, _split(GPT4)),
        "",
        eos_token="<|im_end|>",
        pad_token=END,
        chat_template=CHATML,
    ),
    "gemma": lambda: _wrap(
        _sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>"], 420, dummy_prefix=False),
        "<bos>",
        more=("<start_of_turn>", "<end_of_turn>"),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=GEMMA,
    ),
    "falcon": _falcon,
    "t5": lambda: _wrap(
        _unigram(["<pad>", "</s>", "<unk>"], 300),
        "",
        "</s>",
        more=("<extra_id_0>",),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    ),
    "bart": lambda: _wrap(
        _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], 380),
        "<s>",
        "</s>",
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    ),
}


@functools.cache
def tokenizer_in_kind(kind: str) -> Any:
    """Return one of ``TOKENIZERS``; each is built once."""
    return TOKENIZERS[kind]()


# The names that families use for the same sizes.
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
FAIRSEQ = {"d_model": 32, "max_position_embeddings": 128, "init_std": 0.3}
PLAIN_HEADS = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
HEADS8 = {**LLAMA, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"]}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}


class Family(NamedTuple):
    """One row of docs/families.md.

    Attributes:
        model: Its class in ``transformers``.
        config: The class of its configuration.
        settings: Settings of a tiny model.
        tokenizer: The kind of its tokenizer, a key of ``TOKENIZERS``.
        refused: The error when used as a calibrator; ``None`` if it can be one.
        columns: Columns of the head beyond the tokenizer.
        real: Folder of a published tokenizer of that kind.
        padding: Whether left padding leaves the text of the model, without a processor, unchanged.
        cached: Whether its cache leaves the text of the model, without a processor, unchanged.
    """

    model: str
    config: str
    settings: dict[str, Any]
    tokenizer: str
    refused: str | None = None
    columns: int = 3
    real: str | None = None
    padding: bool = True
    cached: bool = True

    @property
    def encoder_decoder(self) -> bool:
        """Whether ``generate`` shows a processor only the decoder's side."""
        return self.model.endswith("ConditionalGeneration")

    def make(self, width: int, tokenizer: Any, seed: int = 0, **settings: Any) -> PreTrainedModel:
        """Build a random model in eval mode with ``width`` logits."""
        end = tokenizer.eos_token_id
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        bos = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": pad}
        config = getattr(transformers, self.config)(
            vocab_size=width, **{**ids, **self.settings, **settings}
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: PreTrainedModel = getattr(transformers, self.model)(config).eval()
            # With flat distributions, mistakes would not show.
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)
        return model


RECURRENT = "no key-value cache"
# transformers 4.57 does not list the types of all layers, or has a special cache for them.
HYBRID = (
    "its layers of type .* cannot be rolled back|does not run on a plain key-value cache"
    "|no key-value cache"
)

FAMILIES: dict[str, Family] = {
    "GPT-2": Family("GPT2LMHeadModel", "GPT2Config", GPT, "gpt2", columns=0, real="gpt2"),
    "GPT-J": Family("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}, "gpt2", columns=143),
    "GPT-Neo": Family(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **{"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128},
            **{"attention_types": [[["global", "local"], 1]], "initializer_range": 0.3},
        },
        "gpt2",
    ),
    "GPT-NeoX, Pythia": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", PLAIN_HEADS, "neox"),
    "OPT": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {
            **{"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"word_embed_proj_dim": 32, "max_position_embeddings": 128, "init_std": 0.3},
        },
        "opt",
    ),
    "BLOOM": Family(
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
        "bloom",
        columns=200,
    ),
    "Llama 1 and 2": Family(
        "LlamaForCausalLM", "LlamaConfig", LLAMA, "llama2", real="mistral_v1_sentencepiece"
    ),
    "Llama 3": Family("LlamaForCausalLM", "LlamaConfig", LLAMA, "llama3", real="cl100k_base"),
    "Mistral": Family(
        "MistralForCausalLM",
        "MistralConfig",
        {**LLAMA, "sliding_window": 16},
        "mistral",
        "sliding_window of 16 is less than twice",
        real="mistral_v1_sentencepiece",
    ),
    "Mistral Nemo": Family(
        "MistralForCausalLM",
        "MistralConfig",
        {**HEADS8, "sliding_window": None},
        "llama3",
        real="tekken",
    ),
    "Mixtral": Family(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        "mistral",
    ),
    "Qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", LLAMA, "qwen", real="cl100k_base"),
    "Qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", HEADS8, "qwen", columns=100),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**HEADS8, **EXPERTS}, "qwen"),
    "Qwen3-Next": Family(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **{**HEADS8, **EXPERTS, "shared_expert_intermediate_size": 32},
            **{"linear_num_value_heads": 4, "linear_num_key_heads": 2},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
            "layer_types": ["linear_attention", "full_attention"],
        },
        "qwen",
        HYBRID,
    ),
    "Gemma 2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **{**HEADS8, "query_pre_attn_scalar": 8, "sliding_window": 16},
            **{"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        },
        "gemma",
        "sliding_window of 16 is less than twice",
    ),
    "Gemma 3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**HEADS8, **WINDOWED, "query_pre_attn_scalar": 8, "sliding_window": 16},
        "gemma",
        "sliding_window of 16 is less than twice",
    ),
    "Phi-1, Phi-2": Family("PhiForCausalLM", "PhiConfig", LLAMA, "gpt2", columns=943),
    "Phi-3, Phi-4-mini": Family(
        "Phi3ForCausalLM",
        "Phi3Config",
        {**LLAMA, "sliding_window": None},
        "phi3",
        columns=53,
        real="mistral_v1_sentencepiece",
    ),
    "Falcon": Family("FalconForCausalLM", "FalconConfig", PLAIN_HEADS, "falcon"),
    "Falcon-RW (ALiBi)": Family(
        "FalconForCausalLM",
        "FalconConfig",
        {**PLAIN_HEADS, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        "gpt2",
    ),
    "Falcon-H1": Family(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {**LLAMA, **MAMBA2, "mamba_chunk_size": 16, "mamba_d_ssm": 64},
        "falcon",
        HYBRID,
    ),
    "MPT": Family(
        "MptForCausalLM",
        "MptConfig",
        {
            **{"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
            **{"expansion_ratio": 2, "initializer_range": 0.3},
        },
        "neox",
    ),
    "StarCoder2": Family(
        "Starcoder2ForCausalLM", "Starcoder2Config", {**LLAMA, "sliding_window": None}, "gpt2"
    ),
    "OLMo 2": Family("Olmo2ForCausalLM", "Olmo2Config", LLAMA, "llama3", real="cl100k_base"),
    "SmolLM3": Family("SmolLM3ForCausalLM", "SmolLM3Config", LLAMA, "llama3"),
    "Granite": Family(
        "GraniteForCausalLM", "GraniteConfig", {**LLAMA, "logits_scaling": 0.5}, "gpt2"
    ),
    "Cohere Command R": Family(
        "CohereForCausalLM", "CohereConfig", {**LLAMA, "logit_scale": 1.0}, "llama3"
    ),
    "GPT-OSS": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **{**HEADS8, **WINDOWED, "sliding_window": 16},
            **{"num_local_experts": 4, "num_experts_per_tok": 2},
        },
        "llama3",
        "sliding_window of 16 is less than twice",
        real="o200k_base",
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **{**LLAMA, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1},
            **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
            **{"moe_intermediate_size": 16, "first_k_dense_replace": 1, "kv_lora_rank": 8},
            **{"q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
        },
        "llama3",
    ),
    "Llama 4 (text)": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **{**HEADS8, "num_local_experts": 2, "intermediate_size_mlp": 64},
            "attention_chunk_size": 16,
        },
        "llama3",
        "attention_chunk_size of 16 is less than twice",
    ),
    "XGLM": Family(
        "XGLMForCausalLM",
        "XGLMConfig",
        {**FAIRSEQ, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
        "llama2",
    ),
    "BioGPT": Family("BioGptForCausalLM", "BioGptConfig", PLAIN_HEADS, "gpt2"),
    "Mamba": Family(
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3},
        "neox",
        RECURRENT,
    ),
    "Mamba 2": Family(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            **{"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "num_heads": 8},
            **{"head_dim": 8, "n_groups": 2, "chunk_size": 16, "initializer_range": 0.3},
        },
        "neox",
        RECURRENT,
    ),
    "RWKV": Family(
        "RwkvForCausalLM",
        "RwkvConfig",
        {
            **{"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
            **{"intermediate_size": 64, "context_length": 128},
        },
        "neox",
        RECURRENT,
        padding=False,
        cached=False,
    ),
    "RecurrentGemma": Family(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "lru_width": 32, "attention_window_size": 16},
        },
        "gemma",
        HYBRID,
        padding=False,
    ),
    "Jamba": Family(
        "JambaForCausalLM",
        "JambaConfig",
        {
            **{**LLAMA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
            **{"num_experts": 2, "use_mamba_kernels": False},
            **{"mamba_d_state": 4, "mamba_dt_rank": 4},
        },
        "llama2",
        HYBRID,
    ),
    "Bamba, Granite 4": Family(
        "BambaForCausalLM",
        "BambaConfig",
        {**LLAMA, **MAMBA2, "attn_layer_indices": [1], "mamba_chunk_size": 16},
        "llama3",
        HYBRID,
    ),
    "LFM2": Family(
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {**LLAMA, "layer_types": ["conv", "full_attention"]},
        "qwen",
        HYBRID,
    ),
    "T5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **{"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
            **{"decoder_start_token_id": 0, "initializer_factor": 2.0},
        },
        "t5",
        "encoder-decoder",
        columns=28,
    ),
    "BART": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **{**FAIRSEQ, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
            **{"decoder_start_token_id": 2, "forced_eos_token_id": None},
        },
        "bart",
        "encoder-decoder",
        columns=0,
    ),
}
