"""Two gloo processes take the gradient of one."""

import pytest
import torch
from tiny_run import metrics_of, run, write_recipe
from workers import gradients_of

UPDATES = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the same run with one process and with two; fp32 rollouts, no clipping."""
    folder = tmp_path_factory.mktemp("ddp")
    recipe = write_recipe(
        folder,
        {
            "updates": UPDATES,
            "rollout.dtype": "float32",
            "update.clip_norm": 0.0,
            "trainer.callbacks": [{"class_path": "workers.SaveGradients"}],
        },
    )
    run(["--config", recipe, "--run_dir", "one"], folder)
    two = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]
    run(["--config", recipe, "--run_dir", "two", *two], folder)
    return folder / "one", folder / "two"


@pytest.mark.parametrize("update", range(UPDATES))
def test_gradients_equal_those_of_one_process(runs, update):
    one, two = (gradients_of(folder, update) for folder in runs)
    assert len(one) == 1 and len(two) == 2
    assert torch.equal(two[0], two[1]), "ranks disagree"
    assert one[0].norm() > 0
    error = (two[0] - one[0]).norm() / one[0].norm()
    assert error < 1e-5, error


def test_exact_metrics_are_those_of_one_process(runs):
    for one, two in zip(*map(metrics_of, runs), strict=True):
        for name in ("rollouts", "reward", "length", "length_std", "truncated"):
            assert one[name] == pytest.approx(two[name], rel=1e-6), name
        for name in ("loss", "grad_norm", "lr"):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-7), name


# Edits that must turn this file red:
# * loop.py: _add_gradients_of_ranks divides by the world size
# * loop.py: pass process_group=None to token_weights
# * loop.py: _without_gradient_sync returns nullcontext() under DDP
# * loop.py: seed the requests without the prompt's number
# * loop.py: _Updates gives every rank the same problems
