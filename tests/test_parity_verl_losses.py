"""Aggregation and policy losses against verl's (how to run it: tests/verl_cases.py)."""

import math

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from verl_cases import NAN, batch, close, configs, core, few, seeds

from trimtab.stability import (
    aggregation_weights,
    apply_weights,
    broadcast_advantages,
    cispo,
    dppo_kl,
    dppo_tv,
    gspo,
    importance_weights,
    ppo_clip,
    reinforce,
)

AGGREGATION = {
    "token-mean": dict(rule="token_mean"),
    "seq-mean-token-mean": dict(rule="seq_mean"),
    "seq-mean-token-sum": dict(rule="seq_mean_token_sum_norm", max_length=1),
    "seq-mean-token-sum-norm": dict(rule="seq_mean_token_sum_norm", max_length=17),
}


def one_group(mask: Tensor) -> Tensor:
    """Their means are over the responses of the batch, ours over groups first: here one for all."""
    return torch.zeros(len(mask), dtype=torch.int64)


@pytest.mark.parametrize("mode", AGGREGATION)
@few
@seeds
def test_aggregation(mode, seed):
    b = batch(seed)
    mask = b.mask.clone()
    if len(mask) > 2:
        mask[0] = False  # theirs leaves rows without a token out, which `valid` says to ours
    theirs = core.agg_loss(b.dense, mask.long(), mode, loss_scale_factor=17)
    weights = aggregation_weights(
        mask, one_group(mask), b.outcome, valid=mask.any(1), **AGGREGATION[mode]
    )
    close(apply_weights(b.dense, weights), theirs, 1e-7)  # theirs divides by n + 1e-8


