"""megatron_adam_mini equals one process; the checks are in megatron_optimizer_workers.py.

All checks run in processes that are started once; a test is one check in one world of tensor (tp),
pipeline (pp), expert (ep) and data (dp) parallel ranks. The processes are Megatron's: it sees a CPU
as a GPU.
"""

import megatron_optimizer_workers as workers
import pytest
from processes import run_ranks


def ids(worlds):
    return [workers.check_id(world, check) for world, checks in worlds for check in checks]


def outcome(tmp_path_factory, worlds):
    """The names of the checks that passed, and what ended the run, if anything did."""
    folder = tmp_path_factory.mktemp("megatron")
    failure = ""
    try:
        processes = max(world[0] for world, _ in worlds)
        run_ranks(workers.run, (str(folder), worlds), processes)
    except Exception as error:
        failure = str(error)
    passed = folder / "passed"
    return passed.read_text().split() if passed.exists() else [], failure


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    return outcome(tmp_path_factory, workers.CHECKS)


@pytest.fixture(scope="module")
def slow_checks(tmp_path_factory):
    return outcome(tmp_path_factory, workers.SLOW)


@pytest.mark.parametrize("check", ids(workers.CHECKS))
def test_over_ranks(checks, check):
    passed, failure = checks
    assert check in passed, failure


@pytest.mark.slow
@pytest.mark.parametrize("check", ids(workers.SLOW))
def test_more_over_ranks(slow_checks, check):
    passed, failure = slow_checks
    assert check in passed, failure


# Edits that must turn this file red:
#   megatron_optimizer.py:  `if first != last else ()` in _shards  ->  `if False else ()`
#   megatron_optimizer.py:  `itertools.count()` in _shards         ->  `itertools.repeat(0)`
#   megatron_checkpoint.py: `self._fold()` after fully_reshardable ->  removed
#   megatron_checkpoint.py: `group["step"] = int(steps[0])`        ->  `pass`
#   optim/entries.py:       `torch.float64` in sum_moments         ->  `torch.float32`
#   optim/sharding.py:      `reduce=(*plan.reduce, group)`         ->  `reduce=(group,)`
