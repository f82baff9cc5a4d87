import pytest
import token_stats_workers as workers
from processes import run_ranks

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_sharded_vocabulary_equals_one_process(world, tmp_path):
    """Logits and head cut unevenly over gloo processes, kernels and PyTorch."""
    run_ranks(workers.run, (world, str(tmp_path)), world)