@pytest.mark.parametrize("mode", AGGREGATION)
def test_aggregation_by_groups_of_one_size(mode):
    """Then the mean over groups is the mean over responses."""
    b = batch(5)
    ids = torch.arange(2 * (len(b.ids) // 2)) // 2
    mask, loss = b.mask[: len(ids)], b.dense[: len(ids)]
    theirs = core.agg_loss(loss, mask.long(), mode, loss_scale_factor=17)
    weights = aggregation_weights(mask, ids, b.outcome[: len(ids)], **AGGREGATION[mode])
    close(apply_weights(loss, weights), theirs, 1e-7)


@pytest.mark.parametrize("mode", AGGREGATION)
@few
@seeds
def test_aggregation_over_micro_batches_and_ranks(mode, seed):
    """Theirs with the global counts handed in; ours with weights that were taken once."""
    b = batch(seed)
    weights = aggregation_weights(b.mask, one_group(b.mask), b.outcome, **AGGREGATION[mode])
    cut = len(b.mask) // 2
    for rows in (slice(None, cut), slice(cut, None)):
        theirs = core.agg_loss(
            b.dense[rows],
            b.ints[rows],
            mode,
            dp_size=2,
            batch_num_tokens=int(b.mask.sum()),
            global_batch_size=len(b.mask),
            loss_scale_factor=17,
        )
        close(2 * apply_weights(b.dense[rows], weights[rows]), theirs, 1e-7)


def test_difference_groups_of_unequal_size_weigh_alike():
    """A convention: our "seq_mean" is over a group's responses, then over groups, as in GRPO."""
    mask, ids = torch.ones(4, 1, dtype=torch.bool), torch.tensor([0, 0, 0, 1])
    loss = torch.tensor([[1.0], [1.0], [1.0], [5.0]])
    assert core.agg_loss(loss, mask.long(), "seq-mean-token-mean") == 2
    assert apply_weights(loss, aggregation_weights(mask, ids, loss[:, 0], rule="seq_mean")) == 3


def test_difference_rows_without_tokens_count_in_our_means():
    """A convention: N is what was sampled, whatever is masked; `valid` leaves rows out."""
    mask, loss = torch.tensor([[True], [False]]), torch.tensor([[1.0], [1.0]])
    ids = torch.zeros(2, dtype=torch.int64)
    assert core.agg_loss(loss, mask.long(), "seq-mean-token-mean").item() == pytest.approx(1)
    assert apply_weights(loss, aggregation_weights(mask, ids, loss[:, 0], rule="seq_mean")) == 0.5


def test_difference_a_batch_without_a_token():
    """A bug: 0 / 0 is NaN there; the loss is 0 for us."""
    mask, loss = torch.zeros(2, 1, dtype=torch.bool), torch.ones(2, 1)
    weights = aggregation_weights(mask, torch.arange(2), loss[:, 0], rule="token_mean")
    assert apply_weights(loss, weights) == 0
    for mode in AGGREGATION:
        assert core.agg_loss(loss, mask.long(), mode).isnan()


def actor(**options):
    return configs.ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **options)


LOSSES = {
    "vanilla": (
        lambda lp, b, a: ppo_clip(lp, b.old, a, clip_low=0.1, clip_high=0.3, dual_clip=3.0),
        dict(clip_ratio_low=0.1, clip_ratio_high=0.3),
    ),
    "vanilla, dual clip": (
        lambda lp, b, a: ppo_clip(lp, b.old, a, clip_low=0.1, clip_high=0.3, dual_clip=1.5),
        dict(clip_ratio_low=0.1, clip_ratio_high=0.3, clip_ratio_c=1.5),
    ),
    "vanilla, no dual clip": (
        lambda lp, b, a: ppo_clip(lp, b.old, a),
        dict(clip_ratio_c=1e9),
    ),
    "gspo": (
        lambda lp, b, a: gspo(lp, b.old, a, mask=b.mask, clip_low=0.03, clip_high=0.04),
        dict(clip_ratio_low=0.03, clip_ratio_high=0.04),
    ),
    "cispo": (
        lambda lp, b, a: cispo(lp, b.old, a, clip_low=0.2, clip_high=0.5),
        dict(clip_ratio_low=0.2, clip_ratio_high=0.5),
    ),
    "dppo_tv": (
        lambda lp, b, a: dppo_tv(
            lp, b.old, a, threshold_low=0.05, threshold_high=0.1, max_ratio=1.2
        ),
        dict(clip_ratio_low=0.05, clip_ratio_high=0.1, clip_ratio_c=1.2),
    ),
    "dppo_kl": (
        lambda lp, b, a: dppo_kl(
            lp, b.old, a, threshold_low=0.01, threshold_high=0.02, max_ratio=20.0
        ),
        dict(clip_ratio_low=0.01, clip_ratio_high=0.02, clip_ratio_c=20.0),
    ),
}


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", LOSSES)
@settings(few, max_examples=10)
@seeds
def test_policy_losses(name, weighted, mode, seed):
    """Value and gradient; importance weights multiply the token losses, in both."""
    ours, options = LOSSES[name]
    b = batch(seed)
    a = broadcast_advantages(b.outcome, b.mask)
    weights = aggregation_weights(b.mask, one_group(b.mask), b.outcome, **AGGREGATION[mode])
    lp = b.logp.clone().requires_grad_()
    loss = ours(lp, b, a)
    loss = apply_weights(loss * b.weights if weighted else loss, weights)
    loss.backward()
    lp_theirs = b.logp.clone().requires_grad_()
    theirs, _ = core.get_policy_loss_fn(name.partition(",")[0])(
        old_log_prob=b.old,
        log_prob=lp_theirs,
        advantages=a,
        response_mask=b.ints,
        loss_agg_mode=mode,
        config=actor(global_batch_info={"loss_scale_factor": 17}, **options),
        rollout_is_weights=b.weights if weighted else None,
    )
    theirs.backward()
    close(loss.detach(), theirs.detach(), 1e-7)
    close(lp.grad, lp_theirs.grad, 1e-7)


@settings(few, max_examples=10)
@seeds
def test_reinforce(seed):
    b = batch(seed)
    a = broadcast_advantages(b.outcome, b.mask)
    lp, lp_theirs = b.logp.clone().requires_grad_(), b.logp.clone().requires_grad_()
    weights = aggregation_weights(b.mask, one_group(b.mask), b.outcome, rule="token_mean")
    loss = apply_weights(reinforce(lp, a, b.weights), weights)
    loss.backward()
    theirs, _ = core.compute_policy_loss_reinforce(
        b.old, lp_theirs, a, b.ints, "token-mean", actor(), b.weights
    )
    theirs.backward()
    close(loss.detach(), theirs.detach())
    close(lp.grad, lp_theirs.grad)


@settings(few, max_examples=10)
@seeds
def test_a_corrected_and_masked_loss_end_to_end(seed):
    """Their bypass mode (weights by token, sequences by the geometric mean) from our parts.

    Their denominator is that of the kept tokens.
    """
    b = batch(seed)
    a = broadcast_advantages(b.outcome, b.mask)
    lp, lp_theirs = b.logp.clone().requires_grad_(), b.logp.clone().requires_grad_()
    log_ratio = b.logp - b.old
    importance, _ = importance_weights(log_ratio, b.mask, high=1.5)
    inside, _ = importance_weights(
        log_ratio, b.mask, level="geometric", outside="reject", low=1 / 1.2, high=1.2
    )
    keep = (inside > 0).any(1)
    weights = aggregation_weights(
        b.mask, b.ids, b.outcome, rule="token_mean", keep=keep, denominator="kept"
    )
    loss = apply_weights(reinforce(lp, a, importance), weights, keep)
    loss.backward()
    correction = dict(
        loss_type="reinforce",
        rollout_is="token",
        rollout_is_threshold=1.5,
        rollout_rs="seq_mean_k1",
        rollout_rs_threshold="1.2",
    )
    config = actor(policy_loss=configs.actor.PolicyLossConfig(rollout_correction=correction))
    theirs, metrics = core.compute_policy_loss_bypass_mode(
        b.old, lp_theirs, a, b.ints, "token-mean", config
    )
    if not keep.any():
        assert theirs.isnan() and loss == 0  # `test_difference_a_batch_without_a_token`
        return
    theirs.backward()
    close(loss.detach(), theirs.detach())
    close(lp.grad, lp_theirs.grad)
    masked = 1 - keep.double().mean().item()
    assert metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == pytest.approx(masked, abs=1e-6)


def test_difference_dppo_truncates_at_three_by_default():
    """A bug: their comment asks for a large bound and falls back to 20, the config always has 3."""
    lp, old = torch.full((1, 1), -1.0), torch.full((1, 1), -1 - math.log(10.0))
    a, mask = torch.full((1, 1), 1.0), torch.ones(1, 1, dtype=torch.int64)
    loss, _ = core.compute_policy_loss_dppo_tv(
        old, lp, a, mask, config=actor(clip_ratio_low=1.0, clip_ratio_high=1.0)
    )
    assert loss.item() == pytest.approx(3.0)
    ours = dppo_tv(lp, old, a, threshold_low=1.0, threshold_high=1.0)
    assert ours.item() == pytest.approx(10.0, rel=1e-5)


def test_difference_dppo_kl_near_probability_one():
    """Rounding: theirs takes 1 - p and adds 1e-8; ours takes expm1, so p is told from 1."""
    old = torch.tensor([[-1e-4]], dtype=torch.float64)
    lp = torch.tensor([[-1e-11]], dtype=torch.float64)
    a, mask = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.int64)
    threshold = 1.2e-3  # of 1e-4 (ln(1e-4 / 1e-11) - 1) = 1.5e-3, and theirs 0.8e-3
    options = dict(clip_ratio_low=threshold, clip_ratio_high=threshold, clip_ratio_c=20.0)
    theirs, _ = core.compute_policy_loss_dppo_kl(old, lp, a, mask, config=actor(**options))
    ours = dppo_kl(lp, old, a, threshold_low=threshold, threshold_high=threshold)
    assert theirs != 0 and ours == 0


