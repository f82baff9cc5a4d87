"""Trust-region masking: does it survive a mismatch under which PPO-clip collapses?

    python benchmarks/claims/trust_region.py    # what came out: results/claims/trust_region.json

Source: arXiv 2512.23075. The demo's RL (`chain_sum_cpu`, 8 prompts x 8 rollouts, lr 5e-4), with
rollouts of a copy whose linear weights are rounded to int4: the mismatch. Pruning and the
length-triggered rate are off, advantages are the group-relative ones, in all arms:

    exact ppo_clip     the control: rollouts in fp32, no mismatch
    ppo_clip           ratio pi / pi_old with pi_old of the trainer: it does not see the mismatch
    trm                the paper's: loss A pi / pi_engine, whole rollouts masked, max k2 <= 0.05 and
                       mean k3 <= 0.001, divided by all rollouts
    trm, 20 x wider    the same with max k2 <= 1 and mean k3 <= 0.02

Every batch is used for two epochs, 30 batches. The rate and the epochs are those at which the
baseline was seen to collapse (seed 0, chosen before any TRM run of this length); at lr 1e-3 the
control collapses as well. Accuracy is held out (64 problems x 4 samples), of the trainer's own
policy in fp32. `peak` is the best mean reward of 5 updates in a row, `last` that of the last 5: a
collapse is accuracy below half of the control's mean. `kept` is the share of rollouts in the trust
region, `mismatch` the mean |d log p| of sampled tokens, in nats.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from common import Rows, mean_and_error, run_claim, train

from trimtab.rl import RLModule

CLAIM = "TRM trains on under a mismatch that makes PPO-clip collapse (arXiv 2512.23075)"
SHARED = [
    *("--rollout.group_size", "8", "--rollout.dtype", "float32", "--update.epochs", "2"),
    *("--update.lr", "5e-4", "--update.advantage", "group_mean"),
    *("--update.pruning", "null", "--update.length_rate", "null"),
    *("--evaluation.problems", "64"),
]
INT4 = ["--rollout.quantize_bits", "4"]
PPO = ["--update.loss", "ppo_clip", "--update.trust_region", "null"]
WIDER = "{max_threshold: 1.0, mean_threshold: 0.02}"


class IgnoresMismatch(RLModule):
    """PPO-clip as it is: the objective is told that the engine's log-probs are the trainer's."""

    def _objective(self, stats, part, weights, old_logp, rows, first):
        old = stats.logp.detach() if first else old_logp[rows][:, : part.mask.shape[1]]
        part = replace(part, rollout_logp=old.to(part.rollout_logp.dtype))
        return super()._objective(stats, part, weights, old_logp, rows, first)


ARMS = {
    "exact ppo_clip": (PPO, IgnoresMismatch),
    "ppo_clip": (PPO + INT4, IgnoresMismatch),
    "trm": (INT4, RLModule),
    "trm, 20 x wider": ([*INT4, "--update.trust_region", WIDER], RLModule),
}


def summary(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Of the updates' metrics."""
    rewards = [m["reward"] for m in metrics]
    means = [sum(rewards[i : i + 5]) / 5 for i in range(max(1, len(rewards) - 4))]
    kept = [m.get("trust_region/kept_sequences", 1.0) for m in metrics]
    gap = [m.get("mismatch/abs_dlogp_mean", 0.0) for m in metrics]
    return {
        "peak": max(means),
        "last": means[-1],
        "kept": sum(kept) / len(kept),
        "mismatch": sum(gap) / len(gap),
    }


def experiment(arguments: argparse.Namespace) -> tuple[Rows, str]:
    updates = "3" if arguments.quick else "30"
    rows: Rows = []
    accuracies: dict[str, list[float]] = {}
    for name, (options, kind) in ARMS.items():
        for seed in range(arguments.seeds):
            _, found = train(*SHARED, *options, "--updates", updates, seed=seed, module_class=kind)
            row = {"arm": name, "seed": seed, "accuracy": found["accuracy"]}
            row |= {"length": found["length"]} | summary(found["metrics"])
            rows.append(row | {"rewards": [round(m["reward"], 4) for m in found["metrics"]]})
            accuracies.setdefault(name, []).append(found["accuracy"])
    means = {name: mean_and_error(values) for name, values in accuracies.items()}
    half = means["exact ppo_clip"][0] / 2
    collapsed = {name: sum(v < half for v in values) for name, values in accuracies.items()}
    baseline = collapsed["ppo_clip"]
    masked = min(collapsed["trm"], collapsed["trm, 20 x wider"])
    if baseline == 0:
        word = "does not hold: no PPO-clip run collapsed, so there is nothing to be rescued from"
    elif masked < baseline:
        word = "holds" if collapsed["trm"] == 0 and baseline == arguments.seeds else "in part"
    else:
        word = "does not hold"
    said = "; ".join(
        f"{name}: {mean:.3f} +- {error:.3f}, {collapsed[name]} of {arguments.seeds} collapsed"
        for name, (mean, error) in means.items()
    )
    return rows, f"{word}: held-out accuracy {said}"


if __name__ == "__main__":
    run_claim(__doc__, CLAIM, experiment, full=3, quick=1)
