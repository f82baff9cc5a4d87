"""Length-triggered rate: does it prevent the collapse at a high rate, and is the trigger needed?

    python benchmarks/claims/length_rate.py    # what came out: results/claims/length_rate.json

Source: arXiv 2602.01826 (read in part). The demo's RL (`chain_sum_cpu`, 8 prompts x 8 rollouts, no
trust region) at lr 1e-3, five times the recipe's, 45 updates:

    constant    the rate after its linear warm-up of 5 updates
    triggered   halved every 1.8 S updates (the paper's period) after the surge of the length at
                update S; the detector is the recipe's (1.5 times the mean of 5 updates, smoothed)
    clock       the control: halved every 15 updates from the start, whatever the length does

Both decays have the floor of a tenth. `mean factor` is the mean rate over the largest. Accuracy is
held out (64 problems x 4 samples, fp32). `peak` is the best mean reward of 5 updates in a row,
`last` that of the last 5; a run has collapsed if its accuracy is below half of its own peak.
"""

from __future__ import annotations

import argparse

import torch
from common import Rows, mean_and_error, run_claim, train

from trimtab.rl import RLModule

CLAIM = (
    "at lr 1e-3 a length-triggered decay prevents the collapse of a constant rate (arXiv "
    "2602.01826); its control is the same decay by the clock"
)
PERIOD, WARMUP = 15, 5
SHARED = [
    *("--rollout.group_size", "8", "--rollout.dtype", "bfloat16"),
    *("--update.trust_region", "null", "--evaluation.problems", "64"),
]
CONSTANT = ["--update.length_rate", "null"]
TRIGGERED = ["--update.length_rate", "{warmup: 5, ratio: 1.5, smoothing: 0.5, period_factor: 1.8}"]


class ByTheClock(RLModule):
    """Halves the rate every PERIOD updates."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()

        def factor(update: int) -> float:
            return min(1.0, (update + 1) / WARMUP) * max(0.1, 0.5 ** (update // PERIOD))

        schedule = torch.optim.lr_scheduler.LambdaLR(configured["optimizer"], factor)
        return configured | {"lr_scheduler": schedule}


ARMS = {
    "constant": (["--update.lr", "1e-3", *CONSTANT], RLModule),
    "triggered": (["--update.lr", "1e-3", *TRIGGERED], RLModule),
    "clock": (["--update.lr", "1e-3", *CONSTANT], ByTheClock),
}


def experiment(arguments: argparse.Namespace) -> tuple[Rows, str]:
    updates = "8" if arguments.quick else "45"
    rows: Rows = []
    for name, (options, kind) in ARMS.items():
        for seed in range(arguments.seeds):
            _, found = train(*SHARED, *options, "--updates", updates, seed=seed, module_class=kind)
            metrics = found["metrics"]
            rewards = [m["reward"] for m in metrics]
            means_of_5 = [sum(rewards[i : i + 5]) / 5 for i in range(len(rewards) - 4)]
            rates = [m.get("lr", 0.0) for m in metrics]
            fired = [i for i, m in enumerate(metrics) if m.get("length_rate/triggered")]
            rows.append(
                {
                    "arm": name,
                    "seed": seed,
                    "accuracy": found["accuracy"],
                    "length": found["length"],
                    "peak": max(means_of_5),
                    "last": means_of_5[-1],
                    "surge at": fired[0] if fired else "-",
                    "mean factor": sum(rates) / len(rates) / max(rates),
                    "rewards": [round(r, 4) for r in rewards],
                    "lengths": [round(m["length"], 2) for m in metrics],
                }
            )
    return rows, outcome(rows, arguments.seeds)


def outcome(rows: Rows, seeds: int) -> str:
    of = lambda name: [row for row in rows if row["arm"] == name]
    means = {name: mean_and_error([row["accuracy"] for row in of(name)]) for name in ARMS}
    collapsed = {name: sum(row["accuracy"] < row["peak"] / 2 for row in of(name)) for name in ARMS}
    beats_clock = means["triggered"][0] - means["clock"][0]
    both = (means["triggered"][1] ** 2 + means["clock"][1] ** 2) ** 0.5
    if collapsed["constant"] == 0:
        word = "does not hold: no constant-rate run collapsed"
    elif collapsed["triggered"] >= collapsed["constant"]:
        word = "does not hold"
    else:
        word = "holds" if collapsed["triggered"] == 0 and beats_clock > 2 * both else "in part"
    said = "; ".join(
        f"{name} {mean:.3f} +- {error:.3f}, {collapsed[name]} of {seeds} collapsed"
        for name, (mean, error) in means.items()
    )
    surges = ", ".join(str(row["surge at"]) for row in of("triggered"))
    decayed = sum(
        row["mean factor"] < constant["mean factor"] - 1e-6
        for row, constant in zip(of("triggered"), of("constant"), strict=True)
    )
    return (
        f"{word}: held-out accuracy {said}; triggered minus clock {beats_clock:+.3f} +- "
        f"{both:.3f}; surge seen at updates {surges}, and the rate fell within the run in "
        f"{decayed} of {seeds} (the first fall comes 1.8 S after the surge)"
    )


if __name__ == "__main__":
    run_claim(__doc__, CLAIM, experiment, full=3, quick=1)
