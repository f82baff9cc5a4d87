import math

import pytest
import torch

from trimtab.stability import (
    DEFAULT_RHO,
    out_of_set_mask,
    pad_support,
    pruned_statistics,
    pruning_metrics,
    replayed_statistics,
    response_statistics,
)

MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
INSIDE = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])


@pytest.mark.parametrize(
    ("policy", "expected", "dropped"),
    [
        ("include", MASK, 0.0),
        ("mask_token", MASK & INSIDE, 1 / 5),
        ("reject_sequence", MASK & torch.tensor([[True], [False], [True]]), 3 / 5),
    ],
)
def test_policies(policy, expected, dropped):
    kept, metrics = out_of_set_mask(INSIDE, MASK, policy=policy)
    assert torch.equal(kept, expected)
    assert metrics["pruning/out_of_set_fraction"].item() == pytest.approx(1 / 5)
    assert metrics["pruning/out_of_set_sequences"].item() == pytest.approx(1 / 2)
    assert metrics["pruning/dropped_tokens"].item() == pytest.approx(dropped)


def test_a_masked_token_outside_the_set_rejects_nothing():
    kept, _ = out_of_set_mask(torch.zeros(1, 3, dtype=torch.bool) | MASK[:1], MASK[:1])
    assert torch.equal(kept, MASK[:1])
    kept, _ = out_of_set_mask(INSIDE[:1], MASK[:1], policy="reject_sequence")
    assert torch.equal(kept, MASK[:1])


def test_metrics_of_a_known_distribution():
    # p = (0.5, 0.3, 0.15, 0.05), rho = 0.5: the threshold 0.25 keeps two tokens and the label
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().expand(2, 3, 4).clone()
    logits[~MASK[:2]] = float("nan")
    tokens = torch.tensor([[0, 1, 2], [2, 3, 0]])
    stats = response_statistics(logits, tokens, MASK[:2], prune=0.5)
    metrics = pruning_metrics(stats, MASK[:2])
    mass = [0.8, 0.8, 0.95, 0.85, 0.8]
    assert metrics["pruning/kept_mass_mean"].item() == pytest.approx(sum(mass) / 5)
    assert metrics["pruning/kept_mass_min"].item() == pytest.approx(0.8)
    assert metrics["pruning/safe_count_mean"].item() == pytest.approx((2 + 2 + 3 + 3 + 2) / 5)
    assert metrics["pruning/out_of_set_fraction"].item() == pytest.approx(2 / 5)
    full = response_statistics(logits, tokens, MASK[:2])
    torch.testing.assert_close(stats.logp + stats.log_kept_mass, full.logp)


def test_the_gradient_is_exactly_zero_outside_the_safe_set():
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 3, 12)).requires_grad_()
    tokens = torch.randint(12, (2, 3))
    stats = response_statistics(logits, tokens, MASK[:2], prune=0.1)
    stats.logp.sum().backward()
    x = logits.detach()
    inside = x >= x.amax(-1, keepdim=True) + math.log(0.1)
    inside.scatter_(-1, tokens[..., None], True)
    inside &= MASK[:2, :, None]
    assert (logits.grad[~inside] == 0).all() and (logits.grad[inside] != 0).any()


