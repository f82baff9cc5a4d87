import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.stability import (
    aggregation_weights,
    apply_weights,
    cispo,
    dppo_kl,
    dppo_tv,
    gspo,
    ppo_clip,
    ratio_policy_loss,
    reinforce,
    reval_loss,
    trust_region_mask,
)

NAN = float("nan")


def dual_clipped(logp, old, advantages, **options):
    return ppo_clip(logp, old, advantages, clip_low=0.1, clip_high=0.3, dual_clip=1.5, **options)


def reinforced(logp, old, advantages, **options):
    return reinforce(logp, advantages, old.exp(), **options)


def tv_masked(logp, old, advantages, **options):
    return dppo_tv(
        logp, old, advantages, threshold_low=0.05, threshold_high=0.1, max_ratio=1.4, **options
    )


def kl_masked(logp, old, advantages, **options):
    return dppo_kl(logp, old, advantages, threshold_low=0.02, threshold_high=0.05, **options)


def weight_clipped(logp, old, advantages, **options):
    return cispo(logp, old, advantages, clip_low=0.3, clip_high=0.2, **options)


ALL = [
    reinforced,
    ratio_policy_loss,
    ppo_clip,
    dual_clipped,
    weight_clipped,
    tv_masked,
    kl_masked,
]


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    b, t = (int(torch.randint(1, n, (), generator=generator)) for n in (6, 8))
    logp = -3 * torch.rand(b, t, generator=generator) - 1e-3
    old = (logp + 0.5 * torch.randn(b, t, generator=generator)).clamp_max(-1e-3)
    advantages = torch.randn(b, t, generator=generator)
    return logp, old, advantages, torch.rand(b, t, generator=generator) < 0.7


def one_token(fn, lp, old, a):
    """float64 loss and its derivative by lp, straight from the definition."""
    r = math.exp(max(-20.0, min(20.0, lp - old)))
    if fn is reinforced:
        return -math.exp(old) * a * lp, -math.exp(old) * a
    if fn is ratio_policy_loss:
        return -a * r, -a * r
    if fn is weight_clipped:
        weight = min(max(r, 0.7), 1.2)
        return -weight * a * lp, -weight * a
    if fn in (tv_masked, kl_masked):
        p, q = math.exp(min(lp, 0)), math.exp(min(old, 0))
        if fn is tv_masked:
            trains = p - q <= 0.1 if a > 0 else q - p <= 0.05
        else:
            kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) if q < 1 else lp
            trains = (p <= q or kl <= 0.05) if a > 0 else (p >= q or kl <= 0.02)
        weight = min(r, 1.4 if fn is tv_masked else 20.0) * trains
        return -weight * a * lp, -weight * a
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
    whole = torch.ones_like(logp, dtype=torch.bool)
    for fn in (
        ratio_policy_loss,
        ppo_clip,
        lambda lp, _, a: reinforce(lp, a),
        lambda lp, old, a: gspo(lp, old, a, mask=whole),
        cispo,
        dppo_tv,
        dppo_kl,
    ):
        x = logp.clone().requires_grad_()
        (grad,) = torch.autograd.grad(fn(x, logp, advantages).sum(), x)
        torch.testing.assert_close(grad, -advantages)


def test_a_tighter_clamp_cuts_the_gradient():
    logp = torch.tensor([[0.5, 2.0]], requires_grad=True)
    loss = ratio_policy_loss(logp, torch.zeros(1, 2), torch.ones(1, 2), max_log_ratio=1.0)
    torch.testing.assert_close(loss.detach(), -torch.tensor([[0.5, 1.0]]).exp())
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    assert grad[0, 0] != 0 and grad[0, 1] == 0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), inside=st.booleans())
def test_gspo_is_the_sequence_loss(seed, inside):
    """Value of the paper's token form, and with seq_mean weights the sequence form's gradient."""
    logp, old, advantages, mask = (x.double() if x.is_floating_point() else x for x in batch(seed))
    advantages = advantages[:, :1].expand_as(advantages)  # one a response
    clip = {"clip_low": 0.9, "clip_high": 9.0} if inside else {"clip_low": 0.05, "clip_high": 0.1}
    x = logp.clone().requires_grad_()
    loss = gspo(x, old, advantages, mask=mask, **clip)
    rows = mask.any(1)
    tokens = mask.sum(1).clamp_min(1)
    weights = mask / tokens[:, None]
    (grad,) = torch.autograd.grad(apply_weights(loss, weights), x)
    y = logp.clone().requires_grad_()
    s = ((y - old) * mask).sum(1).div(tokens).exp()
    a = advantages[:, 0]
    sequence = torch.maximum(-a * s, -a * s.clamp(1 - clip["clip_low"], 1 + clip["clip_high"]))
    (truth,) = torch.autograd.grad((sequence * rows).sum(), y)
    torch.testing.assert_close(grad, truth)
    value = (loss.detach() * weights).sum(1)
    torch.testing.assert_close(value, (sequence * rows).detach())


