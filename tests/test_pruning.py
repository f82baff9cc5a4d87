import math

import pytest
import torch

from trimtab.stability import (
    DEFAULT_RHO,
    out_of_set_mask,
    pruning_metrics,
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
#   DEFAULT_RHO = math.exp(-12)
