"""Every example runs as it stands, in this process: imports take longer than the examples."""

import ast
import runpy
import sys
from pathlib import Path

import pytest
from megatron_prefix_workers import megatron_example
from processes import run_ranks

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
    run("plain_torch.py", "--steps", "21", monkeypatch=monkeypatch)
    first, *_, last = [line for line in capsys.readouterr().out.splitlines() if "reward" in line]
    reward = lambda line: float(line.split("reward ")[1].split(",")[0])
    assert reward(first) < 0.15 and reward(last) > 0.3


def test_transformers_trainer(monkeypatch, capsys, tmp_path):
    folder = ("--folder", str(tmp_path))
    run("transformers_trainer.py", "--steps", "30", *folder, monkeypatch=monkeypatch)
    *_, first, last = [x for x in capsys.readouterr().out.splitlines() if x.startswith("{'step'")]
    first, last = ast.literal_eval(first), ast.literal_eval(last)
    assert last["step"] == 30 and last["loss"] < first["loss"] - 0.3
    assert last["length_lr_factor"] == 1.0 and "stability/state" in last


def test_trl_grpo(monkeypatch, capsys, tmp_path):
    run("trl_grpo.py", "--steps", "21", "--folder", str(tmp_path), monkeypatch=monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    rewards = [float(line.split()[-1]) for line in lines]
    assert rewards[0] < 0.25 and rewards[-1] > rewards[0] + 0.1


def test_megatron_gpt(tmp_path):
    """Tensor parallel over two processes, on a CPU."""
    run_ranks(megatron_example, (str(tmp_path), str(FOLDER / "megatron_gpt.py")), 2)
    losses = [float(x.split(",")[0]) for x in (tmp_path / "0").read_text().split("loss ")[1:]]
    assert losses[0] > 3 and losses[-1] < 0.5
    assert (tmp_path / "1").read_text() == ""


def test_lightning_callbacks(monkeypatch, capsys, tmp_path):
    folder = ("--folder", str(tmp_path))
    run("lightning_callbacks.py", "--steps", "25", *folder, monkeypatch=monkeypatch)
    last = capsys.readouterr().out.splitlines()[-1]
    name, _, metrics = last.partition(" ")
    metrics = ast.literal_eval(metrics)
    assert name == "AdamMini" and metrics["loss"] < 1.0
    assert metrics["length_lr_factor"] == 1.0 and "stability/state" in metrics
