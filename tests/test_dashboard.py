import io
import json
import re
import sys
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console
from terminal import HIDE, SHOW, Terminal
from tiny_run import write_recipe

from trimtab.rl import Problem
from trimtab.rl.cli import prepared
from trimtab.rl.dashboard import (
    BLOCKS,
    PLAIN,
    Dashboard,
    clock,
    number_line,
    run_display,
    short_number,
    sparkline,
    transcript,
)
from trimtab.rl.recording import ProgressLines, read_rows

# ---------------------------------------------------------------- real runs on a real terminal


def test_a_run_in_forty_columns_draws_and_ends_well(tmp_path):
    write_recipe(tmp_path)
    terminal = Terminal(["--config", "recipe.yaml", "--run_dir", "out"], tmp_path, columns=40)
    assert terminal.wait() == 0, terminal.text[-3000:]
    text, lines = terminal.text, terminal.lines()
    assert text.count(HIDE) == text.count(SHOW) == 1 and text.rindex(SHOW) > text.index(HIDE)
    drawn = [line for line in lines if re.match(r"RL \d+/24 ", line)]
    assert drawn[-1].startswith("RL 24/24 ") and len(drawn) > 2
    labels = ("reward", "length", "mismatch", "entropy", "lr", "mixed groups", "rollout tok/s")
    for label in (*labels, "update tok/s"):
        found = [line for line in lines if line.startswith(f"{label:<14} ")]
        assert found and max(map(len, drawn + found)) <= 40, label
        if label == "reward":
            assert set(found[-1].split()[-1]) & set(BLOCKS)
    last = read_rows(tmp_path / "out" / "metrics.jsonl")[-1]
    shown = next(line for line in reversed(lines) if line.startswith("reward   "))
    assert shown.split()[1] == short_number(last["reward"])
    # what is logged and printed meanwhile stands on lines of its own, above
    assert any(line.startswith("mean response length surged at step") for line in lines)
    assert "evaluating 4 held-out problems (after)" in lines
    assert any(line.startswith("run folder: out") for line in lines[-3:])


