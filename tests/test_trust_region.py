import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.stability import (
    length_neutral_mask,
    sequence_error_rate_mask,
    trust_region_bounds,
    trust_region_indicators,
    trust_region_mask,
)

LN_TRM = {"horizon": 40, "max_tv": 0.04, "max_kl": 0.004}


def ser(log_ratio, mask, **options):
    return sequence_error_rate_mask(log_ratio, mask, **options)


def ln_trm(log_ratio, mask, **options):
    return length_neutral_mask(log_ratio, mask, **LN_TRM, **options)


ALL = [trust_region_mask, ser, ln_trm]


def batch(seed):
    """Rows from nearly on-policy to far away, so that every threshold cuts some of them."""
    generator = torch.Generator().manual_seed(seed)
    b, t = (int(torch.randint(1, n, (), generator=generator)) for n in (9, 12))
    spread = 10 ** (-3 + 3 * torch.rand(b, 1, generator=generator))
    log_ratio = spread * torch.randn(b, t, generator=generator)
    mask = torch.rand(b, t, generator=generator) < 0.7
    return log_ratio, mask


def by_loops(fn, log_ratio, mask):
    """float64, one sequence at a time, straight from the definitions, at the default thresholds."""
    keep = []
    for row, m in zip(log_ratio.double(), mask, strict=True):
        x = [max(-20.0, min(20.0, v)) for v in row[m].tolist()]
        errors = [abs(math.exp(v) - 1) for v in x]
        if not x:
            keep.append(True)
        elif fn is ser:
            keep.append(sum(errors) / len(x) <= 0.05)
        elif fn is ln_trm:
            left = [40 - t for t in range(1, len(x) + 1)]
            w = [min(1, n * 0.04, math.sqrt(n * 0.004 / 2)) for n in left]
            keep.append(sum(e * v for e, v in zip(errors, w, strict=True)) / sum(w) <= 0.05)
        else:
            k3 = [math.exp(v) - 1 - v for v in x]
            keep.append(max(v * v / 2 for v in x) <= 0.05 and sum(k3) / len(x) <= 0.001)
    return torch.tensor(keep)


@pytest.mark.parametrize("fn", ALL)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**20))
def test_matches_the_definition(fn, seed):
    log_ratio, mask = batch(seed)
    truth = by_loops(fn, log_ratio, mask)
    keep, metrics = fn(log_ratio, mask)
    assert keep.dtype == torch.bool and torch.equal(keep, truth)
    if mask.any():
        rows = mask.any(1)
        fraction = truth[rows].double().mean().item()
        tokens = (mask & truth[:, None]).sum().item() / mask.sum().item()
        assert metrics["trust_region/kept_sequences"].item() == pytest.approx(fraction)
        assert metrics["trust_region/kept_tokens"].item() == pytest.approx(tokens)
        assert all(value.isfinite() for value in metrics.values())
    else:
        assert metrics == {}


@pytest.mark.parametrize("fn", ALL)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20))
def test_order_padding_and_garbage(fn, seed):
    log_ratio, mask = batch(seed)
    keep, _ = fn(log_ratio, mask)
    order = torch.randperm(len(keep), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(fn(log_ratio[order], mask[order])[0], keep[order])
    dirty = torch.where(mask, log_ratio, float("nan"))
    dirty = torch.nn.functional.pad(dirty, (0, 3), value=float("inf"))
    assert torch.equal(fn(dirty, torch.nn.functional.pad(mask, (0, 3)))[0], keep)


@pytest.mark.parametrize("fn", ALL)
def test_extreme_ratios_are_rejected_without_overflow(fn):
    log_ratio = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 0.0], [1e4, -1e4]])
    mask = torch.ones(4, 2, dtype=torch.bool)
    mask[3] = False
    keep, metrics = fn(log_ratio, mask)
    assert keep.tolist() == [False, False, True, True]
    assert all(value.isfinite() for value in metrics.values())


