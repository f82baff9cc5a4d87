"""Parameters that are spread over ranks: where a shard lies, and the sums that cross shards.

Source: arXiv 2406.16793, the update rule; block means are those of the whole parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layouts import BlockLayout, BlockMap
from .pieces import Intervals, Plan, Shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# What FSDP1, activation checkpointing and torch.compile put into the names of parameters.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def is_dtensor(tensor: Tensor) -> bool:
    """Recognised by name: torch.distributed is missing from some builds of torch."""
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:  # a step asks often
        return False
    return any(c.__name__ == "DTensor" for c in kind.__mro__)


def local_part(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, which shares its memory; any other tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def cut_of(tensor: Tensor) -> tuple[Any, tuple[Any, ...]] | None:
    """The mesh and the placements of a DTensor; None for any other tensor."""
    if not is_dtensor(tensor):
        return None
    return tensor.device_mesh, tuple(tensor.placements)  # type: ignore[attr-defined]


def dtensor_shard(tensor: DTensor) -> Shard:
    """Where the local part of a DTensor lies.

    Args:
        tensor: placements of any kind but Partial; uneven and empty shards too.

    Returns:
        A box, with the process group of every mesh dim of size 2 or more that cuts a dim.

    Raises:
        ValueError: a Partial placement, or a local shard that is not what placements say.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"placements: expected Shard or Replicate, found {placements}")
    box = []
    for dim, size in enumerate(tensor.shape):
        along = [_on_dim(p, 0) if _shard_dim(p) == dim else Replicate() for p in placements]
        if all(placement.is_replicate() for placement in along):
            box.append(((0, size),))
            continue
        numbers = torch.arange(size, device=mesh.device_type)
        here = distribute_tensor(numbers, mesh, along, src_data_rank=None).to_local()
        box.append(_intervals(here.tolist()))
    sizes = tuple(sum(stop - start for start, stop in intervals) for intervals in box)
    if sizes != tuple(tensor.to_local().shape):
        raise ValueError(
            f"placements: expected a local shard of shape {sizes} by {placements}, found "
            f"{tuple(tensor.to_local().shape)}"
        )
    groups = [
        (_shard_dim(placement), mesh.get_group(i))
        for i, placement in enumerate(placements)
        if _shard_dim(placement) is not None and mesh.size(i) > 1
    ]
    return Shard(tuple(tensor.shape), tuple(box), groups=tuple(groups))


def second_moments(tensor: DTensor, layout: BlockLayout, local: Tensor) -> DTensor:
    """Second moments as a DTensor, so that checkpoints can be loaded by any number of ranks.

    Args:
        tensor: the parameter.
        layout: the blocks of the whole parameter.
        local: the second moments that this rank holds.

    Returns:
        Cut as the parameter is where blocks are not; copied on every rank elsewhere.
    """
    from torch.distributed.tensor import DTensor

    whole = torch.empty(layout.state_shape, device="meta")
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        moment_placements(tensor, layout),
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def moment_placements(tensor: DTensor, layout: BlockLayout) -> tuple[Any, ...]:
    """Placements of the second moments of a DTensor parameter."""
    from torch.distributed.tensor import Replicate

    if layout.kind == "elementwise":
        kept = {dim: dim for dim in range(len(layout.shape))}
    elif layout.plain:
        kept = {dim: dim for dim in range(layout.stacked)} | {layout.unit_dim: layout.stacked}
    else:
        kept = {}
    return tuple(
        _on_dim(p, kept[dim]) if (dim := _shard_dim(p)) in kept else Replicate()
        for p in tensor.placements
    )


def _shard_dim(placement: Any) -> int | None:
    """The tensor dim that a placement cuts, None for copies."""
    return getattr(placement, "dim", None)


def _on_dim(placement: Any, dim: int) -> Any:
    """The same kind of cut along another tensor dim."""
    from torch.distributed.tensor import Shard as PlacedShard

    split = getattr(placement, "split_factor", None)  # FSDP2 over tensor parallelism
    return PlacedShard(dim) if split is None else type(placement)(dim, split_factor=split)


def _intervals(numbers: list[int]) -> Intervals:
    """[start, stop) of every run of consecutive numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return tuple((start, stop) for start, stop in runs)


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP1 has put this parameter into one of its flat parameters, or it is one."""
    return getattr(param, "_fsdp_flattened", False)


def megatron_group(param: Tensor) -> Any:
    """The process group over which Megatron-core has cut this plain local tensor; None if whole."""
    state = sys.modules.get("megatron.core.parallel_state")
    marked = getattr(param, "tensor_model_parallel", False)  # weights without a cut may be, too
    if not marked or state is None or not state.model_parallel_is_initialized():
        return None
    if getattr(param, "allreduce", True):
        group = state.get_tensor_model_parallel_group()
    else:  # an expert's
        group = state.get_expert_tensor_parallel_group()
    return group if group.size() > 1 else None


def cut_by_megatron(plan: Plan, layout: BlockLayout, param: Tensor, group: Any) -> Plan:
    """The plan of a local tensor whose blocks may go on on other tensor-parallel ranks.

    Rows of a column-parallel weight are whole; those of a row-parallel one are cut. Of either the
    plan may be of a flat shard: DistributedOptimizer slices what tensor parallelism has cut.
    """
    kept = {*range(layout.stacked), layout.unit_dim} if layout.kind in ("row", "column") else set()
    groups = (*plan.groups, group)
    if layout.kind == "elementwise" or param.partition_dim in kept:  # type: ignore[attr-defined]
        return replace(plan, groups=groups)
    lengths = plan.lengths * group.size()  # Megatron cuts evenly
    return replace(
        plan, lengths=lengths, reduce=(*plan.reduce, group), groups=groups, one_pass=False
    )


