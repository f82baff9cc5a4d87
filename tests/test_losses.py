import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.stability import (
    aggregation_weights,
    apply_weights,
    ppo_clip,
    ratio_policy_loss,
    reinforce,
    trust_region_mask,
)

NAN = float("nan")


def dual_clipped(logp, old, advantages, **options):
    return ppo_clip(logp, old, advantages, clip_low=0.1, clip_high=0.3, dual_clip=1.5, **options)


def reinforced(logp, old, advantages, **options):
    return reinforce(logp, advantages, old.exp(), **options)


ALL = [reinforced, ratio_policy_loss, ppo_clip, dual_clipped]


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    b, t = (int(torch.randint(1, n, (), generator=generator)) for n in (6, 8))
    logp = -3 * torch.rand(b, t, generator=generator)
    old = logp + 0.5 * torch.randn(b, t, generator=generator)
    advantages = torch.randn(b, t, generator=generator)
    return logp, old, advantages, torch.rand(b, t, generator=generator) < 0.7


def one_token(fn, lp, old, a):
    """float64 loss and its derivative by lp, straight from the definition."""
    r = math.exp(max(-20.0, min(20.0, lp - old)))
    if fn is reinforced:
        return -math.exp(old) * a * lp, -math.exp(old) * a
    if fn is ratio_policy_loss:
        return -a * r, -a * r
    low, high = (0.1, 0.3) if fn is dual_clipped else (0.2, 0.2)
    loss, slope = -a * r, -a * r
    clipped = min(max(r, 1 - low), 1 + high)
    if -a * clipped > loss:
        loss, slope = -a * clipped, 0.0
    if fn is dual_clipped and a < 0 and loss > -1.5 * a:
        loss, slope = -1.5 * a, 0.0
    return loss, slope


@pytest.mark.parametrize("fn", ALL)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20))
def test_value_and_gradient_match_the_definition(fn, seed):
    logp, old, advantages, mask = batch(seed)
    x = logp.double().requires_grad_()
    loss = fn(x, old.double(), advantages.double(), mask=mask)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    value, slope = torch.zeros_like(grad), torch.zeros_like(grad)
    for i, t in mask.nonzero().tolist():
        inputs = (logp[i, t].item(), old[i, t].item(), advantages[i, t].item())
        value[i, t], slope[i, t] = one_token(fn, *inputs)
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(grad, slope)
    assert fn(logp, old, advantages).dtype == torch.float32
    assert fn(logp.bfloat16(), old.bfloat16(), advantages).dtype == torch.float32


@pytest.mark.parametrize("fn", ALL)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_masked_positions_may_hold_anything(fn, seed):
    logp, old, advantages, mask = batch(seed)

    def run(*inputs):
        x = inputs[0].clone().requires_grad_()
        loss = fn(x, *inputs[1:], mask=mask)
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    clean = run(logp, old, advantages)
    dirty = run(*(torch.where(mask, x, NAN) for x in (logp, old, advantages)))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b) and (b[~mask] == 0).all()


