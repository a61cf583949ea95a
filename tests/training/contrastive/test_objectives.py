"""The contrastive objectives equal arithmetic, numpy, finite differences and the paper's code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fusion_detox.errors import ConfigError, DataError
from fusion_detox.training.contrastive.config import ContrastiveConfig
from fusion_detox.training.contrastive.measure import auc, drift, separation
from fusion_detox.training.contrastive.objectives import (
    HIGHEST_NLL,
    contrastive_perplexity_loss,
    kl_to_base,
    likelihood_ratio_loss,
    mean_nll,
    objective_loss,
    positive_nll,
    signed_margin_loss,
)
from fusion_detox.training.loss import IGNORED


def batch(*anchors):
    """Build ``(nll, group, positive)`` from anchors given as (positives' nll, negatives' nll)."""
    rows = [
        (value, number, kind)
        for number, (positives, negatives) in enumerate(anchors)
        for kind, values in ((True, positives), (False, negatives))
        for value in values
    ]
    nll, group, positive = zip(*rows, strict=True)
    return torch.tensor(nll, dtype=torch.float64), torch.tensor(group), torch.tensor(positive)


def transcription(nll, group, positive, temperature, alpha):
    """Equations 1 to 6 of arXiv 2401.08491, anchor by anchor, without numerical safeguards."""
    losses = []
    for anchor in np.unique(group):
        phi = np.exp(nll[group == anchor])
        kind = positive[group == anchor]
        centroid = phi[kind].mean()
        s = 1 / temperature * np.exp(-np.abs(phi - centroid))
        weight = np.where(kind, 1.0, alpha)
        losses.append(-np.log(s[kind].sum() / (weight * s).sum()))
    return np.array(losses)


# mean_nll


def test_mean_nll_by_hand():
    """Two tokens of known probability; prompt, BOS and padding do not count."""
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.8, 0.1, 0.1], [0.2, 0.2, 0.6]])
    logits = torch.stack([probs.log() + 3.0, probs.log()])  # an offset changes nothing
    labels = torch.tensor([[IGNORED, 1, 2, IGNORED], [IGNORED, IGNORED, 2, 0]])
    expected = [-(math.log(0.25) + math.log(0.7)) / 2, -(math.log(0.7) + math.log(0.8)) / 2]
    assert mean_nll(logits, labels).tolist() == pytest.approx(expected, abs=1e-6)


def test_mean_nll_is_cross_entropy_of_each_row(make_llama):
    model = make_llama(300)
    ids = torch.randint(1, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :5] = IGNORED
    labels[1, 30:] = IGNORED
    logits = model(input_ids=ids).logits
    wanted = [
        torch.nn.functional.cross_entropy(row[:-1], target[1:], ignore_index=IGNORED)
        for row, target in zip(logits, labels, strict=True)
    ]
    torch.testing.assert_close(mean_nll(logits, labels), torch.stack(wanted))


@pytest.mark.parametrize("function", ["nll", "kl"])
def test_gradients_of_the_token_losses(function):
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 19, 7, dtype=torch.float64, generator=random, requires_grad=True)
    base = torch.randn(2, 19, 7, dtype=torch.float64, generator=random)
    labels = torch.randint(0, 7, (2, 19), generator=random)
    labels[0, 9:] = IGNORED
    labels[:, 0] = IGNORED
    if function == "nll":
        assert gradcheck(lambda x: mean_nll(x, labels), (logits,))
    else:
        assert gradcheck(lambda x: kl_to_base(x, base, labels), (logits,))


def test_token_losses_in_bfloat16_keep_their_dtypes():
    random = torch.Generator().manual_seed(2)
    exact = torch.randn(2, 9, 30, generator=random)
    labels = torch.randint(0, 30, (2, 9), generator=random)
    half = exact.bfloat16().requires_grad_()
    value = mean_nll(half, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, mean_nll(half.detach().float(), labels))
    value.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_kl_by_hand_and_of_the_base_itself():
    model, base = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    logits, labels = model.log().expand(1, 3, 2), torch.tensor([[IGNORED, 0, 1]])
    assert kl_to_base(logits, base.log().expand(1, 3, 2), labels).item() == pytest.approx(expected)
    assert kl_to_base(logits, logits + 2, labels).item() == pytest.approx(0, abs=1e-6)


def test_tokens_excluded_by_both_models_add_nothing():
    logits = torch.tensor([[[0.0, 1.0, -math.inf]] * 2], requires_grad=True)
    base = torch.tensor([[[0.0, 0.0, -math.inf]] * 2])
    value = kl_to_base(logits, base, torch.tensor([[IGNORED, 1]]))
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_row_without_a_counted_token():
    labels = torch.tensor([[1, 2, 3], [4, IGNORED, IGNORED]])  # nothing predicts a first token
    with pytest.raises(DataError, match="row 1 of 2 has no counted token"):
        mean_nll(torch.zeros(2, 3, 5), labels)
    with pytest.raises(DataError, match="row 1 of 2 has no counted token"):
        kl_to_base(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), labels)


# The paper's J


def test_loss_by_hand():
    """φ = 2, 4 (positives) and 6, 3 (negatives): c = 3, distances 1, 1, 3, 0."""
    values = batch(([math.log(2), math.log(4)], [math.log(6), math.log(3)]))
    e = math.e
    ours = e**-1 + e**-1
    theirs = e**-3 + 1
    found = contrastive_perplexity_loss(*values, temperature=0.1, negative_weight=1.0)
    assert found.item() == pytest.approx(-math.log(ours / (ours + theirs)))
    weighted = contrastive_perplexity_loss(*values, temperature=0.1, negative_weight=1.1)
    assert weighted.item() == pytest.approx(-math.log(ours / (ours + 1.1 * theirs)))


def test_log_perplexity_by_hand():
    """nll 1, 2 (positives) and 3 (negative): c = 1.5, distances .5, .5, 1.5."""
    values = batch(([1.0, 2.0], [3.0]))
    ours = 2 * math.exp(-0.5)
    expected = -math.log(ours / (ours + math.exp(-1.5)))
    found = contrastive_perplexity_loss(*values, perplexity="log")
    assert found.item() == pytest.approx(expected)
    ours = 2 * math.exp(-0.5 / 0.2)
    expected = -math.log(ours / (ours + math.exp(-1.5 / 0.2)))
    found = contrastive_perplexity_loss(
        *values, perplexity="log", temperature=0.2, temperature_in="exponent"
    )
    assert found.item() == pytest.approx(expected)


@st.composite
def batches(draw):
    sizes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=4))
    value = st.floats(0.0, 3.0, allow_nan=False)
    return batch(
        *(
            ([draw(value) for _ in range(positives)], [draw(value) for _ in range(negatives)])
            for positives, negatives in sizes
        )
    )


@given(batches(), st.sampled_from([0.1, 0.2, 1.0]), st.sampled_from([0.5, 1.0, 1.1]))
@settings(max_examples=60, deadline=None)
def test_the_loss_equals_the_equations(values, temperature, alpha):
    found = contrastive_perplexity_loss(
        *values, temperature=temperature, negative_weight=alpha, reduction="none"
    )
    wanted = transcription(*(part.numpy() for part in values), temperature, alpha)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-12)
    mean = contrastive_perplexity_loss(*values, temperature=temperature, negative_weight=alpha)
    assert mean.item() == pytest.approx(wanted.mean(), abs=1e-12)


def test_temperature_cancels_as_a_scale_but_not_in_the_exponent():
    values = batch(([0.5, 1.0], [1.5, 0.2]))
    scaled = [contrastive_perplexity_loss(*values, temperature=t).item() for t in (0.1, 0.2, 5)]
    assert scaled == pytest.approx([scaled[0]] * 3)
    inside = [
        contrastive_perplexity_loss(*values, temperature=t, temperature_in="exponent").item()
        for t in (0.1, 0.2, 5)
    ]
    assert len({round(value, 3) for value in inside}) == 3


@pytest.mark.parametrize("centroid", ["moving", "fixed"])
@pytest.mark.parametrize("perplexity", ["exp", "log"])
@pytest.mark.parametrize("temperature_in", ["scale", "exponent"])
def test_gradients(centroid, perplexity, temperature_in):
    nll, group, positive = batch(([0.3, 0.9, 1.4], [1.1, 0.2]), ([0.7, 1.2], []), ([1.0], [1.6]))

    def loss(values, centre=None):
        return contrastive_perplexity_loss(
            values,
            group,
            positive,
            temperature=0.5,
            negative_weight=1.1,
            perplexity=perplexity,
            centroid=centroid,
            temperature_in=temperature_in,
            reduction="none",
        )

    nll.requires_grad_()
    if centroid == "moving":
        # An anchor with one positive is at the kink of |·|, where no derivative exists.
        smooth = group != 2
        gradcheck(lambda values: loss(torch.where(smooth, values, nll.detach()))[:2], (nll,))
    else:
        # Finite differences with a constant centroid: only negatives move.
        (found,) = torch.autograd.grad(loss(nll).sum(), nll)
        step = 1e-6
        for row in (~positive).nonzero().flatten().tolist():
            up, down = nll.detach().clone(), nll.detach().clone()
            up[row] += step
            down[row] -= step
            slope = (loss(up).sum() - loss(down).sum()).item() / (2 * step)
            assert found[row].item() == pytest.approx(slope, abs=1e-6)


def test_gradient_of_a_fixed_centroid_by_hand():
    """Positives at nll 0 and ln 3 around c = 2, negative at ln 5: dloss/dφ by the chain rule."""
    nll, group, positive = batch(([0.0, math.log(3)], [math.log(5)]))
    nll.requires_grad_()
    contrastive_perplexity_loss(nll, group, positive, centroid="fixed").backward()
    ours, theirs = 2 * math.exp(-1), math.exp(-3)
    share = [math.exp(-1) / (ours + theirs)] * 2
    # d(log Σ_all − log Σ_P)/d(−d) = share_all − share_P; d(−d)/dφ = −sign(φ − c); dφ/dnll = φ.
    expected = [
        (share[0] - 0.5) * 1 * 1,
        (share[1] - 0.5) * -1 * 3,
        (theirs / (ours + theirs)) * -1 * 5,
    ]
    assert nll.grad is not None
    assert nll.grad.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_overflow(dtype):
    """exp(200) is infinite in float32, and inf − inf would be NaN."""
    nll = torch.tensor([200.0, 150.0, 500.0, 2.0], dtype=dtype, requires_grad=True)
    group, positive = torch.zeros(4, dtype=torch.long), torch.tensor([True, True, False, False])
    loss = contrastive_perplexity_loss(nll, group, positive)
    loss.backward()
    assert loss.isfinite()
    assert nll.grad is not None
    assert nll.grad.isfinite().all()
    assert nll.detach().clamp(max=HIGHEST_NLL).exp().pow(2).isfinite().all()


def test_far_apart_values_do_not_underflow():
    """Both sums of s are 0 in plain arithmetic; −log J is the difference of the distances."""
    values = batch(([0.0, math.log(2001)], [math.log(1001)]))  # distances 1000, 1000, 0
    with np.errstate(divide="ignore", invalid="ignore"):
        plain = transcription(*(part.numpy() for part in values), 1.0, 1.0)
    assert not np.isfinite(plain).all()
    found = contrastive_perplexity_loss(*values)
    assert found.item() == pytest.approx(1000 - math.log(2))


def test_no_gradient_without_negatives():
    nll, group, positive = batch(([0.5, 1.5], []))
    nll.requires_grad_()
    for loss in (
        contrastive_perplexity_loss(nll, group, positive),
        signed_margin_loss(nll, group, positive),
        contrastive_perplexity_loss(*batch(([0.5], [0.4])), negative_weight=0.0),
    ):
        assert loss.item() == 0
    (gradient,) = torch.autograd.grad(contrastive_perplexity_loss(nll, group, positive), nll)
    assert gradient.tolist() == [0, 0]


def test_an_anchor_without_positives():
    values = torch.tensor([1.0, 2.0]), torch.tensor([7, 7]), torch.tensor([False, False])
    for function in (contrastive_perplexity_loss, signed_margin_loss, positive_nll):
        with pytest.raises(DataError, match="anchor 7 has no positive"):
            function(*values)


# Independence of the batch


def texts(model, rows, width, pad):
    """nll of rows of different lengths, padded on the right to ``width``."""
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, 0] = IGNORED
    return mean_nll(model(input_ids=ids, attention_mask=mask).logits, labels)


@pytest.mark.parametrize("objective", ["contrastive-perplexity", "signed-margin"])
@pytest.mark.parametrize("maker", ["make_llama", "make_gpt2"])
def test_padding_and_other_rows_do_not_affect_an_anchor(objective, maker, request):
    """An anchor's value depends on its rows only; the paper's code counts padding."""
    model = request.getfixturevalue(maker)(50, initializer_range=0.05)
    rows = [[0, 5, 9], [0, 7, 3, 8, 2], [0, 11, 4, 6], [0, 20, 21, 22], [0, 30, 31], [0, 33, 1, 2]]
    group = torch.tensor([4, 4, 4, 9, 9, 9])
    positive = torch.tensor([True, True, False, True, False, False])
    per_anchor = (
        contrastive_perplexity_loss if objective == "contrastive-perplexity" else signed_margin_loss
    )
    with torch.no_grad():
        together = per_anchor(texts(model, rows, 5, 0), group, positive, reduction="none")
        padded = per_anchor(texts(model, rows, 40, 33), group, positive, reduction="none")
        alone = [
            per_anchor(texts(model, rows[i : i + 3], 12, 1), group[i : i + 3], positive[i : i + 3])
            for i in (0, 3)
        ]
        order = torch.tensor([5, 0, 3, 2, 4, 1])
        shuffled = per_anchor(
            texts(model, [rows[i] for i in order], 5, 0),
            group[order],
            positive[order],
            reduction="none",
        )
    for other in (padded, torch.stack(alone), shuffled):
        torch.testing.assert_close(other, together, rtol=1e-4, atol=1e-5)
    assert abs(together[0] - together[1]) > 1e-3


def test_each_anchor_has_its_own_centroid():
    """With one centroid for the batch, these two well-separated anchors would look bad."""
    near, far = ([1.0, 1.0], [2.0]), ([2.0, 2.0], [3.0])
    own = contrastive_perplexity_loss(*batch(near, far), reduction="none")
    assert own[0].item() == pytest.approx(contrastive_perplexity_loss(*batch(near)).item())
    nll, _, positive = batch(near, far)
    whole_batch = contrastive_perplexity_loss(nll, torch.zeros_like(nll).long(), positive)
    assert abs(whole_batch.item() - own.mean().item()) > 0.1


def test_alpha_is_a_weight_and_not_a_logit():
    """α multiplies the negatives; the paper's code adds it to logits, a weight of e^α."""
    values = batch(([1.0], [1.0]))
    for alpha in (0.5, 1.0, 100.0):
        found = contrastive_perplexity_loss(*values, negative_weight=alpha).item()
        assert found == pytest.approx(math.log(1 + alpha))
        assert found != pytest.approx(math.log(1 + math.exp(alpha)))


