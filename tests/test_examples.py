"""Every example runs as it stands, in this process: imports take longer than the examples."""

import ast
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"


def run(name, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(FOLDER / name), run_name="__main__")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert f"examples/{path.name}" in text.split('"""')[1]


def test_plain_torch(monkeypatch, capsys):
    run("plain_torch.py", "--steps", "25", monkeypatch=monkeypatch)
    first, *_, last = [line for line in capsys.readouterr().out.splitlines() if "reward" in line]
    reward = lambda line: float(line.split("reward ")[1].split(",")[0])
    assert reward(first) < 0.15 and reward(last) > 0.3


def test_lightning_callbacks(monkeypatch, capsys, tmp_path):
    run(
        "lightning_callbacks.py", "--steps", "25", "--folder", str(tmp_path),
        monkeypatch=monkeypatch,
    )  # fmt: skip
    last = capsys.readouterr().out.splitlines()[-1]
    name, _, metrics = last.partition(" ")
    metrics = ast.literal_eval(metrics)
    assert name == "AdamMini" and metrics["loss"] < 1.0
    assert metrics["length_lr_factor"] == 1.0 and "stability/state" in metrics
