"""Ranks of a test: processes of a server that has imported what takes seconds to import."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing import start_processes

_IMPORTED = [
    "jsonargparse",
    "matplotlib.backends.backend_agg",
    "megatron.core.models.gpt",
    "pytorch_lightning",
    "rich.progress",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "trimtab.optim",
    "trimtab.rl.cli",
    "trimtab.rl.run",
    "trimtab.stability",
]


def run_ranks(function: Callable[..., None], args: tuple[Any, ...], ranks: int) -> None:
    """Calls `function(rank, *args)` in so many processes, which have this one's environment.

    Raises what a rank raised. The function and its module are importable by name.
    """
    _start_server()
    environment = dict(os.environ)
    start_processes(_call, (environment, function, args), ranks, start_method="forkserver")


def check_names(worlds: list[tuple[Any, list[Any]]], check_id: Callable[..., str]) -> list[str]:
    """Ids of all checks of all worlds, for pytest."""
    return [check_id(world, check) for world, checks in worlds for check in checks]


def passed_checks(
    run: Callable[..., None], worlds: list[tuple[Any, list[Any]]], folder: Path
) -> tuple[list[str], str]:
    """The names of the checks that passed, and what ended the run, if anything did.

    Calls `run(rank, folder, worlds)` in as many processes as the largest world has (its first
    number); it notes in folder/passed what has passed.
    """
    failure = ""
    try:
        run_ranks(run, (str(folder), worlds), max(world[0] for world, _ in worlds))
    except Exception as error:
        failure = str(error)
    passed = folder / "passed"
    return passed.read_text().split() if passed.exists() else [], failure


def _start_server() -> None:
    """Once: kernels are decorated there as conftest.py has them decorated here."""
    multiprocessing.set_forkserver_preload(_IMPORTED)
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    with mock.patch.dict(os.environ, interpreted):
        forkserver.ensure_running()


def _call(
    rank: int, environment: dict[str, str], function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    function(rank, *args)
