"""The verl plugin where verl is missing, or of another version: one line, and nothing before it."""

import subprocess
import sys

import pytest

MISSING = "sys.modules['verl'] = None"
OLD = "sys.modules['verl'] = types.ModuleType('verl'); sys.modules['verl'].__version__ = '0.8.2'"


@pytest.mark.parametrize(
    ("verl", "found"), [(MISSING, "none"), (OLD, "0.8.2")], ids=["missing", "old"]
)
def test_one_line_says_the_range(verl, found):
    code = f"""
import sys, types
{verl}
import trimtab.integrations
try:
    import trimtab.integrations.verl
except ImportError as error:
    print(error)
assert not {{"torch", "ray"}} & set(sys.modules)  # it costs nothing
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert all(part in line for part in ("verl", "from 0.9 on and below 0.10", f"found {found}"))


# Edits that must turn this file red:
#   integrations/verl.py: require("verl", ...)     ->  removed
#   integrations/verl.py: if error.name != "verl"  ->  if error.name == "verl"
#   integrations/__init__.py                       ->  from . import verl
