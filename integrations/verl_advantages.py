"""Advantage estimators of verl: the whole batch in the driver, before it is split over ranks.

    trimtab_grpo, trimtab_dr_grpo, trimtab_rloo, trimtab_opo, trimtab_reinforce, trimtab_remax
                           of the summed rewards of each response
    trimtab_reinforce_pp, trimtab_reinforce_pp_baseline
                           of token rewards, with algorithm.gamma
    optimal_token_baseline, tir_optimal_token_baseline
                           verl's names, ours after `replace_estimators`

Shapes: B responses, T tokens. Each takes what verl passes, by its names: token_level_rewards and
response_mask [B, T], index [B] the uids of the prompts (numpy), config the section `algorithm`;
and gives advantages and returns, [B, T]. As in verl, the reward of a response is the sum over all
its positions, masked ones too: a response that rollout correction has masked still counts in its
group; those of token rewards ignore masked ones. Options are keys of `algorithm.trimtab`:

    +algorithm.trimtab.deviation=batch     trimtab_grpo
    +algorithm.trimtab.leave_one_out=true  the optimal token baselines, also tail=keep
    +algorithm.trimtab.aggregation=balanced
        any of them: multiplies advantages by `aggregation_weights` of this rule over those of
        "token_mean". verl's own token-mean then weighs by the rule, exactly, with every loss that
        is proportional to the advantage: ours, and vanilla, gspo, cispo and dppo of verl. It needs
        the batch in one optimizer step, and what is logged of advantages is weighted too.

tree_advantages is not here: verl passes no paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from verl.trainer.ppo import core_algos

from ..stability import (
    aggregation_weights,
    broadcast_advantages,
    dr_grpo_advantages,
    grpo_advantages,
    opo_advantages,
    optimal_token_baseline,
    reinforce_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
)

_Returned = tuple[Tensor, Tensor]
_Estimator = Callable[..., _Returned]


def _of_outcomes(compute: Callable[..., Tensor], *known: str) -> _Estimator:
    """An estimator from `compute(rewards [B], lengths [B], ids [B], **options)`, giving [B]."""

    def estimator(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        config: Any = None,
        index: np.ndarray | None = None,
        **_: Any,  # verl passes what the batch has for others
    ) -> _Returned:
        options = _options(config, *known)
        mask, ids = response_mask.bool(), _group_ids(index, response_mask)
        outcome = compute(token_level_rewards.sum(1), mask.sum(1), ids, **options)
        plain = broadcast_advantages(outcome, mask)
        return _weighted(plain, outcome, mask, ids, config), plain

    return estimator


def _of_tokens(compute: Callable[..., Tensor], *known: str) -> _Estimator:
    """An estimator from `compute(rewards [B, T], mask [B, T], ids [B], config, batch, **options)`.

    The side of a response in aggregation is that of its summed reward, whatever its tokens' signs.
    """

    def estimator(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        config: Any = None,
        index: np.ndarray | None = None,
        **batch: Any,
    ) -> _Returned:
        options = _options(config, *known)
        mask, ids = response_mask.bool(), _group_ids(index, response_mask)
        advantages = compute(token_level_rewards, mask, ids, config, batch, **options)
        outcome = dr_grpo_advantages(token_level_rewards.sum(1), ids)
        return _weighted(advantages, outcome, mask, ids, config), advantages

    return estimator


def _grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: np.ndarray | None = None,
    **_: Any,
) -> _Returned:
    if config is not None and not config.get("norm_adv_by_std_in_grpo", True):
        raise ValueError(
            "algorithm.norm_adv_by_std_in_grpo: expected True for trimtab_grpo, found False; "
            "without the deviation it is algorithm.adv_estimator=trimtab_dr_grpo"
        )
    estimator = _of_outcomes(lambda r, n, ids, **o: grpo_advantages(r, ids, **o), "deviation")
    return estimator(token_level_rewards, response_mask, config, index)


def _remax(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: np.ndarray | None = None,
    reward_baselines: Tensor | None = None,
    **_: Any,
) -> _Returned:
    """With verl's reward_baselines [B] as the rewards of greedy rows."""
    if reward_baselines is None:
        raise ValueError(
            "reward_baselines: expected the rewards of greedy responses, found none: verl samples "
            "them for algorithm.adv_estimator=remax with trainer.use_v1=False; keep that name and "
            "call trimtab.integrations.verl.replace_estimators('remax')"
        )

    def compute(rewards: Tensor, lengths: Tensor, ids: Tensor) -> Tensor:
        # a greedy row for each response: several in one prompt's group would be refused
        pairs = torch.arange(len(rewards), device=rewards.device).repeat(2)
        both = torch.cat([rewards, reward_baselines.to(rewards)])
        greedy = torch.arange(len(both), device=rewards.device) >= len(rewards)
        return remax_advantages(both, pairs, greedy)[0][: len(rewards)]

    return _of_outcomes(compute)(token_level_rewards, response_mask, config, index)


