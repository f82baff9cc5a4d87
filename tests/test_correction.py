import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.stability import importance_weights

KINDS = {
    "truncated IS": {"level": "token", "outside": "truncate"},
    "truncated IS, both bounds": {"low": 0.6},
    "sequence truncated IS": {"level": "sequence", "outside": "truncate"},
    "masked IS": {"level": "token", "outside": "zero"},
    "masked sequence IS": {"level": "sequence", "outside": "zero", "high": 3.0},
    "IcePop": {"level": "token", "outside": "zero", "low": 0.5},
    "geometric mask": {"level": "geometric", "outside": "reject", "low": 0.9, "high": 1.2},
    "token rejection": {"level": "token", "outside": "reject", "low": 0.5, "high": 1.5},
    "geometric IS": {"level": "geometric", "outside": "truncate"},
}
each_kind = pytest.mark.parametrize("options", KINDS.values(), ids=list(KINDS))
each_norm = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    b, t = (int(torch.randint(1, n, (), generator=generator)) for n in (7, 9))
    train = -8 * torch.rand(b, t, generator=generator).square() - 1e-3
    rollout = (train + 0.6 * torch.randn(b, t, generator=generator)).clamp_max(0)
    return train, rollout, torch.rand(b, t, generator=generator) < 0.7


def by_loops(log_ratio, mask, level="token", outside="truncate", low=0.0, high=2.0):
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for i, t in mask.nonzero().tolist():
        own = log_ratio[i][mask[i]].double()
        log_r = {
            "token": log_ratio[i, t].item(),
            "sequence": own.sum().item(),
            "geometric": own.mean().item(),
        }[level]
        r = math.exp(max(-20.0, min(20.0, log_r)))
        inside = low <= r <= high
        out[i, t] = {
            "truncate": min(max(r, low), high),
            "zero": r * inside,
            "reject": float(inside),
        }[outside]
    return out


def normalizer(weights, mask, level="token", **_):
    """Mean weight over tokens, or over responses."""
    if level == "token":
        return weights[mask].mean()
    return torch.stack(
        [weights[i][mask[i]].mean() for i in range(len(mask)) if mask[i].any()]
    ).mean()


@each_kind
@each_norm
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20))
def test_weights_match_their_definition(options, normalize, seed):
    train, rollout, mask = batch(seed)
    log_ratio = (train - rollout).requires_grad_()
    weights, metrics = importance_weights(log_ratio, mask, normalize=normalize, **options)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    truth = by_loops(log_ratio.detach(), mask, **options)
    if not mask.any():
        assert metrics == {} and (weights == 0).all()
        return
    if normalize:
        scale = normalizer(truth, mask, **options)
        assert metrics["importance/normalizer"].item() == pytest.approx(scale.item(), rel=1e-5)
        truth = truth / (scale if scale > 0 else 1)
    torch.testing.assert_close(weights.double(), truth, atol=1e-6, rtol=1e-5)
    w = truth[mask]
    assert metrics["importance/weight_mean"].item() == pytest.approx(w.mean().item(), abs=1e-5)
    power = w.square().sum().item()
    ess = w.sum().item() ** 2 / (len(w) * power) if power else 0.0
    assert metrics["importance/weight_ess"].item() == pytest.approx(ess, abs=1e-5)


@each_kind
@each_norm
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_order_padding_and_garbage(options, normalize, seed):
    train, rollout, mask = batch(seed)
    log_ratio, options = train - rollout, options | {"normalize": normalize}
    weights, _ = importance_weights(log_ratio, mask, **options)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    permuted, _ = importance_weights(log_ratio[order], mask[order], **options)
    torch.testing.assert_close(permuted, weights[order])
    dirty = torch.where(mask, log_ratio, float("nan"))
    dirty = torch.nn.functional.pad(dirty, (0, 2), value=float("inf"))
    padded, _ = importance_weights(dirty, torch.nn.functional.pad(mask, (0, 2)), **options)
    torch.testing.assert_close(padded[:, :-2], weights)


@each_kind
@each_norm
def test_extreme_ratios_stay_finite(options, normalize):
    log_ratio = torch.tensor([[1e4, 1e4], [-1e4, -1e4], [1e4, -1e4], [1e4, 1e4]])
    mask = torch.ones(4, 2, dtype=torch.bool)
    mask[3] = False
    weights, metrics = importance_weights(log_ratio, mask, normalize=normalize, **options)
    assert weights.isfinite().all() and (weights[3] == 0).all()
    assert all(value.isfinite() for value in metrics.values())


def test_what_is_outside_is_counted():
    log_ratio = torch.tensor([[0.1, 3.0, 0.5, 3.0]]).log()
    mask = torch.tensor([[True, True, True, False]])
    _, metrics = importance_weights(log_ratio, mask, outside="zero", low=0.4, high=2.0)
    assert metrics["importance/fraction_high"].item() == pytest.approx(1 / 3)
    assert metrics["importance/fraction_low"].item() == pytest.approx(1 / 3)
    assert metrics["importance/ratio_max"].item() == pytest.approx(3.0)
    assert metrics["importance/ratio_mean"].item() == pytest.approx(3.6 / 3)


def test_normalizing_leaves_a_sequence_weight_independent_of_lengths():
    """Over responses, not over tokens: a long response must not decide the scale."""
    mask = torch.arange(9) < torch.tensor([1, 9])[:, None]
    log_ratio = torch.zeros(2, 9)
    log_ratio[:, 0] = torch.tensor([0.5, 1.5]).log()
    weights, _ = importance_weights(log_ratio, mask, level="sequence", normalize=True)
    torch.testing.assert_close(weights[:, 0], torch.tensor([0.5, 1.5]))


def test_bad_inputs_are_named():
    log_ratio, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for low, high in ((3.0, 2.0), (-1.0, 2.0), (None, 0.0), (None, math.inf)):
        with pytest.raises(ValueError, match="low <= high"):
            importance_weights(log_ratio, mask, low=low, high=high)
    with pytest.raises(ValueError, match="level"):
        importance_weights(log_ratio, mask, level="row")
    with pytest.raises(ValueError, match="outside"):
        importance_weights(log_ratio, mask, outside="mask")
    with pytest.raises(ValueError, match="log_ratio"):
        importance_weights(log_ratio[:, 1:], mask)
    log_ratio[0, 1] = -float("inf")
    with pytest.raises(ValueError, match=r"log_ratio.*-inf at \(0, 1\)"):
        importance_weights(log_ratio, mask)


# Edits to stability/correction.py that must turn this file red:
#   log_r.sum(1, keepdim=True)  ->  row_mean(log_r, mask)[:, None]     (a product is no mean)
#   r.clamp(floor, high)        ->  r.clamp(floor)
#   r if outside == "zero" else torch.ones_like(r)  ->  r
#   mean_over(row_mean(weights, mask), mask.any(1), process_group)  ->  mean_over(weights, mask)
#   weights / torch.where(mean > 0, mean, 1)  ->  weights / mean