def test_defaults_are_the_published_ones_where_there_are_any():
    defaults = {
        fn: {n: p.default for n, p in inspect.signature(fn).parameters.items()}
        for fn in (ppo_clip, gspo, cispo)
    }
    assert (defaults[ppo_clip]["clip_low"], defaults[ppo_clip]["clip_high"]) == (0.2, 0.2)
    assert (defaults[gspo]["clip_low"], defaults[gspo]["clip_high"]) == (3e-4, 4e-4)
    assert (defaults[cispo]["clip_low"], defaults[cispo]["clip_high"]) == (1.0, 2.0)


def test_gspo_clips_whole_responses():
    """Two far tokens that cancel in the mean are inside; PPO would clip both."""
    logp = torch.tensor([[-1.0, -3.0], [-1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-2.0, -2.0], [-2.0, -2.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    loss = gspo(logp, old, torch.ones(2, 2), mask=mask, clip_high=0.2)
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(grad, torch.tensor([[-1.0, -1.0], [0.0, 0.0]]))


def test_gspo_beyond_the_clamp_has_no_gradient():
    logp = torch.tensor([[30.0, 30.0], [-30.0, -30.0], [19.0, 19.0]], requires_grad=True)
    mask = torch.ones(3, 2, dtype=torch.bool)
    loss = gspo(logp, torch.zeros(3, 2), -torch.ones(3, 2), mask=mask, clip_low=1.0)
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.isfinite().all() and (grad[:2] == 0).all() and (grad[2] > 0).all()


def test_dppo_stops_only_what_runs_away():
    """A token whose p already rose by more than the bound trains no more upwards, but downwards."""
    logp = torch.tensor([[0.9, 0.9, 0.1, 0.1]]).log().requires_grad_()
    old = torch.tensor([[0.5, 0.5, 0.5, 0.5]]).log()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    for fn in (dppo_tv, dppo_kl):
        (grad,) = torch.autograd.grad(fn(logp, old, advantages).sum(), logp)
        assert (grad != 0).tolist() == [[False, True, True, False]]


def test_dppo_kl_at_certain_tokens():
    """q = 1 and p = 1 have no 0 * inf: only a rise to certainty from below is infinitely far."""
    logp = torch.tensor([[0.0, -0.5, 0.0, -40.0]], dtype=torch.float64)
    old = torch.tensor([[0.0, 0.0, -0.5, 0.0]], dtype=torch.float64)
    up = dppo_kl(logp, old, torch.ones(1, 4), threshold_high=100.0)
    assert up.isfinite().all() and (up != 0).tolist() == [[False, True, False, True]]
    down = dppo_kl(logp, old, -torch.ones(1, 4), threshold_low=0.6)
    assert (down != 0).tolist() == [[False, True, False, False]]


def tree(seed=0):
    """Two steps of three actions: all nine paths, rewards, a reference that is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(4, 3, generator=generator, dtype=torch.float64)  # root, three children
    rewards = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    return reference, rewards, first, second


def path_inputs(logits, first, second):
    lp = logits.log_softmax(-1)
    return torch.stack([lp[0, first], lp[1 + first, second]], 1), logits[0].logsumexp(-1)


def test_reval_is_zero_at_the_reference_without_reward():
    reference, rewards, first, second = tree()
    logits = reference.clone().requires_grad_()
    lp, v = path_inputs(logits, first, second)
    ref, v_ref = path_inputs(reference, first, second)
    mask = torch.ones(9, 2, dtype=torch.bool)
    loss = reval_loss(lp, ref, v.expand(9), v_ref.expand(9), torch.zeros(9), mask, beta=0.5)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert (loss == 0).all() and (grad == 0).all()
    for name in ("ref", "v_ref", "reward"):  # constants, whoever made them
        inputs = {"ref": ref.clone(), "v_ref": v_ref.expand(9).clone(), "reward": torch.ones(9)}
        inputs[name].requires_grad_()
        loss = reval_loss(
            lp, inputs["ref"], v.expand(9), inputs["v_ref"], inputs["reward"], mask, beta=0.5
        )
        assert torch.autograd.grad(
            loss.sum(), inputs[name], allow_unused=True, retain_graph=True
        ) == (None,)
    by_hand = (rewards[first, second] / 0.5).square()
    loss = reval_loss(lp, ref, v.expand(9), v_ref.expand(9), rewards[first, second], mask, beta=0.5)
    torch.testing.assert_close(loss.detach(), by_hand)


@pytest.mark.parametrize("detach_value", [False, True])
def test_reval_converges_off_policy_unless_the_value_is_detached(detach_value):
    """Uniform data: pi_ref exp(r / beta) to rounding; detached it ends elsewhere."""
    reference, rewards, first, second = tree()
    beta, mask = 0.7, torch.ones(9, 2, dtype=torch.bool)
    ref, v_ref = path_inputs(reference, first, second)
    target = (ref.sum(1) + rewards[first, second] / beta).softmax(0)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        lp, v = path_inputs(logits, first, second)
        loss = reval_loss(
            lp,
            ref,
            v.expand(9),
            v_ref.expand(9),
            rewards[first, second],
            mask,
            beta=beta,
            detach_value=detach_value,
        )
        total = apply_weights(loss, torch.full((9,), 1 / 9, dtype=torch.float64))
        total.backward()
        return total

    if detach_value:  # its gradient is that of no function: plain descent
        for _ in range(4000):
            closure()
            logits.data -= 0.3 * logits.grad
    else:
        optimizer.step(closure)
    found = path_inputs(logits.detach(), first, second)[0].sum(1).exp()
    error = (found - target).abs().max().item()
    assert error > 0.01 if detach_value else error < 1e-6


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
    for fn, name in ((dppo_tv, "threshold_low"), (dppo_kl, "threshold_high")):
        with pytest.raises(ValueError, match=name):
            fn(x, x, x, **{name: -0.1})
        with pytest.raises(ValueError, match="max_ratio"):
            fn(x, x, x, max_ratio=0.0)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="beta > 0"):
        reval_loss(x, x, x[:, 0], x[:, 0], x[:, 0], mask, beta=0.0)
    with pytest.raises(ValueError, match=r"value \[B\] = \(2,\), got \(2, 3\)"):
        reval_loss(x, x, x, x[:, 0], x[:, 0], mask, beta=1.0)
    with pytest.raises(ValueError, match="token_loss shaped as weights"):
        apply_weights(x[:, 0], x)  # a value per sequence never broadcasts silently
    with pytest.raises(ValueError, match="finite weights"):
        apply_weights(x, x * NAN)
    with pytest.raises(ValueError, match="keep of"):
        apply_weights(x, x, keep=torch.ones(2))
    bad = x.clone()
    bad[1, 2] = NAN
    for fn in ALL:
        with pytest.raises(ValueError, match=r"advantages.*nan at \(1, 2\)"):
            fn(x, x, bad)


# Edits to stability/losses.py that must turn this file red:
#   moved <= threshold_high, moved >= -threshold_low  ->  both with abs()
#   rest_q > 0 in dppo_kl         ->  rest_q >= 0
#   (lp - lp.detach()).exp()      ->  1 in gspo
#   if detach_value               ->  if not detach_value
#   1 - clip_low, 1 + clip_high   ->  1 - clip_high, 1 + clip_low
#   torch.where(a < 0, ...)       ->  torch.minimum(...) for every sign
#   (lp - old).clamp(...)         ->  (lp - old)            (inf, and a gradient beyond the clamp)
#   return widened                ->  without masked: NaN gradients
#   x if name == "logp" else x.detach()  ->  x