def _reinforce_pp(rewards: Tensor, mask: Tensor, ids: Tensor, config: Any, batch: Any) -> Tensor:
    return reinforce_pp_advantages(rewards, mask, gamma=_gamma(config))


def _reinforce_pp_baseline(
    rewards: Tensor, mask: Tensor, ids: Tensor, config: Any, batch: Any
) -> Tensor:
    return reinforce_pp_advantages(rewards, mask, gamma=_gamma(config), group_ids=ids)


def _gamma(config: Any) -> float:
    return 1.0 if config is None else float(config.get("gamma", 1.0))


def _token_baseline(alignment: Any) -> _Estimator:
    def compute(
        rewards: Tensor, mask: Tensor, ids: Tensor, config: Any, batch: Any, **options: Any
    ) -> Tensor:
        needed = ("old_log_probs", "sum_pi_squared")
        missing = [name for name in needed if batch.get(name) is None]
        if missing:
            raise ValueError(
                f"{', '.join(missing)}: expected statistics of the policy, found none: verl passes "
                "them to its names optimal_token_baseline and tir_optimal_token_baseline, with "
                "actor.calculate_sum_pi_squared=True and trainer.use_v1=False"
            )
        return optimal_token_baseline(
            rewards,
            mask,
            *(batch[name] for name in needed),
            ids,
            alignment=alignment,
            importance=batch.get("rollout_is_weights"),
            **options,
        )

    return _of_tokens(compute, "leave_one_out", "tail")


ESTIMATORS: dict[str, _Estimator] = {
    "trimtab_grpo": _grpo,
    "trimtab_dr_grpo": _of_outcomes(lambda r, n, ids: dr_grpo_advantages(r, ids)),
    "trimtab_rloo": _of_outcomes(lambda r, n, ids: rloo_advantages(r, ids)),
    "trimtab_opo": _of_outcomes(opo_advantages),
    "trimtab_reinforce": _of_outcomes(lambda r, n, ids: reinforce_advantages(r)),
    "trimtab_remax": _remax,
    "trimtab_reinforce_pp": _of_tokens(_reinforce_pp),
    "trimtab_reinforce_pp_baseline": _of_tokens(_reinforce_pp_baseline),
}
_REPLACEMENTS: dict[str, _Estimator] = {
    "optimal_token_baseline": _token_baseline("column"),
    "tir_optimal_token_baseline": _token_baseline("model_token"),
    "remax": _remax,
}


def register_estimators() -> None:
    """Makes ESTIMATORS known to verl; again does no harm."""
    for name, estimator in ESTIMATORS.items():
        core_algos.register_adv_est(name)(estimator)


