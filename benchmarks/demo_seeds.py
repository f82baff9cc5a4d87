"""The demo on several seeds: each with a base of its own, from nothing.

    python benchmarks/demo_seeds.py --seeds 0 1 2

Runs `trimtab-rl --config chain_sum_cpu` once per seed (of the problems, the warm-up and the RL
run), then writes benchmarks/results/demo_seeds.json and the first seed's report.png beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import yaml

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    rows = [run(seed) for seed in parser.parse_args().seeds]
    record = {
        "command": " ".join(["python", "benchmarks/demo_seeds.py", *sys.argv[1:]]),
        "device": f"CPU, {os.cpu_count()} cores, {cpu_name()}",
        "versions": {name: version(name) for name in ("trimtab", "torch", "transformers")},
        "rows": rows,
    }
    (RESULTS / "demo_seeds.json").write_text(json.dumps(record, indent=1) + "\n")
    print("| seed | sampled before | sampled after | greedy before | greedy after "
          "| length before | length after | warm-up (s) | RL (s) |")  # fmt: skip
    print("|---" * 9 + "|")
    for row in rows:
        b, a = row["before"], row["after"]
        print(f"| {row['seed']} | {b['sampled']:.3f} | {a['sampled']:.3f} | {b['greedy']:.3f} "
              f"| {a['greedy']:.3f} | {b['length']:.1f} | {a['length']:.1f} "
              f"| {row['warmup_seconds']:.0f} | {sum(row['seconds'].values()):.0f} |")  # fmt: skip


def run(seed: int) -> dict:
    """One seed's summary."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "trimtab.rl", "--config", "chain_sum_cpu"),
            *("--seed", str(seed), "--policy.warmup.seed", str(seed)),
            *("--task.init_args.seed", str(seed)),
            *("--policy.warmup.cache_dir", f"{folder}/cache", "--run_dir", f"{folder}/run"),
        ]
        started = time.time()
        subprocess.run(command, check=True)
        total = time.time() - started
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        if seed == 0:
            shutil.copy(Path(folder, "run", "report.png"), RESULTS / "demo_seed0.png")
        threads = yaml.safe_load(Path(folder, "run", "config.yaml").read_text())["threads"]
        (recipe,) = Path(folder, "cache").glob("base-*/recipe.json")
        warmup_seconds = json.loads(recipe.read_text())["seconds"]
    seconds = {"warmup_seconds": warmup_seconds, "total_seconds": total}
    return {"seed": seed, "threads": threads, **summary, **seconds}


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