# The sign


def test_j_may_make_toxic_text_more_likely_and_the_signed_margin_does_not():
    """J pushes a negative below the prototype further down; the signed margin lifts it above."""

    def train(loss):
        nll, group, positive = batch(([2.0, 2.2], [2.0]))
        free = nll.clone().requires_grad_()
        for _ in range(400):
            held = torch.where(positive, nll, free)  # the positives do not move
            (gradient,) = torch.autograd.grad(loss(held, group, positive), free)
            free = (free - 0.01 * gradient).detach().requires_grad_()
        return free[2].item()

    assert train(contrastive_perplexity_loss) < 1.7
    assert train(lambda *rows: signed_margin_loss(*rows, margin=1.0)) == pytest.approx(
        3.1, abs=0.05
    )


@given(batches(), st.sampled_from(["hinge", "softplus"]), st.sampled_from(["moving", "fixed"]))
@settings(max_examples=60, deadline=None)
def test_signed_margin_never_makes_a_negative_more_likely(values, kind, centroid):
    nll, group, positive = values
    nll.requires_grad_()
    loss = signed_margin_loss(nll, group, positive, margin=0.5, kind=kind, centroid=centroid)
    if not loss.requires_grad:
        return
    (gradient,) = torch.autograd.grad(loss, nll)
    assert (gradient[~positive] <= 0).all()
    assert (gradient[positive] >= 0).all()
    if centroid == "fixed":
        assert (gradient[positive] == 0).all()


