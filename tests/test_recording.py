import json
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from trimtab.rl import Problem, Sample
from trimtab.rl.recording import (
    MetricsWriter,
    ProgressLines,
    RunFolder,
    TensorBoard,
    TranscriptWriter,
    read_rows,
    replace_text,
)
from trimtab.rl.report import draw_report, print_table


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------- the folder


def test_fresh_folder_is_new_or_empty_and_creates_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.fresh(None, "chainsum")
    assert folder.path.parent.name == "runs" and folder.path.name.startswith("chainsum-2")
    assert RunFolder.fresh("mine", "x").metrics.name == "metrics.jsonl"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    assert RunFolder.fresh("empty", "x").path.name == "empty"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / ".hidden").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("taken", "file"):
        with pytest.raises(
            ValueError, match=f"run_dir: {name} already holds files.*--resume {name}"
        ):
            RunFolder.fresh(name, "x")


def test_existing_folder_has_a_configuration(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="is no run folder"):
            RunFolder.existing(str(path))
    (tmp_path / "config.yaml").write_text("{}")
    assert RunFolder.existing(str(tmp_path)).path == tmp_path


def test_newest_whole_checkpoint(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    assert folder.newest_checkpoint() is None
    folder.checkpoints.mkdir()
    paths = [folder.checkpoints / f"update={n:06d}.ckpt" for n in (9, 10, 11, 100)]
    for path in paths[:3]:
        torch.save({"state_dict": {"w": torch.ones(100)}}, path)
    (folder.checkpoints / "update=000200.ckpt.part").write_bytes(b"")
    assert folder.newest_checkpoint() == paths[2]
    paths[3].write_bytes(paths[2].read_bytes()[:-300])  # killed while it was written
    paths[2].write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert folder.newest_checkpoint() == paths[1]
    assert [record.args[0] for record in caplog.records] == [paths[3], paths[2]]


def test_forget_after_keeps_what_the_checkpoint_knows(tmp_path):
    folder = RunFolder(tmp_path)
    folder.forget_after(3)  # nothing there yet
    lines(folder.metrics, [{"update": n, "reward": n / 7} for n in range(1, 7)])
    with folder.metrics.open("a") as file:
        file.write('{"update": 7, "rew')  # cut
    lines(folder.transcripts, [{"update": n, "prompt": "é\u2028"} for n in (1, 1, 5, 5)])
    folder.forget_after(4)
    assert read_rows(folder.metrics) == [{"update": n, "reward": n / 7} for n in range(1, 5)]
    assert read_rows(folder.transcripts) == [{"update": 1, "prompt": "é\u2028"}] * 2
    folder.forget_after(0)
    assert read_rows(folder.metrics) == [] and folder.metrics.read_text() == ""


# ---------------------------------------------------------------- files


def test_read_rows_forgives_a_cut_last_line_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text, rows in (
        ("", []),
        ('{"a": 1}\n', [{"a": 1}]),
        ('{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}\n{"a": ', [{"a": 1}]),
        ('{"a": NaN}\n{', [{"a": pytest.approx(float("nan"), nan_ok=True)}]),
    ):
        path.write_text(text)
        assert read_rows(path) == rows
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not JSON"):
        read_rows(path)
    path.write_bytes('{"a": "é"}\n{"a": "é"}'.encode()[:-3])  # cut inside a character
    assert read_rows(path) == [{"a": "é"}]


def test_replace_text_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    replace_text(path, "old é")
    assert path.read_text(encoding="utf-8") == "old é"
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            replace_text(path, "new")
        assert path.read_text(encoding="utf-8") == "old é"
    replace_text(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_metrics_go_to_the_file_in_full_precision_and_to_the_loggers(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    logged = []
    log = SimpleNamespace(log_metrics=lambda metrics, step: logged.append((step, metrics)))
    rows = [{"reward": 1 / 3}, {"reward": 1e-30, "time/rollout": 2.5}]
    for update, row in enumerate(rows, 1):
        module = SimpleNamespace(last_metrics=row, updates_done=update)
        writer.on_train_batch_end(SimpleNamespace(loggers=[log]), module, None, None, 0)
    assert read_rows(writer.path) == [{"update": i, **row} for i, row in enumerate(rows, 1)]
    assert logged == [(1, rows[0]), (2, rows[1])]


def group(number, n=2):
    return SimpleNamespace(
        problem=Problem(f"train/{number}", f"prompt {number}"),
        samples=[Sample([1, 2, 3], [0.0] * 3, "stop") for _ in range(n)],
        completions=[f"answer {number}.{i}\n\u2028" for i in range(n)],
        rewards=[None, 1.0][:n],
    )


def test_transcripts_at_the_first_each_nth_and_last_update(tmp_path):
    path = tmp_path / "transcripts.jsonl"
    writer = TranscriptWriter(path, every=3, count=3, total=8)
    module = SimpleNamespace(last_groups=[group(0), group(1)], updates_done=0)
    for module.updates_done in range(1, 9):
        writer.on_train_batch_end(None, module, None, None, 0)
    rows = read_rows(path)
    assert [row["update"] for row in rows] == [n for n in (1, 3, 6, 8) for _ in range(3)]
    assert [row["completion"][:10] for row in rows[:3]] == [
        "answer 0.0",
        "answer 1.0",
        "answer 0.1",
    ]
    assert rows[0] == {
        "update": 1,
        "problem": "train/0",
        "prompt": "prompt 0",
        "completion": "answer 0.0\n\u2028",
        "reward": None,
        "tokens": 3,
        "finish_reason": "stop",
    }
    path.unlink()
    TranscriptWriter(path, every=1, count=0, total=8).on_train_batch_end(
        None, module, None, None, 0
    )
    assert not path.exists()


def test_progress_lines_are_few_and_end_with_the_last(capsys):
    metrics = {"reward": torch.tensor(0.5), "mismatch/abs_dlogp_mean": torch.tensor(0.0123)}
    trainer = SimpleNamespace(num_training_batches=50, progress_bar_metrics=metrics)
    shown = ProgressLines("RL", seconds=1000.0)
    for done in range(1, 51):
        shown.on_train_batch_end(trainer, SimpleNamespace(updates_done=done), None, None, done - 1)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) <= 2 and printed[-1] == "RL 50/50  reward 0.5  mismatch 0.0123"


# ---------------------------------------------------------------- the report


def metric_rows(n):
    edges = (("0", "1e-6"), ("0.1", "0.5"), ("0.5", "1"))
    return [
        {
            "update": i + 1,
            "reward": i / n,
            "length": 10.0 + i,
            "length_std": 2.0,
            "lr": 1e-4,
            "entropy": 1.0 / (i + 1),
            "mismatch/abs_dlogp_mean": 0.01,
            "groups/mixed": 0.5,
            "trust_region/kept_sequences": 0.9,
            "truncated": 0.0,
            "length_rate/factor": 1.0 if i < n // 2 else 0.5,
            "length_rate/triggered": float(i >= n // 2),
        }
        | {f"mismatch/abs_dlogp/p_{low}_{high}": 0.1 for low, high in edges}
        for i in range(n)
    ]


REPORTS = {
    "many": metric_rows(20),
    "one row": metric_rows(1),
    "few metrics": [{"update": 1, "reward": 0.5}, {"update": 2}],
    "no metric": [{"update": 1}],
    "skipped updates": [metric_rows(3)[0], {"update": 2, "rollouts": 0.0}, metric_rows(3)[2]],
    "length without its deviation": [{"update": 1, "length": 3.0}],
    "not finite": [metric_rows(2)[0] | {"reward": float("nan"), "entropy": float("inf")}],
    "rewards beyond 1": [row | {"reward": 30.0 + i} for i, row in enumerate(metric_rows(4))],
}


@pytest.mark.parametrize("rows", REPORTS.values(), ids=REPORTS)
def test_report_is_a_picture(tmp_path, rows, recwarn):
    picture = tmp_path / "report.png"
    draw_report(lines(tmp_path / "metrics.jsonl", rows), picture)
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1650, 825) and 15_000 < len(data) < 1_000_000
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "report.png"}


def test_report_of_nothing_is_refused(tmp_path):
    for text in (None, "", '{"upd'):
        if text is not None:
            (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"metrics\.jsonl: no metrics to draw"):
            draw_report(tmp_path / "metrics.jsonl", tmp_path / "report.png")
    assert not (tmp_path / "report.png").exists()


def test_table_prints_the_figures(capsys, tmp_path):
    before = {"sampled": 0.2754, "greedy": 0.25, "length": 8.04, "lost": 0}
    before["by_label"] = {"direct": [0.75, 0.125]}
    after = (
        before
        | {"lost": 17}
        | {"sampled": 0.9336, "by_label": {"direct": [0.25, 0.5], "worked": [0.75, 1.0]}}
    )
    seconds = {"rollout": 12.25, "reward": 1.0, "update": 30.5}
    folder = tmp_path / ("long" * 30)
    print_table({"before": before, "after": after, "updates": 60, "seconds": seconds}, folder)
    printed = capsys.readouterr().out
    for figure in ("0.275", "0.934", "8.0", "0.75, 0.125", "0.25, 0.500", "0.75, 1.000", "-", "17"):
        assert figure in printed
    for figure in ("60 updates", "12.2", "1.0", "30.5", "43.8"):
        assert figure in printed
    assert f"run folder: {folder}\n" in printed  # in one piece, to be copied
    print_table({"updates": 2, "seconds": seconds}, tmp_path)  # without an evaluation
    assert "held-out" not in capsys.readouterr().out


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("log_metrics", ({"reward": 1.0}, 1)),
        ("log_hyperparams", ({"seed": 1},)),
        ("save", ()),
        ("finalize", ("success",)),
    ],
)
def test_ctrl_c_waits_until_the_logger_is_done(name, arguments, tmp_path, monkeypatch):
    """An interrupt within TensorBoard's queue left its lock taken: a run of ours then hung."""
    done = []

    def interrupted(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        done.append(args)

    monkeypatch.setattr(TensorBoardLogger, name, interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        getattr(TensorBoard(tmp_path), name)(*arguments)
    assert done == [arguments] and signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_in_the_logger_does_what_it_does_elsewhere(tmp_path, monkeypatch):
    """Nothing where it is ignored; the end of the process where the system decides."""
    monkeypatch.setattr(TensorBoardLogger, "save", lambda _: signal.raise_signal(signal.SIGINT))
    board, handler = TensorBoard(tmp_path), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        board.save()
        pid = os.fork()
        if not pid:
            try:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                board.save()
            finally:  # the tests are the parent's
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, handler)


def test_what_the_logger_raises_passes_and_other_threads_log(tmp_path, monkeypatch):
    board = TensorBoard(tmp_path, name="", version="")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(board.log_metrics, {"reward": 1.0}, 1).result()
    board.finalize("success")
    assert list(tmp_path.glob("events*"))
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(TensorBoardLogger, "save", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TensorBoard(tmp_path).save()
    assert signal.getsignal(signal.SIGINT) is handler


# Edits that must turn this file red:
#   rl/recording.py: with interrupts_deferred()                           ->  removed, anywhere
#   rl/recording.py: signal.signal(signal.SIGINT, before)                 ->  removed
#   rl/recording.py: the main thread's condition                          ->  removed
#   rl/recording.py: reverse=True in newest_checkpoint                    ->  removed
#   rl/recording.py: row["update"] <= updates                             ->  < updates
#   rl/recording.py: if number < len(lines): raise                        ->  always raise
#   rl/recording.py: unfinished.write_text(...); unfinished.replace(path) ->  path.write_text(...)
#   rl/report.py: if not rows: raise                                      ->  removed
