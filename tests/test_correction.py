import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.stability import importance_weights, mismatch_metrics

KINDS = {
    "token_truncate": {},
    "token_mask": {},
    "icepop": {"low": 0.5},
    "sequence_truncate": {},
    "geometric_mask": {"low": 0.9, "high": 1.2},
}
each_kind = pytest.mark.parametrize(("kind", "bounds"), KINDS.items(), ids=list(KINDS))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    b, t = (int(torch.randint(1, n, (), generator=generator)) for n in (7, 9))
    train = -8 * torch.rand(b, t, generator=generator).square() - 1e-3
    rollout = (train + 0.6 * torch.randn(b, t, generator=generator)).clamp_max(0)
    return train, rollout, torch.rand(b, t, generator=generator) < 0.7


def by_loops(log_ratio, mask, kind, low=0.0, high=2.0):
    out = torch.zeros(mask.shape, dtype=torch.float64)
    clamped_exp = lambda v: math.exp(max(-20.0, min(20.0, v)))
    for i, t in mask.nonzero().tolist():
        own = log_ratio[i][mask[i]].double()
        if kind == "sequence_truncate":
            out[i, t] = min(clamped_exp(own.sum().item()), high)
        elif kind == "geometric_mask":
            out[i, t] = float(low <= clamped_exp(own.mean().item()) <= high)
        else:
            r = clamped_exp(log_ratio[i, t].item())
            inside = low <= r <= high
            out[i, t] = min(r, high) if kind == "token_truncate" else r * inside
    return out


@each_kind
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20))
def test_weights_match_their_definition(kind, bounds, seed):
    train, rollout, mask = batch(seed)
    log_ratio = (train - rollout).requires_grad_()
    weights, metrics = importance_weights(log_ratio, mask, kind=kind, **bounds)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    truth = by_loops(log_ratio.detach(), mask, kind, **bounds)
    torch.testing.assert_close(weights.double(), truth, atol=1e-6, rtol=1e-5)
    if mask.any():
        w = truth[mask]
        assert metrics["importance/weight_mean"].item() == pytest.approx(w.mean().item(), abs=1e-5)
        power = w.square().sum().item()
        ess = w.sum().item() ** 2 / (len(w) * power) if power else 0.0
        assert metrics["importance/weight_ess"].item() == pytest.approx(ess, abs=1e-5)
    else:
        assert metrics == {}


@each_kind
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_order_padding_and_garbage(kind, bounds, seed):
    train, rollout, mask = batch(seed)
    log_ratio = train - rollout
    weights, _ = importance_weights(log_ratio, mask, kind=kind, **bounds)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    permuted, _ = importance_weights(log_ratio[order], mask[order], kind=kind, **bounds)
    torch.testing.assert_close(permuted, weights[order])
    dirty = torch.where(mask, log_ratio, float("nan"))
    dirty = torch.nn.functional.pad(dirty, (0, 2), value=float("inf"))
    padded, _ = importance_weights(
        dirty, torch.nn.functional.pad(mask, (0, 2)), kind=kind, **bounds
    )
    torch.testing.assert_close(padded[:, :-2], weights)


@each_kind
def test_extreme_ratios_stay_finite(kind, bounds):
    log_ratio = torch.tensor([[1e4, 1e4], [-1e4, -1e4], [1e4, -1e4], [1e4, 1e4]])
    mask = torch.ones(4, 2, dtype=torch.bool)
    mask[3] = False
    weights, metrics = importance_weights(log_ratio, mask, kind=kind, **bounds)
    assert weights.isfinite().all() and (weights[3] == 0).all()
    assert all(value.isfinite() for value in metrics.values())


def test_what_is_outside_is_counted():
    log_ratio = torch.tensor([[0.1, 3.0, 0.5, 3.0]]).log()
    mask = torch.tensor([[True, True, True, False]])
    _, metrics = importance_weights(log_ratio, mask, kind="icepop", low=0.4, high=2.0)
    assert metrics["importance/outside_fraction"].item() == pytest.approx(2 / 3)
    assert metrics["importance/ratio_max"].item() == pytest.approx(3.0)
    assert metrics["importance/ratio_mean"].item() == pytest.approx(3.6 / 3)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20))
