"""Which settings ``tune`` tries."""

from fusion_detox import FusionConfig
from fusion_detox.evaluation.tuning import CONTRAST_GRID, _candidates, _rounds


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