def replay_problem():
    """Logits, and for each generated token its own set, which top_k and top_p could have left."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3, 3, 12, generator=generator)
    tokens = torch.randint(12, (3, 3), generator=generator)
    sets = []
    for b in range(3):
        row = []
        for t in MASK[b].nonzero().flatten().tolist():
            others = torch.randperm(12, generator=generator)[: 1 + (b + t) % 4].tolist()
            row.append(list(dict.fromkeys([*others, int(tokens[b, t])])))
        sets.append(row)
    return logits, tokens, sets


def by_masking(logits, tokens, sets, temperature, softcap):
    """float64: every other logit is -inf."""
    z = logits.double()
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    out = {name: torch.zeros(3, 3, dtype=torch.float64) for name in ("logp", "entropy", "sum_p2")}
    out["log_kept_mass"] = torch.zeros(3, 3, dtype=torch.float64)
    for b in range(3):
        for t, kept in zip(MASK[b].nonzero().flatten().tolist(), sets[b], strict=True):
            inside = torch.zeros(12, dtype=torch.bool)
            inside[kept] = True
            lp = z[b, t].masked_fill(~inside, -torch.inf).log_softmax(-1)
            p = lp.exp()
            out["logp"][b, t] = lp[tokens[b, t]]
            out["entropy"][b, t] = -(p * lp.masked_fill(~inside, 0)).sum()
            out["sum_p2"][b, t] = p.square().sum()
            out["log_kept_mass"][b, t] = z[b, t].log_softmax(-1)[inside].logsumexp(-1)
    return out


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 5.0)])
def test_replay_is_the_softmax_over_the_engines_set(temperature, softcap):
    logits, tokens, sets = replay_problem()
    support = pad_support(sets, MASK)
    x = torch.where(MASK[..., None], logits, float("nan")).requires_grad_()
    options = {"temperature": temperature, "softcap": softcap}
    found = pruned_statistics(x, tokens, MASK, out_of_set="replay", support=support, **options)
    y = logits.double().requires_grad_()
    truth = by_masking(y, tokens, sets, **options)
    for name, want in truth.items():
        torch.testing.assert_close(
            getattr(found.stats, name).detach().double(), want.detach(), atol=1e-5, rtol=1e-5
        )
    assert torch.equal(found.mask, MASK) and torch.equal(found.stats.in_safe_set, MASK)
    assert found.stats.safe_count[MASK].tolist() == [len(kept) for row in sets for kept in row]
    assert found.metrics["pruning/out_of_set_fraction"].item() == 0
    mix = lambda s: (s["logp"] - 0.3 * s["entropy"] + s["sum_p2"])[MASK].sum()
    (grad,) = torch.autograd.grad(mix({n: getattr(found.stats, n) for n in truth}), x)
    (want,) = torch.autograd.grad(mix(truth), y)
    torch.testing.assert_close(grad.double(), want, atol=1e-5, rtol=1e-4)
    outside = torch.ones(3, 3, 12, dtype=torch.bool)
    for b in range(3):
        for t, kept in zip(MASK[b].nonzero().flatten().tolist(), sets[b], strict=True):
            outside[b, t, kept] = False
    assert (grad[outside] == 0).all()  # exactly, and at masked positions that hold NaN


def test_the_whole_vocabulary_as_a_set_is_no_pruning():
    logits, tokens, _ = replay_problem()
    everything = pad_support([[range(12)] * int(n) for n in MASK.sum(1)], MASK)
    stats = replayed_statistics(logits, tokens, MASK, everything)
    plain = response_statistics(logits, tokens, MASK)
    torch.testing.assert_close(stats.logp, plain.logp)
    torch.testing.assert_close(stats.log_kept_mass, torch.zeros(3, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", ["include", "mask_token", "reject_sequence"])
def test_the_objective_under_the_other_policies(policy):
    logits, tokens, _ = replay_problem()
    found = pruned_statistics(logits, tokens, MASK, out_of_set=policy, rho=0.3)
    stats = response_statistics(logits, tokens, MASK, prune=0.3)
    assert torch.equal(found.stats.logp, stats.logp)
    kept, metrics = out_of_set_mask(stats.in_safe_set, MASK, policy=policy)
    assert torch.equal(found.mask, kept) and kept.sum() < (6 if policy != "include" else 99)
    assert metrics.items() <= found.metrics.items()
    assert "pruning/kept_mass_mean" in found.metrics


def test_support_is_checked():
    logits, tokens, sets = replay_problem()
    support = pad_support(sets, MASK)

    def replay(support=support, **options):
        return pruned_statistics(
            logits, tokens, MASK, out_of_set="replay", support=support, **options
        )

    with pytest.raises(ValueError, match=r"a set for each generated token, \[2, 3, 0\]"):
        pad_support(sets[:2], MASK)
    with pytest.raises(ValueError, match="at least one kept token"):
        pad_support([[[]] * int(n) for n in MASK.sum(1)], MASK)
    with pytest.raises(ValueError, match=r"every sampled token in its set.*at \(1, 1\)"):
        wrong = support.clone()
        wrong[1, 1] = torch.where(wrong[1, 1] == tokens[1, 1], -1, wrong[1, 1])
        replay(wrong)
    with pytest.raises(ValueError, match="support below 12, got 12"):
        wrong = support.clone()
        wrong[0, 0, 0] = 12
        replay(wrong)
    with pytest.raises(ValueError, match="distinct ids"):
        replay(torch.cat([support, support], -1))
    with pytest.raises(ValueError, match=r"support \[B, T, K\]"):
        replay(support[0])
    with pytest.raises(ValueError, match=r"support \[B, T, K\]"):
        replay(support[..., :0])
    for wrong in (-5, 3.7):
        with pytest.raises(ValueError, match="token ids, whole numbers >= 0"):
            pad_support([[[wrong]] * int(n) for n in MASK.sum(1)], MASK)
    for value in (float("nan"), -float("inf")):
        broken = logits.clone()
        broken[1, 1, tokens[1, 1]] = value
        with pytest.raises(ValueError, match=r"finite log-probability.*\(1, 1\)"):
            pruned_statistics(broken, tokens, MASK, out_of_set="replay", support=support)
    with pytest.raises(ValueError, match="tokens of int64"):
        replayed_statistics(logits, tokens.int(), MASK, support)
    with pytest.raises(ValueError, match="got none"):
        replay(None)
    with pytest.raises(ValueError, match="got one"):
        pruned_statistics(logits, tokens, MASK, support=support)


def test_no_token_no_metric():
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert out_of_set_mask(none, none)[1] == {}
    stats = response_statistics(
        torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), none, prune=0.5
    )
    assert pruning_metrics(stats, none) == {}


def test_the_default_is_named_and_inputs_are_checked():
    assert math.exp(-13) == DEFAULT_RHO
    with pytest.raises(ValueError, match="policy"):
        out_of_set_mask(INSIDE, MASK, policy="replay")
    with pytest.raises(ValueError, match="in_safe_set"):
        out_of_set_mask(INSIDE.float(), MASK)
    stats = response_statistics(torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), MASK[:2])
    with pytest.raises(ValueError, match="prune=rho"):
        pruning_metrics(stats, MASK[:2])


# Edits to stability/pruning.py that must turn this file red:
#   outside = mask & ~in_safe_set  ->  outside = ~in_safe_set
#   kept = mask & in_safe_set      ->  kept = mask
#   outside.any(1, keepdim=True)   ->  outside.all(1, keepdim=True)
#   torch.where(mask, kept_mass, 1.0).min()  ->  kept_mass.mean()
#   torch.where(kept, gathered, -math.inf)   ->  gathered        (padding joins the set)
#   logsumexp=whole  and  flat.logsumexp - whole  ->  0
#   DEFAULT_RHO = math.exp(-12)