def on_other_megatron_ranks(param: Tensor) -> bool:
    """Whether other ranks have parameters, pipeline stages or experts, that this rank has not."""
    state = sys.modules.get("megatron.core.parallel_state")
    if not hasattr(param, "tensor_model_parallel") or state is None:
        return False
    return state.model_parallel_is_initialized() and (
        state.get_pipeline_model_parallel_world_size() > 1
        or state.get_expert_model_parallel_world_size() > 1
    )


def flat_shards(model: nn.Module) -> dict[Tensor, Shard]:
    """Where the parameters of a model under FSDP1 lie, for `AdamMini(..., shards=...)`.

    FSDP1 (FullyShardedDataParallel) keeps slices of flattened parameters, which have lost their
    shapes: call `infer_blocks` before wrapping or within summon_full_params, this after wrapping.

    Checkpoints, for any number of ranks: `FSDP.optim_state_dict` and `optim_state_dict_to_load`, or
    torch.distributed.checkpoint (give FSDP a device_mesh: torch 2.13 cannot load a ShardedTensor of
    which a rank has nothing). They have one second moment an entry; outside FSDP1
    `from_adamw_state` takes them.

    Args:
        model: FullyShardedDataParallel(..., use_orig_params=True) somewhere inside.

    Returns:
        A Shard by parameter, on every rank for all of them, also those it has nothing of.

    Raises:
        ValueError: use_orig_params=False, a parameter that was not contiguous, or one cut by
            tensor parallelism before.

    Source: torch 2.13, torch/distributed/fsdp/_flat_param.py, which has no public form of this.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    shards: dict[Tensor, Shard] = {}
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle = module._handle  # None if it has no parameters of its own
        if handle is None:
            continue
        flat = handle.flat_param
        if flat._params is None:
            raise ValueError("model: expected FSDP with use_orig_params=True, found False")
        extensions = getattr(flat, "_param_extensions", None) or [None] * len(flat._params)
        for i, param in enumerate(flat._params):
            if extensions[i] is not None or not flat._contiguities[i]:
                raise ValueError(
                    f"model: expected contiguous and plain parameters under FSDP, found "
                    f"{flat._fqns[i]!r}, which is strided or a DTensor"
                )
            shape = tuple(flat._shapes[i])
            if not handle.uses_sharded_strategy:  # NO_SHARD, and a single process
                shards[param] = Shard(shape, flat=(0, prod(shape)))
                continue
            place = flat._shard_param_infos[i]
            here = (0, 0)
            if place.in_shard:
                here = (place.intra_param_start_idx, place.intra_param_end_idx + 1)
            shards[param] = Shard(shape, flat=here, groups=((-1, handle.process_group),))
    return shards


def parameter_layouts(model: nn.Module, blocks: BlockMap) -> dict[Tensor, BlockLayout]:
    """Layouts by parameter, where parameters are passed on without names.

    For `ZeroRedundancyOptimizer(model.parameters(), partial(AdamMini, blocks=...), lr=...)`. Clip
    with torch.nn.utils.clip_grad_norm_ there: every rank steps some of the parameters only.

    Args:
        model: whose parameters the optimizer gets; also wrapped in DDP, FSDP or torch.compile.
        blocks: from `infer_blocks`, on this model or on the one that is wrapped.

    Returns:
        The layout of every parameter.

    Raises:
        ValueError: a parameter that is not in `blocks`.

    Source: arXiv 2406.16793, the partition principle.
    """
    found = {}
    for name, param in model.named_parameters():
        key = block_name(name, blocks)
        if key is None:
            raise ValueError(f"blocks: expected an entry for parameter {name!r}, found none")
        found[param] = blocks[key].layout
    return found


def block_name(name: str, blocks: Mapping[str, Any]) -> str | None:
    """The name under which `blocks` has a parameter, also if wrappers have changed it since."""
    bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    # The third is DDP's; the others are of blocks that were read from the wrapped model.
    names = (name, bare, bare.removeprefix("module."), f"module.{bare}", f"_orig_mod.{bare}")
    return next((key for key in names if key in blocks), None)


def all_reduce_packed(parts: Sequence[tuple[tuple[Any, ...], Tensor]]) -> None:
    """Adds up tensors over process groups, in place: one all-reduce for each set of ranks.

    Args:
        parts: (process groups, tensor) pairs in the same order on every rank, which lacks none
            that is cut over a group of its own; a tensor with several groups is added up over each
            of them in turn.
    """
    dist = torch.distributed
    # Equal meshes have groups of their own, and DTensors may be given either.
    groups = dict.fromkeys(group for groups, _ in parts for group in groups)
    ranks = {group: tuple(dist.get_process_group_ranks(group)) for group in groups}
    # The turn of a set of ranks: no rank may add up over the second group of a tensor before the
    # others have over its first, though what it has may begin with a tensor of the second alone.
    turns: dict[Any, int] = {}
    for of_tensor, _ in parts:
        for turn, group in enumerate(of_tensor):
            turns[ranks[group]] = max(turn, turns.get(ranks[group], 0))
    for one in sorted(turns, key=lambda one: (turns[one], one)):  # one order on all ranks
        same = {group for group in groups if ranks[group] == one}
        mine = [tensor for groups, tensor in parts if not same.isdisjoint(groups)]
        dtype = mine[0].dtype
        for tensor in mine:
            dtype = torch.promote_types(dtype, tensor.dtype)
        packed = torch.cat([tensor.view(-1).to(mine[0].device, dtype) for tensor in mine])
        dist.all_reduce(packed, group=next(group for group in groups if group in same))
        totals = packed.split([tensor.numel() for tensor in mine])
        torch._foreach_copy_([tensor.view(-1) for tensor in mine], list(totals))
