"""The soak of `benchmarks/soak.py`, for a minute of disturbance."""

import json

import pytest
from soak import FAULTS, soak
from soak_rewards import REWARD_FAULTS, digits

pytestmark = pytest.mark.slow


def test_a_short_soak_loses_nothing(tmp_path):
    result = soak(2.0, 0, tmp_path)
    print(json.dumps(result, indent=1))
    assert result["problems"] == []
    assert sum(result["survived"].values()) >= 2 and set(result["survived"]) <= set(FAULTS)
    assert result["updates"] > 5 and result["starts"] >= 2


def test_the_reward_of_the_soak_misbehaves_by_its_text_alone(tmp_path, monkeypatch):
    (tmp_path / "control").mkdir()
    monkeypatch.chdir(tmp_path)
    assert sum(REWARD_FAULTS.values()) < 3000, "of 100,000"
    assert digits(["1ab2c0"], ["12ab"], [[1]]) == [2 / 24]


# Edits that must turn this file red:
# * soak.py: differences passes where run and twin differ in a row of metrics.jsonl
# * durable.py: whole_file opens `path` itself
# * loop.py: on_save_checkpoint without "health"
