"""Rollouts made ahead against rollouts in turn: the recipe grpo, `--rollout.asynchronous` or not.

    python benchmarks/asynchronous_rl.py --seeds 0 1 2

Two threads for the whole trainer in turn; one for each side when they overlap, so both have the
same two cores. The two take turns seed by seed; seconds are those of the run's own clock, without
the first update, which has nothing to overlap with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

from demo_seeds import cpu_name

from trimtab.rl.run_record import wall_seconds

RESULT = Path(__file__).parent / "results" / "asynchronous_rl.json"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=40)
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in asked.seeds:
            for name, ahead, threads in (
                ("in turn, two threads", False, 2),
                ("in turn, one thread", False, 1),
                ("ahead, one thread a side", True, 1),
            ):
                rows.append({"name": name, "seed": seed})
                rows[-1] |= run(seed, ahead, threads, asked.updates, Path(folder))
                print(json.dumps(rows[-1]), flush=True)
    names = list(dict.fromkeys(row["name"] for row in rows))
    of = {n: [row["seconds_per_update"] for row in rows if row["name"] == n] for n in names}
    record = {
        "command": " ".join(["python", "benchmarks/asynchronous_rl.py", *sys.argv[1:]]),
        "device": f"CPU, {os.cpu_count()} cores, {cpu_name()}",
        "versions": {n: version(n) for n in ("trimtab", "torch", "transformers")},
        "rows": rows,
        "ahead_over": {
            n: median(a / b for a, b in zip(of[names[-1]], of[n], strict=True)) for n in names[:-1]
        },
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["ahead_over"], indent=1))


def run(seed: int, ahead: bool, threads: int, updates: int, folder: Path) -> dict:
    """One run's seconds an update, by part, and what it learned."""
    run_dir = folder / f"{seed}-{ahead}-{threads}"
    command = [
        *(sys.executable, "-m", "trimtab.rl", "--config", "grpo", "--seed", str(seed)),
        *("--threads", str(threads), "--updates", str(updates), "--run_dir", str(run_dir)),
        *("--rollout.asynchronous", str(ahead).lower(), "--evaluation.problems", "0"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:]
    parts = {part: s / len(rows) for part, s in wall_seconds(rows).items()}
    return {
        "seconds_per_update": sum(parts.values()),
        "parts": parts,
        "rollout_seconds_per_update": sum(row["time/rollout"] for row in rows) / len(rows),
        "reward_last_5": sum(row["reward"] for row in rows[-5:]) / 5,
    }


if __name__ == "__main__":
    main()