def test_signed_margin_by_hand():
    """Prototype 1.5, margin 1: the shortfall is 0 (nll 3), .5 (nll 2) and 2.5 (nll 0)."""
    values = batch(([1.0, 2.0], [3.0, 2.0, 0.0]))
    assert signed_margin_loss(*values, margin=1.0).item() == pytest.approx((0 + 0.5 + 2.5) / 3)
    soft = [math.log1p(math.exp(x)) for x in (-0.5, 0.5, 2.5)]
    found = signed_margin_loss(*values, margin=1.0, kind="softplus")
    assert found.item() == pytest.approx(sum(soft) / 3)


def test_signed_margin_gradients():
    nll, group, positive = batch(([0.3, 0.9], [1.1, 0.2]), ([0.7], []), ([1.0], [1.6]))
    nll.requires_grad_()
    for kind in ("hinge", "softplus"):
        assert gradcheck(
            lambda x, kind=kind: signed_margin_loss(x, group, positive, margin=0.7, kind=kind),
            (nll,),
        )


# All terms together


def test_objective_is_the_weighted_sum_of_its_terms():
    values, kl = batch(([1.0, 2.0], [2.0]), ([1.0], [0.5])), torch.tensor([0.2, 0.4]).double()
    config = ContrastiveConfig(margin=1.0, lm_weight=0.3, kl_weight=2.0)
    found = objective_loss(*values, objective="signed-margin", config=config, kl=kl)
    margin = signed_margin_loss(*values, margin=1.0).item()
    modelling = ((1.0 + 2.0) / 2 + 1.0) / 2  # all anchors have the same weight
    assert found.item() == pytest.approx(margin + 0.3 * modelling + 2.0 * 0.3)
    paper = objective_loss(
        *values, objective="contrastive-perplexity", config=ContrastiveConfig(), kl=kl
    )
    assert paper.item() == pytest.approx(contrastive_perplexity_loss(*values).item())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a number of at least 0.0001, but is 0.0"),
        ({"negative_weight": -1}, "negative_weight must be a number of at least 0, but is -1"),
        ({"positives": 0}, "positives must be a number of at least 1, but is 0"),
        ({"margin": math.nan}, "margin must be a number"),
        ({"margin": math.inf}, "margin must be a number"),
        ({"perplexity": "log2"}, "perplexity must be one of exp, log, not 'log2'"),
        ({"centroid": True}, "centroid must be one of moving, fixed, not True"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ContrastiveConfig(**wrong)


# Metrics


def test_separation_by_hand():
    """Anchor 0: 2 of 2 pairs in order; anchor 1: 1 of 2; the third anchor has no negative."""
    nll, group, positive = batch(([1.0], [2.0, 3.0]), ([4.0, 2.5], [3.0]), ([9.0], []))
    found = separation(nll, group, positive)
    assert found["auc_within"] == pytest.approx((1 + 0.5) / 2)
    # Of the positives 1, 4, 2.5 and 9, the negatives 2, 3 and 3 exceed 1, 2 and 2.
    assert found["auc_overall"] == pytest.approx((1 + 2 + 2) / 12)
    assert found["positive_perplexity"] == pytest.approx(math.exp((1 + 4 + 2.5 + 9) / 4))
    assert found["negative_perplexity"] == pytest.approx(math.exp(8 / 3))


def test_auc_is_the_share_of_pairs_in_order():
    random = torch.Generator().manual_seed(3)
    above, below = torch.randint(0, 9, (40,), generator=random), torch.arange(12) % 7
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in above for b in below]
    assert auc(above, below) == pytest.approx(sum(pairs) / len(pairs))


