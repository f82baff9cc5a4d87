import ast
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("integrations", "optim", "rl", "stability", "triton_kernels")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
OUTSIDE = sorted(
    path for name in ("tests", "benchmarks", "examples") for path in (ROOT / name).rglob("*.py")
)

# layout.md section 2: who may import whom. A folder may always import itself.
ALLOWED = {
    "triton_kernels": set(),
    "optim": {"triton_kernels"},
    "stability": {"triton_kernels"},
    "rl": {"optim", "stability", "triton_kernels"},
    "integrations": {
        "optim",
        "stability",
        "rl.batch",
        "rl.cli",
        "rl.prefix",
        "rl.prefix_checks",
        "rl.prefix_metrics",
        "rl.prefix_phases",
        "rl.prefix_waves",
        "rl.recording",
        "triton_kernels.gem",
        "triton_kernels.prefix_attention",
        "triton_kernels.token_stats",
    },
}
# Host libraries, imported in integrations/<host>.py and <host>_<part>.py (rl/ is a Lightning
# program).
HOSTS = {
    "accelerate": "transformers",
    "lightning": "lightning",
    "pytorch_lightning": "lightning",
    "transformers": "transformers",
    "trl": "trl",
    "verl": "verl",
    "megatron": "megatron",
    "ray": "ray",
}


def imports(path):
    """(level, dotted name) of every import in a file, `from . import x` as (1, "x")."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name) for alias in node.names)


def python(code, *, path=None, cwd=None):
    """Runs code in a fresh interpreter; `path` stands first on its path, the checkout nowhere."""
    if path is not None:
        code = (
            f"import sys\nsys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in "
            f"getattr(f, '__module__', '')]\nsys.path.insert(0, {str(path)!r})\n{code}"
        )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel made from the unpacked sdist), built from a copy of the checkout."""
    place = tmp_path_factory.mktemp("build")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if not (ROOT / name).exists():
            continue
        copy = place / "checkout" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            copy.symlink_to(os.readlink(ROOT / name))
        else:
            copy.write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; build_meta.build_{}({!r})"
    python(build.format("sdist", str(place)), cwd=place / "checkout")
    (sdist,) = place.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
        archive.extractall(place / "unpacked", **safe)
    (unpacked,) = (place / "unpacked").iterdir()
    python(build.format("wheel", str(place)), cwd=unpacked)
    (wheel,) = place.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-compile", "--target", target, built[1]], check=True)
    return target


def test_packages_are_the_folders():
    setuptools = PROJECT["tool"]["setuptools"]
    assert setuptools["packages"] == list(setuptools["package-dir"])
    assert set(setuptools["packages"]) == {"trimtab"} | {f"trimtab.{name}" for name in FOLDERS}
    assert all((ROOT / folder).is_dir() for folder in setuptools["package-dir"].values())
    for folder in FOLDERS:  # no nested package, so the list is complete
        nested = [p for p in (ROOT / folder).rglob("*.py") if p.parent != ROOT / folder]
        assert nested == []
    assert not (
        ROOT / "triton_kernels" / "__init__.py"
    ).exists()  # that bare name is another project's


def test_each_link_resolves_and_is_a_link_in_git():
    for folder in FOLDERS:
        link = ROOT / "trimtab" / folder
        assert link.is_symlink() and os.readlink(link) == f"../{folder}"
        assert link.resolve() == ROOT / folder
    listed = subprocess.run(
        ["git", "ls-files", "-s", "trimtab"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    modes = {line.split()[3].removeprefix("trimtab/"): line.split()[0] for line in listed}
    assert modes == {"__init__.py": "100644", "py.typed": "100644"} | dict.fromkeys(
        FOLDERS, "120000"
    )


def test_wheel_holds_trimtab_only(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    roots = {name.partition("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"trimtab"}
    expected = {f"trimtab/{path.relative_to(ROOT)}" for path in SOURCES}
    expected |= {f"trimtab/rl/recipes/{p.name}" for p in (ROOT / "rl" / "recipes").glob("*.yaml")}
    expected |= {"trimtab/__init__.py", "trimtab/py.typed"}
    expected |= {"trimtab/optim/adam_mini_step.cpp"}  # compiled where it is first used
    assert {name for name in names if name.startswith("trimtab/")} == expected
    assert any(name.startswith("trimtab/rl/recipes/") for name in names)


def test_sdist_holds_what_its_tests_need(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("tests", "examples"):
        assert {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")} <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_installed_copy_works_and_leaks_no_name(installed):
    roots = {p.name for p in installed.iterdir()} - {"bin"}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"trimtab"}
    origin = python(
        """
import importlib
import trimtab.optim, trimtab.rl.rewards, trimtab.stability, trimtab.triton_kernels.token_stats
from trimtab.rl.cli import RECIPES
assert list(RECIPES.glob("*.yaml")), RECIPES
for name in ("optim", "stability", "integrations", "rl", "triton_kernels"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} can be imported")
print(trimtab.__file__, trimtab.rl.__file__)
""",
        path=installed,
        cwd=installed,
    )
    assert origin.split() == [
        str(installed / "trimtab" / part) for part in ("__init__.py", "rl/__init__.py")
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_of_the_library(path):
    folder = path.parent.name
    for level, name in imports(path):
        assert level or name.partition(".")[0] not in {"trimtab", *FOLDERS}, f"{name}: not relative"
        assert level < 3, name
        if level == 2:
            head, _, rest = name.partition(".")
            assert {head, f"{head}.{rest.partition('.')[0]}"} & (ALLOWED[folder] | {folder}), name
        root = name.partition(".")[0]
        if not level and folder != "rl" and root in HOSTS:
            host = path.stem.partition("_")[0]
            assert (folder, host) == ("integrations", HOSTS[root]), f"{path} imports {name}"
        if not level and root == "triton":
            assert path.name == "_launch.py", f"{path} imports triton"


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_of_what_stands_outside(path):
    for level, name in imports(path):
        assert level == 0, name
        assert name.partition(".")[0] not in FOLDERS, f"{name}: write trimtab.{name}"


def test_light_imports_and_no_triton():
    python(
        """
import sys, trimtab
assert not {"torch", "numpy"} & set(sys.modules)
import trimtab.rl.rewards, trimtab.integrations
heavy = {"torch", "transformers", "pytorch_lightning", "reasoning_gym"} & set(sys.modules)
assert not heavy, heavy
sys.modules["triton"] = None
import math, torch
from trimtab.triton_kernels._launch import triton
from trimtab.triton_kernels.token_stats import token_stats
assert triton is None
stats = token_stats(torch.zeros(2, 8), torch.tensor([1, 3]))
assert torch.allclose(stats.logp, torch.full((2,), -math.log(8)))
"""
    )


# Edits that must turn this file red:
#   pyproject.toml: "trimtab.rl" = ["recipes/*.yaml"]   ->  removed
#   pyproject.toml: "trimtab.optim" = "optim"           ->  packages gain "optim"
#   MANIFEST.in                                         ->  removed         (half of tests/ ships)
#   rl/rewards.py: import torch at the top
#   optim/adam_mini.py: from ..stability import response_statistics
