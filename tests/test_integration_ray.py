"""`trimtab-rl` and a user's module on a local Ray cluster of two workers.

Ray is not in the test environment: `make test-ray` installs it into a folder of its own.
"""

import ast
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_ddp import two_ranks
from tiny_run import metrics_of, write_recipe

ray = pytest.importorskip("ray")
pytest.importorskip("ray.train.torch", exc_type=ImportError)

from ray.train import RunConfig, ScalingConfig, UserCallback  # noqa: E402

from trimtab.integrations.ray import rl_trainer  # noqa: E402

TWO = ScalingConfig(num_workers=2)
FSDP2 = [
    "--trainer.strategy=pytorch_lightning.strategies.ModelParallelStrategy",
    "--trainer.strategy.init_args.data_parallel_size=2",
    "--trainer.strategy.init_args.tensor_parallel_size=1",
    "--trainer.strategy.init_args.save_distributed_checkpoint=false",
    "--trainer.strategy.init_args.process_group_backend=gloo",
]


class WriteReports(UserCallback):
    """Appends every report of rank 0 and of rank 1 to a file; it runs in Ray's controller."""

    def __init__(self, path):
        self.path = path

    def after_report(self, run_context, metrics, checkpoint):
        with self.path.open("a") as file:
            file.write(repr([(m["update"], m["reward"], m["loss"]) for m in metrics]) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The recipe, and the cluster; its workers import tests/ and this checkout."""
    folder = tmp_path_factory.mktemp("ray")
    changes = {"updates": 3, "record.checkpoint_every": 2, "rollout.dtype": "float32"}
    write_recipe(folder, changes | {"evaluation.problems": 0})
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
    )
    yield folder
    ray.shutdown()


def run_config(folder, **options):
    return RunConfig(storage_path=str(folder / "storage"), **options)


@pytest.fixture(scope="module")
def runs(folder):
    """The recipe by two processes as under torchrun, by DDP and FSDP2, and the same by Ray."""
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)  # relative paths are the driver's
    recipe = ["--config", "recipe.yaml", "--run_dir"]
    two = ["--trainer.devices", "2"]
    two_ranks(folder, [[*recipe, "torch", *two], [*recipe, "torch-fsdp2", *two, *FSDP2]])
    reports = run_config(folder, callbacks=[WriteReports(folder / "reports")])
    result = rl_trainer([*recipe, "ray"], TWO, reports).fit()
    again = rl_trainer([*recipe, "ray-fsdp2", *FSDP2], TWO, run_config(folder)).fit()
    patch.undo()
    return result, again


@pytest.mark.parametrize("kind", ["", "-fsdp2"])
def test_it_is_the_run_of_torchrun(folder, runs, kind):
    assert runs[bool(kind)].return_value == str(folder / f"ray{kind}")
    expected, found = (folder / f"{name}{kind}" for name in ("torch", "ray"))
    assert metrics_of(found) == metrics_of(expected)
    weights, started = (
        load_file(path / "model.safetensors")
        for path in (expected / "policy", folder / "tiny-policy")
    )
    for name, weight in load_file(found / "policy" / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], atol=0, rtol=0)
        assert not weight.equal(started[name]), f"{name} was not trained"


def test_metrics_of_every_update_are_reported_by_both_workers(folder, runs):
    reports = [ast.literal_eval(line) for line in (folder / "reports").read_text().splitlines()]
    rows = metrics_of(folder / "ray")
    assert [len(report) for report in reports] == [2, 2, 2]
    for report, row in zip(reports, rows, strict=True):
        assert report[0] == report[1] == (row["update"], row["reward"], row["loss"])


def test_bad_arguments_are_refused_here_and_what_a_worker_refuses_is_raised(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"found --trainer.devices=2"):
        rl_trainer(["--config", "recipe.yaml", "--trainer.devices=2"], TWO)
    with pytest.raises(ValueError, match=r"update.lr.*got -1"):
        rl_trainer(["--config", "recipe.yaml", "--update.lr", "-1"], TWO)
    odd = ["--config", "recipe.yaml", "--run_dir", "odd", "--rollout.prompts", "3"]
    trainer = rl_trainer(odd, TWO, run_config(folder))  # 3 prompts are none too few for one worker
    with pytest.raises(Exception, match=r"expected a multiple of the 2 processes, got 3"):
        trainer.fit()
    assert not (folder / "odd").exists()


def test_example(folder, capsys, monkeypatch):
    example = Path(__file__).parent.parent / "examples" / "ray_lightning.py"
    monkeypatch.setattr(sys, "argv", [str(example), "--steps", "30"])
    monkeypatch.chdir(folder)
    runpy.run_path(str(example), run_name="__main__")
    shown = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert shown["optimizer"] == "AdamMini"
    assert shown["loss"] < 1.0  # of ln 32 = 3.5 at the beginning
    assert {"mean_length", "entropy/mean"} <= shown.keys()


# Edits that must turn test_integration_ray.py red:
# * ray.py: without TORCHELASTIC_RUN_ID (hangs: Lightning starts processes of its own)
# * ray.py: without os.chdir
# * ray.py: OnUpdate(print)
# * ray.py: devices=1 and num_nodes=1
