"""Checks of slices of flattened parameters, FSDP1's and others', for sharding_workers.py."""

import pytest
import torch
import torch.distributed as dist
from sharded_bag import (
    BLOCKS,
    LAYOUTS,
    SETTINGS,
    Bag,
    Slices,
    alone,
    assert_close,
    assert_same,
    assert_same_slices,
    backward,
    counted_all_reduces,
    distributed,
    flattened,
    line,
    mesh_of,
    set_gradients,
    train,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.tensor import Shard

from trimtab.optim import (
    AdamMini,
    flat_shards,
)


def check_fsdp1(folder):
    expected = alone(max_grad_norm=1.0)
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD):
        model, optimizer = flattened(strategy=strategy, max_grad_norm=1.0)
        train(model, optimizer, gradient=backward)
        assert_close(optimizer.grad_norm, expected[1].grad_norm, 1e-12)
        assert_same_slices(model, optimizer, expected, 1e-12)
    model, optimizer = flattened()
    backward(model, 1)
    with counted_all_reduces() as counts:
        optimizer.step()
    assert list(counts.values()) == [1]
    with pytest.raises(ValueError, match=r"shards: expected the place of parameter .*first.rows'"):
        AdamMini(model.named_parameters(), blocks=BLOCKS)
    made = AdamMini.for_model(model, blocks=BLOCKS, weight_decay=0.1)
    assert [len(group["params"]) for group in made.param_groups] == [14, 2]
    with pytest.raises(ValueError, match=r"blocks: expected infer_blocks\(model\) from before"):
        AdamMini.for_model(model)
    by_shape = AdamMini(model.parameters(), shards=flat_shards(model))
    assert by_shape.layout(model.first.rows) == LAYOUTS["first.rows"]
    with FSDP.summon_full_params(model), pytest.raises(ValueError, match="outside summon_full_p"):
        optimizer.step()


def check_fsdp1_with_copies_of_shards(folder):
    expected = alone(max_grad_norm=1.0)
    hybrid = ShardingStrategy.HYBRID_SHARD
    model, optimizer = flattened(strategy=hybrid, mesh=mesh_of(2, 2), max_grad_norm=1.0)
    train(model, optimizer, gradient=backward)
    assert_close(optimizer.grad_norm, expected[1].grad_norm, 1e-12)
    assert_same_slices(model, optimizer, expected, 1e-12)


def check_fsdp1_of_flat_parameters_is_refused(folder):
    model = FSDP(Bag(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="model: expected FSDP with use_orig_params=True, found F"):
        flat_shards(model)
    with pytest.raises(ValueError, match="which FSDP1 has flattened, found none"):
        AdamMini(model.parameters())


def check_gradients_that_some_ranks_lack(folder):
    """Lacking on all ranks: skipped, no state. On one: zeros there. Frozen: no part in a step."""
    slices, expected = Slices(torch.float64), Bag()
    of_rank_0 = [name for name in LAYOUTS if slices.shards[slices.named[name]].flat[1]]
    cut = [of_rank_0[-1], slices.shards[slices.named[of_rank_0[-1]]].flat[1]]
    dist.broadcast_object_list(cut)  # the parameter that rank 0 shares with rank 1, and where
    name, stop = cut
    assert 0 < stop < expected.get_parameter(name).numel()
    models = (slices.named, dict(expected.named_parameters()))
    for named in models:
        named["second.few"].requires_grad_(False)
    optimizer = AdamMini(slices.named.items(), **SETTINGS, shards=slices.shards)
    its_optimizer = AdamMini(expected.named_parameters(), **SETTINGS)
    for t in range(1, 5):
        slices.set_gradients(t, torch.float64)
        set_gradients(expected, t)
        for named in models:
            named["second.few"].grad = named["first.norm"].grad = None
            if t == 2:
                named["first.rows"].grad = None
        if t == 3:
            expected.get_parameter(name).grad.view(-1)[:stop] = 0
            if dist.get_rank() == 0:
                slices.named[name].grad = None
        optimizer.step()
        its_optimizer.step()
    slices.assert_same(expected, 1e-12)
    for unused in ("first.norm", "second.few"):
        assert slices.named[unused] not in optimizer.state
    state = optimizer.state.get(slices.named["first.rows"])
    assert state is None or state["step"] == 3


def check_rounding(folder):
    """Stochastic rounding gives the bits of one process, however the tensors are cut."""
    dtype = torch.bfloat16
    options = {
        "momentum_dtype": dtype,
        "stochastic_rounding": True,
        "max_grad_norm": 1e9,  # so that one process, too, takes the two-phase way
    }
    expected = alone(dtype, **options)
    for dim, inexact in ((0, ()), (1, ()), (2, ("first.conv",))):
        model = distributed(line(), [Shard(dim)], dtype)
        optimizer = AdamMini(model.named_parameters(), **SETTINGS, **options)
        train(model, optimizer, dtype=dtype)
        assert_same(model, optimizer, expected, 0, skip=inexact)
    slices = Slices(dtype)
    optimizer = AdamMini(slices.named.items(), **SETTINGS, **options, shards=slices.shards)
    slices.train(optimizer, dtype)
    slices.assert_same(expected[0], 0)
