"""A full disk: what may be lost is, once said; the rest stops the run, and nothing is lost."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess

import pytest
import torch
from survival import SHORT, assert_same_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_ddp import TWO, two_ranks
from tiny_run import metrics_of, run_here, write_recipe
from torch.multiprocessing import ProcessExitedException

from trimtab.rl.durable import (
    DurableCheckpointIO,
    append_text,
    is_disk_error,
    replace_text,
    whole_file,
)


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a real file system of so many KiB in a folder."""
    mounted = []

    def mount(folder, size):
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in reversed(mounted):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def largest_file():
    """A function that limits the size of files that this process writes, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(folder, room=0):
    with (folder / "ballast").open("wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.tell() - room))


def test_files_are_whole_or_as_before(tmp_path, small_disk):
    disk = small_disk(tmp_path / "disk", 256)
    kept, lines, new = disk / "kept.ckpt", disk / "lines", disk / "new"
    replace_text(kept, "whole")
    append_text(lines, "a line\n" * 100)
    before = lines.read_bytes()
    fill(disk, room=8192)
    big = "x" * 20_000
    for action, path, verb in (
        (lambda: append_text(lines, big + "\n"), lines, "append to"),
        (lambda: append_text(new, big + "\n"), new, "append to"),
        (lambda: replace_text(kept, big), kept, "write"),
        (
            lambda: DurableCheckpointIO().save_checkpoint({"a": torch.ones(9999)}, kept),
            kept,
            "write",
        ),
    ):
        with pytest.raises(OSError, match=f"cannot {verb} {path}: No space left on device") as full:
            action()
        assert is_disk_error(full.value)
    assert lines.read_bytes() == before and new.read_bytes() == b""
    assert kept.read_text() == "whole"
    assert not list(disk.glob(".*")), "what could not be finished takes no room"
    append_text(lines, "x" * 1000)  # there is room for this


def test_files_that_may_not_grow(tmp_path, largest_file):
    """As a quota, and without the right to mount."""
    kept, lines = tmp_path / "kept", tmp_path / "lines"
    append_text(lines, "x" * 900 + "\n")
    replace_text(kept, "whole")
    largest_file(1000)
    for action in (
        lambda: append_text(lines, "y" * 200 + "\n"),
        lambda: replace_text(kept, "y" * 2000),
        lambda: DurableCheckpointIO().save_checkpoint({"a": torch.ones(999)}, kept),
    ):
        with pytest.raises(OSError, match=r"cannot .*File too large") as failed:
            action()
        assert is_disk_error(failed.value)
    assert lines.read_text() == "x" * 900 + "\n" and kept.read_text() == "whole"
    assert not list(tmp_path.glob(".*"))


def test_other_errors_are_their_own(tmp_path):
    with pytest.raises(FileNotFoundError):
        replace_text(tmp_path / "nowhere" / "a", "")
    assert not is_disk_error(FileNotFoundError(errno.ENOENT, "no"))
    with pytest.raises(TypeError):
        with whole_file(tmp_path / "a") as file:
            file.write("text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("room", "what"),
    [(60_000, "cannot write .*update=000006.ckpt"), (0, r"cannot append to .*metrics.jsonl")],
)
def test_what_must_not_be_lost_stops_the_run_and_it_goes_on(
    tmp_path, small_disk, capsys, room, what
):
    disk = small_disk(tmp_path / "disk", 3000)
    options = {"folder": str(disk), "first": 4, "room": room}
    callbacks = [{"class_path": "workers.FillDisk", "init_args": options}]
    recipe = write_recipe(tmp_path, SHORT | {"trainer.callbacks": callbacks})
    arguments = ["--config", recipe, "--run_dir", disk / "run"]
    with pytest.raises(SystemExit) as ended:
        run_here(arguments, tmp_path)
    assert ended.value.code == 3
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert re.search(f"trimtab-rl: stopped: {what}: No space left on device", first), first
    assert "nothing before update=000003 is lost" in second
    left = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
    assert left == ["update=000003.ckpt"]
    for line in (disk / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)

    if room == 0:  # still full: it says so again, and nothing changes
        with pytest.raises(SystemExit) as ended:
            run_here(["--resume", disk / "run"], tmp_path)
        assert ended.value.code == 3 and "No space left" in capsys.readouterr().err
    (disk / "ballast").unlink()
    run_here(["--resume", disk / "run"], tmp_path)
    shutil.rmtree(tmp_path / "whole", ignore_errors=True)
    run_here(["--config", recipe, "--run_dir", "whole"], tmp_path)
    assert_same_run(disk / "run", tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_stop_together(tmp_path, small_disk):
    """Only the first one writes; the second must not wait for it for ever."""
    disk = small_disk(tmp_path / "disk", 3000)
    options = {"folder": str(disk), "first": 4, "room": 60_000}
    callbacks = [{"class_path": "workers.FillDisk", "init_args": options}]
    recipe = write_recipe(tmp_path, SHORT | {"trainer.callbacks": callbacks})
    arguments = ["--config", str(recipe), "--run_dir", str(disk / "run"), *TWO, "ddp"]
    with pytest.raises(ProcessExitedException) as ended:
        two_ranks(tmp_path, [arguments])
    assert ended.value.exit_code == 3
    left = [path.name for path in (disk / "run" / "checkpoints").iterdir()]
    assert left == ["update=000003.ckpt"]
    (disk / "ballast").unlink()
    two_ranks(tmp_path, [["--resume", str(disk / "run")]])
    assert [row["update"] for row in metrics_of(disk / "run")] == list(range(1, 13))


def test_transcripts_and_tensorboard_are_lost_alone(tmp_path, small_disk, capsys):
    """Each on a full disk of its own; TensorBoard's has room again from the tenth update."""
    changes = {"updates": 12, "record.transcripts_every": 1, "evaluation.problems": 2}
    recipe = write_recipe(tmp_path, changes)
    run_here(["--config", recipe, "--run_dir", "whole"], tmp_path)
    run_here(["--config", recipe, "--run_dir", "run", "--trainer.max_steps", "4"], tmp_path)
    run = tmp_path / "run"
    (run / "transcripts.jsonl").unlink()
    (run / "transcripts.jsonl").symlink_to("/dev/full")
    shutil.rmtree(run / "tensorboard")
    events = small_disk(run / "tensorboard", 1500)
    stored = (run / "config.yaml").read_text()
    options = {"folder": str(events), "first": 6, "last": 8, "room": 0}
    fill_disk = json.dumps([{"class_path": "workers.FillDisk", "init_args": options}])
    (run / "config.yaml").write_text(stored.replace("callbacks: null", f"callbacks: {fill_disk}"))
    output = run_here(["--resume", "run"], tmp_path)
    assert output.count("transcripts are lost while this lasts") == 1
    assert output.count("TensorBoard's events are lost while this lasts") == 1
    assert "No space left on device" in output
    assert metrics_of(run) == metrics_of(tmp_path / "whole")
    seen = set()
    for path in events.glob("events*"):
        found = EventAccumulator(str(path)).Reload()
        if "reward" in found.Tags()["scalars"]:
            seen |= {event.step for event in found.Scalars("reward")}
    assert seen >= {5, 6, 10, 11, 12} and not seen & {8, 9}


