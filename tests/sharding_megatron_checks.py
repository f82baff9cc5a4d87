"""Checks of weights that Megatron-core's own layers cut, for sharding_workers.py."""

import itertools

import pytest
import torch
import torch.distributed as dist
from sharded_bag import SETTINGS, assert_close, counted_all_reduces
from torch import nn

from trimtab.optim import AdamMini, BlockLayout, BlockMap, from_adamw_state
from trimtab.optim.entries import fold_moments, spread_moments, sum_moments
from trimtab.optim.pieces import Shard

KINDS = ("row", "column", "whole", "elementwise")


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


class Cut(nn.Module):
    """The same layers, cut over all ranks: `up` by its outputs, `down` by its inputs."""

    def __init__(self):
        super().__init__()
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

        config = ModelParallelConfig(
            tensor_model_parallel_size=tensor_parallel()[0],
            use_cpu_initialization=True,
            params_dtype=torch.float64,
            gradient_accumulation_fusion=False,
        )
        settings = {"config": config, "init_method": nn.init.zeros_}
        self.up = ColumnParallelLinear(6, 8, gather_output=False, **settings)
        self.down = RowParallelLinear(
            8, 4, bias=True, input_is_parallel=True, skip_bias_add=False, **settings
        )

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)[0]))[0]


def tensor_parallel():
    """The number of ranks that cut layers, and which of them this one is."""
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def here(name, whole):
    """What of a whole tensor is on this rank."""
    dims = {"up.weight": 0, "up.bias": 0, "down.weight": 1}
    ranks, rank = tensor_parallel()
    return whole.chunk(ranks, dims[name])[rank] if name in dims else whole