def test_difference_gspo_clamps_the_log_ratio_at_ten():
    """A convention: theirs has no gradient beyond 10 nats, ours clamps at 20 as everything here."""
    lp, old = torch.full((1, 1), -1.0, requires_grad=True), torch.full((1, 1), -13.0)
    a, mask = -torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int64)
    loss, _ = core.compute_policy_loss_gspo(old, lp, a, mask, config=actor())
    assert loss.item() == pytest.approx(math.exp(10), rel=1e-5)
    assert torch.autograd.grad(loss, lp)[0] == 0
    ours = gspo(lp, old, a, mask=mask.bool())
    assert ours.item() == pytest.approx(math.exp(12), rel=1e-5)


@pytest.mark.parametrize("fn", [ppo_clip, gspo, cispo, dppo_tv, dppo_kl], ids=lambda f: f.__name__)
def test_difference_nan_at_a_masked_position_poisons_losses(fn):
    """A bug: their means over sequences mask by a product; only "token-mean" drops the NaN."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    lp, old = (torch.where(mask, x, NAN) for x in (-1.0, -1.1))
    a = mask.double()
    name = "vanilla" if fn is ppo_clip else fn.__name__
    theirs, _ = core.get_policy_loss_fn(name)(
        old, lp, a, mask.long(), "seq-mean-token-mean", actor()
    )
    assert theirs.isnan()
    lp = lp.requires_grad_()
    weights = aggregation_weights(mask, one_group(mask), a[:, 0], rule="seq_mean")
    loss = apply_weights(fn(lp, old, a, mask=mask), weights)
    loss.backward()
    assert loss.isfinite() and lp.grad.isfinite().all()
