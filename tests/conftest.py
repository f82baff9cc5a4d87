import os

import torch

# Set before any kernel module is imported: @triton.jit reads it at decoration. So all are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib
import logging
import pkgutil

import pytest

import trimtab.triton_kernels

for module in pkgutil.iter_modules(trimtab.triton_kernels.__path__, "trimtab.triton_kernels."):
    importlib.import_module(module.name)

# Two OpenMP threads were catastrophic under contention; only the demo uses all cores.
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def kernels_run_where_they_are_tested(request: pytest.FixtureRequest):
    """Elsewhere, and in processes started there, PyTorch runs as for a user without a GPU.

    The interpreter takes seconds for what takes PyTorch milliseconds. A file that tests kernels has
    `pytestmark = pytest.mark.interpreter`; a single test sets TRITON_INTERPRET itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not any(mark.name == "interpreter" for mark in request.node.iter_markers()):
            patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch):
    """torch.empty & co. return NaN in tests, so a kernel that skips an element fails loudly."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            fillable = out.is_floating_point() and not out.requires_grad
            return out.fill_(float("nan")) if fillable else out

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def no_handler_outlives_its_stream():
    """What first logs, or imports Lightning, in a test has the stderr that the test captures."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in list(getattr(logger, "handlers", ())):  # a PlaceHolder has none
            if isinstance(handler, logging.StreamHandler) and getattr(
                handler.stream, "closed", False
            ):
                logger.removeHandler(handler)