def check_megatron(folder):
    """Steps, clipped and not, are those of one process, whatever blocks the ranks cut."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        dist.get_world_size(), create_gloo_process_groups=False
    )
    for kind in KINDS:
        for max_grad_norm in (None, 1e-2):
            models = Whole().double(), Cut()
            optimizers = []
            for model in models:
                blocks = {}
                for name, p in model.named_parameters():
                    layout = BlockLayout(kind if p.ndim == 2 else "elementwise", tuple(p.shape))
                    blocks[name] = (layout, "test")
                    if model is models[1]:
                        p.data = here(name, models[0].get_parameter(name)).detach().clone()
                settings = {**SETTINGS, "blocks": BlockMap(blocks)}
                optimizers.append(
                    AdamMini(model.named_parameters(), max_grad_norm=max_grad_norm, **settings)
                )
            for step in range(3):
                x = torch.randn(5, 6, dtype=torch.float64, generator=torch.manual_seed(step))
                for model, optimizer in zip(models, optimizers, strict=True):
                    optimizer.zero_grad()
                    model(x).square().mean().backward()
                    optimizer.step()
            for name, p in models[1].named_parameters():
                assert_close(p.detach(), here(name, models[0].get_parameter(name).detach()), 1e-12)
            if max_grad_norm:
                assert_close(optimizers[1].grad_norm, optimizers[0].grad_norm, 1e-12)
            if any(optimizers[1]._place(p).plan.reduce for p in models[1].parameters()):
                adam = torch.optim.AdamW(models[1].named_parameters())
                adam.step()
                with pytest.raises(ValueError, match="a slice whose blocks go on on other ranks"):
                    from_adamw_state(optimizers[1], adam.state_dict())
    parallel_state.destroy_model_parallel()


# Where the flattened parts of two and of three ranks end. One border in down.weight, or in
# up.weight: then ranks begin with tensors cut over other groups. One in each: each rank lacks one.
BORDERS = {4: (2, ((13,), (35,))), 3: (1, ((13, 60), (50, 80)))}


def check_slices_of_megatron(folder):
    """Layers cut over two ranks or one, whose flattened parts lie end to end over the others.

    As DistributedOptimizer has them: in reverse order, as views, and no rank has all of them.
    """
    from megatron.core import parallel_state

    layers, borders = BORDERS[dist.get_world_size()]
    parallel_state.initialize_model_parallel(layers, create_gloo_process_groups=False)
    group = parallel_state.get_data_parallel_group()
    for kind, border in itertools.product(KINDS, borders):
        whole, model = Whole().double(), Cut()
        blocks = [
            {n: (layout_of(kind, p), "test") for n, p in m.named_parameters()}
            for m in (whole, model)
        ]
        expected = AdamMini(whole.named_parameters(), **{**SETTINGS, "blocks": BlockMap(blocks[0])})
        for name, p in model.named_parameters():
            p.data = here(name, whole.get_parameter(name)).detach().clone()
        slices, shards, names = end_to_end(model, group, border)
        groups = [{"params": list(slices.values()), "lr": 0.1, "betas": (0.9, 0.999), "host": 1}]
        settings = {key: value for key, value in SETTINGS.items() if key not in ("lr", "blocks")}
        optimizer = AdamMini.for_groups(
            groups, names, blocks=BlockMap(blocks[1]), shards=shards, **settings
        )
        assert optimizer.param_groups is groups and groups[0]["host"] == 1
        assert groups[0]["eps"] == SETTINGS["eps"]
        for step in range(3):
            x = torch.randn(5, 6, dtype=torch.float64, generator=torch.manual_seed(step))
            expected.zero_grad()
            whole(x).square().mean().backward()
            for name, mine in slices.items():
                g = here(name, whole.get_parameter(name).grad).flatten()
                mine.grad = g[slice(*shards[mine].flat)].clone()
            with counted_all_reduces() as counts:
                optimizer.step()
            # over the slices, over the layers, each at most once
            assert all(n == 1 for n in counts.values()), counts
            expected.step()
        for name, mine in slices.items():
            p = whole.get_parameter(name)
            cut = slice(*shards[mine].flat)
            assert_close(mine.detach(), here(name, p.detach()).flatten()[cut], 1e-12)
            v = expected.layout(p).expand(expected.state[p]["exp_avg_sq"])
            found = spread_moments(optimizer, mine)
            assert_close(found, here(name, v).flatten()[cut], 1e-12)
        check_folding(optimizer, expected, whole, slices, shards)
    parallel_state.destroy_model_parallel()


def check_folding(optimizer, expected, whole, slices, shards):
    """Entry by entry and back is the same; entries of Adam become the means of whole blocks."""
    same = {p: sum_moments(optimizer, p, spread_moments(optimizer, p)) for p in slices.values()}
    for p, v in fold_moments(optimizer, same).items():
        assert_close(v, optimizer.state[p]["exp_avg_sq"], 1e-15)
    torch.manual_seed(5)
    adam = {n: torch.rand(p.shape, dtype=torch.float64) for n, p in whole.named_parameters()}
    sums = {
        mine: sum_moments(
            optimizer, mine, here(name, adam[name]).flatten()[slice(*shards[mine].flat)]
        )
        for name, mine in slices.items()
    }
    for mine, v in fold_moments(optimizer, sums).items():
        optimizer.state[mine]["exp_avg_sq"] = v
    for name, mine in slices.items():
        layout = expected.layout(whole.get_parameter(name))
        truth = here(name, layout.expand(layout.mean(adam[name])))
        found = spread_moments(optimizer, mine)
        assert_close(found, truth.flatten()[slice(*shards[mine].flat)], 1e-12)


def layout_of(kind, p):
    return BlockLayout(kind if p.ndim == 2 else "elementwise", tuple(p.shape))


def end_to_end(model, group, borders):
    """This rank's slices by name, the shards that `for_groups` takes, and names."""
    named = dict(reversed(list(model.named_parameters())))
    slices, shards, names, first = {}, {}, {}, 0
    for number, (name, p) in enumerate(named.items()):
        last = first + p.numel()
        inside = [min(max(border, first), last) - first for border in borders]
        start, stop = list(itertools.pairwise((0, *inside, p.numel())))[group.rank()]
        cut = ((-1, group),) if any(first < border < last for border in borders) else ()
        shard = Shard(tuple(p.shape), flat=(start, stop), groups=cut, number=number)
        if stop > start:
            mine = p.view(-1)[start:stop]
            for mark in ("tensor_model_parallel", "partition_dim"):
                if hasattr(p, mark):
                    setattr(mine, mark, getattr(p, mark))
            slices[name], shards[mine], names[mine] = mine, shard, name
        elif cut:
            shards[p], names[p] = shard, name
        first = last
    return slices, shards, names