def test_each_statistic_cuts_at_its_threshold():
    mask = torch.ones(2, 1, dtype=torch.bool)
    log_ratio = torch.tensor([[-0.30], [-0.34]])
    loose = {"mean_threshold": 1.0}
    assert trust_region_mask(log_ratio, mask, **loose)[0].tolist() == [
        True,
        False,
    ]  # sqrt(0.1) = 0.316
    out = trust_region_mask(
        log_ratio, mask, max_statistic="abs_log_ratio", max_threshold=0.32, **loose
    )
    assert out[0].tolist() == [True, False]
    kl = torch.tensor([[0.2], [0.1]])
    out = trust_region_mask(
        log_ratio, mask, max_statistic="exact_kl", max_threshold=0.15, exact_kl=kl, **loose
    )
    assert out[0].tolist() == [False, True]
    out = trust_region_mask(
        log_ratio,
        mask,
        max_threshold=1.0,
        mean_statistic="exact_kl",
        mean_threshold=0.15,
        exact_kl=kl,
    )
    assert out[0].tolist() == [False, True]
    out = trust_region_mask(  # k3 at -0.34 is 0.0518
        log_ratio, mask, max_statistic="k3", max_threshold=0.05, **loose
    )
    assert out[0].tolist() == [True, False]
    for statistic, threshold in (("k2", 0.05), ("k3", 0.045), ("abs_log_ratio", 0.32)):
        out = trust_region_mask(
            log_ratio,
            mask,
            max_threshold=1.0,
            mean_statistic=statistic,
            mean_threshold=threshold,
        )
        assert out[0].tolist() == [True, False]
    metrics = out[1]
    assert metrics["trust_region/rejected_by_mean"].item() == 0.5
    assert metrics["trust_region/rejected_by_peak"].item() == 0


def test_the_mask_is_for_whole_sequences_and_carries_no_gradient():
    log_ratio = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.01]], requires_grad=True)
    keep, metrics = trust_region_mask(log_ratio, torch.ones(2, 3, dtype=torch.bool))
    assert keep.tolist() == [False, True]
    assert not any(value.requires_grad for value in metrics.values())
    # k3 of 0.01 is 5.0e-5: mean over three tokens before and after rejecting the first row
    k3 = [(math.e - 2) / 3, (math.exp(0.01) - 1.01) / 3]
    assert metrics["trust_region/mean_before"].item() == pytest.approx(sum(k3) / 2, rel=1e-4)
    assert metrics["trust_region/mean_after"].item() == pytest.approx(k3[1], rel=1e-2)


def test_a_deviation_at_the_last_token_of_the_horizon_changes_nothing_after_it():
    mask = torch.ones(2, 4, dtype=torch.bool)
    log_ratio = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    keep, _ = length_neutral_mask(log_ratio, mask, horizon=4, max_tv=0.1, max_kl=0.1)
    assert keep.tolist() == [False, True]


def test_length_neutral_weights_count_generated_tokens_not_columns():
    mask = torch.ones(1, 3, dtype=torch.bool)
    log_ratio = torch.tensor([[0.1, 0.2, -0.3]])
    options = {"horizon": 4, "max_tv": 0.1, "max_kl": 0.1}
    spread = log_ratio.new_zeros(1, 9).scatter(1, torch.tensor([[0, 4, 8]]), log_ratio)
    gaps = torch.zeros(1, 9, dtype=torch.bool).scatter(1, torch.tensor([[0, 4, 8]]), True)
    _, plain = length_neutral_mask(log_ratio, mask, **options)
    _, spread_out = length_neutral_mask(spread, gaps, **options)
    w = [min(n * 0.1, (n * 0.05) ** 0.5) for n in (3, 2, 1)]
    errors = [abs(math.expm1(v)) for v in (0.1, 0.2, -0.3)]
    expected = sum(e * v for e, v in zip(errors, w, strict=True)) / sum(w)
    for metrics in (plain, spread_out):
        assert metrics["trust_region/mean_before"].item() == pytest.approx(expected, rel=1e-5)


