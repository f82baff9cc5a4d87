"""Accuracy of a policy on held-out problems, sampled and greedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from .loop import RLModule
from .rollout import RolloutEngine
from .seeds import stable_seed
from .sharding import full_parameters


@dataclass(frozen=True)
class Evaluation:
    """Results on the held-out problems.

    Args:
        sampled: mean reward of the samples; None, like the other means, when all rewards are lost.
        greedy: mean reward of the greedy answers.
        length: mean tokens of the samples.
        lost: rollouts without a reward, excluded from the means.
        by_label: share of the samples and mean reward of each label, for tasks that label answers.
    """

    sampled: float | None
    greedy: float | None
    length: float | None
    lost: int
    by_label: dict[str, tuple[float, float]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def evaluate(module: RLModule, engine: RolloutEngine, version: int) -> Evaluation:
    """Evaluates the module's policy as its engine samples it; every process takes a share.

    Args:
        module: policy, task and configuration.
        engine: takes the policy's weights.
        version: of those weights.

    Returns:
        The same Evaluation on every process.
    """
    config = module.config.evaluation
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    engine.update_weights(full_parameters(module.policy), version)
    numbers = range(rank, config.problems, world)
    label = getattr(module.collector.task, "label", None)
    sums: dict[str, list[float]] = {}  # name -> [sum, count]

    def add(name: str, value: float) -> None:
        entry = sums.setdefault(name, [0.0, 0.0])
        entry[0] += value
        entry[1] += 1

    for kind, changes in (
        ("sampled", {"n": config.samples, "tree": None}),
        ("greedy", {"n": 1, "temperature": 0.0, "tree": None}),
    ):
        collected = module.collector.collect(
            engine,
            "heldout",
            numbers,
            lambda number: stable_seed(module.config.seed, "heldout", number),
            **changes,
        )
        for group in collected.groups:
            rows = zip(group.samples, group.completions, group.rewards, strict=True)
            for sample, text, reward in rows:
                if reward is None:
                    add("lost", 1.0)
                    continue
                add(kind, reward)
                if kind == "sampled":
                    add("length", len(sample.token_ids))
                    if label is not None:
                        add(f"label/{label(text)}", reward)
    return _summary(_over_ranks(sums, world))


def _over_ranks(sums: dict[str, list[float]], world: int) -> dict[str, list[float]]:
    if world == 1:
        return sums
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, sums)
    total: dict[str, list[float]] = {}
    for found in gathered:
        for name, (value, count) in found.items():
            entry = total.setdefault(name, [0.0, 0.0])
            entry[0] += value
            entry[1] += count
    return total


def _summary(sums: dict[str, list[float]]) -> Evaluation:
    def mean(name: str) -> float | None:
        value, count = sums.get(name, (0.0, 0.0))
        return value / count if count else None

    samples = sums.get("sampled", [0.0, 0.0])[1]
    labels = sorted(name for name in sums if name.startswith("label/"))
    return Evaluation(
        sampled=mean("sampled"),
        greedy=mean("greedy"),
        length=mean("length"),
        lost=int(sums.get("lost", [0.0, 0.0])[1]),
        by_label={
            name.removeprefix("label/"): (sums[name][1] / samples, mean(name)) for name in labels
        },
    )
