"""Which engine a configuration asks for, and what is refused before anything is written."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import causal_lm
from tiny_run import metrics_of, run_here, write_recipe

from trimtab.rl import RolloutConfig, Tree, VLLMConfig, VLLMEngine
from trimtab.rl.cli import main
from trimtab.rl.engine import TransformersEngine
from trimtab.rl.engines import make_engine
from trimtab.rl.rollout import Sampling
from trimtab.rl.sampling_checks import finish_reason
from trimtab.rl.vllm_engine import INSTALL, refuse_missing_vllm

without_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here"
)


def test_the_default_is_that_of_transformers(tmp_path):
    rollout = RolloutConfig(dtype="float32", quantize_bits=8, max_rows=3)
    engine = make_engine(rollout, causal_lm("llama"), tmp_path)
    assert type(engine) is TransformersEngine
    assert (engine.quantize_bits, engine.max_rows) == (8, 3)
    assert engine.model.dtype == torch.float32 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vllm": VLLMConfig()}, r"rollout.vllm: expected null without engine vllm, got VLLM"),
        (
            {"engine": "vllm", "servers": ("http://a:1",)},
            r"rollout.servers: expected \[\] with rollout.engine vllm, .*, got \['http://a:1'\]",
        ),
        (
            {"engine": "vllm", "tree": Tree()},
            "rollout.tree: expected null with rollout.engine vllm",
        ),
        ({"engine": "vllm", "quantize_bits": 4}, "rollout.quantize_bits: expected null with"),
        ({"engine": "vllm", "temperature": 3.0}, "rollout.temperature: expected what vLLM takes"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**options)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("gpu_memory_utilization", 0.0, r"a share in \(0, 1\]"),
        ("gpu_memory_utilization", 1.5, r"a share in \(0, 1\]"),
        ("max_model_len", 1, "a count >= 2 or null"),
        ("tensor_parallel_size", 0, "a count >= 1"),
    ],
)
def test_options_of_vllm_out_of_range(option, value, expected):
    message = f"rollout.vllm.{option}: expected {expected}, got {value}"
    with pytest.raises(ValueError, match=message):
        VLLMConfig(**{option: value})


@without_vllm
def test_a_missing_vllm_is_one_line_with_the_command(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, {"updates": 1, "evaluation.problems": 0})
    monkeypatch.chdir(tmp_path)
    run_here(["--config", recipe, "--run_dir", "out"], tmp_path)
    stored = Path("out/config.yaml").read_text()
    Path("out/config.yaml").write_text(stored.replace("engine: transformers", "engine: vllm"))
    start = ["--config", str(recipe), "--run_dir", "none", "--rollout.engine=vllm"]
    for arguments in (start, ["eval", "out"]):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            main([*arguments])
        [line] = capsys.readouterr().err.splitlines()
        assert "rollout.engine: vllm is not installed in this environment; " + INSTALL in line
    assert not Path("none").exists()
    with pytest.raises(ValueError, match="vllm is not installed"):
        VLLMEngine(causal_lm("llama"), tmp_path / "model")
    assert "vllm" not in sys.modules and not (tmp_path / "model").exists()


def test_a_run_older_than_the_option_goes_on_as_it_was(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, {"updates": 1, "evaluation.problems": 0})
    monkeypatch.chdir(tmp_path)
    run_here(["--config", recipe, "--run_dir", "out"], tmp_path)
    stored = Path("out/config.yaml").read_text()
    old = re.sub(r"(?m)^  (engine: transformers|vllm: null)\n", "", stored)
    assert len(old.splitlines()) == len(stored.splitlines()) - 2
    Path("out/config.yaml").write_text(old)
    with pytest.raises(SystemExit, match="2"):
        main(["--resume", "out", "--rollout.engine=vllm"])
    line = capsys.readouterr().err
    assert "--resume: rollout.engine was 'transformers' in that run, got 'vllm'" in line
    run_here(["--resume", "out", "--updates=2"], tmp_path)
    assert len(metrics_of(tmp_path / "out")) == 2


def test_several_processes_are_refused(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("raise ImportError('never imported to look')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    refuse_missing_vllm(1)
    with pytest.raises(ValueError, match=r"rollout.engine: expected a trainer of one process.* 2;"):
        refuse_missing_vllm(2)


def test_why_a_rollout_ended():
    sampling = Sampling(max_tokens=3, stop_token_ids=(7,))
    assert finish_reason([1, 7], sampling) == "stop" == finish_reason([1, 2, 7], sampling)
    assert finish_reason([1, 2, 3], sampling) == "length"
    for ids in ([1], []):
        with pytest.raises(ValueError, match="which is no stop token"):
            finish_reason(ids, sampling)


# Edits that must turn this file red:
# * vllm_engine.py: import vllm at the top
# * run.py: without refuse_missing_vllm (the run's folder is there before the error)
# * evaluate_run.py: without refuse_missing_vllm
# * config.py: servers and engine vllm together
# * engines.py: without quantize_bits
# * cli.py: _refuse_changes(stored, ...)
