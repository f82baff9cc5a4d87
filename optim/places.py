"""What an optimizer knows of a parameter before its first gradient: name, blocks, pieces, shard."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layouts import BlockLayout, BlockMap, geometric_layout
from .pieces import Plan, Shard, make_plan
from .sharding import (
    block_name,
    cut_by_megatron,
    dtensor_shard,
    is_dtensor,
    is_flattened,
    megatron_group,
)


@dataclass(frozen=True)
class Place:
    """One parameter's."""

    name: str
    number: int  # among all parameters of the optimizer, or its shard's
    layout: BlockLayout
    plan: Plan
    shape: torch.Size  # of the parameter
    is_dtensor: bool
    empty: bool  # no mean of an empty block
    asked: bool  # updated, even if none of it is here, if another rank has a gradient


def places_of(
    group: dict[str, Any],
    blocks: BlockMap | Mapping[Tensor, BlockLayout] | None,
    shards: Mapping[Tensor, Shard] | None,
    first: int,
    known_names: Mapping[Tensor, str],
) -> dict[Tensor, Place]:
    """The places of a group's parameters; the first gets number `first`."""
    names = group.get("param_names")
    if names is None and all(param in known_names for param in group["params"]):
        names = [known_names[param] for param in group["params"]]
    by_name = bool(blocks) and all(isinstance(key, str) for key in blocks)
    if by_name and names is None:
        raise ValueError(
            "blocks: expected named parameters (model.named_parameters()), found no names; where "
            "only parameters can be passed, give blocks=parameter_layouts(model, blocks)"
        )
    if names is not None and len(names) != len(group["params"]):
        raise ValueError(
            f"params: expected a name for each of the {len(group['params'])} parameters of a "
            f"group, found {len(names)}; add parameters with add_param_group"
        )
    places = {}
    for i, param in enumerate(group["params"]):
        name = names[i] if names else f"number {i} of its group"
        _check_parameter(name, param)
        shard = dtensor_shard(param) if is_dtensor(param) else (shards or {}).get(param)
        if shard is None and is_flattened(param):
            raise ValueError(
                f"shards: expected the place of parameter {name!r}, which FSDP1 has flattened, "
                "found none; pass shards=flat_shards(model), with use_orig_params=True"
            )
        whole = torch.empty(shard.shape, device="meta") if shard else param
        if blocks is None:
            layout = geometric_layout(whole)
        else:
            key = block_name(name, blocks) if by_name else param
            if key not in blocks:
                raise ValueError(f"blocks: expected an entry for parameter {name!r}, found none")
            entry = blocks[key]
            layout = entry if isinstance(entry, BlockLayout) else entry.layout
        layout.validate(name, whole)
        number = first + len(places)
        if shard and shard.number is not None:
            number = shard.number
        with torch.device("cpu"):  # whatever the default device is
            plan = make_plan(layout, shard)
            cut = None if shard and shard.flat is None else megatron_group(param)
            if cut is not None:
                plan = cut_by_megatron(plan, layout, param, cut)
        places[param] = Place(
            name,
            number,
            layout,
            plan,
            param.shape,
            is_dtensor(param),
            empty=0 in layout.shape,
            asked=plan.flat and shard is not None and bool(shard.groups),
        )
    return places


def _check_parameter(name: str, param: Tensor) -> None:
    if not param.is_floating_point() or param.layout != torch.strided:
        raise ValueError(
            f"parameter {name!r}: expected dense and floating, found {param.dtype}, {param.layout}"
        )


def check_shape(place: Place, param: Tensor) -> None:
    """Of a parameter whose shape is not what it was."""
    if not place.plan.flat:
        raise ValueError(
            f"parameter {place.name!r}: expected shape {tuple(place.shape)}, as when it was given "
            f"to this optimizer, found {tuple(param.shape)}: make a new optimizer"
        )
    if param.numel() != place.plan.n_entries:
        raise ValueError(
            f"parameter {place.name!r}: expected the {place.plan.n_entries} entries of its shard, "
            f"found {param.numel()}: step outside summon_full_params"
        )


def check_gradient(place: Place, param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise ValueError(
            f"gradient of parameter {place.name!r}: expected dense, found {grad.layout} "
            "(sparse=True of nn.Embedding gives such gradients)"
        )
    if grad.shape != param.shape and not place.plan.flat:
        raise ValueError(
            f"gradient of parameter {place.name!r}: expected shape {tuple(param.shape)}, found "
            f"{tuple(grad.shape)}"
        )
    if is_dtensor(grad) != place.is_dtensor:
        kinds = ["a DTensor" if is_dtensor(x) else "a plain tensor" for x in (param, grad)]
        raise ValueError(
            f"gradient of parameter {place.name!r}: expected {kinds[0]}, found {kinds[1]}"
        )
    if place.is_dtensor and grad.placements != param.placements:
        raise ValueError(
            f"gradient of parameter {place.name!r}: expected placements {param.placements}, found "
            f"{grad.placements}"
        )
