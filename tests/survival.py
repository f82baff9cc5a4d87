"""Runs that are killed: at a chosen moment, as often as a test wants, and what they must leave.

A further configuration is one more entry of CASES: changes of `tiny_run.TINY` by dotted names.
`test_survival.py` kills each of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from processes import run_ranks
from safetensors.torch import load_file
from tiny_run import metrics_of, write_recipe
from torch.multiprocessing import ProcessExitedException

SHORT: dict[str, Any] = {"updates": 12, "record.checkpoint_every": 3, "evaluation.problems": 2}

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "adamw, two steps an update, clipped ratios": {
        "update.optimizer": "adamw",
        "update.epochs": 2,
        "update.loss": "ppo_clip",
    },
    "three phases": {"update.route": "three_phase", "update.micro_prompts": 1},
    "lost rewards": {"task.init_args.reward": "reward_functions:fails_on_a"},
    "skipped steps": {"trainer.callbacks": [{"class_path": "workers.PoisonSomeGradients"}]},
    "going back": {
        "health.nonfinite": "rollback",
        "trainer.callbacks": [{"class_path": "workers.PoisonSomeGradients"}],
    },
    "replay and a reference, going back": {
        "update.loss": "reval",
        "update.reval": {"beta": 0.1},
        "update.replay": {"size": 48, "updates": 1},
        "update.reference": {"reset_every": 4},
        "update.pruning": None,
        "update.trust_region": None,
        "health.nonfinite": "rollback",
        "trainer.callbacks": [{"class_path": "workers.PoisonSomeGradients"}],
    },
    "rollouts ahead, going back": {
        "rollout.asynchronous": True,
        "update.loss": "ppo_clip",
        "health.nonfinite": "rollback",
        "trainer.callbacks": [{"class_path": "workers.PoisonSomeGradients"}],
    },
    "budgets by success": {
        "problems": 16,
        "rollout.budget": {"low": 2, "high": 8},
        "update.advantage": "grpo",
        "update.loss": "ppo_clip",
        "update.aggregation": "seq_mean",
    },
    "spikes": {"health.grad_norm_factor": 1.1, "health.window": 2, "health.spike": "rollback"},
}


def recipe_of(folder: Path, case: str) -> Path:
    """The recipe of a case, in `folder`."""
    return write_recipe(folder, SHORT | CASES[case])


def killed_run(folder: Path, arguments: list[str], moment: int) -> bool:
    """Runs `trimtab-rl` until it is killed at a moment, or to its end.

    Args:
        folder: where it runs.
        arguments: of the command line.
        moment: of those that `moments_of` counts.

    Returns:
        Whether it was killed: its end may have come first.
    """
    try:
        run_ranks(run_until, (str(folder), arguments, moment), 1)
    except ProcessExitedException as ended:
        assert ended.signal_name == "SIGKILL", ended
        return True
    return False


def moments_of(folder: Path, arguments: list[str]) -> int:
    """Moments of a run to its end: calls of functions by the loop and by what writes for it."""
    run_ranks(run_until, (str(folder), arguments, 0), 1)
    return int((folder / "moments").read_text())


def run_until(rank: int, folder: str, arguments: list[str], moment: int) -> None:
    """The process of a run. Moment 0: to the end, and the count of moments goes to a file."""
    import torch

    from trimtab.rl.cli import main

    torch.set_num_threads(1)
    os.chdir(folder)
    moments = _Moments(moment)
    sys.setprofile(moments.see)
    try:
        main(arguments)
    finally:
        sys.setprofile(None)
        Path("moments").write_text(str(moments.count))


class _Moments:
    """Counts what the run does once its folder is there; kills this process at one of them."""

    FILES = ("recording.py", "durable.py", "run.py", "loop.py", "health.py", "serialization.py")

    def __init__(self, fatal: int) -> None:
        self.count, self.fatal = 0, fatal

    def see(self, frame: FrameType, event: str, _: object) -> None:
        if os.path.basename(frame.f_code.co_filename) not in self.FILES:
            return
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_in_write(folder: Path, arguments: list[str], write: int) -> bool:
    """As `killed_run`, but within one of the writes to checkpoints, after half of its bytes."""
    try:
        run_ranks(run_until_write, (str(folder), arguments, write), 1)
    except ProcessExitedException as ended:
        assert ended.signal_name == "SIGKILL", ended
        return True
    return False


def run_until_write(rank: int, folder: str, arguments: list[str], fatal: int) -> None:
    """The process of a run that dies within its `fatal`-th write to a checkpoint (from 1)."""
    from trimtab.rl import durable

    whole, count = durable._ErrorsLater.write, 0

    def write(self: Any, data: Any) -> int:
        nonlocal count
        if str(self._file.name).endswith(".ckpt.unfinished"):
            count += 1
            if count == fatal:
                whole(self, bytes(data)[: len(data) // 2])
                self._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, data)

    durable._ErrorsLater.write = write
    run_until(rank, folder, arguments, 0)


def survives(folder: Path, recipe: Path, name: str, total: int, seed: int, kills: int) -> None:
    """Kills a run `kills` times at moments drawn from `seed`, and resumes it each time to the end.

    Args:
        folder: of the recipe.
        recipe: of a case.
        name: of the run's folder.
        total: moments of an undisturbed run.
        seed: of the moments.
        kills: how often.
    """
    moments = random.Random(seed)
    for _ in range(kills):
        arguments = ["--config", str(recipe), *_start(folder, name)]
        killed_run(folder, arguments, moments.randrange(1, total))
    with contextlib.chdir(folder):
        run_ranks(run_until, (str(folder), ["--config", str(recipe), *_start(folder, name)], 0), 1)


def _start(folder: Path, name: str) -> list[str]:
    """A run that was killed before it had a configuration begins anew."""
    if (folder / name / "config.yaml").is_file():
        return ["--resume", name]
    for path in (folder / name).glob("*"):
        path.unlink()
    return ["--run_dir", name]


def assert_same_run(found: Path, expected: Path) -> None:
    """Every update once with the same numbers, the same weights, the same ends, no litter."""
    assert metrics_of(found) == metrics_of(expected)
    weights, wanted = (load_file(run / "policy" / "model.safetensors") for run in (found, expected))
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert weights[name].equal(weight), name
    for name in ("transcripts.jsonl",):
        assert (found / name).read_text() == (expected / name).read_text()
    for folder in (".", "checkpoints"):
        names, wanted = (
            {path.name for path in (run / folder).iterdir()} for run in (found, expected)
        )
        assert names == wanted