@pytest.mark.slow
def test_an_evaluation_or_a_policy_that_cannot_be_written_is_made_up_for(
    tmp_path, small_disk, capsys
):
    """At the end of a run: the last update is there, so a resume only finishes."""
    disk = small_disk(tmp_path / "disk", 3000)
    recipe = write_recipe(tmp_path, SHORT)
    run_here(["--config", recipe, "--run_dir", disk / "run", "--trainer.max_steps", "12"], tmp_path)
    shutil.rmtree(disk / "run" / "policy")
    summary = json.loads((disk / "run" / "summary.json").read_text())
    del summary["updates"]
    (disk / "run" / "summary.json").write_text(json.dumps(summary))
    fill(disk, room=140_000)
    with pytest.raises(SystemExit) as ended:
        run_here(["--resume", disk / "run"], tmp_path)
    assert ended.value.code == 3
    assert "No space left on device" in capsys.readouterr().err
    assert not (disk / "run" / "policy").exists()
    (disk / "ballast").unlink()
    run_here(["--resume", disk / "run"], tmp_path)
    run_here(["--config", recipe, "--run_dir", "whole"], tmp_path)
    assert_same_run(disk / "run", tmp_path / "whole")
    assert os.path.isdir(disk / "run" / "policy")


# Edits that must turn this file red:
# * durable.py: append_text without ftruncate
# * durable.py: whole_file without unlink
# * durable.py: _ErrorsLater.write without `except`
# * recording.py: TensorBoard.log_metrics without _costs_only_events
# * recording.py: TranscriptWriter without `except`
# * recording.py: `self._failed` is never set
# * run.py: old checkpoints are deleted before the new one is written
