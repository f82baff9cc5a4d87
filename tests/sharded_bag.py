"""The model that the checks over ranks share, its ways of being sharded, and comparisons.

A bag of parameters, one for each way to cut blocks; its loss is linear, so that the gradient of
every parameter is known. Expected is always what one process computes.
"""

import contextlib
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from trimtab.optim import (
    AdamMini,
    BlockLayout,
    BlockMap,
    flat_shards,
)
from trimtab.optim.pieces import Shard as Place

# Rows 10, 7, 3 and 1 are uneven or fewer than ranks; heads straddle the shards of 2 or 3 ranks.
LAYOUTS = {
    "first.rows": BlockLayout("row", (10, 6)),
    "first.heads": BlockLayout("row", (9, 4), ((1, 3),)),
    "first.norm": BlockLayout("elementwise", (7,)),
    "first.columns": BlockLayout("column", (7, 6)),
    "first.experts": BlockLayout("row", (4, 6, 5), stacked=1),
    "first.conv": BlockLayout("row", (7, 3, 2, 2)),
    "second.heads": BlockLayout("row", (10, 4), ((1, 5),)),
    "second.fused": BlockLayout("row", (12, 3), ((2, 1), (1, 4))),
    "second.fused_columns": BlockLayout("column", (5, 12), ((1, 3), (3, 1))),
    "second.whole": BlockLayout("whole", (3, 4)),
    "second.bias": BlockLayout("elementwise", (3,)),
    "second.matrix": BlockLayout("elementwise", (5, 4)),
    "second.expert_heads": BlockLayout("row", (3, 6, 2), ((1, 2), (2, 1), (1, 2)), 1),
    "second.expert_columns": BlockLayout("column", (2, 4, 6), stacked=1),
    "second.few": BlockLayout("row", (3, 5)),
    "second.one": BlockLayout("row", (1, 6)),
}
BLOCKS = BlockMap({name: (layout, "test") for name, layout in LAYOUTS.items()})
# PyTorch alone: its sums do not depend on where a tensor lies in memory.
SETTINGS = {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.1, "blocks": BLOCKS, "fused": False}
STEPS = 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


