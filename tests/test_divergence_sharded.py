"""Losses over rows of logits whose vocabulary lies on several ranks equal those of one process.

The checks are in divergence_workers.py; all run in three processes that are started once.
"""

import divergence_workers as workers
import pytest
from processes import run_ranks

pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The list of checks that passed; `failure` has what ended the run."""
    folder = tmp_path_factory.mktemp("divergence")
    try:
        run_ranks(workers.run, (str(folder),), 3)
    except Exception as error:
        (folder / "failure").write_text(str(error))
    return folder


@pytest.mark.parametrize("check", workers.ids())
def test_over_ranks(folder, check):
    passed = (folder / "passed").read_text().split() if (folder / "passed").exists() else []
    assert check in passed, (folder / "failure").read_text()


# Edits that must turn this file red:
#   divergence.py: `move` in _reduce                        ->  0
#   gem.py: `torch.where(keep == 0, 0, ...)`                ->  torch.where(keep > 0, ..., 0) (NaN)
#   _exp_sums.py: `keep * sums.rest`                        ->  sums.rest
#   _exp_sums.py: `edges.clamp_max(v)`                      ->  edges
#   imitation.py: `ids - shard.start`                       ->  ids
