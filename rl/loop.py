"""The RL loop as a Lightning module: roll out, score, update; the rest is Lightning's.

One Lightning batch is one update: the numbers of its problems. Everything random in it is a
function of (seed, update, prompt), so a resumed run needs no generator state and two processes
sample what one would.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..optim import AdamMini, LengthTriggeredLR
from ..stability import group_metrics
from ..triton_kernels.token_stats import TokenStats
from .batch import RolloutBatch, collate
from .collect import Collected, Collector, ScoredGroup, stable_seed
from .config import RLConfig
from .engine import TransformersEngine
from .objective import (
    Objective,
    batch_metrics,
    objective,
    policy_statistics,
    token_weights,
    trusted_rollouts,
)
from .prefix import SharedPrefix
from .prefix_waves import Wave, WaveOutput
from .ranks import (
    check_shares,
    mean_over_ranks,
    refuse_precision,
    refuse_strategy,
    world_size,
)
from .rollout import RolloutEngine, refuse_engine
from .server_engine import VLLMServerEngine
from .sharding import (
    all_reduce_gradients,
    full_parameters,
    is_sharded,
    shard_policy,
    take_part_in_backward,
)
from .tasks import Task

logger = logging.getLogger(__name__)

SHOWN = {
    "reward": "reward",
    "length": "length",
    "mismatch/abs_dlogp_mean": "mismatch",
    "lr": "lr",
}
"""What the progress display shows: the metric's name and its short one."""


