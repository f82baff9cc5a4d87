"""Updates that are not healthy are skipped, undone by going back, or end the run."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_ddp import SHARDED, TWO, two_ranks
from tiny_run import metrics_of, run_here, write_recipe

from trimtab.rl import HealthConfig, Stopped
from trimtab.rl.health import HealthWatch, all_finite

SHORT = {
    "updates": 8,
    "record.checkpoint_every": 2,
    "evaluation.problems": 0,
    "rollout.dtype": "float32",
}


def poisoned(updates, kind="PoisonSomeGradients"):
    return [{"class_path": f"workers.{kind}", "init_args": {"updates": updates}}]


def started(folder, name, *arguments):
    """Output of a run that ends well."""
    return run_here(["--config", "recipe.yaml", "--run_dir", name, *arguments], folder)


def stopped(folder, capsys, *arguments):
    """The error of a run that must stop, resumable."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_here(list(arguments), folder)
    assert ended.value.code == 3
    return capsys.readouterr().err


def policy_of(run):
    return load_file(run / "policy" / "model.safetensors")


def same(first, second):
    return all(first[name].equal(weight) for name, weight in second.items())


def column(run, name):
    return [row[name] for row in metrics_of(run)]


def test_skipped_and_undone_updates(tmp_path):
    """At the third and fourth of eight updates; checkpoints after 2, 4, ..."""
    write_recipe(tmp_path, SHORT | {"trainer.callbacks": poisoned([2, 3])})
    output = started(tmp_path, "skip")
    assert output.count("not finite") == 2, "each said once"
    assert "update 3: the gradient is not finite: its step is skipped" in output
    assert column(tmp_path / "skip", "health/skipped") == [0, 0, 1, 2, 2, 2, 2, 2]
    assert column(tmp_path / "skip", "health/in_a_row") == [0, 0, 1, 2, 0, 0, 0, 0]
    assert column(tmp_path / "skip", "skipped_updates")[-1] == 2
    summary = json.loads((tmp_path / "skip" / "summary.json").read_text())
    assert summary["health"] == {
        "skipped": 2,
        "rollbacks": 0,
        "last_reason": "update 4: the gradient is not finite",
    }

    output = started(tmp_path, "back", "--health.nonfinite", "rollback")
    assert "update 3: the gradient is not finite: back to update=000002" in output
    assert "update 4: the gradient is not finite: back to update=000002" in output
    rows = metrics_of(tmp_path / "back")
    assert [row["update"] for row in rows] == list(range(1, 9)), "the next problems follow"
    assert column(tmp_path / "back", "health/rollbacks") == [0, 0, 1, 2, 2, 2, 2, 2]
    # the same weights met the gradients of updates 3 and 4: those after update 2
    assert column(tmp_path / "back", "grad_norm")[2:4] == [None, None]
    # a rate that was undone is warmed up again: update 5 is the third that counts
    assert column(tmp_path / "back", "lr")[4] == column(tmp_path / "back", "lr")[2]
    assert column(tmp_path / "skip", "lr")[4] > column(tmp_path / "skip", "lr")[2]
    assert not same(policy_of(tmp_path / "back"), policy_of(tmp_path / "skip"))


def test_going_back_is_exactly_the_checkpoint_and_the_next_problems(tmp_path):
    """The updates after it equal those of a run that is resumed from the checkpoint there."""
    write_recipe(tmp_path, SHORT | {"trainer.callbacks": poisoned([3])})
    started(tmp_path, "back", "--health.nonfinite", "rollback")
    started(tmp_path, "whole", "--trainer.max_steps", "2")
    path = tmp_path / "whole" / "checkpoints" / "update=000002.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["trimtab"]["updates_done"] = 4  # on with the fifth
    path.unlink()
    torch.save(checkpoint, path.with_name("update=000004.ckpt"))
    run_here(["--resume", "whole"], tmp_path)
    assert same(policy_of(tmp_path / "whole"), policy_of(tmp_path / "back"))


