"""The demo's own floor: fifteen updates on one thread, from a base trained here.

Slow: on a machine without AVX-512 the warm-up alone took 13 minutes of one core.
"""

import json
from pathlib import Path

import pytest
from tiny_run import run

CACHE = Path(__file__).parent.parent / ".cache" / "trimtab"


@pytest.mark.slow
def test_fifteen_updates_lift_the_held_out_accuracy(tmp_path):
    """The base comes from the cache `make demo` uses too; without it the warm-up runs first."""
    arguments = ["--config", "chain_sum_cpu", "--policy.warmup.cache_dir", CACHE]
    small = ["--updates", "15", "--evaluation.problems", "64", "--threads", "1"]
    run([*arguments, "--run_dir", "run", *small], tmp_path, timeout=3600)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert 0.15 <= before["sampled"] <= 0.45
    assert after["sampled"] >= 0.6
    assert after["length"] > 1.3 * before["length"]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert min(row["mismatch/abs_dlogp_mean"] for row in rows) > 1e-4, "the mismatch is not real"
    assert min(row["length_std"] for row in rows) > 2, "lengths do not vary"


# Edits that must turn this file red:
# * objective.py: the sign of the advantages
# * rollout.py: do not update the engine's weights
# * recipe: lr 0