def replace_estimators(*names: str) -> None:
    """Puts our estimators in the place of verl's, for what verl passes to its own names alone.

    Args:
        names: of "optimal_token_baseline", "tir_optimal_token_baseline" and "remax".

    Raises:
        ValueError: another name; nothing has been replaced then.
    """
    unknown = [name for name in names if name not in _REPLACEMENTS]
    if unknown:
        raise ValueError(f"names: expected of {list(_REPLACEMENTS)}, found {unknown}")
    for name in names:  # verl's decorator refuses a name that is taken
        core_algos.ADV_ESTIMATOR_REGISTRY[name] = _REPLACEMENTS[name]


def _weighted(
    advantages: Tensor, outcome: Tensor, mask: Tensor, ids: Tensor, config: Any
) -> Tensor:
    """`advantages` times what makes verl's token-mean weigh as the rule says."""
    rule = _section(config).get("aggregation")
    if rule is None:
        return advantages
    _check_one_step(config, len(mask))
    # rows without a token are verl's padding, which is in no mean
    weights = aggregation_weights(mask, ids, outcome, rule=rule, valid=mask.any(1))
    return advantages * weights * mask.sum()


def _check_one_step(config: Any, size: int) -> None:
    """The rule's counts are the batch's, and so must be the optimizer step's and verl's."""

    def found(key: str) -> Any:
        return OmegaConf.select(config, f"..{key}")  # from the section's parent

    actor = "actor_rollout_ref.actor"
    if not isinstance(config, DictConfig) or found(actor) is None:
        raise ValueError(
            "algorithm.trimtab.aggregation: expected verl's whole configuration around the section "
            f"algorithm, found {type(config).__name__} alone"
        )
    mode, rejection = found(f"{actor}.loss_agg_mode"), config.get("rollout_correction")
    if mode != "token-mean":
        raise ValueError(
            "algorithm.trimtab.aggregation: expected actor.loss_agg_mode=token-mean, which it "
            f"re-weighs, found {mode}"
        )
    rows, step = found("data.train_batch_size"), found(f"{actor}.ppo_mini_batch_size")
    if rows != step:
        raise ValueError(
            "algorithm.trimtab.aggregation: expected the batch in one optimizer step, found "
            f"data.train_batch_size={rows} and actor.ppo_mini_batch_size={step}"
        )
    step *= found("actor_rollout_ref.rollout.n") or 1
    if size > step:  # agents whose sessions give several rows
        raise ValueError(
            "algorithm.trimtab.aggregation: expected the batch in one optimizer step, found "
            f"{size} rows and steps of {step} (ppo_mini_batch_size * rollout.n)"
        )
    if rejection is not None and rejection.get("rollout_rs") is not None:
        raise ValueError(
            "algorithm.trimtab.aggregation: expected rollout_correction.rollout_rs=null, as verl "
            f"counts the rejected tokens too, found {rejection.get('rollout_rs')}"
        )


def _group_ids(index: np.ndarray | None, like: Tensor) -> Tensor:
    if index is None:
        raise ValueError("index: expected the uid of every response's prompt, found none")
    numbers = np.unique(index, return_inverse=True)[1].reshape(-1)
    return torch.from_numpy(numbers).to(like.device)


def _section(config: Any) -> Mapping[str, Any]:
    section = (None if config is None else config.get("trimtab", None)) or {}
    if not isinstance(section, Mapping):
        raise ValueError(
            "algorithm.trimtab: expected options (+algorithm.trimtab.aggregation=balanced), found "
            f"{section!r}"
        )
    return section


def _options(config: Any, *known: str) -> dict[str, Any]:
    """The options of an estimator in `algorithm.trimtab`; of no other."""
    section = dict(_section(config))
    unknown = sorted(section.keys() - {"aggregation", *known})
    if unknown:
        raise ValueError(
            f"algorithm.trimtab: expected of {sorted({'aggregation', *known})} with this "
            f"adv_estimator, found {unknown}"
        )
    return {name: value for name, value in section.items() if name != "aggregation"}
