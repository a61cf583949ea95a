"""Which settings ``tune`` tries, and when it finds them better than the present ones."""

import numpy as np
import pytest

from fusion_detox import FusionConfig
from fusion_detox.evaluation import PromptSet
from fusion_detox.evaluation.tuning import (
    CONTRAST_GRID,
    MIN_PROMPTS,
    Price,
    Trial,
    Tuning,
    _candidates,
    _choosing,
    _exceeded,
    _gain,
    _relative,
    _rounds,
)


def test_context_kl_is_also_tried_with_higher_strengths():
    tried = _candidates(FusionConfig(strength=1.5, context_kl=0.3), "context_kl", (None, 0.1))
    assert [(one.context_kl, one.strength) for one in tried] == [
        (0.3, 1.5),
        (None, 1.5),
        (None, 1.0),
        (None, 0.75),
        (0.1, 1.5),
        (0.1, 2.25),
        (0.1, 3.0),
    ]


def test_strengths_stay_within_the_range_of_the_rule():
    tried = _candidates(FusionConfig(rule="product", strength=0.6), "context_kl", (0.1,))
    assert max(one.strength for one in tried) == 1.0


def test_the_strength_is_varied_first_and_again_at_the_end():
    names = [name for name, _ in _rounds(FusionConfig(), CONTRAST_GRID)]
    assert names[0] == names[-1] == "strength"
    assert "context_kl" in names


def _setting(probability, generator, count):
    values = generator.binomial(1, probability, count).astype(float)
    return {"prompt_toxicity": {"scorer": values.tolist()}}


def _decide(present, candidates, prompts, generator, *, naively=False):
    """What ``tune`` does once everything is measured, with toxicity as the only measure.

    ``naively`` decides on the prompts that chose.
    """
    choosing = np.arange(prompts) % 2 == 0
    base = _setting(0.7, generator, prompts)
    measured = {config: _setting(p, generator, prompts) for config, p in candidates.items()}
    measured[PRESENT] = _setting(present, generator, prompts)
    trials = {
        config: Trial(config, float(_relative(one, base, choosing).mean()), 1, 0, 1, 0)
        for config, one in measured.items()
    }
    best = min(trials.values(), key=lambda trial: trial.rank)
    gain = _gain(base, measured[best.config], measured[PRESENT], choosing ^ (not naively), 500)
    return Tuning(best, trials[PRESENT], tuple(trials.values()), ("scorer",), (), gain)


PRESENT = FusionConfig(strength=1.0)
OTHERS = [FusionConfig(strength=2.0 + n / 10) for n in range(30)]


@pytest.mark.parametrize("prompts", [MIN_PROMPTS, 200])
def test_noise_is_not_a_gain(prompts):
    """The best of 30 settings that are as toxic as the present ones only looks better."""

    def decide(*, naively):
        generator = np.random.default_rng(0)
        same = dict.fromkeys(OTHERS, 0.5)
        return [_decide(0.5, same, prompts, generator, naively=naively) for _ in range(300)]

    runs = decide(naively=False)
    assert sum(run.improves for run in runs) <= 0.03 * len(runs)
    assert sum(run.improves for run in decide(naively=True)) > 0.1 * len(runs)
    for run in runs:
        assert run.verdict().startswith(
            "Change to the settings marked *" if run.improves else "Keep the present settings"
        )


def test_a_clear_difference_is_a_gain():
    generator = np.random.default_rng(0)
    better = {**dict.fromkeys(OTHERS, 0.5), OTHERS[7]: 0.1}
    runs = [_decide(0.6, better, 100, generator) for _ in range(100)]
    assert sum(run.improves and run.chosen.config == OTHERS[7] for run in runs) > 95


def test_equal_prompts_are_on_the_same_side():
    texts = [f"Prompt {n}" for n in range(41)]
    sets = [PromptSet.from_texts(texts), PromptSet.from_texts([t.upper() for t in texts])]
    one, other = _choosing(sets).reshape(2, 41)
    assert (one == other).all()
    assert one.sum() == 21


def test_limits_are_exceeded_only_beyond_noise():
    measured = {"perplexity": {"relative": [1.2, 1.06, 1.4]}, "harmless": {"kl": [0.1, 0.04, 0.2]}}
    assert _exceeded(measured, Price()) == ("perplexity is above 1.06, and the limit is 1.05",)
    assert _exceeded(measured, Price(perplexity=1.1)) == ()


def test_a_scorer_without_toxic_text_does_not_count():
    generator = np.random.default_rng(1)
    every = np.ones(40, dtype=bool)
    base, other = _setting(0.5, generator, 40), _setting(0.5, generator, 40)
    expected = _relative(other, base, every)
    for one in (base, other):
        one["prompt_toxicity"]["blind"] = [0.0] * 40
    np.testing.assert_array_equal(_relative(other, base, every), expected)
    base["prompt_toxicity"]["scorer"] = [0.0] * 40
    assert _gain(base, other, other, every, 100) is None
