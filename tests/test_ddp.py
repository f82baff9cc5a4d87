"""Two gloo processes take the gradient of one, under DDP and under FSDP2."""

import socket

import pytest
import torch
from processes import run_ranks
from safetensors.torch import load_file
from tiny_run import METHODS, make_policy, metrics_of, run, run_here, start, write_recipe
from workers import cli_runs, gradients_of

UPDATES = 3
TWO = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy"]
SHARDED = [
    *TWO,
    "pytorch_lightning.strategies.ModelParallelStrategy",
    "--trainer.strategy.init_args.data_parallel_size=2",
    "--trainer.strategy.init_args.tensor_parallel_size=1",
    "--trainer.strategy.init_args.save_distributed_checkpoint=false",
    "--trainer.strategy.init_args.process_group_backend=gloo",
]


RUNS = [("digits_written", "adam_mini"), ("lost_on_the_second_rank", "adamw")]


@pytest.fixture(scope="module", params=RUNS)
def folder(tmp_path_factory, request):
    """The same run with one process and with two of each kind; fp32 rollouts, no clipping.

    Once with every reward, once with none left for the second rank in the first two updates.
    """
    reward, optimizer = request.param
    folder = tmp_path_factory.mktemp("ddp")
    recipe = write_recipe(
        folder,
        {
            "task.init_args.reward": f"reward_functions:{reward}",
            "updates": UPDATES,
            "record.checkpoint_every": 2,
            "rollout.dtype": "float32",
            "update.clip_norm": 0.0,
            "update.optimizer": optimizer,
            "update.blocks": "paper",  # sums of query and key heads are added over ranks
            "trainer.callbacks": [{"class_path": "workers.SaveGradients"}],
        },
    )
    run_here(["--config", recipe, "--run_dir", "one"], folder)
    phases = ["--update.route", "three_phase", "--update.prefix.min_bound", "0"]
    fused = [*phases, "--update.head", "fused"]
    runs = {
        "ddp": [*TWO, "ddp"],
        "fsdp2": SHARDED,
        "ddp-phases-fused": [*TWO, "ddp", *fused],
        "fsdp2-phases": [*SHARDED, *phases],
    }
    two_ranks(folder, [["--config", str(recipe), "--run_dir", n, *a] for n, a in runs.items()])
    return folder


