"""Checks of weights that Megatron-core's own layers cut, for sharding_workers.py."""

import torch
import torch.distributed as dist
from sharded_bag import SETTINGS, assert_close
from torch import nn

from trimtab.optim import AdamMini, BlockLayout, BlockMap

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
            tensor_model_parallel_size=dist.get_world_size(),
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


def here(name, whole):
    """What of a whole tensor is on this rank."""
    dims = {"up.weight": 0, "up.bias": 0, "down.weight": 1}
    if name not in dims:
        return whole
    return whole.chunk(dist.get_world_size(), dims[name])[dist.get_rank()]


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
    parallel_state.destroy_model_parallel()