@pytest.mark.parametrize("fn", [ratio_policy_loss, ppo_clip, dual_clipped])
def test_extreme_ratios_stay_finite_with_their_gradients(fn):
    logp = torch.tensor([[1e4, -1e4, 1e4, -1e4]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    loss = fn(logp, torch.zeros(1, 4), advantages)
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.isfinite().all() and (grad == 0).all()


def test_only_logp_carries_a_gradient():
    inputs = [torch.full((1, 2), v, requires_grad=True) for v in (-0.5, -0.4, 1.0)]
    for fn in ALL:
        grads = torch.autograd.grad(fn(*inputs).sum(), inputs, allow_unused=True)
        assert grads[0] is not None and grads[1:] == (None, None)


def test_on_policy_all_losses_share_the_policy_gradient():
    logp, _, advantages, _ = batch(3)
    for fn in (ratio_policy_loss, ppo_clip, lambda lp, _, a: reinforce(lp, a)):
        x = logp.clone().requires_grad_()
        (grad,) = torch.autograd.grad(fn(x, logp, advantages).sum(), x)
        torch.testing.assert_close(grad, -advantages)


def test_a_tighter_clamp_cuts_the_gradient():
    logp = torch.tensor([[0.5, 2.0]], requires_grad=True)
    loss = ratio_policy_loss(logp, torch.zeros(1, 2), torch.ones(1, 2), max_log_ratio=1.0)
    torch.testing.assert_close(loss.detach(), -torch.tensor([[0.5, 1.0]]).exp())
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    assert grad[0, 0] != 0 and grad[0, 1] == 0


def test_apply_weights_skips_what_has_no_weight():
    loss = torch.tensor([[1.0, NAN], [3.0, 4.0]], requires_grad=True)
    weights = torch.tensor([[0.5, 0.0], [0.25, 0.25]])
    total = apply_weights(loss, weights)
    assert total.item() == 0.5 + 1.75
    (grad,) = torch.autograd.grad(total, loss)
    assert torch.equal(grad, weights)
    kept = apply_weights(loss, weights, keep=torch.tensor([True, False]))
    assert kept.item() == 0.5


def test_a_rejected_sequence_may_hold_garbage_and_a_kept_one_may_not():
    loss = torch.tensor([[1.0], [NAN]])
    weights = torch.full((2, 1), 0.5)
    assert apply_weights(loss, weights, keep=torch.tensor([True, False])).item() == 0.5
    with pytest.raises(ValueError, match=r"token_loss.*nan at \(1, 0\)"):
        apply_weights(loss, weights)


def test_trust_region_masking_divides_by_the_total():
    # gradient = (1/N) sum_i keep_i A_i sum_t rho_t grad lp_t, N all sequences, by loops
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(4, 5, generator=generator, dtype=torch.float64)
    rollout = logp + 0.02 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    rollout[2, 1] -= 1.0
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]
    outcome = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    keep, _ = trust_region_mask(logp - rollout, mask)
    assert keep.tolist() == [True, True, False, True]
    weights = aggregation_weights(
        mask, torch.zeros(4).long(), outcome, rule="seq_mean_token_sum_norm", max_length=1
    )
    x = logp.clone().requires_grad_()
    loss = ratio_policy_loss(x, rollout, outcome[:, None].expand(4, 5), mask=mask)
    (grad,) = torch.autograd.grad(apply_weights(loss, weights, keep), x)
    rho = (logp - rollout).exp()
    expected = -torch.where(mask & keep[:, None], outcome[:, None] * rho, 0)
    torch.testing.assert_close(grad, expected / 4)
    # the kept denominator: the kept rows alone make the weights
    weights = aggregation_weights(
        mask & keep[:, None],
        torch.zeros(4).long(),
        outcome,
        rule="seq_mean_token_sum_norm",
        max_length=1,
        valid=keep,
    )
    (grad,) = torch.autograd.grad(
        apply_weights(ratio_policy_loss(x, rollout, outcome[:, None].expand(4, 5)), weights), x
    )
    torch.testing.assert_close(grad, expected / 3)


def test_bad_inputs_are_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"advantages shaped as logp = \(2, 3\), got \(2,\)"):
        reinforce(x, torch.zeros(2))  # a value per sequence never broadcasts silently
    with pytest.raises(ValueError, match="max_log_ratio"):
        ratio_policy_loss(x, x, x, max_log_ratio=50.0)
    with pytest.raises(ValueError, match="clip_low"):
        ppo_clip(x, x, x, clip_low=1.5)
    with pytest.raises(ValueError, match="dual_clip"):
        ppo_clip(x, x, x, dual_clip=0.5)
    with pytest.raises(ValueError, match="keep of"):
        apply_weights(x, x, keep=torch.ones(2))
    bad = x.clone()
    bad[1, 2] = NAN
    for fn in ALL:
        with pytest.raises(ValueError, match=r"advantages.*nan at \(1, 2\)"):
            fn(x, x, bad)


# Edits to stability/losses.py that must turn this file red:
#   1 - clip_low, 1 + clip_high   ->  1 - clip_high, 1 + clip_low
#   torch.where(a < 0, ...)       ->  torch.minimum(...) for every sign
#   (lp - old).clamp(...)         ->  (lp - old)            (inf, and a gradient beyond the clamp)
#   return widened                ->  without masked: NaN gradients
#   x if name == "logp" else x.detach()  ->  x
