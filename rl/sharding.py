"""FSDP2: a policy whose parameters are spread over the processes.

A process cannot call a sharded policy alone: each forward gathers parameters from all of them, and
each backward reduces gradients to all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .lora import has_adapters, merged_parameters


def shard_policy(policy: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shards a policy in place, each decoder layer as a unit of its own.

    Args:
        policy: causal LM.
        mesh: one-dimensional.
    """
    layers = set(policy._no_split_modules or ())
    for module in list(policy.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(policy, mesh=mesh)


def is_sharded(policy: PreTrainedModel) -> bool:
    """Whether the policy's parameters are spread over processes, gathered or not at the moment."""
    return any(isinstance(module, FSDPModule) for module in policy.modules()) or any(
        isinstance(parameter, DTensor) for parameter in policy.parameters()
    )


def full_parameters(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Whole parameters by checkpoint name; of a sharded policy every process must take them all.

    Args:
        policy: sharded or not.

    Yields:
        (name, tensor); gathered for the occasion where the parameter is sharded, and with the
        policy's adapters, if it has any, merged in.
    """
    if has_adapters(policy):
        yield from merged_parameters(policy)
        return
    for name, parameter in policy.named_parameters():
        whole = parameter.detach()
        yield name, whole.full_tensor() if isinstance(whole, DTensor) else whole


def stored_buffers(policy: PreTrainedModel) -> dict[str, Tensor]:
    """Buffers of a checkpoint by name, such as the biases of Glm4Moe's router; never sharded.

    Args:
        policy: sharded or not.

    Returns:
        Name -> tensor, in its own dtype.
    """
    # not by state_dict: FSDP2 reshards in it, and the first process calls this alone
    return {
        f"{path}.{name}".lstrip(".").replace(".base_layer.", "."): buffer
        for path, module in policy.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def take_part_in_backward(policy: PreTrainedModel) -> None:
    """A forward and backward that adds nothing, for a process without rollouts of its own.

    Args:
        policy: sharded.
    """
    device = torch.device(policy.device)
    logits = policy(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device)).logits
    if torch.is_grad_enabled():
        (logits.float().sum() * 0.0).backward()


def all_reduce_gradients(
    parameters: Sequence[nn.Parameter],
    *,
    average: bool,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Adds up `.grad` over processes, with one collective a dtype; a missing one counts as zero.

    Args:
        parameters: replicated, in the same order everywhere.
        average: divide by the number of processes.
        process_group: of the replicas; None: all processes.
    """
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for dtype in {p.dtype: None for p in parameters}:
        chosen = [p for p in parameters if p.dtype == dtype]
        flat = torch.cat([p.grad.flatten() for p in chosen])
        dist.all_reduce(flat, group=process_group)
        if average:
            flat /= dist.get_world_size(process_group)
        for p, grad in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
            p.grad.copy_(grad.view_as(p))
