"""A pretrained model learns one-digit sums, whole and by LoRA, on several seeds.

    python -m trimtab.rl.smollm2 smollm2
    python benchmarks/smollm2_seeds.py --model smollm2 --recipe smollm2 --seeds 0 1 2

Runs the recipe once per seed (of the run and of its problems) and adds each to
benchmarks/results/RECIPE_seeds.json as it ends: held-out accuracy before and after, the reward of
each update, seconds of the processor and of the clock, and the peak of the process's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from demo_seeds import cpu_name

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("trimtab", "torch", "transformers", "peft", "reasoning-gym")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of python -m trimtab.rl.smollm2")
    parser.add_argument("--recipe", choices=["smollm2", "smollm2_lora"], default="smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    record = {
        "command": " ".join(["python", "benchmarks/smollm2_seeds.py", *sys.argv[1:]]),
        "device": f"CPU, {os.cpu_count()} cores shared with other work, {cpu_name()}",
        "threads": options.threads,
        "versions": {name: version(name) for name in VERSIONS},
        "rows": [],
    }
    for seed in options.seeds:
        row = run(options.recipe, Path(options.model).resolve(), seed, options.threads)
        record["rows"].append(row)
        path = RESULTS / f"{options.recipe}_seeds.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    print("| seed | sampled before | sampled after | greedy before | greedy after "
          "| reward, first 3 | last 3 | CPU (s) | wall (s) | peak memory (GiB) |")  # fmt: skip
    print("|---" * 10 + "|")
    for row in record["rows"]:
        b, a, rewards = row["before"], row["after"], row["rewards"]
        print(f"| {row['seed']} | {b['sampled']:.3f} | {a['sampled']:.3f} | {b['greedy']:.3f} "
              f"| {a['greedy']:.3f} | {sum(rewards[:3]) / 3:.3f} | {sum(rewards[-3:]) / 3:.3f} "
              f"| {row['cpu_seconds']:.0f} | {row['wall_seconds']:.0f} "
              f"| {row['peak_bytes'] / 2**30:.1f} |")  # fmt: skip


def run(recipe: str, model: Path, seed: int, threads: int) -> dict:
    """One seed's summary, rewards and costs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "trimtab.rl", "--config", recipe),
            *("--policy.path", str(model), "--run_dir", f"{folder}/run"),
            *("--seed", str(seed), "--task.init_args.seed", str(seed)),
            *("--threads", str(threads), "--trainer.enable_progress_bar", "false"),
        ]
        started = time.time()
        process = subprocess.Popen(command)
        _, status, used = os.wait4(process.pid, 0)  # with what it cost, of this process alone
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"seed {seed}: the run ended with {process.returncode}")
        wall = time.time() - started
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        checkpoints = Path(folder, "run", "checkpoints").glob("*.ckpt")
        checkpoint = max(path.stat().st_size for path in checkpoints)
    return {
        "seed": seed,
        **summary,
        "rewards": [row["reward"] for row in rows],
        "mixed_groups": [row.get("groups/mixed") for row in rows],
        "mismatch": [row.get("mismatch/abs_dlogp_mean") for row in rows],
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "wall_seconds": wall,
        "peak_bytes": used.ru_maxrss * 1024,
        "checkpoint_bytes": checkpoint,
    }


if __name__ == "__main__":
    main()