def test_a_step_that_ruins_weights_goes_back_further_and_further(tmp_path):
    """`skip` cannot undo a step."""
    changes = {"trainer.callbacks": poisoned([5, 6], "PoisonSomeSteps"), "updates": 8}
    write_recipe(tmp_path, SHORT | changes)
    output = started(tmp_path, "run")
    assert "update 6: a weight is not finite after the step: back to update=000004" in output
    assert "update 7: a weight is not finite after the step: back to update=000002" in output
    assert column(tmp_path / "run", "health/rollbacks")[-1] == 2
    assert all(weight.isfinite().all() for weight in policy_of(tmp_path / "run").values())
    # after going back at update 6 no checkpoint of it was written
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["update=000004.ckpt", "update=000008.ckpt"]


def test_without_a_checkpoint(tmp_path, capsys):
    write_recipe(tmp_path, SHORT | {"trainer.callbacks": poisoned([0]), "updates": 2})
    output = started(tmp_path, "skipped", "--health.nonfinite", "rollback")
    assert "update 1: the gradient is not finite: its step is skipped" in output
    recipe = write_recipe(tmp_path, SHORT | {"trainer.callbacks": poisoned([1], "PoisonSomeSteps")})
    error = stopped(tmp_path, capsys, "--config", recipe, "--run_dir", "ruined")
    assert "update 2: a weight is not finite after the step, and there is no checkpoint" in error
    assert "nothing before the first update is lost" in error
    assert not list((tmp_path / "ruined").glob("checkpoints/*")), "none of ruined weights"


def test_stop_is_clean_and_goes_on_under_another_policy(tmp_path, capsys):
    recipe = write_recipe(tmp_path, SHORT | {"trainer.callbacks": poisoned([3])})
    arguments = ("--config", recipe, "--run_dir", "run", "--health.nonfinite", "stop")
    error = stopped(tmp_path, capsys, *arguments)
    assert error.splitlines() == [
        "trimtab-rl: stopped: update 4: the gradient is not finite",
        "nothing before update=000002 is lost: trimtab-rl --resume run goes on from there",
    ]
    assert column(tmp_path / "run", "update") == [1, 2, 3]
    assert "update 4: the gradient" in stopped(tmp_path, capsys, "--resume", "run"), "again"
    run_here(["--resume", "run", "--health.nonfinite", "skip"], tmp_path)
    started(tmp_path, "whole")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert same(policy_of(tmp_path / "run"), policy_of(tmp_path / "whole"))


def test_too_many_in_a_row_stop(tmp_path, capsys):
    recipe = write_recipe(tmp_path, SHORT | {"trainer.callbacks": poisoned([1, 3, 4, 5, 6])})
    arguments = ("--config", recipe, "--run_dir", "run", "--health.max_in_a_row", "3")
    error = stopped(tmp_path, capsys, *arguments)
    assert "update 7: the gradient is not finite, after 3 such updates in a row (health." in error


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_decide_alike(tmp_path, strategy):
    """Only the second rank sees what is wrong: its gradient, and the weights after its step."""
    options = SHARDED if strategy == "fsdp2" else [*TWO, "ddp"]
    changes = {"updates": 6, "health.nonfinite": "rollback"}
    changes["trainer.callbacks"] = [
        {"class_path": "workers.PoisonSecondRank", "init_args": {"updates": [2], "steps": [4]}}
    ]
    recipe = write_recipe(tmp_path, SHORT | changes)
    two_ranks(tmp_path, [["--config", str(recipe), "--run_dir", "run", *options]])
    assert column(tmp_path / "run", "update") == list(range(1, 7))
    assert column(tmp_path / "run", "health/rollbacks") == [0, 0, 1, 1, 2, 2]
    assert all(weight.isfinite().all() for weight in policy_of(tmp_path / "run").values())


def watch(**options):
    return HealthWatch(HealthConfig(**options))


