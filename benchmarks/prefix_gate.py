"""Is the gate of shared-prefix training right? What it expects of a group against what is measured.

    OMP_NUM_THREADS=1 python benchmarks/prefix_gate.py benchmarks/results/prefix_gate.json

For each model and group: the gradient of the mean log-probability with the prompt computed once and
by the dense route (waves of several trajectories), one after the other; the median over pairs. The
bound is by FLOPs alone; what calls of the model cost beside them makes the difference, and its
constants (`rl/prefix_metrics.py`) are chosen by this table.
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from measure import commit, device_name, versions
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.rl import SharedPrefix

MODELS = ((64, 2, 4, 97), (128, 2, 4, 64), (256, 8, 8, 4096), (512, 4, 8, 4096))
GROUPS = (
    (16, 2, 4), (17, 4, 4), (32, 3, 8), (64, 3, 8), (400, 2, 100), (128, 4, 32), (60, 16, 60),
    (64, 8, 16), (200, 4, 10), (200, 16, 4),
)  # fmt: skip
PAIRS = 5


def make_model(width: int, layers: int, heads: int, vocabulary: int) -> LlamaForCausalLM:
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=int(width * 2.7),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        **ends,
    )
    return LlamaForCausalLM(config).train()


def measure(model: LlamaForCausalLM, prompt: int, lengths: list[int]) -> dict[str, float]:
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (prompt,)).tolist()
    responses = [torch.randint(vocabulary, (n,)).tolist() for n in lengths]
    shared, dense = (SharedPrefix(model, min_bound=b, verify="never") for b in (0, 1e9))

    def seconds(step: SharedPrefix) -> float:
        start = time.perf_counter()
        with step.group(ids) as group:
            group.accumulate(responses, lambda out, _: out.logp.sum())
        return time.perf_counter() - start

    for step in (shared, dense):
        seconds(step)
    found = shared.metrics()
    ratios = []
    for _ in range(PAIRS):
        own = seconds(shared)
        ratios.append(seconds(dense) / own)
    return {
        "measured": statistics.median(ratios),
        "expected": found["prefix/expected"],
        "bound": found["prefix/bound"],
    }


def main(path: str) -> None:
    logging.getLogger("trimtab").setLevel(logging.ERROR)
    rows = []
    for width, layers, heads, vocabulary in MODELS:
        model = make_model(width, layers, heads, vocabulary)
        for prompt, group, length in GROUPS:
            random.seed(0)
            lengths = [max(1, int(length * random.uniform(0.4, 1.6))) for _ in range(group)]
            row = {"width": width, "layers": layers, "prompt": prompt, "lengths": lengths}
            rows.append(row | measure(model, prompt, lengths))
    table = Table("model", "prompt", "responses", "bound", "expected", "measured")
    for row in rows:
        mean = sum(row["lengths"]) / len(row["lengths"])
        table.add_row(
            f"{row['width']} x {row['layers']}",
            str(row["prompt"]),
            f"{len(row['lengths'])} of {mean:.0f}",
            *(f"{row[name]:.2f}" for name in ("bound", "expected", "measured")),
        )
    Console().print(table)
    wrong = [row for row in rows if row["expected"] >= 1.2 and row["measured"] < 0.98]
    print(f"{len(wrong)} of {len(rows)} groups would share and lose more than 2 %")
    facts = {
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "versions": versions(("torch", "transformers")),
        "commit": commit("rl", "triton_kernels"),
    }
    Path(path).write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