def two_ranks(folder, runs):
    """Runs of two processes that exist already, as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(cli_runs, (str(folder), port, runs), 2)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "ddp-phases-fused", "fsdp2-phases"])
@pytest.mark.parametrize("update", range(UPDATES))
def test_gradients_equal_those_of_one_process(folder, update, strategy):
    one, two = (gradients_of(folder / name, update) for name in ("one", strategy))
    assert len(one) == 1 and len(two) == 2
    assert torch.equal(two[0], two[1]), "ranks disagree"
    assert one[0].norm() > 0
    error = (two[0] - one[0]).norm() / one[0].norm()
    assert error < 1e-5, error


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_weights_equal_those_of_one_process(folder, strategy):
    one, two = (
        load_file(folder / name / "policy" / "model.safetensors") for name in ("one", strategy)
    )
    for name, weight in one.items():
        error = (two[name] - weight).abs().max() / weight.abs().max()
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_exact_metrics_are_those_of_one_process(folder, strategy):
    for one, two in zip(metrics_of(folder / "one"), metrics_of(folder / strategy), strict=True):
        for name in ("rollouts", "reward", "length", "length_std", "truncated"):
            assert one[name] == pytest.approx(two[name], rel=1e-6), name
        for name in ("loss", "grad_norm", "lr"):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("folder", RUNS[:1], indirect=True)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_resume_to_the_same_weights(folder, strategy):
    stopped = folder / f"{strategy}-stopped"
    first = ["--config", str(folder / "recipe.yaml"), "--run_dir", str(stopped)]
    first += ["--trainer.max_steps", "2"]
    if strategy == "ddp":  # Lightning starts the second rank; relative paths, from elsewhere
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        run([*first, *TWO, "ddp"], folder)
        again = ["--config", "../recipe.yaml", "--resume", f"../{stopped.name}"]
        run([*again, *TWO, "ddp"], elsewhere)
    else:
        again = ["--config", str(folder / "recipe.yaml"), "--resume", str(stopped)]
        two_ranks(folder, [[*first, *SHARDED], [*again, *SHARDED]])
    assert metrics_of(stopped) == metrics_of(folder / strategy)
    whole, resumed = (
        load_file(path / "policy" / "model.safetensors") for path in (folder / strategy, stopped)
    )
    assert all(whole[name].equal(resumed[name]) for name in whole)


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    """Each method with one process and with two (DDP); fp32 rollouts, no clipping."""
    folder = tmp_path_factory.mktemp("methods")
    recipe = write_recipe(folder, {"updates": 4, "evaluation.problems": 0})
    make_policy(folder / "tiny-teacher", seed=1)
    base = ["--config", str(recipe), "--rollout.dtype=float32", "--update.clip_norm=0"]
    base += ["--update.pruning=null", "--update.trust_region=null"]
    for name, options in METHODS.items():
        run_here([*base, *options, "--run_dir", f"{name}-one"], folder)
    two_ranks(
        folder, [[*base, *o, "--run_dir", f"{n}-two", *TWO, "ddp"] for n, o in METHODS.items()]
    )
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_each_method_on_two_processes_is_that_of_one(methods, method):
    one, two = (metrics_of(methods / f"{method}-{ranks}") for ranks in ("one", "two"))
    for before, after in zip(one, two, strict=True):
        for name in ("rollouts", "reward", "length", "reward_errors", "replay/size"):
            assert before.get(name, 0) == pytest.approx(after.get(name, 0), rel=1e-6), name
        for name in ("loss", "grad_norm", "replay/loss", "replay/grad_norm"):
            assert before.get(name, 0) == pytest.approx(after.get(name, 0), rel=1e-3, abs=1e-6), (
                name
            )
    assert one[-1]["grad_norm"] > 0
    policies = [
        load_file(methods / f"{method}-{ranks}" / "policy" / "model.safetensors")
        for ranks in ("one", "two")
    ]
    for name, weight in policies[0].items():
        error = (policies[1][name] - weight).abs().max() / weight.abs().max()
        assert error < 1e-4, (name, error)


@pytest.mark.slow
@pytest.mark.parametrize("folder", RUNS[:1], indirect=True)
def test_torchrun_on_two_machines_is_two_processes(folder):
    """Two agents of torchrun find each other, as on two machines, each with one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-id=test"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    agent += ["-m", "trimtab.rl", "--config", "recipe.yaml", "--run_dir", "machines"]
    agent += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=2"]
    agent += ["--trainer.strategy=ddp"]
    processes = [start(agent, folder, "torch.distributed.run") for _ in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    assert metrics_of(folder / "machines") == metrics_of(folder / "ddp")
    found, expected = (
        load_file(folder / name / "policy" / "model.safetensors") for name in ("machines", "ddp")
    )
    assert all(found[name].equal(expected[name]) for name in expected)


# Edits that must turn this file red:
# * run.py: without rank_zero_only.rank (the slower rank finds the run folder in use)
# * policy_update.py: _add_gradients_of_ranks divides by the world size
# * policy_update.py: no scale under FSDP2; no None parts for ranks without rollouts (hangs)
# * policy_update.py: pass process_group=None to token_weights
# * policy_update.py: replay without the process group, or every rank takes the whole sample
# * loop.py: rates observed by each process alone
# * policy_update.py: _without_gradient_sync returns nullcontext() under DDP
# * loop.py: seed the requests without the prompt's number
# * data.py: _Updates gives every rank the same problems
