"""From a model to its BlockMap: which entries of each parameter share one second moment.

Three presets, read from the modules and never from parts of parameter names:
    snr    every matrix by output neuron, channel or token, but for values and the ways back to the
           residual stream (attention output, the down projection): by input neuron, along which
           AdamW's second moments are flattest. The default: least loss in benchmarks/README.md
    rows   all by output neuron, channel or token
    paper  the same, but for queries and keys: by head
Norms, biases, vectors and scalars are elementwise in all of them.

Source: arXiv 2406.16793, the partition principle; the authors' package matches names instead.
"""

import logging
from collections.abc import Iterable
from typing import Literal, get_args

from torch import nn
from torch.nn.parameter import is_lazy

from .block_roles import Role, find_roles
from .block_storage import Storage, class_name, find_storage
from .layouts import BlockEntry, BlockLayout, BlockMap, Kind

Preset = Literal["snr", "rows", "paper"]

_logger = logging.getLogger(__name__)

_BY_HEAD = ("q", "k")  # under paper
_BY_INPUT = ("v", "o", "down")  # under snr
_OTHER: dict[str, Kind] = {"row": "column", "column": "row"}


def infer_blocks(model: nn.Module, preset: Preset = "snr", *, strict: bool = False) -> BlockMap:
    """Reads the block layout of every parameter from the module that owns it.

    Knows the layers of torch, attention and feed-forward blocks of transformers, megatron-core
    (shards too: shapes are local there) and peft, with fused, interleaved and stacked storage. A
    fused projection whose parts want different axes stays by output neuron. A tied parameter has
    one entry, under the name `named_parameters` gives it; a warning tells where the other module
    would cut it otherwise.

    Args:
        model: any module, on any device (meta too); DTensors count with their global shape.
        preset: "snr", "rows" or "paper".
        strict: refuse, instead of logging once, parameters of unknown role, which are cut by row.

    Returns:
        A BlockMap with an entry for every name in `model.named_parameters()`.

    Raises:
        ValueError: an unknown preset, a lazy parameter without a shape, or under `strict` a
            parameter of unknown role.

    Source: arXiv 2406.16793, the partition principle; only `paper` cuts q and k as it does, and its
        norms, one block each there, are elementwise here. Axes of `snr`: after arXiv 2503.01843.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"preset: expected one of {get_args(Preset)}, found {preset!r}")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"model: {name!r} has no shape yet; run a batch through it first")
    storage = find_storage(model)
    roles = find_roles(model, storage)
    entries: dict[str, BlockEntry] = {}
    first_names: dict[int, str] = {}
    doubts: dict[str, list[str]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{key}" if prefix else key
            stored, role = storage[module, key], roles.get((module, key))
            layout, reason = _entry(module, parameter, stored, role, preset)
            first = first_names.setdefault(id(parameter), name)
            if first in entries:
                if entries[first].layout != layout:
                    _logger.warning("%s keeps the blocks of %s, to which it is tied", name, first)
                continue
            entries[name] = BlockEntry(layout, reason)
            if not stored.known or (preset == "paper" and role and not role.parts):
                doubts.setdefault(reason, []).append(f"{name} {layout.shape}")
    if doubts:
        listed = "; ".join(f"{_shortened(names)}: {why}" for why, names in doubts.items())
        if strict:
            raise ValueError(f"model: strict expects parameters of known role, found {listed}")
        _logger.warning("cut by row for want of better knowledge: %s", listed)
    return BlockMap(entries)


def vector_names(model: nn.Module) -> set[str]:
    """Names of the parameters whose entries share nothing: norms, biases, vectors, scalars."""
    storage = find_storage(model)
    return {
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        for key, _ in module.named_parameters(recurse=False)
        if storage[module, key].axis is None
    }


def refuse_without_blocks(blocks: BlockMap, names: Iterable[str]) -> None:
    """Passes if any of these parameters has blocks of several entries.

    Args:
        blocks: from `infer_blocks`.
        names: of the parameters that are to be optimized.

    Raises:
        ValueError: every one of them is elementwise, or there is none.

    Source: arXiv 2406.16793; without such a block Adam-mini is AdamW.
    """
    kinds = {blocks[name].layout.kind for name in names if name in blocks}
    if kinds <= {"elementwise"}:
        raise ValueError(
            f"model: expected a matrix among its trainable parameters, found {len(kinds)} kind(s) "
            "of blocks, all of single entries: Adam-mini would be AdamW; keep AdamW, or pass "
            "blocks=infer_blocks(model) from before something flattened the parameters"
        )


def _entry(
    module: nn.Module, parameter: nn.Parameter, stored: Storage, role: Role | None, preset: Preset
) -> BlockEntry:
    shape = tuple(parameter.shape)
    what = f"{stored.unit} of {class_name(module)}"
    if stored.axis is None:
        return BlockEntry(BlockLayout("elementwise", shape), what)
    by_output = BlockLayout(stored.axis, shape, stacked=stored.stacked)
    if role is None or not role.parts:
        doubt = f"; {role.words}" if role and preset == "paper" else ""
        return BlockEntry(by_output, what + doubt)
    kinds = {part.role for part in role.parts}
    if preset == "paper" and not kinds.isdisjoint(_BY_HEAD):
        layout = BlockLayout(stored.axis, shape, _segments(role), stored.stacked)
        heads = " and ".join(kind for kind in _BY_HEAD if kind in kinds)
        return BlockEntry(layout, f"{role.words}: {heads} by head")
    if preset == "snr" and not kinds.isdisjoint(_BY_INPUT):
        if not kinds.issubset(_BY_INPUT):
            return BlockEntry(by_output, f"{role.words}: {stored.unit}, as one tensor has one axis")
        if len(shape) == stored.stacked + 2:  # not a kernel
            layout = BlockLayout(_OTHER[stored.axis], shape, stacked=stored.stacked)
            return BlockEntry(layout, f"{role.words}: input neuron")
    return BlockEntry(by_output, f"{role.words}: {stored.unit}")


def _segments(role: Role) -> tuple[tuple[int, int], ...]:
    """Heads of q and k, single neurons of all else; neighbours of one size are one segment."""
    segments: list[tuple[int, int]] = []
    for part in role.parts:
        by_head = part.role in _BY_HEAD
        count, size = (part.count, part.size) if by_head else (part.count * part.size, 1)
        if segments and segments[-1][1] == size:
            count += segments.pop()[0]
        segments.append((count, size))
    return tuple(segments)


def _shortened(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
