"""megatron_adam_mini equals one process; the checks are in megatron_optimizer_workers.py.

All checks run in processes that are started once; a test is one check in one world of tensor (tp),
pipeline (pp), expert (ep) and data (dp) parallel ranks. The processes are Megatron's: it sees a CPU
as a GPU.
"""

import megatron_optimizer_workers as workers
import pytest
from processes import check_names, passed_checks


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    return passed_checks(workers.run, workers.CHECKS, tmp_path_factory.mktemp("megatron"))


@pytest.fixture(scope="module")
def slow_checks(tmp_path_factory):
    return passed_checks(workers.run, workers.SLOW, tmp_path_factory.mktemp("megatron"))


@pytest.mark.parametrize("check", check_names(workers.CHECKS, workers.check_id))
def test_over_ranks(checks, check):
    passed, failure = checks
    assert check in passed, failure


@pytest.mark.slow
@pytest.mark.parametrize("check", check_names(workers.SLOW, workers.check_id))
def test_more_over_ranks(slow_checks, check):
    passed, failure = slow_checks
    assert check in passed, failure


# Edits that must turn this file red:
#   megatron_optimizer.py:  `if first != last else ()` in _shards  ->  `if False else ()`
#   megatron_optimizer.py:  `itertools.count()` in _shards         ->  `itertools.repeat(0)`
#   megatron_checkpoint.py: `self._fold()` after fully_reshardable ->  removed
#   megatron_checkpoint.py: `group["step"] = int(steps[0])`        ->  `pass`
#   megatron_checkpoint.py: `init_state()` of _FP32.state_dict     ->  removed
#   megatron_checkpoint.py: `"fused": own["fused"]`                ->  removed
#   optim/entries.py:       `torch.float64` in sum_moments         ->  `torch.float32`
#   optim/sharding.py:      `reduce=(*plan.reduce, group)`         ->  `reduce=(group,)`