class Part(nn.Module):
    """Some parameters of the bag; its loss is their product with given gradients."""

    def __init__(self, layouts, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, layout in layouts.items():
            start = torch.randn(layout.shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(start.to(dtype)))

    def forward(self, gradients):
        return sum((getattr(self, name) * g).sum() for name, g in gradients.items())


class Bag(nn.Module):
    """All parameters of LAYOUTS, in two parts."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.first, self.second = (Part(of_part(p, LAYOUTS), dtype) for p in ("first", "second"))

    def forward(self, gradients):
        return self.first(of_part("first", gradients)) + self.second(of_part("second", gradients))


def of_part(part, things):
    return {name.removeprefix(f"{part}."): x for name, x in things.items() if name.startswith(part)}


def gradients(t, dtype=torch.float64):
    """The gradient of step t; in bf16 one power of 2 a block, so that all sums are exact."""
    generator = torch.Generator().manual_seed(t)
    found = {}
    for name, layout in LAYOUTS.items():
        g = torch.randn(layout.shape, generator=generator, dtype=torch.float64)
        if dtype == torch.bfloat16:
            blocks = layout.index().flatten()
            greatest = torch.zeros(layout.n_blocks, dtype=g.dtype)
            greatest.scatter_reduce_(0, blocks, g.abs().flatten(), "amax")
            chosen = g.abs() == greatest[blocks].view(g.shape)
            g = torch.where(chosen, g.sign() * g.abs().log2().round().exp2(), 0)
        found[name] = g.to(dtype)
    return found


def set_gradients(model, t, dtype=torch.float64):
    """Gives every parameter, DTensor or not, its gradient of step t."""
    given = gradients(t, dtype)
    for name, param in model.named_parameters():
        param.grad = given[name]
        if isinstance(param, DTensor):
            mesh, cut = param.device_mesh, param.placements
            param.grad = distribute_tensor(given[name], mesh, cut, src_data_rank=None)


def backward(model, t, dtype=torch.float64):
    """Gradients of step t by a backward pass; another one on every rank, their mean is right."""
    model.zero_grad()
    weight = 1 + dist.get_rank() - (dist.get_world_size() - 1) / 2
    model({name: g * weight for name, g in gradients(t, dtype).items()}).backward()


def train(model, optimizer, first=1, last=STEPS, dtype=torch.float64, gradient=set_gradients):
    for t in range(first, last + 1):
        gradient(model, t, dtype)
        optimizer.step()


def alone(dtype=torch.float64, steps=STEPS, **options):
    """The model and its optimizer after so many steps in one process."""
    model = Bag(dtype)
    optimizer = AdamMini(model.named_parameters(), **SETTINGS, **options)
    train(model, optimizer, 1, steps, dtype)
    return model, optimizer


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value, other):
    """What `other`, a DTensor or not, holds of a value."""
    if not isinstance(other, DTensor):
        return value
    cut = distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)
    return cut.to_local()


def assert_close(found, wanted, tolerance, name=""):
    """Agree relative to the greatest entry."""
    assert found.shape == wanted.shape, (name, found.shape, wanted.shape)
    if wanted.numel():
        error, scale = (found - wanted).abs().max(), wanted.abs().max()
        assert error <= tolerance * scale, (name, float(error), float(scale))


def assert_same(model, optimizer, expected, tolerance, skip=()):
    """Parameters and moments are, shard by shard, those of one process."""
    whole, its_optimizer = expected
    wanted = dict(whole.named_parameters())
    for name, param in model.named_parameters():
        if name in skip:
            continue
        assert_close(local(param), like(wanted[name].detach(), param), tolerance, name)
        state, its_state = optimizer.state[param], its_optimizer.state[wanted[name]]
        assert type(state["exp_avg_sq"]) is type(param.data), name
        for key, value in its_state.items():
            assert_close(local(state[key]), like(value, state[key]), tolerance, (name, key))


@contextlib.contextmanager
def counted_all_reduces():
    """Counts calls of torch.distributed.all_reduce by process group."""
    counts, original = {}, dist.all_reduce

    def counted(tensor, *args, group=None, **kwargs):
        counts[group] = counts.get(group, 0) + 1
        return original(tensor, *args, group=group, **kwargs)

    dist.all_reduce = counted
    try:
        yield counts
    finally:
        dist.all_reduce = original


def mesh_of(*sizes):
    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[-len(sizes) :])


def line():
    """The mesh of all ranks."""
    return mesh_of(dist.get_world_size())


def distributed(mesh, placements, dtype=torch.float64, only=LAYOUTS):
    """The bag with its parameters, or some of them, cut like this where they have the dim."""
    model = Bag(dtype)
    for part, module in model.named_children():
        for name, param in list(module.named_parameters()):
            if f"{part}.{name}" in only:
                cut = [p if getattr(p, "dim", 0) < param.ndim else Replicate() for p in placements]
                value = distribute_tensor(param.detach(), mesh, cut, src_data_rank=None)
                setattr(module, name, nn.Parameter(value))
    return model


def sharded(dtype=torch.float64, mesh=None, **options):
    """The bag under FSDP2, and its optimizer."""
    model = Bag(dtype)
    for module in (model.first, model.second, model):
        fully_shard(module, mesh=mesh or line())
    return model, AdamMini(model.named_parameters(), **SETTINGS, **options)


def flattened(dtype=torch.float64, strategy=ShardingStrategy.FULL_SHARD, mesh=None, **options):
    """The bag under FSDP1, and its optimizer."""
    wrap = partial(
        FSDP,
        use_orig_params=True,
        sharding_strategy=strategy,
        device_mesh=mesh or line(),
        device_id=torch.device("cpu"),
    )
    model = Bag(dtype)
    model.second = wrap(model.second)
    model = wrap(model)
    shards = flat_shards(model)
    return model, AdamMini(model.named_parameters(), **SETTINGS, shards=shards, **options)


def assert_same_slices(model, optimizer, expected, tolerance):
    """As assert_same, of what this rank has of flattened parameters."""
    whole, its_optimizer = expected
    saved, (group,) = optimizer.state_dict()["state"], optimizer.param_groups
    for number, (name, value) in enumerate(whole.named_parameters()):
        param, its_state = group["params"][number], its_optimizer.state[value]
        start, stop = optimizer.shards[param].flat
        assert (number in saved) == (stop > start), name
        if stop > start:
            found = {**saved[number], "param": param.detach()}
            assert found["step"] == its_state["step"]
            wanted = {
                "param": value.detach(),
                "exp_avg": its_state["exp_avg"],
                "exp_avg_sq": LAYOUTS[name].expand(its_state["exp_avg_sq"]),
            }
            for key, x in wanted.items():
                x = x.flatten()[start:stop].to(found[key].dtype)
                assert_close(found[key].flatten(), x, tolerance, (name, key))


class Slices:
    """The bag's parameters end to end, cut evenly; this rank's slices by name."""

    def __init__(self, dtype):
        rank, world = dist.get_rank(), dist.get_world_size()
        whole = dict(Bag(dtype).named_parameters())
        size = -(-sum(p.numel() for p in whole.values()) // world)
        first = -rank * size  # of a parameter, seen from this rank's part
        self.named, self.shards = {}, {}
        for name, param in whole.items():
            start, stop = (min(max(x, 0), param.numel()) for x in (-first, size - first))
            mine = nn.Parameter(param.detach().flatten()[start:stop].clone())
            self.named[name] = mine
            groups = ((-1, dist.group.WORLD),)
            self.shards[mine] = Place(tuple(param.shape), flat=(start, stop), groups=groups)
            first += param.numel()

    def of(self, name, value):
        start, stop = self.shards[self.named[name]].flat
        return value.flatten()[start:stop].clone()

    def set_gradients(self, t, dtype):
        for name, g in gradients(t, dtype).items():
            param = self.named[name]
            param.grad = self.of(name, g) if param.numel() else None

    def train(self, optimizer, dtype):
        for t in range(1, STEPS + 1):
            self.set_gradients(t, dtype)
            optimizer.step()

    def assert_same(self, expected, tolerance):
        for name, value in expected.named_parameters():
            wanted = self.of(name, value.detach())
            assert_close(self.named[name].detach(), wanted, tolerance, name)