def test_metrics_match_their_definitions(seed):
    train, rollout, mask = batch(seed)
    dirty = [torch.where(mask, x, float("nan")) for x in (train, rollout)]
    metrics = {name: value.item() for name, value in mismatch_metrics(*dirty, mask).items()}
    rows = [i for i in range(len(mask)) if mask[i].any()]
    if not rows:
        assert metrics == {}
        return
    a, b = train.double(), rollout.double()
    d = (a - b)[mask]
    r = d.exp()
    mean = lambda values: sum(values) / len(values)
    surprise = [(-a[i, mask[i]].mean().item(), -b[i, mask[i]].mean().item()) for i in rows]
    expected = {
        "mismatch/k1": -d.mean().item(),
        "mismatch/k3": (r - 1 - d).mean().item(),
        "mismatch/abs_dlogp_mean": d.abs().mean().item(),
        "mismatch/abs_dlogp_max": d.abs().max().item(),
        "mismatch/ppl_train": mean([math.exp(x) for x, _ in surprise]),
        "mismatch/ppl_rollout": mean([math.exp(y) for _, y in surprise]),
        "mismatch/log_ppl_gap": mean([x - y for x, y in surprise]),
        "mismatch/chi2_token": r.square().mean().item() - 1,
        "mismatch/chi2_sequence": mean(
            [math.exp(2 * (a - b)[i, mask[i]].sum().item()) for i in rows]
        )
        - 1,
        "mismatch/ess": (r.sum().square() / (len(r) * r.square().sum())).item(),
    }
    edges = {"0": 0, "1e-6": 1e-6, "1e-4": 1e-4, "1e-2": 1e-2, "0.1": 0.1, "0.5": 0.5, "1": 1}
    names, p = list(edges), a[mask].exp()
    for low, high in itertools.pairwise(names):
        inside = (p >= edges[low]) & (p < edges[high])
        if inside.any():
            expected[f"mismatch/abs_dlogp/p_{low}_{high}"] = d.abs()[inside].mean().item()
    assert metrics == pytest.approx(expected, rel=2e-3, abs=1e-5)


def test_buckets_hold_their_lower_edge_and_empty_ones_are_absent():
    p = torch.tensor([[0.1, 0.5, 1.0, 1e-7]], dtype=torch.float64)
    gap = torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    metrics = mismatch_metrics(p.log(), p.log() - gap, mask)
    buckets = {k.split("p_")[1]: v.item() for k, v in metrics.items() if "/p_" in k}
    assert buckets == pytest.approx({"0_1e-6": 8.0, "0.1_0.5": 1.0, "0.5_1": 3.0})


def test_equal_engines_and_extreme_ones():
    lp = -torch.rand(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    metrics = mismatch_metrics(lp, lp, mask)
    for name in ("k1", "k3", "abs_dlogp_max", "log_ppl_gap", "chi2_token", "chi2_sequence"):
        assert metrics[f"mismatch/{name}"].item() == 0
    assert metrics["mismatch/ess"].item() == pytest.approx(1)
    for far in (mismatch_metrics(lp, lp - 1e4, mask), mismatch_metrics(lp - 1e4, lp, mask)):
        assert all(value.isfinite() for value in far.values())
        assert far["mismatch/abs_dlogp_max"].item() == pytest.approx(1e4, rel=1e-4)


def test_bad_inputs_are_named():
    log_ratio, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="low for kind 'icepop'"):
        importance_weights(log_ratio, mask, kind="icepop")
    with pytest.raises(ValueError, match="low=None for kind 'token_mask'"):
        importance_weights(log_ratio, mask, kind="token_mask", low=0.5)
    with pytest.raises(ValueError, match="low <= high"):
        importance_weights(log_ratio, mask, kind="icepop", low=3.0)
    with pytest.raises(ValueError, match="kind"):
        importance_weights(log_ratio, mask, kind="sequence")
    with pytest.raises(ValueError, match="rollout_logp"):
        mismatch_metrics(log_ratio, log_ratio[:, 1:], mask)
    log_ratio[0, 1] = -float("inf")
    with pytest.raises(ValueError, match=r"log_ratio.*-inf at \(0, 1\)"):
        importance_weights(log_ratio, mask, kind="token_mask")
    with pytest.raises(ValueError, match=r"logp.*-inf at \(0, 1\)"):
        mismatch_metrics(log_ratio, log_ratio, mask)


# Edits to stability/correction.py that must turn this file red:
#   log_r.sum(1, keepdim=True)  ->  row_mean(log_r, mask)[:, None]     (a product is no mean)
#   r.clamp_max(high)           ->  r
#   torch.ones_like(r) if kind == "geometric_mask" else r  ->  r
#   right=True                  ->  right=False
#   -log_r                      ->  log_r in k1
