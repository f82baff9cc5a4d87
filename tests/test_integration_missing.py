"""Where a host is missing, or of another version: one line, and nothing of it before that."""

import subprocess
import sys

import pytest

# (integration, the host's modules, its name for pip, the range)
HOSTS = [
    ("lightning", ["lightning", "pytorch_lightning"], "lightning", "2.6"),
    ("transformers", ["transformers"], "transformers", "from 5.0 on and below 6"),
    ("trl", ["trl"], "trl", "from 1.16 on and below 2"),
    ("verl", ["verl"], "verl", "from 0.9 on and below 0.10"),
    ("megatron", ["megatron"], "megatron-core", "from 0.16 on and below 0.20"),
    ("ray", ["ray"], "ray", "from 2.60 on and below 3"),
]


def lines_of(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("name", "modules", "host", "versions"), HOSTS, ids=[h[0] for h in HOSTS])
def test_a_missing_host_is_one_line(name, modules, host, versions):
    (line,) = lines_of(f"""
import sys
sys.modules.update(dict.fromkeys({modules}))
try:
    import trimtab.integrations.{name}
except ImportError as error:
    print(error)
""")
    assert host in line and versions in line and ("found none" in line or name == "lightning")


@pytest.mark.parametrize("host", ["trl", "verl", "ray"])
def test_another_version_is_one_line(host):
    (line,) = lines_of(f"""
import sys, types
sys.modules["{host}"] = types.ModuleType("{host}")
sys.modules["{host}"].__version__ = "0.8.2"
try:
    import trimtab.integrations.{host}
except ImportError as error:
    print(error)
assert not {{"torch", "trl.trainer", "ray.train"}} & set(sys.modules)
""")
    assert "found 0.8.2" in line and "pip install" in line


def test_what_a_host_needs_is_not_the_host():
    (line,) = lines_of("""
import sys
from trimtab.integrations._versions import version_of
sys.modules["email.charset"] = None
sys.modules.pop("email.message", None)
try:
    version_of("email.message")
except ModuleNotFoundError as error:
    print(error.name)
""")
    assert line == "email.charset"


def test_the_package_imports_no_host():
    hosts = sorted({module for _, modules, _, _ in HOSTS for module in modules})
    (line,) = lines_of(f"""
import sys
import trimtab, trimtab.integrations
print(sorted(set({hosts}) & set(sys.modules)))
""")
    assert line == "[]"


# Edits that must turn this file red:
#   integrations/verl.py: require("verl", ...)        ->  removed (and of any other host)
#   integrations/_versions.py: if error.name not in   ->  if error.name in
#   integrations/__init__.py                          ->  from . import verl
