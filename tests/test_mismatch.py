import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.stability import importance_weights, mismatch_report


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    b, t = (int(torch.randint(1, n, (), generator=generator)) for n in (7, 40))
    train = -8 * torch.rand(b, t, generator=generator).square() - 1e-3
    rollout = (train + 0.6 * torch.randn(b, t, generator=generator)).clamp_max(0)
    return train, rollout, torch.rand(b, t, generator=generator) < 0.7


def numbers(report):
    return {name.removeprefix("mismatch/"): x.item() for name, x in report.metrics().items()}


def effective(w):
    return sum(w) ** 2 / (len(w) * sum(x * x for x in w))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20))
def test_metrics_match_their_definitions(seed):
    train, rollout, mask = batch(seed)
    dirty = [torch.where(mask, x, float("nan")) for x in (train, rollout)]
    weights, _ = importance_weights(train - rollout, mask, outside="zero", low=0.5)
    kept = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.9
    metrics = numbers(mismatch_report(*dirty, mask, weights=weights, kept=kept))
    rows = [i for i in range(len(mask)) if mask[i].any()]
    if not rows:
        assert metrics == {}
        return
    a, b = train.double(), rollout.double()
    d = (a - b)[mask]
    r = d.exp().tolist()
    mean = lambda values: sum(values) / len(values)
    std = lambda values: math.sqrt(mean([(x - mean(values)) ** 2 for x in values]))
    low, high = (
        (lambda values: mean([x < 0.5 for x in values])),
        (lambda values: mean([x > 2 for x in values])),
    )
    surprise = [(-a[i, mask[i]].mean().item(), -b[i, mask[i]].mean().item()) for i in rows]
    gaps = [x - y for x, y in surprise]
    products = [math.exp((a - b)[i, mask[i]].sum().item()) for i in rows]
    means = [(a - b)[i, mask[i]].exp().mean().item() for i in rows]
    w = weights.double()[mask].tolist()
    weight_means = [weights.double()[i, mask[i]].mean().item() for i in rows]
    expected = {
        "count": len(r),
        "k1": -d.mean().item(),
        "k3": mean([x - 1 - math.log(x) for x in r]),
        "abs_dlogp_mean": d.abs().mean().item(),
        "abs_dlogp_max": d.abs().max().item(),
        "ppl_train": mean([math.exp(x) for x, _ in surprise]),
        "ppl_rollout": mean([math.exp(y) for _, y in surprise]),
        "log_ppl_train": mean([x for x, _ in surprise]),
        "log_ppl_rollout": mean([y for _, y in surprise]),
        "log_ppl_gap": mean(gaps),
        "log_ppl_gap_abs": mean([abs(x) for x in gaps]),
        "log_ppl_gap_max": max(gaps),
        "log_ppl_gap_min": min(gaps),
        "ppl_ratio": mean([math.exp(x) for x in gaps]),
        "chi2_token": mean([x * x for x in r]) - 1,
        "chi2_sequence": mean([x * x for x in products]) - 1,
        "ratio_mean": mean(r),
        "ratio_std": std(r),
        "ratio_max": max(r),
        "ratio_min": min(r),
        "ess": effective(r),
        "fraction_high": high(r),
        "fraction_low": low(r),
        "sequence_ratio_mean": mean(products),
        "sequence_ratio_std": std(products),
        "sequence_ratio_max": max(products),
        "sequence_ratio_min": min(products),
        "sequence_ratio_ess": effective(products),
        "sequence_fraction_high": high(products),
        "sequence_fraction_low": low(products),
        "response_ratio_mean": mean(means),
        "response_ratio_std": std(means),
        "response_ratio_max": max(means),
        "response_ratio_min": min(means),
        "response_ratio_max_deviation": max(abs(x - 1) for x in means),
        "response_fraction_high": high(means),
        "response_fraction_low": low(means),
        "response_weight_mean": mean(weight_means),
        "response_weight_std": std(weight_means),
        "response_weight_max": max(weight_means),
        "response_weight_min": min(weight_means),
        "response_weight_max_deviation": max(abs(x - 1) for x in weight_means),
        "weight_mean": mean(w),
        "weight_std": std(w),
        "weight_max": max(w),
        "weight_min": min(w),
        "weight_ess": effective(w) if any(w) else 0.0,
        "masked_tokens": (~kept)[mask].double().mean().item(),
        "masked_sequences": mean([bool((mask & ~kept)[i].any()) for i in rows]),
    }
    p, lengths = a[mask].exp(), mask.sum(1, keepdim=True).expand_as(mask)[mask]
    p_edges = {"0": 0, "1e-6": 1e-6, "1e-4": 1e-4, "1e-2": 1e-2, "0.1": 0.1, "0.5": 0.5, "1": 2}
    length_edges = {"0": 0, "16": 16, "64": 64}
    k3 = torch.tensor(r, dtype=torch.float64) - 1 - d
    for kind, values, edges in (("p", p, p_edges), ("length", lengths, length_edges)):
        for lower, upper in itertools.pairwise(edges):
            inside = (values >= edges[lower]) & (values < edges[upper])
            if inside.any():
                expected[f"abs_dlogp/{kind}_{lower}_{upper}"] = d.abs()[inside].mean().item()
                expected[f"k3/{kind}_{lower}_{upper}"] = k3[inside].mean().item()
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-7)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20))
def test_reports_of_parts_add_up_in_any_order(seed):
    train, rollout, mask = batch(seed)
    weights, _ = importance_weights(train - rollout, mask)
    inputs = {"weights": weights, "kept": train > -4}
    whole = numbers(mismatch_report(train, rollout, mask, **inputs))
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    parts = [
        mismatch_report(
            *(x[rows] for x in (train, rollout, mask)),
            **{name: x[rows] for name, x in inputs.items()},
        )
        for rows in (order[:1], order[1:])  # the second can be empty
    ]
    assert numbers(parts[1] + parts[0]) == pytest.approx(whole, rel=1e-9, abs=1e-9)
    assert numbers(sum(parts)) == pytest.approx(whole, rel=1e-9, abs=1e-9)
    for other in ({}, inputs | {"high": 3.0}):
        with pytest.raises(ValueError, match="same optional arguments"):
            parts[0] + mismatch_report(train, rollout, mask, **other)


