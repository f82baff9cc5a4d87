"""TRL's GRPOTrainer with the remedies of trimtab.stability, each a keyword argument.

    trainer = StabilityGRPOTrainer(
        model, reward_funcs, args=GRPOConfig(scale_rewards="none"), train_dataset=dataset,
        token_baseline={"leave_one_out": True}, aggregation={"rule": "balanced"},
        length_trigger={}, monitors=StabilityWatch([GradientNormMonitor()]),
    )

Without any of them it is GRPOTrainer, bit for bit. `StabilityOptions` says what each does and what
of TRL's own options it contradicts. For another base class: `class Mine(StabilityMixin, Base)`.

How a step goes, of TRL 1.16 (read and run; the methods are private there):
* `_generate_and_score_completions` makes rows; ours adds per row what is needed later, in the same
  dict, so that TRL's shuffling and splitting take it along;
* `_prepare_inputs` hands out micro-batches of buffered rows; ours weighs the tokens of each
  accumulated step when the buffer is new, over all its micro-batches and processes;
* `_compute_loss` takes [B, T] advantages and multiplies them by a token's loss before it sums. So a
  weight goes into the advantage (every loss of TRL is homogeneous in it), a dropped token into
  `tool_mask`. The log-probabilities that decide what is dropped are those the loss uses: computed
  once, and handed to TRL when it asks.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from ..stability import (
    aggregation_weights,
    gradient_variance_proxy,
    mismatch_report,
    optimal_token_baseline,
    out_of_set_mask,
    pruning_metrics,
    sign_length_metrics,
    trust_region_mask,
)
from ..triton_kernels.token_stats import TokenStats
from .trl_options import StabilityOptions, checked_args
from .trl_prefix import SharedPrefixGRPOTrainer
from .trl_statistics import completion_statistics
from .trl_steps import StepsMixin

_logger = logging.getLogger(__name__)


class StabilityMixin(StepsMixin):
    """In front of GRPOTrainer or of a class made of it: remedies of trimtab.stability.

    Args:
        model: of GRPOTrainer.
        reward_funcs: of GRPOTrainer.
        args: of GRPOTrainer.
        *more: of GRPOTrainer.
        **kwargs: the fields of StabilityOptions; others are of GRPOTrainer.

    Raises:
        TypeError: an option has another type or an unknown name.
        ValueError: an option is out of range, or contradicts one of TRL's, of the model, of the
            distribution or of the base class.

    Source: each remedy names its own, see StabilityOptions.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *more: Any,
        **kwargs: Any,
    ) -> None:
        given = {f.name: kwargs.pop(f.name) for f in fields(StabilityOptions) if f.name in kwargs}
        self.stability = StabilityOptions(**given)
        self._scored: tuple[Tensor, Tensor | None, Tensor | None] | None = None
        self._rewards: Tensor | None = None
        self._said_missing = False
        if self.stability.active:
            if args is None:  # as GRPOTrainer makes it
                name = model if isinstance(model, str) else model.config._name_or_path
                args = GRPOConfig(f"{name.split('/')[-1]}-GRPO")
            own_rollouts = kwargs.get("rollout_func") is not None
            args = checked_args(self.stability, args, own_rollouts)
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        if self.stability.active:
            self._refuse()
        self._start_steps()

    def _refuse(self) -> None:
        options, shared = self.stability, isinstance(self, SharedPrefixGRPOTrainer)
        order = type(self).__mro__
        for refused, expected in (
            (
                shared and order.index(StabilityMixin) > order.index(SharedPrefixGRPOTrainer),
                "StabilityMixin before SharedPrefixGRPOTrainer in the bases",
            ),
            (
                shared and options.pruning is not None,
                "pruning=None with SharedPrefixGRPOTrainer, whose groups report no safe set to it",
            ),
            (
                self._is_vlm and (options.acts_on_loss or options.reads_hidden),
                "a model of text alone, found a processor of images",
            ),
            (
                options.reads_hidden and (self.is_deepspeed_enabled or self.is_fsdp_enabled),
                "no DeepSpeed or FSDP with pruning, token_baseline or VarianceMonitor, which read "
                "the whole weight of the head",
            ),
            (
                options.length_trigger is not None and self.is_deepspeed_enabled,
                "no DeepSpeed with length_trigger, whose factor acts by hooks of a torch optimizer",
            ),
            (
                options.pruning is not None and self.aux_loss_enabled,
                "args.router_aux_loss_coef=0 with pruning, whose call returns no loss of routers",
            ),
        ):
            if refused:
                raise ValueError(f"{type(self).__name__}: expected {expected}")

    # Samples -------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args, **kwargs)  # [all processes' rows, funcs]
        return self._rewards

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        options = self.stability
        if options.aggregation is None and not options.reads_sampled:
            return out
        size = self.num_generations if self.model.training else self.num_generations_eval
        start = self.accelerator.process_index * len(inputs)
        rows = torch.arange(start, start + len(inputs), device=out["completion_ids"].device)
        out["group_ids"] = rows // size
        out["scored"] = ~self._rewards[rows].isnan().all(1)  # TRL's advantage of others is 0
        out["outcome_advantages"] = out["advantages"]
        if options.reads_sampled:
            self._score_tokens(out, self._rewards[rows])
        return out

    @torch.no_grad()
    def _score_tokens(self, out: dict[str, Any], rewards: Tensor) -> None:
        """Replaces the advantages by the token baseline's, and measures their variance."""
        mask = _mask(out)
        ids, attention = _sequences(out)
        stats = self._statistics(
            self.model, ids, attention, mask.shape[1], rows=self.args.per_device_train_batch_size
        )
        if self.stability.token_baseline is not None:
            weights = self.reward_weights.to(rewards.device)
            last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), 0).amax(1)
            outcome = (rewards * weights).nansum(1, keepdim=True).to(stats.logp.dtype)
            importance = out.get("importance_sampling_ratio")
            out["advantages"] = optimal_token_baseline(
                torch.zeros_like(stats.logp).scatter(1, last[:, None], outcome),
                mask,
                stats.logp,
                stats.sum_p2,
                out["group_ids"],
                importance=None if importance is None else importance.expand(mask.shape),
                valid=out["scored"],
                process_group=self._group,
                **self.stability.token_baseline,
            )
        if self.stability.measures_variance:
            advantages = _by_token(out["advantages"]).expand(mask.shape)
            self._report(
                gradient_variance_proxy(
                    advantages, stats.logp, stats.sum_p2, mask, process_group=self._group
                )
            )

    def _statistics(
        self, model: nn.Module, ids: Tensor, attention: Tensor, width: int, rows: int | None = None
    ) -> TokenStats:
        return completion_statistics(
            model,
            self.accelerator.unwrap_model(model),
            ids,
            attention,
            width,
            temperature=self.temperature,
            prune=self.stability.rho,
            rows=rows,
            autocast=self.accelerator.autocast,
        )

    # Micro-batches -------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if self.stability.aggregation is not None and "loss_weights" not in inputs:
            if self.model.training:
                steps = self.args.gradient_accumulation_steps
                buffered = self._buffered_inputs
                for start in range(0, len(buffered), steps):
                    self._weigh(buffered[start : start + steps])
            else:
                self._weigh([inputs])
        return inputs

    def _weigh(self, batches: list[dict[str, Any]]) -> None:
        """Gives the micro-batches of one step, on all processes, the weights of their tokens."""
        names = ("group_ids", "outcome_advantages", "scored")
        ids, advantages, scored = (torch.cat([batch[n] for batch in batches]) for n in names)
        mask = torch.cat([_mask(batch) for batch in batches])
        weights = aggregation_weights(
            mask,
            ids,
            advantages,
            valid=scored,
            process_group=self._group,
            **{"max_length": self.max_completion_length} | dict(self.stability.aggregation),
        )
        sizes = [len(batch["group_ids"]) for batch in batches]
        for batch, part in zip(batches, weights.split(sizes), strict=True):
            batch["loss_weights"] = part
        if "coupling/share" in self.stability.watched:
            self._report(
                sign_length_metrics(weights, advantages, mask, ids, process_group=self._group)
            )

    # Loss ----------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self._scored is not None:
            scored, self._scored = self._scored, None
            return scored
        if self.stability.pruning is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy,
                **others,
            )  # fmt: skip
        stats = self._statistics(model, input_ids, attention_mask, logits_to_keep, batch_size)
        if torch.is_grad_enabled():
            self._report_pruning(stats, attention_mask[:, -logits_to_keep:].bool())
        return stats.logp, stats.entropy if compute_entropy else None, None

    def _report_pruning(self, stats: TokenStats, mask: Tensor) -> None:
        self._report(pruning_metrics(stats, mask, process_group=self._group))

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if not self.stability.acts_on_loss:
            return super()._compute_loss(model, inputs)
        inputs, mask = dict(inputs), _mask(inputs)
        scored, mask = self._score(model, inputs, mask)
        logp = scored[0]
        rollout = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        if self.stability.measures_mismatch and self.model.training:
            known = self._known(mask, inputs.get("sampling_per_token_logps"))
            report = mismatch_report(logp.detach(), inputs["sampling_per_token_logps"], known)
            self._mismatch = report if self._mismatch is None else self._mismatch + report
        if self.stability.trust_region is not None:
            known = self._known(mask, rollout)
            keep, metrics = trust_region_mask(
                logp.detach() - rollout,
                known,
                process_group=self._group,
                **self.stability.trust_region,
            )
            self._report(metrics)
            mask = mask & keep[:, None]
        inputs["tool_mask"] = mask.to(inputs["completion_mask"].dtype)
        extra = 0.0
        if "loss_weights" in inputs:
            extra = self._weighted(inputs, mask, logp)
        self._scored = scored
        try:
            return super()._compute_loss(model, inputs) + extra
        finally:
            self._scored = None

    def _score(
        self, model: nn.Module, inputs: dict[str, Any], mask: Tensor
    ) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Tensor]:
        """What TRL will ask for, and the tokens that train under the pruned vocabulary."""
        ids, attention = _sequences(inputs)
        if self.stability.pruning is None:
            scored = self._get_per_token_logps_and_entropies(
                model, ids, attention, mask.shape[1], compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled,
            )  # fmt: skip
            return scored, mask
        stats = self._statistics(model, ids, attention, mask.shape[1])
        self._report_pruning(stats, inputs["completion_mask"].bool())
        kept, metrics = out_of_set_mask(
            stats.in_safe_set, mask, policy=self.stability.out_of_set, process_group=self._group
        )
        self._report(metrics)
        return (stats.logp, stats.entropy, None), kept

    def _known(self, mask: Tensor, rollout: Tensor | None) -> Tensor:
        """The tokens of `mask` whose log-probability when sampled is known."""
        if rollout is None:
            raise ValueError(
                "trust_region, monitors: expected log-probabilities of the samples (use_vllm, or a "
                "rollout_func whose logprobs are not None), found none"
            )
        known = mask & rollout.isfinite()
        if not self._said_missing and not known.equal(mask):
            self._said_missing = True
            _logger.warning(
                "the engine reported no finite log-probability for %d of %d tokens: such tokens "
                "have no part in the trust region and in the mismatch (TRL corrects nothing there)",
                int((mask & ~known).sum()), int(mask.sum()),
            )  # fmt: skip
        return known

    def _weighted(self, inputs: dict[str, Any], mask: Tensor, logp: Tensor) -> Tensor | float:
        """Puts the weights into the advantages; what the KL penalty then lacks, as a loss."""
        ranks = self.accelerator.num_processes  # whose gradients will be averaged
        divisor = inputs["num_items_in_batch"].clamp(min=1.0) / ranks  # as TRL computes it
        if self.model.training:
            steps = self.current_gradient_accumulation_steps
            divisor = divisor * steps / self.args.steps_per_generation
        weights = inputs["loss_weights"] * ranks
        inputs["advantages"] = _by_token(inputs["advantages"]) * weights * divisor
        if self.beta == 0.0:
            return 0.0
        kl = self._penalty(inputs, mask, logp)
        return self.beta * (torch.where(mask, weights - 1 / divisor, 0.0) * kl).sum()

    def _penalty(self, inputs: dict[str, Any], mask: Tensor, logp: Tensor) -> Tensor:
        """[B, T] the KL penalty that TRL adds to a token's loss."""
        log_ratio = torch.where(mask, inputs["ref_per_token_logps"] - logp, 0.0)
        kl = log_ratio.exp() - log_ratio - 1
        if not self.args.use_bias_correction_kl:
            return kl
        drift = torch.where(mask, logp - inputs.get("old_per_token_logps", logp.detach()), 0.0)
        if self.importance_sampling_level == "sequence":
            drift = drift.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return kl * drift.exp()


class StabilityGRPOTrainer(StabilityMixin, GRPOTrainer):
    """GRPOTrainer with the remedies of trimtab.stability; see StabilityMixin for its arguments."""


def _mask(inputs: dict[str, Any]) -> Tensor:
    """[B, T] bool: the tokens that TRL's loss counts."""
    mask = inputs["completion_mask"]
    return (mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]).bool()


def _sequences(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """[B, P + T] ids and attention mask of prompts and completions."""
    return (
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
    )


def _by_token(advantages: Tensor) -> Tensor:
    """[B, T], or [B, 1] of one advantage per row."""
    return advantages if advantages.ndim == 2 else advantages[:, None]