def test_bounds_oracle():
    bounds = trust_region_bounds(4096, max_kl=1e-4, max_tv=5e-3, sequence_kl=0.01, sequence_tv=0.05)
    assert bounds["classical_tv"] == pytest.approx(839, abs=0.5)
    assert bounds["classical_kl"] == pytest.approx(1677, abs=0.5)
    assert bounds["coupling"] == pytest.approx(79.9, abs=0.05)
    assert bounds["pinsker_marginal_kl"] == pytest.approx(34.9, abs=0.05)
    assert bounds["pinsker_marginal_tv"] == pytest.approx(24.7, abs=0.05)
    assert bounds["mixed_kl"] == pytest.approx(8.19, abs=0.005)
    assert bounds["mixed_tv"] == pytest.approx(4.10, abs=0.005)
    assert bounds["unified"] == bounds["mixed_tv"]


@pytest.mark.parametrize(
    "point", [(1, 0.1, 0.2, 0.1, 0.2), (37, 0.3, 0.4, 1.5, 3.0), (9, 5, 2, 9, 9)]
)
def test_bounds_match_their_sums(point):
    T, delta, eps, dkl, dtv = point
    bounds = trust_region_bounds(*point)
    cap, steps = lambda v: min(1.0, v), range(1, T + 1)
    root = math.sqrt(delta / 2)
    marginal = sum(cap(math.sqrt((t - 1) * delta / 2)) for t in steps)
    reach = [cap(min((T - t) * eps, math.sqrt((T - t) * delta / 2))) for t in steps]
    expected = {
        "classical_tv": 2 * T * (T - 1) * eps**2,
        "classical_kl": T * (T - 1) * delta,
        "coupling": 4 * cap(eps) * sum(cap((t - 1) * eps) for t in steps),
        "pinsker_marginal_kl": 4 * cap(root) * marginal,
        "pinsker_marginal_tv": 4 * cap(eps) * marginal,
        "mixed_kl": 4 * T * cap(root) * cap(math.sqrt(dkl / 2)),
        "mixed_tv": 4 * T * cap(eps) * cap(dtv),
        "adaptive": 4 * sum(cap(eps) * r for r in reach),
    }
    expected["unified"] = min(expected.values())
    assert bounds == pytest.approx(expected)
    tv = torch.linspace(0, 0.1, T)
    adaptive = trust_region_bounds(*point, token_tv=tv)["adaptive"]
    assert adaptive == pytest.approx(
        4 * sum(v * r for v, r in zip(tv.tolist(), reach, strict=True))
    )


def test_bad_inputs_are_named():
    log_ratio, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="exact_kl"):
        trust_region_mask(log_ratio, mask, max_statistic="exact_kl")
    with pytest.raises(ValueError, match="max_statistic"):
        trust_region_mask(log_ratio, mask, max_statistic="k1")
    with pytest.raises(ValueError, match="horizon"):
        length_neutral_mask(log_ratio, mask, horizon=2, max_tv=0.1, max_kl=0.1)
    with pytest.raises(ValueError, match="max_tv"):
        length_neutral_mask(log_ratio, mask, horizon=3, max_tv=0.0, max_kl=0.1)
    with pytest.raises(ValueError, match="horizon"):
        trust_region_bounds(0, 0.1, 0.1, 0.1, 0.1)
    with pytest.raises(ValueError, match="sequence_kl"):
        trust_region_bounds(2, 0.1, 0.1, -0.1, 0.1)
    with pytest.raises(ValueError, match="token_tv"):
        trust_region_bounds(2, 0.1, 0.1, 0.1, 0.1, token_tv=torch.zeros(3))
    log_ratio[1, 2] = float("nan")
    for fn in ALL:
        with pytest.raises(ValueError, match=r"log_ratio.*nan at \(1, 2\)"):
            fn(log_ratio, mask)


