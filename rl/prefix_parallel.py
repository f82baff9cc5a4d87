"""Shared-prefix training on several processes: what each must do at the same time as the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .sharding import all_reduce_gradients, take_part_in_backward


class Ranks:
    """The processes of a sharded model (FSDP2); of any other model this process alone.

    A sharded model is called by all processes alike, so they agree on the route, and on the number
    of waves; those with fewer take part in the others' with nothing.

    Args:
        model: whose calls gather parameters.
        sharded: whether they do.
        replicas: the processes of a model in DistributedDataParallel; None: all, if there are any.
    """

    def __init__(
        self, model: PreTrainedModel, sharded: bool, replicas: dist.ProcessGroup | None
    ) -> None:
        self.model, self.sharded, self.replicas = model, sharded, replicas
        if sharded and not isinstance(model, FSDPModule):
            raise ValueError(
                "model: expected fully_shard on the whole model, too, not only on parts"
            )
        self.reshard()
        mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
        # of a mesh of several dimensions (HSDP), one after the other
        self._groups = [] if mesh is None else [mesh.get_group(i) for i in range(mesh.ndim)]

    def sums(self, *values: float) -> tuple[float, ...]:
        """Each value's sum over the processes."""
        if not self.sharded:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self._device())
        for group in self._groups:
            dist.all_reduce(total, group=group)
        return tuple(total.tolist())

    def most(self, count: float) -> float:
        """Largest of the processes' numbers."""
        if not self.sharded:
            return count
        most = torch.tensor(count, dtype=torch.float64, device=self._device())
        for group in self._groups:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        return type(count)(most)

    def synchronize(self, on: bool) -> None:
        """Whether a backward pass reduces gradients."""
        if self.sharded:
            self.model.set_requires_gradient_sync(on)

    def reshard(self) -> None:
        """Makes `parameters()` the sharded ones: after a forward pass the root's are whole."""
        if self.sharded:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def take_part(self) -> None:
        """One forward pass, and backward if gradients are on, that adds nothing."""
        if self.sharded:
            take_part_in_backward(self.model)

    def forget(self) -> None:
        """Drops what waves left unreduced, after an error."""
        if not self.sharded:
            return
        self.synchronize(True)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                group = module._get_fsdp_state()._fsdp_param_group
                for parameter in group.fsdp_params if group else ():
                    kind = getattr(type(parameter), "unsharded_accumulated_grad", None)
                    if not isinstance(kind, property):  # torch < 2.15 keeps it beside .grad
                        parameter.unsharded_accumulated_grad = None
                    if hasattr(parameter, "_unsharded_param"):
                        parameter._unsharded_param.grad = None

    def all_reduce(self, parameters: Sequence[nn.Parameter], average: bool) -> None:
        """Sums or averages gradients over the replicas, unless the model is sharded."""
        if not self.sharded and dist.is_initialized():
            all_reduce_gradients(parameters, average=average, process_group=self.replicas)

    def _device(self) -> torch.device:
        return torch.device(self.model.device)
