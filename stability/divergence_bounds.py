"""Bounds on the error of the surrogate objective, from the divergences of two policies.

Shapes: T tokens of horizon. eps = largest token TV, delta = largest token KL, D = sums over a
sequence.

    classical_tv          2 T (T - 1) eps^2                     classical_kl   T (T - 1) delta
    coupling              4 min(1, eps) sum_t min(1, (t - 1) eps)
    pinsker_marginal_kl   4 min(1, sqrt(delta / 2)) sum_t min(1, sqrt((t - 1) delta / 2))
    pinsker_marginal_tv   4 min(1, eps) sum_t min(1, sqrt((t - 1) delta / 2))
    mixed_kl              4 T min(1, sqrt(delta / 2)) min(1, sqrt(D_kl / 2))
    mixed_tv              4 T min(1, eps) min(1, D_tv)
    adaptive              4 sum_t E[TV_t] min(1, (T - t) eps, sqrt((T - t) delta / 2))
    unified               the smallest of them

Source: arXiv 2512.23075.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._numerics import (
    agreed,
    check_mask,
    check_tokens,
    excess,
    k3,
    masked,
    maximum,
    mean_over,
    total,
)


def trust_region_bounds(
    horizon: int,
    max_kl: float,
    max_tv: float,
    sequence_kl: float,
    sequence_tv: float,
    *,
    token_tv: Tensor | None = None,
) -> dict[str, float]:
    """Upper bounds on the error of the surrogate objective, for rewards in [0, 1].

    A value above 1 certifies nothing: report it as an indicator.

    Args:
        horizon: T >= 1, tokens.
        max_kl: delta, the largest KL of one token, nats.
        max_tv: eps, the largest total variation of one token.
        sequence_kl: sum of the KL over the sequence, nats.
        sequence_tv: sum of the total variation over the sequence.
        token_tv: [horizon] expected total variation of the t-th token, for the adaptive bound;
            None: max_tv at every token, which can only raise it.

    Returns:
        `classical_tv`, `classical_kl`, `coupling`, `pinsker_marginal_kl`, `pinsker_marginal_tv`,
        `mixed_kl`, `mixed_tv`, `adaptive`, and `unified`, the smallest of them.

    Raises:
        ValueError: the horizon is below 1, or a divergence is negative or not finite.

    Source:
        arXiv 2512.23075.
    """
    if horizon != int(horizon) or horizon < 1:
        raise ValueError(f"expected horizon as a whole number >= 1, got {horizon}")
    scalars = dict(max_kl=max_kl, max_tv=max_tv, sequence_kl=sequence_kl, sequence_tv=sequence_tv)
    for name, value in scalars.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"expected {name} >= 0 and finite, got {value}")
    if token_tv is not None and tuple(token_tv.shape) != (horizon,):
        raise ValueError(f"expected token_tv [horizon] = ({horizon},), got {tuple(token_tv.shape)}")
    if token_tv is not None and not ((token_tv >= 0) & token_tv.isfinite()).all():
        raise ValueError("expected token_tv >= 0 and finite, got a value that is not")
    eps, pinsker = min(1.0, max_tv), min(1.0, math.sqrt(max_kl / 2))
    before = torch.arange(horizon, dtype=torch.float64)  # t - 1
    after = before.flip(0)  # T - t
    marginal_tv = (before * max_tv).clamp_max(1).sum().item()
    marginal_kl = (before * max_kl / 2).sqrt().clamp_max(1).sum().item()
    reach = (after * max_tv).minimum((after * max_kl / 2).sqrt()).clamp_max(1)
    tv = torch.full_like(after, eps) if token_tv is None else token_tv.double().cpu()
    bounds = {
        "classical_tv": 2 * horizon * (horizon - 1) * max_tv**2,
        "classical_kl": horizon * (horizon - 1) * max_kl,
        "coupling": 4 * eps * marginal_tv,
        "pinsker_marginal_kl": 4 * pinsker * marginal_kl,
        "pinsker_marginal_tv": 4 * eps * marginal_kl,
        "mixed_kl": 4 * horizon * pinsker * min(1.0, math.sqrt(sequence_kl / 2)),
        "mixed_tv": 4 * horizon * eps * min(1.0, sequence_tv),
        "adaptive": 4 * (tv * reach).sum().item(),
    }
    return bounds | {"unified": min(bounds.values())}


@torch.no_grad()
def trust_region_indicators(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    horizon: int | None = None,
    exact_kl: Tensor | None = None,
    exact_tv: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The bounds of `trust_region_bounds` on the divergences seen in a batch, for the log.

    Without the exact divergences a token's are estimated from its sample, KL by k3 and total
    variation by |rho - 1| / 2; their maxima over tokens are then no bounds of anything: watch where
    they go, and certify nothing by them.

    Args:
        log_ratio: [B, T] lp_train - lp_rollout of the sampled tokens, nats.
        mask: [B, T] bool.
        horizon: T, tokens; None: the longest response of the batch.
        exact_kl: [B, T] KL(pi_rollout || pi) at each token, nats.
        exact_tv: [B, T] total variation at each token, in [0, 1].
        process_group: the ranks whose rows form the batch; every one of them must call. None: this
            process alone.

    Returns:
        0-d fp64 tensors, empty when there is no token: `trust_region/max_kl`, `max_tv` (over
        tokens), `sequence_kl`, `sequence_tv` (mean over responses of their sums), and
        `trust_region/bound_NAME` for each bound; the expected TV of the adaptive one is the mean
        over responses at their t-th token, 0 behind their end.

    Raises:
        ValueError: shapes do not match, an unmasked input is not finite, or the horizon is shorter
            than a response.

    Source:
        arXiv 2512.23075; the estimates from samples are ours.
    """
    given = {"exact_kl": exact_kl, "exact_tv": exact_tv}
    with agreed(process_group, mask):
        check_mask(mask)
        check_tokens("log_ratio", log_ratio, mask)
        for name, exact in given.items():
            if exact is not None:
                check_tokens(name, exact, mask)
    lengths = mask.sum(1)
    longest = maximum(lengths.amax() if len(mask) else lengths.new_zeros(()), process_group)
    if not longest:
        return {}
    if horizon is not None and horizon < longest:
        raise ValueError(f"expected horizon >= {int(longest)}, the longest row, got {horizon}")
    log_rho = masked(log_ratio.double(), mask)
    kl = k3(log_rho) if exact_kl is None else exact_kl.double().clamp_min(0)
    tv = excess(log_rho).abs() / 2 if exact_tv is None else exact_tv.double().clamp_min(0)
    kl, tv = masked(kl, mask), masked(tv, mask)
    max_kl, max_tv = (
        maximum(x.amax() if x.numel() else x.new_zeros(()), process_group) for x in (kl, tv)
    )
    sequence_kl, sequence_tv = (mean_over(x.sum(1), mask.any(1), process_group) for x in (kl, tv))
    horizon = int(longest) if horizon is None else horizon
    own_index = (mask.cumsum(1) - 1).clamp_min(0)
    token_tv = tv.new_zeros(horizon).index_add(0, own_index.flatten(), tv.flatten())
    responses = total(mask.any(1).sum(), process_group)
    bounds = trust_region_bounds(
        horizon,
        max_kl.item(),
        max_tv.item(),
        sequence_kl.item(),
        sequence_tv.item(),
        token_tv=total(token_tv, process_group) / responses,
    )
    seen = dict(max_kl=max_kl, max_tv=max_tv, sequence_kl=sequence_kl, sequence_tv=sequence_tv)
    return {f"trust_region/{name}": value for name, value in seen.items()} | {
        f"trust_region/bound_{name}": log_rho.new_tensor(value) for name, value in bounds.items()
    }
