"""The RL loop as a Lightning module: roll out, score, update; the rest is Lightning's.

One Lightning batch is one update: the numbers of its problems. Everything random in it is a
function of (seed, update, prompt), so a resumed run needs no generator state and two processes
sample what one would.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..optim import AdamMini, LengthTriggeredLR
from ..stability import group_metrics
from .ahead import RolloutsAhead
from .batch import RolloutBatch, collate
from .budget import SuccessRates, allocate_budget, budget_metrics
from .collect import Collected, Collector, ScoredGroup, decoded_fraction
from .config import RLConfig
from .data import problems_of_update, share_of
from .engines import make_engine
from .health import HealthWatch
from .lora import (
    add_adapters,
    base_view,
    copy_of_trained,
    fingerprint,
    is_adapter,
    refuse_other_base,
)
from .model_copy import ModelCopy
from .policy_update import PolicyUpdate
from .ranks import (
    check_shares,
    mean_over_ranks,
    refuse_precision,
    refuse_strategy,
    world_size,
)
from .rollout import RolloutEngine, refuse_engine
from .seeds import stable_seed
from .sharding import full_parameters, is_sharded, shard_policy
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
        policy: causal LM; trained in the dtype it comes in. Gets the adapters of policy.lora.
        tokenizer: turns prompts into ids once, and completions into text for the reward.
        task: gives the reward function and the stop text.
        teacher: of the loss imitation, with the policy's vocabulary; else None.

    Raises:
        ValueError: the advantage remax, and an environment that compares the rollouts of a group.
    """

    teacher: PreTrainedModel | None

    def __init__(
        self,
        config: RLConfig,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        # The update accumulates over parts of the batch and may take several steps.
        self.automatic_optimization = False
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        lora = config.policy.lora
        self.base_sha256: str | None = None  # of what checkpoints then leave out
        if lora is not None:
            self.base_sha256 = fingerprint(policy)
            add_adapters(policy, lora, stable_seed(config.seed, "lora"))
        self.policy.eval()  # dropout would make the trainer's log-probs differ from the engine's
        self.updates_done = 0
        self.skipped_updates = 0
        self.health = HealthWatch(config.health)
        self.last_groups: list[ScoredGroup] = []
        self.last_metrics: dict[str, float] = {}
        self.engine: RolloutEngine | None = None
        self.collector = Collector(config, task, tokenizer)
        turns = self.collector.turns
        if self._greedy and turns is not None and turns.compares_groups:
            raise ValueError(
                "update.advantage: expected another than remax with an environment that compares "
                "the rollouts of a group: the greedy one is alone"
            )
        self.reference: PreTrainedModel | None = None  # its weights are part of the checkpoint
        if config.update.reference is not None:
            copied = copy.deepcopy(policy) if lora is None else copy_of_trained(policy)
            self.reference = copied.eval().requires_grad_(False)
        object.__setattr__(self, "teacher", teacher)  # its weights are not
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        budget = config.rollout.budget
        self.success_rates: SuccessRates | None = None
        if budget is not None:
            self.success_rates = SuccessRates(
                decay=budget.decay, smoothing=budget.smoothing, threshold=budget.threshold
            )
        self.policy_update = self._make_policy_update()
        self.ahead = RolloutsAhead()
        self._budgets: dict[int, dict[str, float]] = {}  # metrics, of updates not yet computed

    # ---------------------------------------------------------------- Lightning's hooks

    def setup(self, stage: str) -> None:
        """Refuses what would not be exact, also for those who use the module without `Run`."""
        refuse_strategy(self.trainer.strategy, self.config.update, self.config.policy.lora)
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
        if isinstance(self.engine, ModelCopy):
            self.engine.to(self.device)
        if self.teacher is not None:
            self.teacher.to(self.device)
        self.policy_update.begin()
        needs_min_p = self.config.update.pruning is not None
        tempered = self.config.rollout.temperature != 1 or needs_min_p
        refuse_engine(
            self.engine.capabilities,
            processed=tempered,
            min_p=needs_min_p,
            tree=self.config.rollout.tree is not None,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = {"updates_done": self.updates_done, "skipped_updates": self.skipped_updates}
        if self.success_rates is not None:
            state["success_rates"] = self.success_rates.state_dict()
        if self.policy_update.replay is not None:
            state["replay"] = self.policy_update.replay.state_dict()
        state["health"] = self.health.state_dict()
        if (pending := self.ahead.pending()) is not None:  # by weights that no checkpoint has
            own = self.collector.state_of(pending)
            of_ranks: list[Any] = [own] * world_size()
            if world_size() > 1:
                dist.all_gather_object(of_ranks, own)
            state["pending"] = of_ranks
            state["budgets"] = self._budgets
        if self.base_sha256 is not None:
            state["base"] = {"sha256": self.base_sha256, "path": self.policy.name_or_path}
            checkpoint["state_dict"] = self.stored_weights()
        checkpoint["trimtab"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["trimtab"]
        self.refuse_base(checkpoint)
        if self.base_sha256 is not None:  # it is strict about what is missing
            frozen = {n: t for n, t in self.state_dict().items() if not is_adapter(n)}
            checkpoint["state_dict"] = frozen | checkpoint["state_dict"]
        self.updates_done, self.skipped_updates = state["updates_done"], state["skipped_updates"]
        if self.success_rates is not None:
            self.success_rates.load_state_dict(state["success_rates"])
        if self.policy_update.replay is not None:
            self.policy_update.replay.load_state_dict(state["replay"])
        if "health" in state:  # not in those of earlier versions
            self.health.load_state_dict(state["health"])
        if "pending" in state:
            own = state["pending"][self.global_rank]
            self.ahead.put(self.updates_done, self.collector.restored(own, "train"))
            self._budgets = state["budgets"]
        # A run is one Lightning epoch. If it had ended, more updates go on in that same epoch.
        loops = checkpoint["loops"]["fit_loop"]
        loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        for counts in loops["epoch_progress"].values():
            counts["processed"] = counts["completed"] = 0

    def go_back_to(self, checkpoint: dict[str, Any]) -> None:
        """As `on_load_checkpoint`, but the run goes on with the problems that follow.

        Args:
            checkpoint: of this run, from before.
        """
        kept = (self.updates_done, self.skipped_updates, self._budgets)
        self.ahead.drop()  # by weights that the policy no longer has
        self.on_load_checkpoint(checkpoint)
        self.ahead.drop()  # of problems that are done
        self.updates_done, self.skipped_updates, self._budgets = kept

    def stored_weights(self) -> dict[str, torch.Tensor]:
        """Tensors of a checkpoint by name: all, or with policy.lora those of the adapters."""
        state = self.state_dict()
        if self.base_sha256 is None:
            return state
        return {name: tensor for name, tensor in state.items() if is_adapter(name)}

    def refuse_base(self, checkpoint: dict[str, Any]) -> None:
        """Raises unless a checkpoint that leaves out the frozen base was made on this one.

        Args:
            checkpoint: of Lightning, with the state that `on_save_checkpoint` adds.

        Raises:
            ValueError: another base.
        """
        base = checkpoint["trimtab"].get("base")
        if base is not None and self.base_sha256 is not None:
            refuse_other_base(base, self.base_sha256, self.policy.name_or_path)

    def training_step(self, batch: tuple[int, list[int]], batch_index: int) -> None:
        """One update: rollouts of these problems, their rewards, and the optimizer's steps."""
        update, numbers = batch
        assert self.policy_update is not None
        self.health.begin(update)
        collected, waited = self._rollouts(update, numbers)
        groups = collected.groups
        rollouts = collate(
            [group.prompt_ids for group in groups],
            [group.number for group in groups],
            [group.samples for group in groups],
            [group.rewards for group in groups],
            self.device,
            greedy_rewards=[group.greedy_reward for group in groups] if self._greedy else None,
        )
        started = time.perf_counter()
        facts = self._rollout_facts(rollouts, collected)
        metrics: dict[str, float] = {}
        if facts["rollouts"]:
            metrics = self.policy_update.take(rollouts, facts)
        else:
            self.skip("no reward is left")
        facts |= self.health.finish(self.trainer, self)
        self.last_groups = groups
        self.updates_done = update + 1
        self._reset_reference()
        times = {
            "time/rollout": collected.rollout_seconds,
            "time/reward": collected.reward_seconds,
            "time/update": time.perf_counter() - started,
        }
        metrics |= self._budgets.pop(update, {})
        if self.config.rollout.asynchronous:
            times["time/wait"] = waited
        self.last_metrics = metrics | facts | {"skipped_updates": self.skipped_updates} | times
        # For the progress display and other callbacks. Every rank has the same values already:
        # reduced exactly, or averaged by mean_over_ranks.
        for name, value in (self.last_metrics | {"update": self.updates_done}).items():
            shown = name in SHOWN
            self.log(name, float(value), prog_bar=shown, logger=False, rank_zero_only=True)

    def on_train_end(self) -> None:
        """Where a limit stops the run, the rollouts on their way belong to its checkpoint."""
        self.ahead.pending()

    def teardown(self, stage: str) -> None:
        """Ends the reward process and frees the engine."""
        self.ahead.close()
        self.collector.close()
        if self.engine is not None:
            self.engine.close()

    # ---------------------------------------------------------------- the parts of an update

    def _make_policy_update(self) -> PolicyUpdate:
        return PolicyUpdate(self)

    def _make_engine(self) -> RolloutEngine:
        rollout = self.config.rollout
        folder = Path(self.trainer.default_root_dir)
        return make_engine(rollout, base_view(self.policy), folder, retries=rollout.server_retries)

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
                sum(reward is None for group in collected.groups for reward in group.all_rewards())
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
        tree = self.config.rollout.tree
        if tree is not None and len(batch):
            groups = groups | {"tree/decoded_fraction": decoded_fraction(collected.groups, tree)}
        return facts | mean_over_ranks(groups)

    @property
    def _greedy(self) -> bool:
        return self.config.update.advantage == "remax"

    def _rollouts(self, update: int, numbers: list[int]) -> tuple[Collected, float]:
        """Of this update, and the seconds that they kept the trainer waiting."""
        assert self.engine is not None
        handed_over = False
        if self.ahead.update == update:
            collected, waited = self.ahead.take()
        else:
            self.engine.update_weights(full_parameters(self.policy), version=update)
            handed_over = True
            started = time.perf_counter()
            collected = self._collector_of(update, numbers)()
            waited = time.perf_counter() - started
        self._observe_successes(collected.groups)
        following = update + 1
        if self.config.rollout.asynchronous and following < self.config.updates:
            if not handed_over:
                self.engine.update_weights(full_parameters(self.policy), version=update)
            numbers = problems_of_update(self.config, following)
            numbers = share_of(numbers, self.global_rank, world_size())
            self.ahead.start(following, self._collector_of(following, numbers))
        return collected, waited

    def _collector_of(self, update: int, numbers: list[int]) -> Callable[[], Collected]:
        """What collects an update's rollouts with the weights that the engine has."""
        assert self.engine is not None
        return partial(
            self.collector.collect,
            self.engine,
            "train",
            numbers,
            lambda number: stable_seed(self.config.seed, "rollout", update, number),
            counts=self._counts_of(update, numbers),
            greedy=self._greedy,
        )

    def _counts_of(self, update: int, numbers: list[int]) -> list[int] | None:
        """Rollouts of each of this process's problems; None: group_size of each."""
        budget, rollout = self.config.rollout.budget, self.config.rollout
        if budget is None or self.success_rates is None:
            return None
        everyone = problems_of_update(self.config, update)
        ids = [self.collector.task.problem("train", number).id for number in everyone]
        rates = self.success_rates.rates(ids)
        total = rollout.prompts * rollout.group_size
        counts = allocate_budget(rates, total, low=budget.low, high=budget.high)
        of_number = dict(zip(everyone, counts.tolist(), strict=True))
        metrics = budget_metrics(rates, counts)
        self._budgets[update] = {name: float(value) for name, value in metrics.items()}
        return [of_number[number] for number in numbers]

    def _observe_successes(self, groups: list[ScoredGroup]) -> None:
        if self.success_rates is None:
            return
        rows = [(group.problem.id, reward) for group in groups for reward in group.rewards]
        rewards = torch.tensor([torch.nan if reward is None else reward for _, reward in rows])
        self.success_rates.observe(
            [problem for problem, _ in rows],
            rewards,
            valid=rewards.isfinite(),
            process_group=dist.group.WORLD if world_size() > 1 else None,
        )

    def _reset_reference(self) -> None:
        """After so many updates the reference is the policy as it is now."""
        options = self.config.update.reference
        if self.reference is None or options is None or not options.reset_every:
            return
        if self.updates_done % options.reset_every == 0:
            self.reference.load_state_dict(self.policy.state_dict())

    def skip(self, why: str) -> None:
        """Counts and logs a step that is not taken.

        Args:
            why: for the log.
        """
        self.skipped_updates += 1
        logger.warning("a step of update %d is skipped: %s", self.updates_done + 1, why)


class _LinearWarmup:
    """Factor of LambdaLR: 1/n, 2/n, .. 1. A class, because a closure does not pickle."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps)
