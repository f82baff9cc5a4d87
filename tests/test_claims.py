"""Every experiment of benchmarks/claims runs, and says what came out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLAIMS = Path(__file__).parent.parent / "benchmarks" / "claims"
SCRIPTS = sorted(path.name for path in CLAIMS.glob("*.py") if path.name != "common.py")
FAST = {"remax_bandit.py"}


@pytest.mark.parametrize(
    "script", [s if s in FAST else pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS]
)
def test_an_experiment_says_what_came_out(script):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(CLAIMS / script), "--quick"],
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    assert "claim: " in done.stdout
    (outcome,) = [line for line in done.stdout.splitlines() if line.startswith("outcome: ")]
    assert outcome.removeprefix("outcome: ").startswith(("holds", "in part", "does not hold"))


def test_every_experiment_has_its_committed_outcome():
    results = {path.stem for path in (CLAIMS.parent / "results" / "claims").glob("*.json")}
    assert results == {Path(script).stem for script in SCRIPTS}
