"""Every packaged recipe to its end, from one base policy.

    python benchmarks/recipe_runs.py                       # all recipes that need no model folder
    python benchmarks/recipe_runs.py grpo reval --seeds 0 1

Runs `trimtab-rl --config NAME` and writes results/recipe_runs.json: held-out accuracy before and
after, wall time by part, and what was sampled. A recipe that is named again replaces its rows.
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

import yaml
from demo_seeds import cpu_name

from trimtab.rl.cli import RECIPES

ROWS = Path(__file__).parent / "results" / "recipe_runs.json"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=trained_from_nothing())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    rows = json.loads(ROWS.read_text())["rows"] if ROWS.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.recipes:
            for seed in arguments.seeds:
                rows = [row for row in rows if (row["recipe"], row["seed"]) != (name, seed)]
                rows.append(run(name, seed, arguments.threads, Path(folder)))
                write(sorted(rows, key=lambda row: (row["recipe"], row["seed"])))
    print_table(json.loads(ROWS.read_text())["rows"])


def trained_from_nothing() -> list[str]:
    """Recipes whose policy is warmed up on the task's own documents."""
    found = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES.glob("*.yaml")}
    return sorted(name for name, recipe in found.items() if "warmup" in recipe["policy"])


def run(name: str, seed: int, threads: int, folder: Path) -> dict:
    """One recipe's summary; bases are shared by recipes that ask for the same."""
    run_dir = folder / f"{name}-{seed}"
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    command = [
        *(sys.executable, "-m", "trimtab.rl", "--config", name, "--seed", str(seed)),
        *("--threads", str(threads), "--run_dir", str(run_dir)),
    ]
    for model in ("policy", "teacher"):
        if "warmup" in recipe.get(model, {}):
            command += [f"--{model}.warmup.cache_dir", str(folder / "cache")]
    subprocess.run(command, check=True)
    summary = json.loads((run_dir / "summary.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    sampled = {
        "rollouts": sum(row["rollouts"] for row in rows),
        "tokens": sum(row["rollouts"] * row.get("length", 0.0) for row in rows),
        "mixed_groups": sum(row["groups/mixed"] for row in rows) / len(rows),
    }
    for metric in ("tree/decoded_fraction", "remax/zero_fraction", "budget/mixed_expected"):
        values = [row[metric] for row in rows if row.get(metric) is not None]
        if values:
            sampled[metric] = sum(values) / len(values)
    return {"recipe": name, "seed": seed, "threads": threads, **summary, "sampled": sampled}


def write(rows: list[dict]) -> None:
    record = {
        "command": " ".join(["python", "benchmarks/recipe_runs.py", *sys.argv[1:]]),
        "device": f"CPU, {os.cpu_count()} cores, {cpu_name()}",
        "versions": {name: version(name) for name in ("trimtab", "torch", "transformers")},
        "rows": rows,
    }
    ROWS.write_text(json.dumps(record, indent=1) + "\n")


def print_table(rows: list[dict]) -> None:
    print("| recipe | sampled before | after | greedy after | length after | rollouts | tokens "
          "| rollout (s) | update (s) |")  # fmt: skip
    print("|---" * 9 + "|")
    for row in rows:
        before, after, seconds = row["before"], row["after"], row["seconds"]
        print(f"| {row['recipe']} | {before['sampled']:.3f} | {after['sampled']:.3f} "
              f"| {after['greedy']:.3f} | {after['length']:.1f} "
              f"| {row['sampled']['rollouts']:.0f} | {row['sampled']['tokens']:.0f} "
              f"| {seconds['rollout']:.0f} | {seconds['update']:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
