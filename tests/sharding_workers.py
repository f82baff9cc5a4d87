"""Checks that test_sharding.py runs in several processes: DTensors, FSDP2, DDP and ZeRO-1.

`run` is started once in every process and goes through the worlds of CHECKS, each a process group
of its own. A check gets a folder that all worlds share.
"""

import copy
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sharded_bag import (
    BLOCKS,
    LAYOUTS,
    SETTINGS,
    STEPS,
    TOLERANCE,
    Bag,
    Slices,
    alone,
    assert_close,
    assert_same,
    backward,
    counted_all_reduces,
    distributed,
    gradients,
    like,
    line,
    local,
    mesh_of,
    set_gradients,
    sharded,
    train,
)
from sharding_checkpoint_checks import FULL, check_load, check_save
from sharding_flat_checks import (
    check_fsdp1,
    check_fsdp1_of_flat_parameters_is_refused,
    check_fsdp1_with_copies_of_shards,
    check_gradients_that_some_ranks_lack,
    check_rounding,
)
from sharding_megatron_checks import check_megatron, check_slices_of_megatron
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from trimtab.optim import (
    AdamMini,
    BlockLayout,
    BlockMap,
    infer_blocks,
    parameter_layouts,
)

# DTensors


def check_cut_of_one_dim(folder):
    for dtype, dims in ((torch.float64, range(4)), (torch.float32, [0])):
        expected = alone(dtype)
        for dim in dims:
            model = distributed(line(), [Shard(dim)], dtype)
            optimizer = AdamMini(model.named_parameters(), **SETTINGS)
            train(model, optimizer, dtype=dtype)
            assert_same(model, optimizer, expected, TOLERANCE[dtype])


def check_cut_of_two_dims(folder):
    mesh, expected = mesh_of(2, 2), alone()
    for cut in (
        [Shard(0), Shard(0)],
        [Shard(0), Shard(1)],
        [Shard(2), Shard(1)],
        [Replicate(), Shard(0)],
        [Shard(1), Replicate()],
        [_StridedShard(0, split_factor=2), Shard(0)],
    ):
        model = distributed(mesh, cut)
        optimizer = AdamMini(model.named_parameters(), **SETTINGS)
        train(model, optimizer)
        assert_same(model, optimizer, expected, 1e-12)


def check_ranks_that_own_nothing(folder):
    """Not even another parameter: they still add up sums, in the dtype of the others."""
    layout = BlockLayout("whole", (1, 6))
    settings = {**SETTINGS, "blocks": BlockMap({"w": (layout, "test")})}
    whole = nn.Parameter(torch.ones(1, 6, dtype=torch.float64))
    part = nn.Parameter(distribute_tensor(whole.detach(), line(), [Shard(0)], src_data_rank=None))
    for param, grad in ((whole, gradients(1)["second.one"]), (part, gradients(1)["second.one"])):
        optimizer = AdamMini([("w", param)], **settings)
        param.grad = distribute_tensor(grad, line(), [Shard(0)]) if param is part else grad
        optimizer.step()
    assert_close(local(part.detach()), like(whole.detach(), part), 1e-12)


def check_kernels(folder):
    """What runs by default takes shards too, also empty ones and those of one entry."""
    expected, settings = alone(torch.float32), {**SETTINGS, "fused": None}
    for dim in (0, 1):
        model = distributed(line(), [Shard(dim)], torch.float32)
        optimizer = AdamMini(model.named_parameters(), **settings)
        train(model, optimizer, dtype=torch.float32)
        assert_same(model, optimizer, expected, 1e-6)
    slices = Slices(torch.float32)
    optimizer = AdamMini(slices.named.items(), **settings, shards=slices.shards)
    slices.train(optimizer, torch.float32)
    slices.assert_same(expected[0], 1e-6)


def check_partial_sums_are_refused(folder):
    param = DTensor.from_local(torch.ones(2, 3), line(), [Partial()])
    with pytest.raises(ValueError, match=r"placements: expected Shard or Replicate, found \(Parti"):
        AdamMini([nn.Parameter(param)])


def check_all_reduces(folder):
    """One a process group and step, whatever is cut and clipped; none where no block is cut."""
    uncut = {name for name, x in LAYOUTS.items() if x.rule in ("elementwise", "row")}
    for only, options, count in (
        (LAYOUTS, {}, 1),
        (LAYOUTS, {"max_grad_norm": 1.0}, 1),
        (uncut, {}, 0),
        (uncut, {"error_if_nonfinite": True}, 1),
        ((), {"max_grad_norm": 1.0}, 0),
    ):
        model = distributed(line(), [Shard(0)], only=only)
        named = [pair for pair in model.named_parameters() if pair[0] in only or not only]
        optimizer = AdamMini(named, **SETTINGS, **options)
        set_gradients(model, 1)
        with counted_all_reduces() as counts:
            optimizer.step()
        assert list(counts.values()) == [count] * bool(count), (options, counts)


