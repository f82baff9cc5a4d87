"""MegatronSharedPrefix equals each trajectory alone; the checks are in megatron_prefix_workers.py.

All checks run in processes that are started once; a test is one check in one world of tensor (tp),
pipeline (pp) and data (dp) parallel ranks. The processes are Megatron's: it sees a CPU as a GPU.
"""

import megatron_prefix_workers as workers
import pytest
from processes import check_names, passed_checks


@pytest.fixture(scope="module")
def small_worlds(tmp_path_factory):
    return passed_checks(workers.run, workers.CHECKS, tmp_path_factory.mktemp("megatron"))


@pytest.fixture(scope="module")
def large_worlds(tmp_path_factory):
    return passed_checks(workers.run, workers.SLOW, tmp_path_factory.mktemp("megatron"))


@pytest.mark.parametrize("check", check_names(workers.CHECKS, workers.check_id))
def test_over_ranks(small_worlds, check):
    passed, failure = small_worlds
    assert check in passed, failure


@pytest.mark.slow
@pytest.mark.parametrize("check", check_names(workers.SLOW, workers.check_id))
def test_over_more_ranks(large_worlds, check):
    passed, failure = large_worlds
    assert check in passed, failure


# Edits to integrations/megatron_prefix.py that must turn this file red:
#   self._schedule([prefix], _no_loss, True)   ->  pass                       (no phase C)
#   table[positions]                           ->  table[: len(positions)]    (rotary positions)
#   _attributes(self.gpt, post_process=False)  ->  nullcontext()              (head on the prefix)
#   "calculate_per_token_loss": True           ->  False
#   "finalize_model_grads_func": None          ->  removed
#   value.reshape(()).clone()                  ->  value
