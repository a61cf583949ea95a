"""Both decoders equal plain ``transformers``, and unsupported models are refused."""

import weakref

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fusion_detox.decoding.generic_decoder import GenericDecoder
from fusion_detox.decoding.kv_cache import Row
from fusion_detox.decoding.stacked_llama import StackedLlamaDecoder
from fusion_detox.errors import ModelError

CPU = torch.device("cpu")
WIDTH, COLUMNS = 50, 24
TEXTS = [tuple((7 * i + j * (i + 1)) % 40 + 3 for j in range(20)) for i in range(6)]
SHAPES = {
    "grouped": {},
    "all heads": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
    "gelu": {"hidden_act": "gelu"},
}


def randomised(model):
    """Randomise norm scales and biases, which start as ones and zeros and would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def expected(models, text):
    with torch.no_grad():
        return torch.stack([m(input_ids=torch.tensor([text])).logits[0] for m in models])


def compare(decoder, models, rows):
    """Compare the decoder with plain models on rows of TEXTS; slot i holds text i."""
    with torch.no_grad():
        found = decoder.logits(rows)
    width = found.shape[-1]
    wanted = torch.cat(
        [
            expected(models, TEXTS[row.slot][: row.stop])[:, [row.start + at for at in row.asked]]
            for row in rows
        ],
        1,
    )
    torch.testing.assert_close(found, wanted[..., :width], atol=1e-4, rtol=1e-4)


def row(slot, start, stop, back=1):
    tokens = TEXTS[slot][start:stop]
    return Row(slot, start, tokens, tuple(range(len(tokens) - back, len(tokens))))


def exercise(decoder, models):
    decoder.resize(3)
    compare(decoder, models, [row(0, 0, 5), row(1, 0, 9, back=3), row(2, 0, 1)])
    compare(decoder, models, [row(0, 5, 6), row(1, 9, 10), row(2, 1, 2)])
    decoder.resize(6)
    compare(decoder, models, [row(0, 6, 7), row(2, 2, 5, back=2)])  # an idle slot in between
    compare(decoder, models, [row(5, 0, 4), row(0, 7, 8)])  # many slots
    compare(decoder, models, [row(0, 3, 4), row(5, 3, 8), row(1, 1, 2)])  # rolled back
    compare(decoder, models, [row(3, 0, 1), row(4, 0, 1)])
    compare(decoder, models, [row(3, 1, 2), row(4, 1, 2)])  # all of equal length
    # Many different offsets: the head must not run at all of them for every row.
    compare(decoder, models, [row(i, 0, 3 + 3 * i, back=2) for i in range(6)])
    with torch.no_grad():
        decoder.copy(5, 0, 0, 12)
        copied = decoder.logits([Row(0, 12, TEXTS[5][12:14], (1,))])
    torch.testing.assert_close(
        copied[:, 0],
        expected(models, TEXTS[5][:14])[:, -1, : copied.shape[-1]],
        atol=1e-4,
        rtol=1e-4,
    )
    compare(decoder, models, [row(0, 0, 2)])


@pytest.mark.parametrize("shape", SHAPES)
def test_stacked_llamas(make_llama, shape):
    models = [randomised(make_llama(WIDTH, seed, **SHAPES[shape])) for seed in (1, 2)]
    assert StackedLlamaDecoder.supports(models)
    exercise(StackedLlamaDecoder(models, COLUMNS, WIDTH - 3, CPU), models)


def test_models_with_one_trunk_run_it_once(make_llama):
    clean, reference = (randomised(make_llama(WIDTH, 1)) for _ in range(2))
    clean.lm_head.weight.data += 0.3 * torch.randn(clean.lm_head.weight.shape)
    for other in (reference, randomised(make_llama(WIDTH, 2))):
        models = [clean, other]
        decoder = StackedLlamaDecoder(models, COLUMNS, WIDTH, CPU)
        assert len(decoder._embeddings) == (1 if other is reference else 2)
        exercise(decoder, models)


def test_one_stacked_llama(make_llama):
    models = [make_llama(WIDTH, 1)]
    exercise(StackedLlamaDecoder(models, COLUMNS, WIDTH, CPU), models)


def test_another_base_of_the_rotary_positions(make_llama):
    models = [make_llama(WIDTH, seed) for seed in (1, 2)]
    assert StackedLlamaDecoder.supports(models)
    for name in ("rope_parameters", "rope_theta"):
        if hasattr(models[0].config, name):
            changed = {"rope_type": "default", "rope_theta": 500.0}
            value = changed if name == "rope_parameters" else 500.0
            others = [make_llama(WIDTH, seed, **{name: value}) for seed in (1, 2)]
    assert not StackedLlamaDecoder.supports([models[0], others[0]])
    exercise(StackedLlamaDecoder(others, COLUMNS, WIDTH, CPU), others)


def test_generic_llamas(make_llama):
    models = [make_llama(WIDTH, seed) for seed in (1, 2)]
    exercise(GenericDecoder(models, COLUMNS, CPU), models)


def test_generic_gpt2_and_mixed_pairs(make_llama, make_gpt2):
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=WIDTH,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
        )
    ).eval()
    for models in ([make_gpt2(WIDTH, 1), make_llama(WIDTH, 2)], [opt]):
        exercise(GenericDecoder(models, COLUMNS, CPU), models)


def test_models_that_cannot_be_stacked(make_llama, make_gpt2):
    plain = make_llama(WIDTH, 1)
    scaled = make_llama(
        WIDTH, 1, rope_scaling={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    )
    deeper = make_llama(WIDTH, 1, num_hidden_layers=3)
    biased = make_llama(WIDTH, 1, attention_bias=True)
    half = make_llama(WIDTH, 1).to(torch.bfloat16)
    extended = make_llama(WIDTH, 1)
    extended.model.layers[0].adapter = torch.nn.Linear(2, 2)

    class Own(LlamaForCausalLM):
        pass

    for models in (
        [plain, make_gpt2(WIDTH, 1)],
        [scaled, scaled],
        [plain, scaled],
        [plain, deeper],
        [plain, biased],
        [plain, half],
        [extended],
        [Own(plain.config)],
    ):
        assert not StackedLlamaDecoder.supports(models)
    assert StackedLlamaDecoder.supports([plain, make_llama(WIDTH, 2)])


def test_the_generic_decoder_supports_scaled_rotary_positions(make_llama):
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    models = [make_llama(WIDTH, 1, rope_scaling=scaling)]
    exercise(GenericDecoder(models, COLUMNS, CPU), models)


def test_the_models_are_not_changed(make_gpt2):
    model = make_gpt2(WIDTH, 1).train()
    decoder = GenericDecoder([model], COLUMNS, CPU)
    assert model.training
    exercise(decoder, [make_gpt2(WIDTH, 1)])


def mistral(window):
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=WIDTH,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            sliding_window=window,
        )
    ).eval()


def test_sliding_windows():
    models = [mistral(2 * COLUMNS)]
    exercise(GenericDecoder(models, COLUMNS, CPU), models)
    with pytest.raises(ModelError, match=r"sliding_window of 30 .* context_length of at most 15"):
        GenericDecoder([mistral(30)], COLUMNS, CPU)


def test_recurrent_states_are_refused():
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=WIDTH, hidden_size=8, state_size=4, num_hidden_layers=1)
    )
    with pytest.raises(ModelError, match="no key-value cache"):
        GenericDecoder([mamba], COLUMNS, CPU)


def test_encoder_decoders_are_refused():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=WIDTH, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        GenericDecoder([t5], COLUMNS, CPU)


def test_hybrid_layers_are_refused(make_llama):
    model = make_llama(WIDTH, 1)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="layers of type linear_attention"):
        GenericDecoder([model], COLUMNS, CPU)


def test_too_few_positions_are_refused(make_llama, make_gpt2):
    with pytest.raises(ModelError, match=r"64 positions, fewer than .* context_length of 65"):
        GenericDecoder([make_gpt2(WIDTH, 1)], 65, CPU)
    with pytest.raises(ModelError, match=r"64 positions, fewer than .* context_length of 65"):
        StackedLlamaDecoder([make_llama(WIDTH, 1)], 65, WIDTH, CPU)


class ByColumn(LlamaForCausalLM):
    """Uses a token's column as its position, as models with learned biases do."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        kwargs.pop("position_ids", None)
        return super().forward(input_ids, attention_mask, past_key_values=past_key_values, **kwargs)


