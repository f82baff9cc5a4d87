import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.stability import (
    aggregation_weights,
    clip_metrics,
    entropy_metrics,
    group_metrics,
    sign_length_metrics,
)


def groups(seed):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 14, (), generator=generator))
    rewards = torch.rand(n, generator=generator).round()
    ids = 3 * torch.randint(-2, 3, (n,), generator=generator)
    return rewards, ids, torch.rand(n, generator=generator) < 0.7


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**20))
def test_group_fractions_match_their_definition(seed):
    rewards, ids, valid = groups(seed)
    dirty = torch.where(valid, rewards, float("nan"))
    metrics = {name: value.item() for name, value in group_metrics(dirty, ids, valid).items()}
    outcomes = [set(rewards[valid & (ids == i)].tolist()) for i in set(ids[valid].tolist())]
    if not outcomes:
        assert metrics == {}
        return
    share = lambda wanted: sum(o == wanted for o in outcomes) / len(outcomes)
    expected = {
        "groups/mixed": share({0.0, 1.0}),
        "groups/all_pass": share({1.0}),
        "groups/all_fail": share({0.0}),
        "groups/count": len(outcomes),
    }
    assert metrics == pytest.approx(expected)
    unmarked = group_metrics(rewards, ids, valid)  # an invalid reward that looks like any other
    assert {name: value.item() for name, value in unmarked.items()} == metrics
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    permuted = group_metrics(dirty[order], ids[order], valid[order])
    assert {name: value.item() for name, value in permuted.items()} == metrics


def test_the_threshold_decides_what_passes():
    rewards, ids = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([1, 1, 1])
    assert group_metrics(rewards, ids)["groups/mixed"].item() == 1
    assert group_metrics(rewards, ids, pass_threshold=0.1)["groups/all_pass"].item() == 1
    assert group_metrics(rewards, ids, pass_threshold=0.9)["groups/all_fail"].item() == 1


def tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    b, t = (int(torch.randint(1, n, (), generator=generator)) for n in (6, 8))
    log_ratio = 0.4 * torch.randn(b, t, generator=generator)
    advantages = torch.randn(b, t, generator=generator).round(decimals=1)
    return log_ratio, advantages, torch.rand(b, t, generator=generator) < 0.7


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**20))
def test_clip_metrics_match_their_definition(seed):
    log_ratio, advantages, mask = tokens(seed)
    dirty = [torch.where(mask, x, float("nan")) for x in (log_ratio, advantages)]
    metrics = {k: v.item() for k, v in clip_metrics(*dirty, mask, 0.1, 0.3).items()}
    pairs = [(log_ratio[i, t].exp().item(), advantages[i, t].item()) for i, t in mask.nonzero()]
    if not pairs:
        assert metrics == {}
        return
    share = lambda wanted: sum(wanted(r, a) for r, a in pairs) / len(pairs)
    removed = sum(r * a - min(r * a, min(max(r, 0.9), 1.3) * a) for r, a in pairs)
    expected = {
        "clip/clipped_high": share(lambda r, a: r > 1.3 and a > 0),
        "clip/clipped_low": share(lambda r, a: r < 0.9 and a < 0),
        "clip/leaked_high": share(lambda r, a: r > 1.3 and a < 0),
        "clip/leaked_low": share(lambda r, a: r < 0.9 and a > 0),
        "clip/raw_signal": abs(sum(r * a for r, a in pairs)),
        "clip/clipped_away": abs(removed),
    }
    if expected["clip/clipped_high"] + expected["clip/clipped_low"] > 0:
        expected["clip/signal_ratio"] = expected["clip/raw_signal"] / abs(removed)
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_each_quadrant_by_hand():
    log_ratio = torch.tensor([[2.0, 2.0, 0.5, 0.5, 1.1]]).log()
    advantages = torch.tensor([[1.0, -3.0, -2.0, 5.0, 1.0]])
    metrics = clip_metrics(log_ratio, advantages, torch.ones(1, 5, dtype=torch.bool))
    for name in ("clipped_high", "clipped_low", "leaked_high", "leaked_low"):
        assert metrics[f"clip/{name}"].item() == pytest.approx(0.2)
    assert metrics["clip/raw_signal"].item() == pytest.approx(abs(2 - 6 - 1 + 2.5 + 1.1))
    assert metrics["clip/clipped_away"].item() == pytest.approx(0.8 * 1 + -0.3 * -2)


def test_inside_the_range_nothing_is_clipped_and_there_is_no_ratio():
    metrics = clip_metrics(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    assert metrics["clip/clipped_away"].item() == 0 and "clip/signal_ratio" not in metrics


def test_extreme_ratios_stay_finite():
    log_ratio = torch.tensor([[1e4, -1e4]], requires_grad=True)
    metrics = clip_metrics(log_ratio, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    assert all(v.isfinite() and not v.requires_grad for v in metrics.values())


def test_bad_inputs_are_named():
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="clip_low"):
        clip_metrics(torch.zeros(1, 2), torch.zeros(1, 2), mask, clip_low=2.0)
    with pytest.raises(ValueError, match=r"log_ratio.*inf at \(0, 1\)"):
        clip_metrics(torch.tensor([[0.0, torch.inf]]), torch.zeros(1, 2), mask)
    with pytest.raises(ValueError, match=r"rewards \[B\]"):
        group_metrics(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"rewards.*nan at \(0,\)"):
        group_metrics(torch.tensor([torch.nan]), torch.zeros(1, dtype=torch.long))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20))