def test_buckets_hold_their_lower_edge_and_empty_ones_are_absent():
    p = torch.tensor([[0.1, 0.5, 1.0, 1e-7]], dtype=torch.float64)
    gap = torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    metrics = mismatch_report(p.log(), p.log() - gap, mask).metrics()
    buckets = {k.split("p_")[1]: v.item() for k, v in metrics.items() if "abs_dlogp/p_" in k}
    assert buckets == pytest.approx({"0_1e-6": 8.0, "0.1_0.5": 1.0, "0.5_1": 3.0})


def test_equal_engines_and_extreme_ones():
    lp = -torch.rand(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    metrics = mismatch_report(lp, lp, mask).metrics()
    for name in ("k1", "k3", "abs_dlogp_max", "log_ppl_gap", "chi2_token", "chi2_sequence"):
        assert metrics[f"mismatch/{name}"].item() == 0
    assert metrics["mismatch/ess"].item() == pytest.approx(1)
    for far in (
        mismatch_report(lp, lp - 1e4, mask).metrics(),
        mismatch_report(lp - 1e4, lp, mask).metrics(),
    ):
        assert all(value.isfinite() for value in far.values())
        assert far["mismatch/abs_dlogp_max"].item() == pytest.approx(1e4, rel=1e-4)


def test_length_buckets_hold_the_tokens_of_their_responses():
    lengths = torch.tensor([15, 16, 64])
    mask = torch.arange(64) < lengths[:, None]
    gap = torch.tensor([1.0, 2.0, 4.0]).expand(64, 3).T
    metrics = numbers(mismatch_report(torch.full((3, 64), -5.0), -5.0 - gap, mask))
    found = {k.split("length_")[1]: v for k, v in metrics.items() if "abs_dlogp/length" in k}
    assert found == pytest.approx({"0_16": 1.0, "16_64": 2.0, "64_256": 4.0})


def test_bad_inputs_are_named():
    lp, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="rollout_logp"):
        mismatch_report(lp, lp[:, 1:], mask)
    with pytest.raises(ValueError, match="low <= high"):
        mismatch_report(lp, lp, mask, low=3.0)
    with pytest.raises(ValueError, match="weights"):
        mismatch_report(lp, lp, mask, weights=lp[:1])
    with pytest.raises(ValueError, match=r"kept.*torch\.bool"):
        mismatch_report(lp, lp, mask, kept=lp)
    lp[0, 1] = -float("inf")
    with pytest.raises(ValueError, match=r"logp.*-inf at \(0, 1\)"):
        mismatch_report(lp, lp, mask)


# Edits to stability/mismatch.py that must turn this file red:
#   right=True -> right=False                       (an edge belongs to the bucket above it)
#   "k1": -log_r -> log_r
#   torch.maximum(self.maxima, other.maxima) -> self.maxima + other.maxima
#   (second / n - mean.square()) -> second / n
#   sequence = ratio(log_r.sum(1)) -> ratio(row_mean(log_r, mask))