class Stateful(LlamaForCausalLM):
    """Reads what is in its cache, as a recurrent state does."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        output = super().forward(
            input_ids, attention_mask, past_key_values=past_key_values, **kwargs
        )
        output.logits = output.logits + 0.1 * held
        return output


class Failing(LlamaForCausalLM):
    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        raise AttributeError("no such state")


def tiny_config():
    return LlamaConfig(
        vocab_size=WIDTH,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )


def test_models_with_positions_by_column_run_texts_of_one_length_at_a_time():
    models = [ByColumn(tiny_config()).eval(), LlamaForCausalLM(tiny_config()).eval()]
    exercise(GenericDecoder(models, COLUMNS, CPU), models)


def test_models_whose_results_depend_on_the_cache_are_refused():
    config = tiny_config()
    with pytest.raises(ModelError, match="results with and without a cache differ"):
        GenericDecoder([Stateful(config).eval()], COLUMNS, CPU)
    with pytest.raises(ModelError, match=r"plain key-value cache \(AttributeError: no such state"):
        GenericDecoder([Failing(config).eval()], COLUMNS, CPU)


def test_equal_weights_are_held_once(make_llama):
    """Many processors of one calibrator hold one copy; models that were changed get their own."""
    models = [randomised(make_llama(WIDTH, seed)) for seed in (1, 2)]
    one, other = (StackedLlamaDecoder(models, COLUMNS, WIDTH, CPU) for _ in range(2))

    def addresses(decoder):
        tensors = [decoder._embeddings, *decoder._head]
        for layer in decoder._layers:
            tensors += [part for part in layer if part is not None]
        return {tensor.data_ptr() for tensor in tensors}

    assert addresses(one) == addresses(other)
    models[1].model.layers[0].mlp.down_proj.weight.data += 0.5
    changed = StackedLlamaDecoder(models, COLUMNS, WIDTH, CPU)
    assert len(addresses(changed) - addresses(one)) == 1
    exercise(changed, models)
    held = weakref.ref(changed._layers[0].down)
    del changed
    assert held() is None