def test_entropy_metrics_match_their_definition(seed):
    lp, advantages, mask = tokens(seed)
    entropy = lp.abs()
    found = entropy_metrics(entropy, lp, advantages, mask, lr=0.3)
    if not mask.any():
        assert found == {}
        return
    x, a = lp[mask].double(), advantages[mask].double()
    covariance = ((x - x.mean()) * (a - a.mean())).mean().item()
    assert found["entropy/mean"].item() == pytest.approx(entropy[mask].mean().item(), rel=1e-5)
    assert found["entropy/covariance"].item() == pytest.approx(covariance, abs=1e-6)
    assert found["entropy/predicted_change"].item() == pytest.approx(-0.3 * covariance, abs=1e-6)


def test_the_prediction_is_the_first_order_change_of_a_natural_gradient_step():
    """logits += lr A on a bandit: the entropy changes by -lr Cov(ln p, A) + O(lr^2)."""
    generator = torch.Generator().manual_seed(0)
    logits, a = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    entropy = lambda z: -(z.softmax(0) * z.log_softmax(0)).sum()
    # actions in exact proportion to their probability: 10^5 samples, rounded
    counts = (logits.softmax(0) * 1e5).round().long()
    lp = logits.log_softmax(0).repeat_interleave(counts)[None]
    advantages = a.repeat_interleave(counts)[None]
    mask = torch.ones_like(lp, dtype=torch.bool)
    for lr in (1e-2, 1e-3):
        change = (entropy(logits + lr * a) - entropy(logits)).item()
        found = entropy_metrics(torch.ones_like(lp), lp, advantages, mask, lr=lr)
        assert found["entropy/predicted_change"].item() == pytest.approx(change, rel=2 * lr + 1e-3)


def test_the_covariance_is_right_for_advantages_that_are_not_centred():
    generator = torch.Generator().manual_seed(0)
    lp = -torch.rand(40, 50, generator=generator)
    a = 1e4 + 1e-2 * torch.randn(40, 50, generator=generator)
    mask = torch.ones(40, 50, dtype=torch.bool)
    found = entropy_metrics(lp, lp, a, mask)["entropy/covariance"].item()
    x, y = lp.double(), a.double()
    truth = ((x - x.mean()) * (y - y.mean())).mean().item()
    assert found == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize(
    "advantages", [[1.0, 1.0, 1.0, 0.0], [0.5, 0.5, -0.5, -0.5]], ids=["uncentred", "centred"]
)
def test_equal_lengths_couple_nothing_whatever_the_advantages(advantages):
    mask = torch.ones(4, 5, dtype=torch.bool)
    outcome, ids = torch.tensor(advantages), torch.tensor([0, 0, 0, 0])
    for rule in ("balanced", "seq_mean", "token_mean", "token_mean_group"):
        for keep in (None, torch.tensor([True, False, True, True])):
            weights = aggregation_weights(mask, ids, outcome, rule=rule, keep=keep)
            found = sign_length_metrics(weights, outcome, mask, ids)
            assert found["coupling/share"].item() == pytest.approx(0, abs=1e-6)


def test_sign_length_metrics():
    mask = torch.arange(6) < torch.tensor([1, 3, 6, 2])[:, None]
    outcome, ids = torch.tensor([2.0, 1.0, -1.0, 0.0]), torch.tensor([0, 0, 0, 0])
    weights = aggregation_weights(mask, ids, outcome, rule="token_mean")
    found = {k: v.item() for k, v in sign_length_metrics(weights, outcome, mask, ids).items()}
    assert found == pytest.approx(
        {
            "coupling/sum": (2 + 3 - 6) / 12,
            # rows of 1, 3, 6 and 2 tokens weigh 3 each at equal lengths
            "coupling/by_length": (2 * (1 - 3) + 1 * (3 - 3) - 1 * (6 - 3)) / 12,
            "coupling/share": (2 * (1 - 3) + 1 * (3 - 3) - 1 * (6 - 3)) / (2 + 3 + 6),
            "coupling/length_positive": 2.0,
            "coupling/length_negative": 6.0,
            "coupling/length_gap": 1 / 3,
        }
    )
    one_sided = sign_length_metrics(weights[:2], outcome[:2], mask[:2], ids[:2])
    assert "coupling/length_gap" not in one_sided and "coupling/length_negative" not in one_sided
    assert sign_length_metrics(weights, torch.zeros(4), mask, ids) == {}
    with pytest.raises(ValueError, match="weights"):
        sign_length_metrics(weights[:, 1:], outcome, mask, ids)
    with pytest.raises(ValueError, match="lr >= 0"):
        entropy_metrics(weights, weights, weights, mask, lr=-1.0)


# Edits to stability/metrics.py that must turn this file red:
#   passed = rows & (...)     ->  passed = rewards > pass_threshold
#   groups = sizes > 0        ->  torch.ones_like(sizes, dtype=torch.bool)
#   above & (a > 0)           ->  above & (a < 0) in clipped_high
#   r.clamp(1 - clip_low, 1 + clip_high)  ->  1
#   rewards > pass_threshold  ->  >=
