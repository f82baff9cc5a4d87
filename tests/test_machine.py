"""How many threads a run takes, and what it writes down."""

import json
from types import SimpleNamespace

import pytest
import torch

from trimtab.rl import machine


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("slowdown", "chosen"), [(0.5, 2), (1.0, 1), (4.0, 1)])
def test_all_cores_only_where_they_are_faster(slowdown, chosen, monkeypatch, threads):
    """Time is simulated: a forward on two threads takes `slowdown` times that on one."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock.now)

    def forward(x, weight):
        clock.now += slowdown if torch.get_num_threads() == 2 else 1.0
        return x

    monkeypatch.setattr(torch.nn.functional, "linear", forward)
    assert machine.fastest_threads(2) == chosen


def test_one_core_needs_no_measurement(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail("measured"))
    assert machine.fastest_threads(1) == 1


def test_environment_names_directory_and_versions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = json.loads(json.dumps(machine.environment()))
    assert found["started_in"] == str(tmp_path)
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])


# Edits that must turn this file red:
# * compare with 1.1 instead of 0.9
# * return cores whatever was measured
# * started_in: the home directory