def check_clipping(folder):
    """As clip_grad_norm_, with parameters that are cut and others that are whole on every rank."""
    expected, some = Bag(), [name for name in LAYOUTS if name.startswith("first")]
    its_optimizer = AdamMini(expected.named_parameters(), **SETTINGS)
    model = distributed(line(), [Shard(0)], only=some)
    optimizer = AdamMini(model.named_parameters(), **SETTINGS, max_grad_norm=0.5)
    for t in range(1, STEPS + 1):
        set_gradients(expected, t)
        norm = nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        its_optimizer.step()
        train(model, optimizer, t, t)
        assert_close(optimizer.grad_norm, norm, 1e-12)
    assert_same(model, optimizer, (expected, its_optimizer), 1e-12)


def check_a_gradient_that_is_not_finite_on_one_rank(folder):
    model = distributed(line(), [Shard(0)])
    optimizer = AdamMini(model.named_parameters(), **SETTINGS, error_if_nonfinite=True)
    train(model, optimizer)
    if dist.get_rank() == 1:
        model.first.rows.grad.to_local()[0, 0] = float("nan")
    before = [local(p.detach()).clone() for p in model.parameters()]
    states_before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match="gradients: expected a finite norm, found nan"):
        optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, local(new.detach()))
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(local(value), local(states_before[number][key]))


def check_state_of_another_kind_is_refused(folder):
    """Whole moments for a shard, or another shard's: their shapes alone would pass."""
    model = distributed(line(), [Shard(0)])
    optimizer = AdamMini(model.named_parameters(), **SETTINGS)
    train(model, optimizer, 1, 1)
    elsewhere = distributed(line(), [Shard(1)])
    its_optimizer = AdamMini(elsewhere.named_parameters(), **SETTINGS)
    train(elsewhere, its_optimizer, 1, 1)
    for saved in (alone()[1].state_dict(), its_optimizer.state_dict()):
        with pytest.raises(ValueError, match=r"'first.rows' expects the mesh .* set_optimizer_st"):
            optimizer.load_state_dict(saved)


# FSDP2


def check_fsdp2(folder):
    model, optimizer = sharded()
    train(model, optimizer, gradient=backward)
    assert_same(model, optimizer, alone(), 1e-12)


def check_hsdp(folder):
    """Copies of shards: the mesh is replicate x shard."""
    expected = alone(max_grad_norm=1.0)
    model, optimizer = sharded(mesh=mesh_of(2, 2), max_grad_norm=1.0)
    train(model, optimizer, gradient=backward)
    assert_close(optimizer.grad_norm, expected[1].grad_norm, 1e-12)
    assert_same(model, optimizer, expected, 1e-12)


def check_fsdp_over_tensor_parallelism(folder):
    """Rows cut twice (_StridedShard), rows cut one way and columns the other; clipped."""
    mesh = mesh_of(2, 2)
    for rows, kind, size in ((10, "row", 5), (12, "row", 4), (12, "row", 1), (12, "column", 1)):
        torch.manual_seed(0)
        expected = nn.Sequential(nn.Linear(6, rows), nn.Tanh(), nn.Linear(rows, 5)).double()
        model = copy.deepcopy(expected)
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["inner"], plan)
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh["outer"])
        assert isinstance(model[0].weight.placements[0], _StridedShard)
        layouts = {
            "0.weight": BlockLayout(kind, (rows, 6), ((1, size),)),
            "0.bias": BlockLayout("elementwise", (rows,)),
            "2.weight": BlockLayout("row", (5, rows)),
            "2.bias": BlockLayout("elementwise", (5,)),
        }
        blocks = BlockMap({name: (layout, "test") for name, layout in layouts.items()})
        optimizer, its_optimizer = (
            AdamMini(m.named_parameters(), **{**SETTINGS, "blocks": blocks}, max_grad_norm=0.1)
            for m in (model, expected)
        )
        x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for _ in range(STEPS):
            with counted_all_reduces() as counts:
                step_on(model, optimizer, x.chunk(2)[mesh["outer"].get_local_rank()])
            assert list(counts.values()) == [1, 1]
            step_on(expected, its_optimizer, x)
            assert_close(optimizer.grad_norm, its_optimizer.grad_norm, 1e-12)
        assert_same(model, optimizer, (expected, its_optimizer), 1e-12)
        if rows % 4 == 0:  # torch 2.13 cannot load whole tensors into an uneven _StridedShard
            saved = states.get_optimizer_state_dict(model, optimizer, options=FULL)
            assert_close(saved["state"]["0.weight"]["exp_avg_sq"], v_of(its_optimizer), 1e-12)
            states.set_optimizer_state_dict(model, optimizer, saved, options=FULL)
            assert_same(model, optimizer, (expected, its_optimizer), 1e-12)


def v_of(optimizer):
    return optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg_sq"]


def step_on(model, optimizer, x):
    optimizer.zero_grad()
    (model(x) - 1).square().mean().backward()
    optimizer.step()