def test_thresholds_are_inclusive_and_checked():
    mask = torch.ones(1, 2, dtype=torch.bool)
    log_ratio = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    mean = (log_ratio.expm1()).mean().item()
    assert sequence_error_rate_mask(log_ratio, mask, threshold=mean)[0].item()
    assert not sequence_error_rate_mask(log_ratio, mask, threshold=mean * (1 - 1e-12))[0].item()
    k2 = {"max_threshold": 0.125, "mean_threshold": 9.0}
    assert trust_region_mask(log_ratio, mask, **k2)[0].item()
    for bad in (float("nan"), -0.1):
        with pytest.raises(ValueError, match="max_threshold >= 0"):
            trust_region_mask(log_ratio, mask, max_threshold=bad)
        with pytest.raises(ValueError, match="threshold >= 0"):
            sequence_error_rate_mask(log_ratio, mask, threshold=bad)


def test_indicators_are_the_bounds_of_what_was_seen():
    mask = torch.tensor([[True, True, False, True], [False, True, False, False]])
    log_ratio = torch.tensor([[0.1, -0.2, 9.0, 0.05], [9.0, -0.1, 9.0, 9.0]], dtype=torch.float64)
    kl = torch.tensor([[0.01, 0.03, 9.0, 0.002], [9.0, 0.02, 9.0, 9.0]], dtype=torch.float64)
    tv = kl.sqrt() / 2
    found = trust_region_indicators(log_ratio, mask, horizon=10, exact_kl=kl, exact_tv=tv)
    expected_tv = torch.zeros(10, dtype=torch.float64)
    expected_tv[:3] = torch.tensor([tv[0, 0] + tv[1, 1], tv[0, 1], tv[0, 3]]) / 2  # by own token
    bounds = trust_region_bounds(
        10,
        0.03,
        tv[0, 1].item(),
        (kl[0, [0, 1, 3]].sum() + 0.02).item() / 2,
        (tv[0, [0, 1, 3]].sum() + tv[1, 1]).item() / 2,
        token_tv=expected_tv,
    )
    got = {
        k.removeprefix("trust_region/bound_"): v.item() for k, v in found.items() if "bound" in k
    }
    assert got == pytest.approx(bounds)
    assert found["trust_region/max_kl"].item() == 0.03

    sampled = trust_region_indicators(log_ratio, mask)
    own = log_ratio[mask]
    k3 = own.exp() - 1 - own
    assert sampled["trust_region/max_kl"].item() == pytest.approx(k3.max().item())
    assert sampled["trust_region/max_tv"].item() == pytest.approx(
        (own.exp() - 1).abs().max().item() / 2
    )
    horizon_3 = trust_region_bounds(
        3,
        *(sampled[f"trust_region/{n}"].item() for n in ("max_kl", "max_tv")),
        *(sampled[f"trust_region/sequence_{n}"].item() for n in ("kl", "tv")),
    )
    for name in ("classical_kl", "coupling", "mixed_tv"):
        assert sampled[f"trust_region/bound_{name}"].item() == pytest.approx(horizon_3[name])
    assert trust_region_indicators(log_ratio, torch.zeros_like(mask)) == {}
    with pytest.raises(ValueError, match="horizon >= 3"):
        trust_region_indicators(log_ratio, mask, horizon=2)


# Edits to stability/trust_region.py and divergence_bounds.py that must turn this file red:
#   log_rho.square() / 2      ->  log_rho.square()
#   within_max & within_mean  ->  within_max | within_mean
#   | empty                   ->  nothing, with mean_threshold < 0; or & ~empty
#   horizon - mask.cumsum(1)  ->  horizon - columns            (gaps would count)
#   before.flip(0)            ->  before