@pytest.mark.slow
def test_a_run_with_a_warm_up_shows_its_bar_first(tmp_path):
    recipe = {
        "task": {"class_path": "trimtab.rl.ChainSumTask", "init_args": {"shots": 1}},
        "policy": {
            "warmup": {"hidden_size": 16, "heads": 2, "layers": 1, "ffn": 16}
            | {"reasoning_steps": 3, "mixture_steps": 2, "batch_documents": 1}
        },
        "rollout": {"prompts": 2, "group_size": 2, "max_tokens": 4},
        "evaluation": {"problems": 0},
        "updates": 2,
        "threads": 1,
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    terminal = Terminal(["--config", "recipe.yaml", "--run_dir", "out"], tmp_path, columns=120)
    assert terminal.wait() == 0, terminal.text[-3000:]
    lines = terminal.lines()
    bar = max(i for i, line in enumerate(lines) if line.startswith("warm-up"))
    assert "5/5" in lines[bar]
    first = min(i for i, line in enumerate(lines) if line.startswith("RL "))
    assert bar < first and any(line.startswith("RL 2/2 ") for line in lines)


@pytest.mark.slow
def test_ctrl_c_typed_into_the_terminal(tmp_path):
    write_recipe(tmp_path, {"updates": 100_000, "evaluation.problems": 0})
    terminal = Terminal(["--config", "recipe.yaml", "--run_dir", "out"], tmp_path, columns=80)
    terminal.read(until="RL 5")  # 5, or 50 to 59: in the middle of things
    terminal.type(b"\x03")
    assert terminal.wait() == 130, terminal.text[-3000:]
    assert terminal.text.rindex(SHOW) > terminal.text.rindex(HIDE)
    assert "interrupted: trimtab-rl --resume out goes on" in terminal.lines()
    assert "Traceback" not in terminal.text


# ---------------------------------------------------------------- where it stands


def test_no_terminal_keeps_its_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert isinstance(run_display(tmp_path / "m", 3), ProgressLines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(run_display(tmp_path / "m", 3), Dashboard)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(run_display(tmp_path / "m", 3), ProgressLines)


@pytest.mark.parametrize("shown", [True, False])
def test_enable_progress_bar(tmp_path, monkeypatch, shown):
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    option = [] if shown else ["--trainer.enable_progress_bar=false"]
    run = prepared(["--config", "recipe.yaml", "--run_dir", "out", *option])
    displays = [c for c in run.trainer.callbacks if isinstance(c, Dashboard)]
    assert len(displays) == shown and run.trainer.progress_bar_callback is None
    run.module.teardown("fit")


# ---------------------------------------------------------------- what it draws


def drawn(dashboard, width, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width)
    console.print(dashboard.drawn(console))
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def filled(path, updates=5):
    dashboard = Dashboard(path, 10)
    for i in range(updates):
        metrics = {"reward": i / 10, "length": 20.0, "lr": 1e-4, "rollouts": 8.0}
        metrics |= {"time/rollout": 0.5, "skipped_updates": 2.0, "entropy": float("nan")}
        group = SimpleNamespace(
            problem=Problem("train/7", "p"), completions=["[red]7+5=12\n\x1b[2J#12"], rewards=[1.0]
        )
        module = SimpleNamespace(last_metrics=metrics, last_groups=[group], updates_done=i + 1)
        dashboard.on_train_batch_end(None, module, None, None, i)
    return dashboard


@pytest.mark.parametrize("width", [40, 80, 130, 200])
def test_every_line_fits(tmp_path, width):
    text = drawn(filled(tmp_path / "m"), width)
    assert max(map(len, text.splitlines())) <= width
    assert "RL 5/10" in text and "2 skipped" in text and "0:00 left" in text
    assert re.search(r"rollout tok/s +320 ", text)  # 8 x 20 tokens in half a second
    assert re.search(r"reward +0.4 ▁▃▅▆█", text) or width == 40
    assert "entropy" not in text  # never a number
    assert "train/7, reward 1: [red]7+5=12⏎ [2J#12" in text.replace("\n", "")  # as text, no codes


def test_an_ascii_terminal_gets_plain_characters(tmp_path):
    text = drawn(filled(tmp_path / "m"), 100, "ascii")
    assert re.search(r"reward +0.4 _-\+\*@", text), text
    assert "#12" in text


def test_a_continued_run_has_its_past(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"update": i, "reward": i / 4, "rollouts": 2, "length": 3} for i in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dashboard = Dashboard(path, 10, Console(file=io.StringIO(), force_terminal=True))
    dashboard.on_train_start(None, SimpleNamespace(updates_done=3))
    dashboard.stop()
    dashboard.stop()
    assert dashboard.history["reward"] == [0.25, 0.5, 0.75]
    assert "RL 3/10" in dashboard.console.file.getvalue()


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BLOCKS
    assert sparkline([7, 0], 9, PLAIN) == "@_"
    assert sparkline([1, 1, 1], 9) == "▄▄▄" and sparkline([], 4) == ""
    assert sparkline([0, 0, 4, 4, 8, 8, 28, 28], 4) == "▁▂▃█"  # averaged in stretches
    assert len(sparkline(list(range(1000)), 24)) == 24


def test_numbers_and_times():
    assert [short_number(v) for v in (0.12345, 1e-4, 99.96, 100.4, 12345.6, 2e6, 3e8, -0.5)] == [
        "0.123", "0.0001", "100", "100", "12,346", "2000000", "3e+08", "-0.5",
    ]  # fmt: skip
    assert all(len(short_number(v)) <= 8 for v in (1e-300, 1.23e-5, 999999.4, 9999999.4, 1e300))
    assert [clock(s) for s in (0, 7.4, 67, 3723, 86_400 * 2 + 3 * 3600, -1)] == [
        "0:00", "0:07", "1:07", "1:02:03", "2 d 3 h", "0:00",
    ]  # fmt: skip
    assert len(number_line("reward", [0.5], 24)) <= 24


def test_transcript_keeps_the_end_of_a_long_one():
    line = transcript("train/1", "a" * 5000 + "\x07#42", None)
    assert line.startswith("train/1, reward lost: aaa") and line.endswith("aaa #42")
    assert len(line) < 450 and line.isprintable()


# Edits to rl/dashboard.py that must turn this file red:
#   columns = max(1, width // CELL)               ->  columns = 2
#   live.stop() in stop                           ->  removed
#   self._streams.enter_context(_logging_above()) ->  removed      (the surge lands in the drawing)
#   if c.isprintable() in transcript              ->  always
#   BLOCKS if unicode else PLAIN                  ->  BLOCKS
#   on_exception                                  ->  removed      (too late: teardown)
