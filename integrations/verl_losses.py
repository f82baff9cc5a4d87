"""Policy losses of verl: a micro-batch of one rank, scaled by the counts of the whole step.

    trimtab_trust_region   ratio_policy_loss of the responses that trust_region_mask keeps
    trimtab_ppo_clip       ppo_clip        actor.clip_ratio_low, clip_ratio_high; dual: clip_ratio_c
    trimtab_gspo           gspo            the same two bounds
    trimtab_cispo          cispo           the same two bounds
    trimtab_dppo_tv        dppo_tv         the same two as thresholds, clip_ratio_c as max_ratio
    trimtab_dppo_kl        dppo_kl         the same
    trimtab_reinforce      reinforce

Shapes: B responses of the micro-batch, T tokens. Each takes what verl passes, by its names, [B, T]:
old_log_prob, log_prob, advantages, response_mask, and rollout_is_weights if rollout correction made
any, which multiply the loss; and returns the scalar and metrics. The scalar is verl's `agg_loss`
with the counts of all ranks and micro-batches (`config.global_batch_info`). A rejected response
adds nothing and stays in the counts, as in the paper. verl averages metrics over micro-batches, in
which all must be: those of one without a token (verl's padding) are 0, as verl's own, and
clip/signal_ratio, which is not always there, is left out.

old_log_prob is the trainer's own, so that trimtab_trust_region bounds what the steps on one batch
change; with algorithm.rollout_correction.bypass_mode=True it is the rollout engine's, and the mask
is of the mismatch between the two engines. Thresholds:

    actor_rollout_ref.actor.policy_loss._target_=trimtab.integrations.verl.TrustRegionPolicyLossConfig
    +actor_rollout_ref.actor.policy_loss.max_threshold=0.05

Not here: reval_loss, which needs V(s1), and rules of aggregation, which need uids that verl keeps
in the driver (verl_advantages.py has them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.utils.torch_functional import masked_mean
from verl.workers.config import PolicyLossConfig

from ..stability import (
    cispo,
    clip_metrics,
    dppo_kl,
    dppo_tv,
    gspo,
    ppo_clip,
    ratio_policy_loss,
    reinforce,
    trust_region_mask,
)

_Metrics = dict[str, Tensor]
_TokenLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Any], tuple[Tensor, _Metrics]]


@dataclass
class TrustRegionPolicyLossConfig(PolicyLossConfig):
    """verl's policy_loss section with the thresholds of trimtab_trust_region.

    Args:
        max_statistic: "k2", "k3" or "abs_log_ratio"; "exact_kl" needs distributions, which verl
            does not pass.
        max_threshold: upper bound on its maximum over a response's tokens.
        mean_statistic: of the same.
        mean_threshold: upper bound on its mean over a response's tokens.
        max_log_ratio: in (0, 20]; nats, beyond which a token has no gradient.

    Raises:
        ValueError: "exact_kl" is asked for, or a value is out of range.
    """

    max_statistic: str = "k2"
    max_threshold: float = 0.05
    mean_statistic: str = "k3"
    mean_threshold: float = 0.001
    max_log_ratio: float = 20.0

    def __post_init__(self) -> None:
        for name in ("max_statistic", "mean_statistic"):
            if getattr(self, name) == "exact_kl":
                raise ValueError(
                    f"policy_loss.{name}: expected k2, k3 or abs_log_ratio, found exact_kl, for "
                    "which verl passes no distributions"
                )
        # in the driver, before workers start: what the functions refuse
        token, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
        _rejecting(self, token, mask)
        ratio_policy_loss(token, token, token, max_log_ratio=self.max_log_ratio, mask=mask)


_OF_VERL = {field.name for field in fields(PolicyLossConfig)}
_THRESHOLDS = [f.name for f in fields(TrustRegionPolicyLossConfig) if f.name not in _OF_VERL]


def _trust_region(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
    section = config.policy_loss
    if not isinstance(section, TrustRegionPolicyLossConfig):  # verl's own, or a mapping
        given = {name: section.get(name) for name in _THRESHOLDS}
        section = TrustRegionPolicyLossConfig(**{n: x for n, x in given.items() if x is not None})
    keep, metrics = _rejecting(section, lp.detach() - old, mask)
    loss = ratio_policy_loss(lp, old, a, max_log_ratio=section.max_log_ratio, mask=mask)
    return torch.where(keep[:, None], loss, 0), metrics


def _rejecting(section: TrustRegionPolicyLossConfig, log_ratio: Tensor, mask: Tensor) -> Any:
    return trust_region_mask(
        log_ratio,
        mask,
        max_statistic=section.max_statistic,
        max_threshold=section.max_threshold,
        mean_statistic=section.mean_statistic,
        mean_threshold=section.mean_threshold,
    )


def _ppo_clip(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
    low, high = _bounds(config)
    metrics = clip_metrics(lp.detach() - old, a, mask, low, high)
    loss = ppo_clip(
        lp, old, a, clip_low=low, clip_high=high, dual_clip=config.clip_ratio_c, mask=mask
    )
    return loss, metrics


def _gspo(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
    low, high = _bounds(config)
    return gspo(lp, old, a, clip_low=low, clip_high=high, mask=mask), {}


def _cispo(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
    low, high = _bounds(config)
    return cispo(lp, old, a, clip_low=low, clip_high=high, mask=mask), {}


def _dppo_tv(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
    low, high = _bounds(config)
    return dppo_tv(
        lp, old, a, threshold_low=low, threshold_high=high, max_ratio=config.clip_ratio_c, mask=mask
    ), {}


def _dppo_kl(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
    low, high = _bounds(config)
    return dppo_kl(
        lp, old, a, threshold_low=low, threshold_high=high, max_ratio=config.clip_ratio_c, mask=mask
    ), {}


def _reinforce(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
    return reinforce(lp, a, mask=mask), {}


def _bounds(config: Any) -> tuple[float, float]:
    """As verl's losses read them."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    both = config.clip_ratio
    return both if low is None else low, both if high is None else high


