"""Megatron's policy loss and monitors over ranks; the checks are in megatron_loss_workers.py.

All checks run in processes that are started once; a test is one check in one world of tensor (tp),
pipeline (pp) and data (dp) parallel ranks. The processes are Megatron's: it sees a CPU as a GPU.
"""

import megatron_loss_workers as workers
import pytest
from megatron_prefix_workers import check_id
from processes import check_names, passed_checks


@pytest.fixture(scope="module")
def small_worlds(tmp_path_factory):
    return passed_checks(workers.run, workers.CHECKS, tmp_path_factory.mktemp("megatron"))


@pytest.fixture(scope="module")
def large_worlds(tmp_path_factory):
    return passed_checks(workers.run, workers.SLOW, tmp_path_factory.mktemp("megatron"))


@pytest.mark.parametrize("check", check_names(workers.CHECKS, check_id))
def test_over_ranks(small_worlds, check):
    passed, failure = small_worlds
    assert check in passed, failure


@pytest.mark.slow
@pytest.mark.parametrize("check", check_names(workers.SLOW, check_id))
def test_over_more_ranks(large_worlds, check):
    passed, failure = large_worlds
    assert check in passed, failure


# Edits to integrations/megatron_loss.py that must turn this file red:
#   scaled = value * self.scale                        ->  scaled = value
#   (model.dp_cp_group.size() if averaged else 1)      ->  1
#   if self.count_tokens else self.mask.new_zeros(())  ->  removed
#   "loss": value.detach()                             ->  "loss": scaled.detach()
#   (0 if group is None else tp.rank() * width)        ->  0
#   output[..., :kept] if kept < width else output     ->  output   (padding counts)
#   group = tp if width < whole else None              ->  None
#   check_statistics(temperature, prune)               ->  removed  (the first stage waits)
# and to integrations/megatron_monitors.py:
#   (pp, pp.size() - 1),                               ->  removed  (the first stage has no numbers)
#   process_group=dp of clip_metrics                   ->  None
#   if not torch.is_grad_enabled()                     ->  if False (evaluation counts)
#   found = [str(error)]                               ->  raise    (the other stage waits)
#   pad(x, (0, width - x.shape[1]))                    ->  x
