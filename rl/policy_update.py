"""The optimizer's steps on a batch of rollouts: parts, statistics, objective, backward, step.

A batch may be larger than what fits as one graph: it is taken in parts of whole groups, whose
weights were computed over the whole batch and all processes, so that the parts add up.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..optim import LengthTriggeredLR
from ..triton_kernels.token_stats import TokenStats
from .advantages import outcome_advantages
from .batch import RolloutBatch
from .config import RLConfig
from .objective import (
    Objective,
    Prepared,
    Statistics,
    batch_metrics,
    objective,
    policy_statistics,
    token_weights,
    trusted_rollouts,
)
from .prefix import SharedPrefix
from .prefix_waves import Wave, WaveOutput
from .ranks import mean_over_ranks, world_size
from .replay import ReplayBuffer
from .seeds import stable_seed
from .sharding import all_reduce_gradients, is_sharded, take_part_in_backward

if TYPE_CHECKING:
    from .loop import RLModule


class PolicyUpdate:
    """Steps of the policy's optimizer on rollouts; every process must call alike.

    Args:
        module: gives policy, reference, teacher, configuration, optimizer and schedule.
    """

    def __init__(self, module: RLModule) -> None:
        self.module, self.policy = module, module.policy
        self.run_config: RLConfig = module.config
        self.config = module.config.update
        self.shared_prefix: SharedPrefix | None = None
        self.reference_prefix: SharedPrefix | None = None
        replay = self.config.replay
        self.replay = None if replay is None else ReplayBuffer(replay.size)

    def begin(self) -> None:
        """Once the models are where, and sharded as, they are trained."""
        if self.config.route == "three_phase":
            self.shared_prefix = self._make_shared_prefix(self.policy, self.config.prefix.verify)
            if self.module.reference is not None:
                self.reference_prefix = self._make_shared_prefix(self.module.reference, "never")

    def take(self, batch: RolloutBatch, facts: dict[str, float]) -> dict[str, float]:
        """The optimizer's steps on one batch of rollouts, and on replayed ones.

        Args:
            batch: of this process; may be empty where another process has rollouts.
            facts: of the rollouts of all processes: `rollouts`, `length`, `truncated`.

        Returns:
            Metrics by name, the same on every process.
        """
        outcome, own = outcome_advantages(batch, self.config, self._process_group)
        metrics = mean_over_ranks(own)
        old_logp = torch.zeros_like(batch.rollout_logp)
        for epoch in range(self.config.epochs):
            found, stepped = self._step_on(batch, outcome, old_logp, first=epoch == 0)
            prefix = f"epoch_{epoch + 1}/" if epoch else ""
            metrics |= {prefix + name: value for name, value in found.items()}
            if not stepped:
                break
        if stepped:  # a batch that is not healthy would come back
            metrics |= self._step_on_replayed(batch, outcome, int(facts["rollouts"]))
        self._schedule(facts, metrics)
        return metrics

    def _step_on_replayed(
        self, batch: RolloutBatch, outcome: Tensor, count: int
    ) -> dict[str, float]:
        replay, options, module = self.replay, self.config.replay, self.module
        if replay is None or options is None:
            return {}
        replay.add(batch, outcome, self._process_group)
        metrics: dict[str, float] = {"replay/size": len(replay)}
        rank, world = (dist.get_rank(), world_size()) if world_size() > 1 else (0, 1)
        for i in range(options.updates):
            seed = stable_seed(self.run_config.seed, "replay", module.updates_done, i)
            replayed, targets = replay.sample(
                count, seed, rank=rank, world=world, device=module.device
            )
            old_logp = torch.zeros_like(replayed.rollout_logp)
            found, stepped = self._step_on(replayed, targets, old_logp, first=True)
            metrics |= {f"replay/{name}": value for name, value in found.items()}
            if not stepped:
                break
        return metrics

    def _step_on(
        self, batch: RolloutBatch, outcome: Tensor, old_logp: Tensor, *, first: bool
    ) -> tuple[dict[str, float], bool]:
        """One optimizer step: metrics, and whether it stepped; the first fills `old_logp`."""
        config, optimizer = self.config, self.module.optimizers()
        optimizer.zero_grad()
        parts = self._parts(batch)
        weights = token_weights(
            batch,
            outcome,
            config,
            self.run_config.rollout.max_tokens,
            self._process_group,
            self._kept_rollouts(batch, parts),
        )
        prepared = Prepared(batch, outcome, weights, old_logp)
        done: list[tuple[Tensor, Objective]] = []
        for rows in parts:
            if rows is None:
                self._take_part()
                continue
            with self._without_gradient_sync():
                done.append((rows, self._backward_of_part(prepared, rows, first)))
        metrics: dict[str, float] = {}
        if self.shared_prefix is not None:
            metrics = mean_over_ranks(self.shared_prefix.metrics())
        metrics |= mean_over_ranks(batch_metrics(done, prepared, config) if done else {})
        self._add_gradients_of_ranks()
        return metrics, self._step(optimizer, metrics)

    def _backward_of_part(self, prepared: Prepared, rows: Tensor, first: bool) -> Objective:
        """Statistics of some whole groups, their objective, and its backward pass."""
        # reduce-scatter of FSDP2 averages; the weights already divide by global counts
        scale = world_size() if is_sharded(self.policy) else 1
        part = prepared.select(rows)
        reference = self._reference_statistics(part.batch)

        def of_part(found: Statistics) -> Objective:
            now = part
            if first:
                old = found.policy.logp.detach().to(prepared.old_logp.dtype)
                columns = torch.arange(old.shape[1], device=old.device)
                prepared.old_logp[rows.nonzero(), columns] = old
                now = replace(part, old_logp=old)
            return self._objective(found._replace(reference=reference), now)

        if self.shared_prefix is None:
            temperature = self.run_config.rollout.temperature
            teacher = self.module.teacher
            result = of_part(
                policy_statistics(self.policy, part.batch, self.config, temperature, teacher)
            )
            self.module.manual_backward(result.loss * scale)
            return result
        results: list[Objective] = []

        def loss(out: WaveOutput, _whole: Wave) -> Tensor:
            results.append(of_part(Statistics(out.stats)))
            return results[-1].loss * scale

        (prompt,) = part.batch.prompts
        with self.shared_prefix.group(prompt) as group:
            # jointly: the token baseline is taken over the group
            backward = self.module.manual_backward
            group.accumulate(part.batch.responses(), loss, joint=True, by=backward)
        return results[-1]

    def _objective(self, found: Statistics, part: Prepared) -> Objective:
        return objective(found, part, self.config)

    @torch.no_grad()
    def _reference_statistics(self, batch: RolloutBatch) -> TokenStats | None:
        reference = self.module.reference
        if reference is None:
            return None
        if self.reference_prefix is not None:
            return _shared_statistics(self.reference_prefix, batch)
        temperature = self.run_config.rollout.temperature
        return policy_statistics(reference, batch, self.config, temperature).policy

    def _statistics(self, batch: RolloutBatch) -> TokenStats:
        if self.shared_prefix is not None:
            with torch.no_grad():
                return _shared_statistics(self.shared_prefix, batch)
        temperature = self.run_config.rollout.temperature
        return policy_statistics(self.policy, batch, self.config, temperature).policy

    def _kept_rollouts(self, batch: RolloutBatch, parts: list[Tensor | None]) -> Tensor | None:
        """[B] bool for `denominator: kept`, which must be known before the first weight is."""
        region = self.config.trust_region
        if region is None or region.denominator == "total":
            return None
        keep = batch.mask.new_zeros(len(batch))
        with torch.no_grad():
            for rows in parts:
                if rows is None:
                    self._take_part()
                    continue
                part = batch.select(rows)
                keep[rows] = trusted_rollouts(self._statistics(part), part, self.config)[0]
        return keep

    def _parts(self, batch: RolloutBatch) -> list[Tensor | None]:
        """[B] bool row masks of whole groups whose graphs are alive together.

        A sharded policy is called by all processes alike: those with fewer parts fill up with None.
        """
        size = self.config.micro_prompts or len(batch.prompts)
        if self.shared_prefix is not None:
            size = 1
        parts = [
            batch.rows_of_prompts(first, first + size)
            for first in range(0, len(batch.prompts), max(size, 1))
        ]
        parts = [rows for rows in parts if rows.any()]
        if not is_sharded(self.policy):
            return parts
        count = torch.tensor(len(parts), device=self.module.device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return parts + [None] * (int(count) - len(parts))

    def _take_part(self) -> None:
        """What a process without a part does while the others have one (FSDP2)."""
        if self.shared_prefix is None:
            take_part_in_backward(self.policy)
        else:
            self.shared_prefix.idle_group(joint=True)

    def _without_gradient_sync(self) -> AbstractContextManager[None]:
        """DDP would average after each part; `_add_gradients_of_ranks` sums once, at the end."""
        strategy = self.module.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            return strategy.block_backward_sync()
        return nullcontext()

    def _add_gradients_of_ranks(self) -> None:
        """Sums gradients over the processes: the weights already divide by global counts."""
        if world_size() == 1 or is_sharded(self.policy):
            return
        all_reduce_gradients(list(self.policy.parameters()), average=False)

    def _step(self, optimizer: Any, metrics: dict[str, float]) -> bool:
        """Clips and steps; False if the module's watch finds that something is not healthy."""
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.parameters(), self.config.clip_norm or torch.inf
        )
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        metrics["grad_norm"] = float(norm)
        metrics["variance/signal"] = float(norm) ** 2
        metrics["lr"] = float(optimizer.param_groups[0]["lr"])
        if not self.module.health.allows_step(metrics):
            return False
        optimizer.step()
        return self.module.health.check_state(self.policy.parameters(), optimizer.optimizer)

    def _schedule(self, facts: dict[str, float], metrics: dict[str, float]) -> None:
        schedule = self.module.lr_schedulers()
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

    def _make_shared_prefix(self, model: PreTrainedModel, verify: Any) -> SharedPrefix:
        update, options = self.config, self.config.prefix
        return SharedPrefix(
            model,
            prefix_memory=options.memory,
            wave_tokens=options.wave_tokens,
            min_bound=options.min_bound,
            verify=verify,
            head=update.head,
            temperature=self.run_config.rollout.temperature,
            prune=None if update.pruning is None else update.pruning.rho,
        )

    @property
    def _process_group(self) -> ProcessGroup | None:
        return dist.group.WORLD if world_size() > 1 else None


def _shared_statistics(shared: SharedPrefix, batch: RolloutBatch) -> TokenStats:
    """Of one prompt's rollouts, by phase A and waves; called without gradients."""
    (prompt,) = batch.prompts
    with shared.group(prompt) as group:
        return group.statistics(batch.responses()).stats