def _policy_loss(token_loss: _TokenLoss) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """A loss of tokens as verl calls a policy loss."""
    names: list[str] = []  # of its metrics

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        mask = response_mask.bool()
        loss, found = token_loss(log_prob, old_log_prob, advantages, mask, config)
        if not names:
            token = torch.zeros(1, 1)
            names.extend(token_loss(token, token, token, token == 0, config)[1])
        if rollout_is_weights is not None:
            loss = loss * torch.where(mask, rollout_is_weights, 0)
        moved = torch.where(mask, old_log_prob - log_prob.detach(), 0)
        metrics = {"ppo_kl": masked_mean(moved, mask)}
        # verl 0.9 (Metric.aggregate_dp) refuses a metric that ranks have reported unequally often:
        # each micro-batch reports the same ones, whatever it holds
        metrics |= {name: found.get(name, torch.zeros(())) for name in names}
        scalar = agg_loss(
            loss_mat=loss, loss_mask=mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
        )
        return scalar, {f"actor/{name}": value.item() for name, value in metrics.items()}

    return policy_loss


LOSSES = {
    "trimtab_trust_region": _policy_loss(_trust_region),
    "trimtab_ppo_clip": _policy_loss(_ppo_clip),
    "trimtab_gspo": _policy_loss(_gspo),
    "trimtab_cispo": _policy_loss(_cispo),
    "trimtab_dppo_tv": _policy_loss(_dppo_tv),
    "trimtab_dppo_kl": _policy_loss(_dppo_kl),
    "trimtab_reinforce": _policy_loss(_reinforce),
}


def register_losses() -> None:
    """Makes LOSSES known to verl; again does no harm."""
    for name, loss in LOSSES.items():
        register_policy_loss(name)(loss)
