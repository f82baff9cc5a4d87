"""Length-triggered rate: does it help where the mismatch, not the rate, is the trouble?

    python benchmarks/claims/length_rate_mismatch.py
                            # what came out: results/claims/length_rate_mismatch.json

Source: arXiv 2602.01826 (read in part). The replica mismatch of trust_region.py (one engine of four
is broken, PPO-clip does not see it; lr 2e-4, 30 updates), with the rate constant after its warm-up
or halved every 1.8 S updates after the surge of the length at update S (1.5 times the mean of the
first 2 updates, smoothed). Accuracy is held out (64 problems x 4 samples, fp32).
"""

from __future__ import annotations

import argparse

from common import Rows, mean_and_error, run_claim, train
from trust_region import PPO, SHARED, IgnoresReplica

CLAIM = (
    "a length-triggered decay keeps a run from collapsing under a mismatch of rollout and training "
    "(arXiv 2602.01826)"
)
ARMS = {
    "constant": "null",
    "triggered": "{warmup: 2, ratio: 1.5, smoothing: 0.5, period_factor: 1.8}",
}


def experiment(arguments: argparse.Namespace) -> tuple[Rows, str]:
    updates = "3" if arguments.quick else "30"
    rows: Rows = []
    for name, rate in ARMS.items():
        options = [*SHARED, *PPO, "--update.length_rate", rate, "--updates", updates]
        for seed in range(arguments.seeds):
            _, found = train(*options, seed=seed, module_class=IgnoresReplica)
            metrics = found["metrics"]
            fired = [i for i, m in enumerate(metrics) if m.get("length_rate/triggered")]
            rows.append(
                {
                    "arm": name,
                    "seed": seed,
                    "accuracy": found["accuracy"],
                    "length": found["length"],
                    "surge at": fired[0] if fired else "-",
                    "last factor": metrics[-1].get("length_rate/factor", 1.0),
                    "rewards": [round(m["reward"], 4) for m in metrics],
                    "lengths": [round(m["length"], 2) for m in metrics],
                }
            )
    of = {name: [row["accuracy"] for row in rows if row["arm"] == name] for name in ARMS}
    means = {name: mean_and_error(values) for name, values in of.items()}
    pairs = zip(of["triggered"], of["constant"], strict=True)
    gain, error = mean_and_error([a - b for a, b in pairs])
    word = "holds" if gain > 2 * error else "does not hold"
    said = ", ".join(f"{name} {mean:.3f} +- {e:.3f}" for name, (mean, e) in means.items())
    return rows, (
        f"{word}: held-out accuracy {said}, triggered minus constant {gain:+.3f} +- {error:.3f}"
    )


if __name__ == "__main__":
    run_claim(__doc__, CLAIM, experiment, full=3, quick=1)