class Attention(nn.Module):
    """Three heads of three neurons, as infer_blocks knows them."""

    def __init__(self):
        super().__init__()
        self.head_dim, self.num_heads = 3, 3
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 9) for _ in range(3))
        self.o_proj = nn.Linear(9, 6)

    def forward(self, x):
        return x + self.o_proj((self.q_proj(x) * self.k_proj(x)).tanh() + self.v_proj(x))


def check_presets(folder):
    """Blocks inferred from a sharded model are those of the whole one, and for_model takes them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for preset in ("rows", "paper", "snr"):
        torch.manual_seed(0)
        expected = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), Attention()).double()
        model = copy.deepcopy(expected)
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=line())
        assert infer_blocks(model, preset).to_dict() == infer_blocks(expected, preset).to_dict()
        options = {"preset": preset, "lr": 0.1, "weight_decay": 0.1, "fused": False}
        optimizer = AdamMini.for_model(model, **options)
        its_optimizer = AdamMini.for_model(expected, **options)
        x = torch.randn(6, 6, dtype=torch.float64)
        for _ in range(STEPS):
            step_on(model, optimizer, x.chunk(world)[rank])
            step_on(expected, its_optimizer, x)
        assert_same(model, optimizer, (expected, its_optimizer), 1e-11)


# Whole parameters on every rank: DDP, ZeRO-1


def check_ddp(folder):
    bag = Bag()
    model = nn.parallel.DistributedDataParallel(bag)
    optimizer = AdamMini(model.named_parameters(), **SETTINGS, max_grad_norm=1.0)
    train(model, optimizer, gradient=backward)
    assert_same(bag, optimizer, alone(max_grad_norm=1.0), 1e-12)


def zero(model):
    """AdamMini in ZeRO-1."""
    options = {key: value for key, value in SETTINGS.items() if key not in ("lr", "blocks")}
    make = partial(AdamMini, blocks=parameter_layouts(model, BLOCKS), **options)
    return ZeroRedundancyOptimizer(model.parameters(), make, lr=SETTINGS["lr"])


def check_zero_1(folder):
    """Every rank steps some of the parameters; its state is consolidated, saved and loaded."""
    bag = Bag()
    model = nn.parallel.DistributedDataParallel(bag)
    optimizer = zero(model)
    train(model, optimizer, 1, 2, gradient=backward)
    optimizer.consolidate_state_dict(to=0)
    path = folder / f"zero{dist.get_world_size()}.pt"
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), path)
    dist.barrier()
    resumed = zero(model)
    resumed.load_state_dict(torch.load(path, weights_only=True))
    train(model, resumed, 3, 4, gradient=backward)
    expected, its_optimizer = alone(steps=4)
    assert 0 < len(resumed.optim.state) < len(LAYOUTS)
    for (name, param), wanted in zip(bag.named_parameters(), expected.parameters(), strict=True):
        assert_close(param.detach(), wanted.detach(), 1e-12, name)
        for key, value in resumed.optim.state.get(param, {}).items():
            assert_close(value, its_optimizer.state[wanted][key], 1e-12, (name, key))
    with pytest.raises(ValueError, match=r"functools.partial\(AdamMini, blocks"):
        ZeroRedundancyOptimizer(model.parameters(), AdamMini, blocks={}, lr=0.1)


EVERYWHERE = [
    check_cut_of_one_dim,
    check_ranks_that_own_nothing,
    check_kernels,
    check_all_reduces,
    check_clipping,
    check_a_gradient_that_is_not_finite_on_one_rank,
    check_fsdp2,
    check_ddp,
    check_zero_1,
    check_fsdp1,
    check_gradients_that_some_ranks_lack,
    check_rounding,
]
CHECKS = [
    (
        2,
        [
            *EVERYWHERE,
            check_partial_sums_are_refused,
            check_state_of_another_kind_is_refused,
            check_fsdp1_of_flat_parameters_is_refused,
            check_megatron,
            check_save,
        ],
    ),
    (3, [*EVERYWHERE, check_presets, check_slices_of_megatron, check_load, check_save]),
    (2, [check_load]),
    (
        4,
        [
            check_fsdp2,
            check_hsdp,
            check_fsdp1_with_copies_of_shards,
            check_megatron,
            check_slices_of_megatron,
            check_cut_of_two_dims,
            check_fsdp_over_tensor_parallelism,
        ],
    ),
]


def check_id(number, check):
    """The name of a check in one of the worlds."""
    return f"{check.__name__.removeprefix('check_')}-{number}-of-{CHECKS[number][0]}"


def run(rank, folder):
    """Every check of every world this process belongs to; rank 0 notes those that passed."""
    torch.set_num_threads(1)
    for number, (world, checks) in enumerate(CHECKS):
        if rank >= world:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous{number}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=120),
        )
        for check in checks:
            check(Path(folder))
            dist.barrier()
            if rank == 0:
                with open(f"{folder}/passed", "a") as notes:
                    notes.write(f"{check_id(number, check)}\n")
        dist.destroy_process_group()
