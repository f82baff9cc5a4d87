"""Length-triggered rate: does it prevent the collapse at a high rate, and is the trigger needed?

    python benchmarks/claims/length_rate.py    # what came out: results/claims/length_rate.json

Source: arXiv 2602.01826 (read in part). The demo's RL (`chain_sum_cpu`, 8 prompts x 8 rollouts, no
trust region) at lr 1e-3, five times the recipe's, 45 updates:

    constant       the rate after its linear warm-up of 5 updates
    triggered, 5   halved every 1.8 S updates (the paper's period) after the surge of the length at
                   update S; the detector is the recipe's (1.5 times the mean of the first 5
                   updates, smoothed)
    triggered, 2   the same against the mean of the first 2 updates: on this task the length surges
                   within the first 5, which makes it part of the other's baseline
    clock          the control: the decay of a surge at update 4, whatever the length does

The decays have a floor of a tenth. `mean factor` is the mean rate over the largest. Accuracy is
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
SURGE, PERIOD, WARMUP = 4, 1.8 * 4, 5
SHARED = [
    *("--rollout.group_size", "8", "--rollout.dtype", "bfloat16"),
    *("--update.trust_region", "null", "--evaluation.problems", "64", "--update.lr", "1e-3"),
]
DETECTOR = "{{warmup: {}, ratio: 1.5, smoothing: 0.5, period_factor: 1.8}}"


class ByTheClock(RLModule):
    """Halves the rate as if the length had surged at SURGE."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()

        def factor(update: int) -> float:
            falls = max(0, (update - SURGE) // PERIOD)
            return min(1.0, (update + 1) / WARMUP) * max(0.1, 0.5**falls)

        schedule = torch.optim.lr_scheduler.LambdaLR(configured["optimizer"], factor)
        return configured | {"lr_scheduler": schedule}


ARMS = {
    "constant": ("null", RLModule),
    "triggered, 5": (DETECTOR.format(5), RLModule),
    "triggered, 2": (DETECTOR.format(2), RLModule),
    "clock": ("null", ByTheClock),
}


def experiment(arguments: argparse.Namespace) -> tuple[Rows, str]:
    updates = "8" if arguments.quick else "45"
    rows: Rows = []
    for name, (rate, kind) in ARMS.items():
        options = [*SHARED, "--update.length_rate", rate, "--updates", updates]
        for seed in range(arguments.seeds):
            _, found = train(*options, seed=seed, module_class=kind)
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
    best = min(("triggered, 5", "triggered, 2"), key=lambda name: collapsed[name])
    pairs = zip(of(best), of("clock"), strict=True)
    gain, error = mean_and_error([a["accuracy"] - b["accuracy"] for a, b in pairs])
    if collapsed["constant"] == 0:
        word = "does not hold: no constant-rate run collapsed"
    elif collapsed[best] >= collapsed["constant"]:
        word = "does not hold"
    else:
        word = "holds" if collapsed[best] == 0 and gain > 2 * error else "in part"
    said = "; ".join(
        f"{name} {mean:.3f} +- {error:.3f}, {collapsed[name]} of {seeds} collapsed"
        for name, (mean, error) in means.items()
    )
    surges = "; ".join(
        f"{name}: " + ", ".join(str(row["surge at"]) for row in of(name))
        for name in ("triggered, 5", "triggered, 2")
    )
    return (
        f"{word}: held-out accuracy {said}; {best} minus clock {gain:+.3f} +- {error:.3f}; surge "
        f"seen at updates {surges} (the first fall comes 1.8 S later)"
    )


if __name__ == "__main__":
    run_claim(__doc__, CLAIM, experiment, full=3, quick=1)
