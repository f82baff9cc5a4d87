"""Runs killed by SIGKILL at any moment go on to what an undisturbed run leaves, bit for bit."""

import pytest
import torch
from survival import (
    CASES,
    assert_same_run,
    killed_in_write,
    moments_of,
    recipe_of,
    survives,
)
from tiny_run import metrics_of, run_here

from trimtab.rl.durable import (
    append_text,
    check_whole,
    clear_unfinished,
    replace_text,
    whole_file,
)
from trimtab.rl.recording import RunFolder

SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "default"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Case -> (folder, recipe, moments of its run "whole"); each is run once."""
    done = {}

    def run(case):
        if case not in done:
            folder = tmp_path_factory.mktemp("undisturbed")
            recipe = recipe_of(folder, case)
            total = moments_of(folder, ["--config", str(recipe), "--run_dir", "whole"])
            done[case] = (folder, recipe, total)
        return done[case]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("case", ["default", *SLOW])
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_moment(undisturbed, case, seed):
    """Four times, the later ones in runs that were resumed."""
    folder, recipe, total = undisturbed(case)
    survives(folder, recipe, f"killed-{seed}", total, seed, kills=4)
    assert_same_run(folder / f"killed-{seed}", folder / "whole")


def test_the_cases_do_what_their_names_say(undisturbed):
    folder, _, total = undisturbed("default")
    assert total > 2000
    assert all(row["grad_norm"] > 0 for row in metrics_of(folder / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "name", "least"),
    [
        ("lost rewards", "reward_errors", 1),
        ("skipped steps", "health/skipped", 2),
        ("going back", "health/rollbacks", 2),
        ("spikes", "health/rollbacks", 1),
    ],
)
def test_the_slow_cases_do_what_their_names_say(undisturbed, case, name, least):
    folder, _, _ = undisturbed(case)
    assert max(row[name] for row in metrics_of(folder / "whole")) >= least


@pytest.mark.parametrize(
    "write", [1, 40, *(pytest.param(n, marks=pytest.mark.slow) for n in (9, 100, 130))]
)
def test_killed_half_way_through_a_checkpoint(undisturbed, write):
    folder, recipe, _ = undisturbed("default")
    name = f"write-{write}"
    assert killed_in_write(folder, ["--config", str(recipe), "--run_dir", name], write)
    [litter] = (folder / name / "checkpoints").glob(".*")
    assert litter.name.endswith(".ckpt.unfinished")
    run_here(["--config", recipe, "--resume", name], folder)
    assert_same_run(folder / name, folder / "whole")


def test_a_whole_checkpoint_with_a_broken_block_is_not_taken(undisturbed):
    """As a disk may return it: of the right length, and it can be opened."""
    folder, recipe, _ = undisturbed("default")
    run_here(["--config", recipe, "--run_dir", "block", "--trainer.max_steps", "7"], folder)
    path = max((folder / "block" / "checkpoints").iterdir())
    data = bytearray(path.read_bytes())
    at = len(data) // 2
    data[at : at + 512] = bytes(x ^ 0xFF for x in data[at : at + 512])
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match="checksum"):
        check_whole(path)
    output = run_here(["--config", recipe, "--resume", "block"], folder)
    assert "cannot be read" in output and "after update 6" in output
    assert_same_run(folder / "block", folder / "whole")


def test_whole_files_and_appended_text(tmp_path):
    path = tmp_path / "a"
    replace_text(path, "old")
    with pytest.raises(KeyboardInterrupt):
        with whole_file(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]
    append_text(path, "er\n")
    append_text(tmp_path / "b", "x\n")
    assert path.read_text() == "older\n" and (tmp_path / "b").read_text() == "x\n"


def test_what_killed_writes_have_left_is_cleared(tmp_path):
    folder = RunFolder(tmp_path)
    (folder.checkpoints).mkdir()
    (tmp_path / ".policy.unfinished").mkdir()
    kept = [folder.checkpoint(3), tmp_path / "notes.unfinished", tmp_path / ".mine"]
    for path in (*kept, tmp_path / ".summary.json.unfinished"):
        path.write_text("")
    (folder.checkpoints / ".update=000004.ckpt.unfinished").write_text("")
    folder.clear_unfinished()
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(kept)
    assert not (tmp_path / ".policy.unfinished").exists()
    clear_unfinished(tmp_path / "nowhere")


# Edits that must turn this file red:
# * durable.py: whole_file opens `path` itself
# * durable.py: _ENDING = ".ckpt"
# * recording.py: newest_checkpoint without check_whole
# * recording.py: clear_unfinished passes
# * run.py: CheckpointWriter.regular takes every checkpoint
# * run.py: without `and not module.health.went_back`
# * health.py: load_state_dict does not restore in_a_row; or the windows
