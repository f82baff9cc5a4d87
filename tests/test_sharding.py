"""AdamMini over ranks equals AdamMini in one process; the checks are in sharding_workers.py.

All checks run in four processes that are started once; a test is one check in one world.
"""

import copy
import pickle

import pytest
import sharding_checkpoint_checks as checkpoints
import sharding_workers as workers
import torch
from processes import run_ranks
from sharded_bag import alone, assert_same
from torch import nn

from trimtab.optim import AdamMini, BlockLayout, BlockMap, parameter_layouts
from trimtab.optim.pieces import Shard
from trimtab.optim.sharding import block_name

IDS = [
    workers.check_id(number, check)
    for number, (_, checks) in enumerate(workers.CHECKS)
    for check in checks
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoints and the list of checks that passed; `failure` has what ended the run."""
    folder = tmp_path_factory.mktemp("sharding")
    checkpoints.save_alone(folder)
    try:
        run_ranks(workers.run, (str(folder),), 4)
    except Exception as error:
        (folder / "failure").write_text(str(error))
    return folder


@pytest.mark.parametrize("check", IDS)
def test_over_ranks(folder, check):
    passed = (folder / "passed").read_text().split() if (folder / "passed").exists() else []
    assert check in passed, (folder / "failure").read_text()


def test_one_process_goes_on_from_checkpoints_of_several(folder):
    for name in ("fsdp2-fp32-2.dcp", "fsdp2-fp32-3.pt", "fsdp2-bf16-3.dcp", "fsdp1-fp32-2.pt"):
        options = checkpoints.VARIANTS[name.split("-")[1]]
        expected = alone(torch.float32, checkpoints.RESUMED_TO, **options)
        assert_same(*checkpoints.load_alone(folder / name), expected, 1e-6)


def sliced(**options):
    """An AdamMini over entries 2 to 9 of a 3 x 4 parameter, of which nothing else is anywhere."""
    param = nn.Parameter(torch.ones(7))
    shards = {param: Shard((3, 4), flat=(2, 9))}
    return param, AdamMini([param], shards=shards, **options)


def test_an_optimizer_with_shards_is_not_copied():
    _, optimizer = sliced()
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="shards: an AdamMini with shards cannot be copied"):
            copied(optimizer)


@pytest.mark.parametrize("option", ["capturable", "amp_scaling"])
def test_options_that_ranks_would_have_to_agree_on_are_refused_with_shards(option):
    with pytest.raises(ValueError, match=r"capturable, amp_scaling: expected False with shards"):
        sliced(**{option: True})


def test_state_of_a_slice_is_refused_where_blocks_differ():
    param, optimizer = sliced()
    param.grad = torch.arange(7.0)
    optimizer.step()
    saved = optimizer.state_dict()
    v = saved["state"][0]["exp_avg_sq"]
    assert v.shape == (7,) and v[0] == v[1] != v[2] == v[5] != v[6]
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["state"][0]["exp_avg_sq"].equal(v)
    v[1] = 9
    with pytest.raises(ValueError, match=r"number 0 of its group' expects one number for each"):
        optimizer.load_state_dict(saved)


def test_names_of_wrapped_models():
    blocks = BlockMap({"a.weight": (BlockLayout("row", (2, 3)), ""), "module.x": (None, "")})
    for name in (
        "a.weight",
        "module.a.weight",
        "_orig_mod.module.a.weight",
        "_fsdp_wrapped_module.a._fsdp_wrapped_module.weight",
        "a._checkpoint_wrapped_module.weight",
    ):
        assert block_name(name, blocks) == "a.weight"
    assert block_name("module.x", blocks) == "module.x" and block_name("weight", blocks) is None
    wrapped = BlockMap({"_orig_mod.a": (BlockLayout("row", (2, 3)), "")})
    assert block_name("a", wrapped) == "_orig_mod.a"
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    with pytest.raises(ValueError, match=r"blocks: expected an entry for parameter 'a.bias'"):
        parameter_layouts(model, blocks)
    model.a.bias = None
    assert parameter_layouts(model, blocks) == {model.a.weight: blocks["a.weight"].layout}


# Edits that must turn this file red:
#   sharding.py: `_on_dim(p, 0)` in dtensor_shard            ->  `Shard(0)`, not split twice
#   sharding.py: `ranks = {...}` in all_reduce_packed        ->  `{group: id(group) for ...}`
#   sharding.py: `sorted(turns, ...)` in all_reduce_packed    ->  `turns`
#   sharding.py: `kept = {...} | {...}` in moment_placements ->  without the stacked dims
#   update.py: `parts += [(u.plan.groups, u.present) ...]`   ->  removed
#   adam_mini.py: `cut_of(state[moment]) != cuts[moment]`    ->  `False`