def test_separation_without_negatives():
    found = separation(*batch(([1.0], [])))
    assert found["negative_perplexity"] is None
    assert found["auc_within"] is None
    assert found["auc_overall"] is None


def test_drift_by_hand():
    found = drift(20 * math.log(2), 16 * math.log(2), 3, tokens=6, size=8)
    assert found == {"bits_per_byte": 2.5, "base_bits_per_byte": 2.0, "kl": 0.5}


def test_likelihood_ratio_by_hand_and_its_optimum():
    """KL(softmax(-λ g) ‖ softmax(r)) of two anchors, written out; 0 if r = -λ g + constant."""
    ratio = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    group = torch.tensor([4, 4, 4, 9, 9])
    toxicity = torch.tensor([0.0, 1.0, 0.25, 1.0, 0.0], dtype=torch.float64)
    found = likelihood_ratio_loss(ratio, group, toxicity, tilt=2.0, reduction="none")
    expected = []
    for rows in ([0, 1, 2], [3, 4]):
        wanted = [math.exp(-2.0 * float(toxicity[i])) for i in rows]
        own = [math.exp(float(ratio.detach()[i])) for i in rows]
        wanted = [value / sum(wanted) for value in wanted]
        own = [value / sum(own) for value in own]
        expected.append(sum(w * math.log(w / o) for w, o in zip(wanted, own, strict=True)))
    assert found.tolist() == pytest.approx(expected)
    assert torch.autograd.gradcheck(
        lambda r: likelihood_ratio_loss(r, group, toxicity, tilt=2.0), ratio
    )
    best = -2.0 * toxicity + torch.tensor([7.0, 7.0, 7.0, -3.0, -3.0])
    assert float(likelihood_ratio_loss(best, group, toxicity, tilt=2.0)) == pytest.approx(0)
    far = torch.tensor([-1e4, 1e4, 0.0, 0.0, 0.0], requires_grad=True)
    loss = likelihood_ratio_loss(far, group, toxicity.float(), tilt=2.0)
    loss.backward()
    assert bool(torch.isfinite(far.grad).all())