def judged(health, update, **metrics):
    metrics = {"loss": 0.0, "grad_norm": 1.0, "mismatch/abs_dlogp_mean": 0.1} | metrics
    health.begin(update)
    allowed = health.allows_step(metrics)
    health.finish(None, SimpleNamespace(skipped_updates=0))
    return allowed


def test_spikes_are_judged_against_the_median_of_healthy_updates():
    health = watch(grad_norm_factor=3.0, window=3)
    assert judged(health, 0, grad_norm=1e9), "the window is not full"
    assert all(judged(health, u, grad_norm=g) for u, g in ((1, 1.0), (2, 2.0), (3, 6.0)))
    # window 1, 2, 6: median 2
    assert judged(health, 4, grad_norm=6.0)
    # 2, 6, 6
    assert judged(health, 5, grad_norm=18.0)
    # 6, 6, 18: a spike stays out of the window
    assert not judged(health, 6, grad_norm=18.1) and not judged(health, 7, grad_norm=18.1)
    assert judged(health, 8, grad_norm=18.0)
    assert "norm 18.1 is more than 3 times the median 6 of the last 3" in health.last_reason
    assert health.skipped == 2

    health = watch(mismatch_factor=2.0, window=1, spike="stop")
    assert judged(health, 0) and judged(health, 1, **{"mismatch/abs_dlogp_mean": 0.2})
    with pytest.raises(Stopped, match=r"update 3: the mismatch 0\.41 is more than 2 times"):
        judged(health, 2, **{"mismatch/abs_dlogp_mean": 0.41})
    assert judged(watch(), 0, grad_norm=1e30), "by default nothing is a spike"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("loss", "the loss"),
        ("grad_norm", "the gradient"),
        ("mismatch/abs_dlogp_mean", "a log-prob"),
    ],
)
def test_what_is_not_finite_is_named(name, what):
    for value in (float("nan"), float("inf")):
        health = watch()
        assert not judged(health, 0, **{name: value})
        assert health.last_reason == f"update 1: {what} is not finite"


def test_state_survives_and_the_last_of_a_row_counts():
    health = watch(grad_norm_factor=2.0, window=2, max_in_a_row=2)
    for update, norm in enumerate((1.0, 1.0, 9.0, 9.0)):
        judged(health, update, grad_norm=norm)
    other = watch(grad_norm_factor=2.0, window=2, max_in_a_row=2)
    other.load_state_dict(yaml.safe_load(yaml.safe_dump(health.state_dict())))
    for each in (health, other):
        with pytest.raises(Stopped, match="after 2 such updates in a row"):
            judged(each, 4, grad_norm=9.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_finite(value, dtype):
    good = [torch.ones(3, dtype=dtype), torch.zeros(0), torch.tensor(3), None, torch.tensor(1.0)]
    assert all_finite(good) and all_finite([])
    bad = torch.ones(2, 2, dtype=dtype)
    bad[1, 0] = value
    assert not all_finite([*good, bad])
    assert all_finite([torch.full((4,), torch.finfo(dtype).max, dtype=dtype)])


def test_what_health_refuses():
    for wrong, message in (
        ({"grad_norm_factor": 1.0}, "health.grad_norm_factor: expected null or a factor > 1"),
        ({"mismatch_factor": float("nan")}, "health.mismatch_factor: expected null or a factor"),
        ({"window": 0}, "health.window: expected a count >= 1, got 0"),
        ({"max_in_a_row": 0}, "health.max_in_a_row: expected a count >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            HealthConfig(**wrong)


# Edits that must turn this file red:
# * health.py: _go_back without the schedulers
# * health.py: _go_back does not put updates_done back
# * health.py: _checkpoint asks for 1 instead of in_a_row + 1
# * health.py: _act without all_gather_object
# * health.py: finish appends to the windows whatever the action
# * run.py: CheckpointWriter writes also after going back
# * loop.py: without check_state
# * cli.py: without "health." in FREE_ON_RESUME