class RLModule(pl.LightningModule):
    """Trains a policy on its own rollouts.

    Args:
        config: the run.
        policy: causal LM; trained in the dtype it comes in.
        tokenizer: turns prompts into ids once, and completions into text for the reward.
        task: gives the reward function and the stop text.
    """

    def __init__(
        self,
        config: RLConfig,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
    ) -> None:
        super().__init__()
        # The update accumulates over parts of the batch and may take several steps.
        self.automatic_optimization = False
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.policy.eval()  # dropout would make the trainer's log-probs differ from the engine's
        self.updates_done = 0
        self.skipped_updates = 0
        self.last_groups: list[ScoredGroup] = []
        self.last_metrics: dict[str, float] = {}
        self.engine: RolloutEngine | None = None
        self.shared_prefix: SharedPrefix | None = None
        self.collector = Collector(config, task, tokenizer)

    # ---------------------------------------------------------------- Lightning's hooks

    def setup(self, stage: str) -> None:
        """Refuses what would not be exact, also for those who use the module without `Run`."""
        refuse_strategy(self.trainer.strategy, self.config.update.head)
        refuse_precision(self.trainer.precision)
        check_shares(self.config.rollout.prompts, self.trainer.world_size)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer and its length-triggered schedule."""
        update = self.config.update
        options: dict[str, Any] = dict(lr=update.lr, betas=update.betas, eps=update.eps)
        if update.optimizer == "adam_mini":
            optimizer: torch.optim.Optimizer = AdamMini.for_model(
                self.policy, preset=update.blocks, weight_decay=update.weight_decay, **options
            )
        else:
            trained = [p for p in self.policy.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(
                [
                    {"params": [p for p in trained if p.ndim > 1]},
                    {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
                ],
                weight_decay=update.weight_decay,
                **options,
            )
        warmup = max(1, update.lr_warmup)
        base = torch.optim.lr_scheduler.LambdaLR(optimizer, _LinearWarmup(warmup))
        if update.length_rate is None:
            return {"optimizer": optimizer, "lr_scheduler": base}
        schedule = LengthTriggeredLR(
            optimizer,
            base,
            max_length=self.config.rollout.max_tokens,
            **dataclasses.asdict(update.length_rate),
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def configure_model(self) -> None:
        """Under FSDP2: copies the whole policy for the engine, then shards it."""
        if self.device_mesh is not None and not is_sharded(self.policy):
            self.engine = self._make_engine()
            shard_policy(self.policy, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Makes the engine; its copy of the policy, if it has one, is on the policy's device."""
        if self.engine is None:
            self.engine = self._make_engine()
        if isinstance(self.engine, TransformersEngine):
            self.engine.to(self.device)
        if self.config.update.route == "three_phase":
            self.shared_prefix = self._make_shared_prefix()
        needs_min_p = self.config.update.pruning is not None
        tempered = self.config.rollout.temperature != 1 or needs_min_p
        refuse_engine(self.engine.capabilities, processed=tempered, min_p=needs_min_p)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["trimtab"] = {
            "updates_done": self.updates_done,
            "skipped_updates": self.skipped_updates,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.updates_done = checkpoint["trimtab"]["updates_done"]
        self.skipped_updates = checkpoint["trimtab"]["skipped_updates"]
        # A run is one Lightning epoch. If it had ended, more updates go on in that same epoch.
        loops = checkpoint["loops"]["fit_loop"]
        loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        for counts in loops["epoch_progress"].values():
            counts["processed"] = counts["completed"] = 0

    def training_step(self, batch: tuple[int, list[int]], batch_index: int) -> None:
        """One update: rollouts of these problems, their rewards, and the optimizer's steps."""
        update, numbers = batch
        assert self.engine is not None
        self.engine.update_weights(full_parameters(self.policy), version=update)
        collected = self.collector.collect(
            self.engine,
            "train",
            numbers,
            lambda number: stable_seed(self.config.seed, "rollout", update, number),
        )
        groups = collected.groups
        rollouts = collate(
            [group.prompt_ids for group in groups],
            [group.number for group in groups],
            [group.samples for group in groups],
            [group.rewards for group in groups],
            self.device,
        )
        started = time.perf_counter()
        facts = self._rollout_facts(rollouts, collected)
        metrics: dict[str, float] = {}
        if facts["rollouts"]:
            metrics = self._update(rollouts, facts)
        else:
            self._skip("no reward is left")
        self.last_groups = groups
        self.updates_done = update + 1
        times = {
            "time/rollout": collected.rollout_seconds,
            "time/reward": collected.reward_seconds,
            "time/update": time.perf_counter() - started,
        }
        self.last_metrics = metrics | facts | {"skipped_updates": self.skipped_updates} | times
        # For the progress display and other callbacks. Every rank has the same values already:
        # reduced exactly, or averaged by mean_over_ranks.
        for name, value in (self.last_metrics | {"update": self.updates_done}).items():
            shown = name in SHOWN
            self.log(name, float(value), prog_bar=shown, logger=False, rank_zero_only=True)

    def teardown(self, stage: str) -> None:
        """Ends the reward process and frees the engine."""
        self.collector.close()
        if self.engine is not None:
            self.engine.close()

    # ---------------------------------------------------------------- the parts of an update

    def _make_engine(self) -> RolloutEngine:
        rollout = self.config.rollout
        if rollout.servers:
            return VLLMServerEngine(
                self.policy,
                rollout.servers,
                Path(self.trainer.default_root_dir) / "rollout-weights",
                dtype=getattr(torch, rollout.dtype),
                max_rows=rollout.max_rows,
                timeout=rollout.server_timeout,
            )
        return TransformersEngine(
            self.policy,
            dtype=getattr(torch, rollout.dtype),
            quantize_bits=rollout.quantize_bits,
            max_rows=rollout.max_rows,
        )

    def _make_shared_prefix(self) -> SharedPrefix:
        update, options = self.config.update, self.config.update.prefix
        return SharedPrefix(
            self.policy,
            prefix_memory=options.memory,
            wave_tokens=options.wave_tokens,
            min_bound=options.min_bound,
            verify=options.verify,
            head=update.head,
            temperature=self.config.rollout.temperature,
            prune=None if update.pruning is None else update.pruning.rho,
        )

    def _rollout_facts(self, batch: RolloutBatch, collected: Collected) -> dict[str, float]:
        """Means over the rollouts of all processes, exactly."""
        lengths = batch.mask.sum(-1)
        sums = torch.tensor(
            [
                len(batch),
                batch.rewards.sum().item(),
                lengths.sum().item(),
                lengths.square().sum().item(),
                batch.truncated.sum().item(),
                collected.errors,
                collected.timeouts,
                sum(r is None for group in collected.groups for r in group.rewards)
                - collected.errors
                - collected.timeouts,
            ],
            dtype=torch.float64,
            device="cpu" if self.device.type == "mps" else self.device,
        )
        if world_size() > 1:
            dist.all_reduce(sums)
        n, reward, length, squares, truncated, errors, timeouts, unscored = sums.tolist()
        facts = {
            "rollouts": n,
            "reward_errors": errors,
            "reward_timeouts": timeouts,
            "reward_none": unscored,  # the reward function's own None
        }
        if n:
            mean = length / n
            facts |= {
                "reward": reward / n,
                "length": mean,
                "length_std": max(0.0, squares / n - mean * mean) ** 0.5,
                "truncated": truncated / n,
            }
        groups = group_metrics(batch.rewards, batch.group_ids) if len(batch) else {}
        return facts | mean_over_ranks(groups)

    def _update(self, batch: RolloutBatch, facts: dict[str, float]) -> dict[str, float]:
        """The optimizer's steps on one batch of rollouts."""
        config, optimizer = self.config.update, self.optimizers()
        process_group = dist.group.WORLD if world_size() > 1 else None
        parts = self._parts(batch)
        old_logp = torch.zeros_like(batch.rollout_logp)
        metrics: dict[str, float] = {}
        for epoch in range(config.epochs):
            optimizer.zero_grad()
            keep = self._kept_rollouts(batch, parts)
            weights = token_weights(
                batch, config, self.config.rollout.max_tokens, process_group, keep
            )
            done: list[tuple[Tensor, Objective]] = []
            for rows in parts:
                if rows is None:
                    self._take_part()
                    continue
                part = batch.select(rows)
                of_part = partial(
                    self._objective,
                    part=part,
                    weights=weights[rows][:, : part.mask.shape[1]],
                    old_logp=old_logp,
                    rows=rows,
                    first=epoch == 0,
                )
                with self._without_gradient_sync():
                    done.append((rows, self._backward_of_part(part, of_part)))
            if self.shared_prefix is not None:
                metrics |= mean_over_ranks(self.shared_prefix.metrics())
            own = batch_metrics(done, batch, weights, old_logp, config) if done else {}
            found = mean_over_ranks(own)
            self._add_gradients_of_ranks()
            stepped = self._step(optimizer, found)
            prefix = f"epoch_{epoch + 1}/" if epoch else ""
            metrics |= {prefix + name: value for name, value in found.items()}
            if not stepped:
                self._skip("the gradient is not finite")
                break
        self._schedule(facts, metrics)
        return metrics

    def _objective(
        self,
        stats: TokenStats,
        part: RolloutBatch,
        weights: Tensor,
        old_logp: Tensor,
        rows: Tensor,
        first: bool,
    ) -> Objective:
        """Of some rows of the batch; in the first epoch their log-probs go to `old_logp` [B, T]."""
        width = part.mask.shape[1]
        if first:
            columns = torch.arange(width, device=self.device)
            old_logp[rows.nonzero(), columns] = stats.logp.detach().to(old_logp.dtype)
        return objective(stats, part, weights, old_logp[rows][:, :width], self.config.update)

    def _backward_of_part(
        self, part: RolloutBatch, of_part: Callable[[TokenStats], Objective]
    ) -> Objective:
        """Statistics of some whole groups, their objective, and its backward pass."""
        # reduce-scatter of FSDP2 averages; the weights already divide by global counts
        scale = world_size() if is_sharded(self.policy) else 1
        if self.shared_prefix is None:
            result = of_part(self._statistics(part))
            self.manual_backward(result.loss * scale)
            return result
        results: list[Objective] = []

        def loss(out: WaveOutput, _whole: Wave) -> Tensor:
            results.append(of_part(out.stats))
            return results[-1].loss * scale

        (prompt,) = part.prompts
        with self.shared_prefix.group(prompt) as group:
            # jointly: the token baseline is taken over the group
            group.accumulate(part.responses(), loss, joint=True, by=self.manual_backward)
        return results[-1]

    def _take_part(self) -> None:
        """What a process without a part does while the others have one (FSDP2)."""
        if self.shared_prefix is None:
            take_part_in_backward(self.policy)
        else:
            self.shared_prefix.idle_group(joint=True)

    def _without_gradient_sync(self) -> AbstractContextManager[None]:
        """DDP would average after each part; `_add_gradients_of_ranks` sums once, at the end."""
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            return strategy.block_backward_sync()
        return nullcontext()

    def _parts(self, batch: RolloutBatch) -> list[Tensor | None]:
        """[B] bool row masks of whole groups whose graphs are alive together.

        A sharded policy is called by all processes alike: those with fewer parts fill up with None.
        """
        size = self.config.update.micro_prompts or len(batch.prompts)
        if self.shared_prefix is not None:
            size = 1
        parts = [
            batch.rows_of_prompts(first, first + size)
            for first in range(0, len(batch.prompts), size)
        ]
        parts = [rows for rows in parts if rows.any()]
        if not is_sharded(self.policy):
            return parts
        count = torch.tensor(len(parts), device=self.device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return parts + [None] * (int(count) - len(parts))

    def _statistics(self, part: RolloutBatch) -> TokenStats:
        if self.shared_prefix is not None:
            (prompt,) = part.prompts
            with torch.no_grad(), self.shared_prefix.group(prompt) as group:
                return group.statistics(part.responses()).stats
        update, rollout = self.config.update, self.config.rollout
        return policy_statistics(self.policy, part, update, rollout.temperature)

    def _kept_rollouts(self, batch: RolloutBatch, parts: list[Tensor | None]) -> Tensor | None:
        """[B] bool for `denominator: kept`, which must be known before the first weight is."""
        region = self.config.update.trust_region
        if region is None or region.denominator == "total":
            return None
        keep = batch.mask.new_zeros(len(batch))
        with torch.no_grad():
            for rows in parts:
                if rows is None:
                    self._take_part()
                    continue
                part = batch.select(rows)
                keep[rows] = trusted_rollouts(self._statistics(part), part, self.config.update)[0]
        return keep

    def _add_gradients_of_ranks(self) -> None:
        """Sums gradients over the processes: the weights already divide by global counts."""
        if world_size() == 1 or is_sharded(self.policy):
            return
        all_reduce_gradients(list(self.policy.parameters()), average=False)

    def _step(self, optimizer: Any, metrics: dict[str, float]) -> bool:
        """Clips and steps; False, and no step, if the gradient is not finite."""
        config = self.config.update
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.parameters(), config.clip_norm or torch.inf
        )
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        metrics["grad_norm"] = float(norm)
        metrics["variance/signal"] = float(norm) ** 2
        metrics["lr"] = float(optimizer.param_groups[0]["lr"])
        if not torch.isfinite(norm):
            return False
        optimizer.step()
        return True

    def _schedule(self, facts: dict[str, float], metrics: dict[str, float]) -> None:
        schedule = self.lr_schedulers()
        if isinstance(schedule, LengthTriggeredLR):
            schedule.observe(  # it logs a surge itself
                facts["length"],
                facts["truncated"],
                mismatch=metrics.get("mismatch/k3"),
                grad_norm=metrics.get("grad_norm"),
            )
            metrics["length_rate/factor"] = schedule.factor
            metrics["length_rate/triggered"] = float(schedule.triggered_at is not None)
        schedule.step()

    def _skip(self, why: str) -> None:
        self.skipped_updates += 1
        logger.warning("a step of update %d is skipped: %s", self.updates_done + 1, why)


class _LinearWarmup:
    """Factor of LambdaLR: 1/n, 2/n, .. 1. A class, because a closure does not pickle."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps)
