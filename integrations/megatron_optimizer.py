"""AdamMini within Megatron-core's optimizers.

    optimizer = megatron_adam_mini(config, model_chunks)   # for get_megatron_optimizer

Megatron builds its optimizers as ever: groups and their overrides, fp32 copies, flat shards, loss
scaling, clipping. Then the torch optimizer inside each of them is replaced by an AdamMini over the
same groups. What tensor parallelism or the shards of `DistributedOptimizer` cut is updated with
the means of whole blocks: one all-reduce a step and set of ranks.

Source: arXiv 2406.16793; blocks as `trimtab.optim.infer_blocks` reads them from Megatron's modules.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor

from ..optim.adam_mini import AdamMini
from ..optim.blocks import Preset, infer_blocks
from ..optim.layouts import BlockMap
from ..optim.pieces import Shard
from ..optim.sharding import block_name
from . import megatron_model  # noqa: F401, it refuses versions that were not tried
from .megatron_checkpoint import adam_checkpoints

_KINDS = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)
_ADAMS = ("Adam", "AdamW", "FusedAdam")

# Options of OptimizerConfig: what each has to be, and why.
_EXPECTED = {
    "optimizer": ("adam", "whose groups and hyper-parameters AdamMini takes"),
    "decoupled_weight_decay": (True, "AdamMini decays weights, not gradients"),
    "use_precision_aware_optimizer": (False, "it keeps the fp32 weights in the optimizer replaced"),
    "optimizer_cpu_offload": (False, "AdamMini keeps its state where the weights are"),
    "offload_optimizer_states": (False, "it would go on holding the optimizer replaced"),
    "use_layer_wise_distributed_optimizer": (False, "use use_distributed_optimizer=True"),
}


def megatron_adam_mini(
    config: OptimizerConfig,
    model_chunks: Sequence[DistributedDataParallel],
    *,
    optimizer: MegatronOptimizer | None = None,
    preset: Preset = "snr",
    strict: bool = False,
    blocks: BlockMap | Sequence[BlockMap] | None = None,
    fused: bool | None = None,
    momentum_dtype: torch.dtype | None = None,
    seed: int = 0,
    **arguments: Any,
) -> MegatronOptimizer:
    """What `get_megatron_optimizer` returns, with an AdamMini in the place of every Adam.

    Goes with fp32, bf16 and fp16 training, `use_distributed_optimizer`, tensor, pipeline, expert,
    data and context parallelism. Its distributed checkpoints have Adam's form, with one second
    moment an entry: those of Adam are taken, too, and can be resharded as Adam's are, in the
    formats fully_reshardable and dp_reshardable (and dp_zero_gather_scatter).

    Args:
        config: with optimizer="adam".
        model_chunks: as for `get_megatron_optimizer`.
        optimizer: what `get_megatron_optimizer` has returned for these chunks, before its first
            step; None calls it.
        preset, strict: as in `infer_blocks`, for `blocks`.
        blocks: of the (tensor-parallel) parameters by their names in the model, one map a chunk;
            None for what `infer_blocks` says.
        fused, momentum_dtype, seed: as in AdamMini. Which way a bf16 momentum is rounded depends
            on how the model is cut over ranks.
        arguments: others of `get_megatron_optimizer`.

    Returns:
        Megatron's optimizer; the AdamMini of each of its parts is
        `.chained_optimizers[i].optimizer`, whose map of blocks is `.blocks`.

    Raises:
        ValueError: an option that leaves no Adam to replace, chunks that are not Megatron's
            DistributedDataParallel, groups of processes that its parallel_state does not have, an
            optimizer that has been stepped or replaced before; as in `infer_blocks`. Nothing has
            been replaced then.

    Source: arXiv 2406.16793, the update rule.
    """
    chunks = list(model_chunks)
    _check(config, chunks, arguments.get("pg_collection"))
    names = _names(chunks)
    found = _blocks(chunks, blocks, preset, strict)
    if optimizer is None:
        optimizer = get_megatron_optimizer(config, chunks, **arguments)
    elif arguments:
        raise ValueError(f"arguments: expected none with optimizer=, found {sorted(arguments)}")
    parts = optimizer.chained_optimizers if type(optimizer) is ChainedOptimizer else [optimizer]
    parts = [part for part in parts if not part.is_stub_optimizer]  # of frozen models
    for part in parts:
        _check_part(part)
    options = {"fused": fused, "momentum_dtype": momentum_dtype, "seed": seed}
    places = [_places(part) for part in parts]
    made = [
        _adam_mini(part, its, names, blocks=found, **options)
        for part, its in zip(parts, places, strict=True)
    ]
    rule = preset if blocks is None else "given"
    for part, its, inner in zip(parts, places, made, strict=True):
        part.optimizer = inner
        adam_checkpoints(part, its.here, rule)
    return optimizer


class _Places(NamedTuple):
    """What one of Megatron's optimizers updates.

    here: the tensor that its inner optimizer has, by parameter of the model.
    shards: where flat shards lie; by parameter of the model where this rank has none of it.
    """

    here: dict[Tensor, Tensor]
    shards: dict[Tensor, Shard]


def _places(part: MegatronOptimizer) -> _Places:
    if isinstance(part, DistributedOptimizer):
        pairs = (
            *zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True),
            *zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True),
        )
        here = _paired(pairs)
        return _Places(here, dict(_shards(part, here)))
    if isinstance(part, FP32Optimizer):
        return _Places({p: p for group in part.optimizer.param_groups for p in group["params"]}, {})
    pairs = (
        *zip(part.float16_groups, part.fp32_from_float16_groups, strict=True),
        *zip(part.fp32_from_fp32_groups, part.fp32_from_fp32_groups, strict=True),
    )
    return _Places(_paired(pairs), {})


def _paired(groups: Sequence[tuple[list[Tensor], list[Tensor]]]) -> dict[Tensor, Tensor]:
    return {
        param: inner
        for params, inners in groups
        for param, inner in zip(params, inners, strict=True)
    }


def _shards(
    part: DistributedOptimizer, here: Mapping[Tensor, Tensor]
) -> Iterator[tuple[Tensor, Shard]]:
    """Of all parameters here, and of those cut over other ranks of the group.

    A bucket of the buffer is cut into equal shards, one a rank, wherever parameters begin.
    """
    ranks = part.data_parallel_group.size()
    number = itertools.count()
    for buffer in part.buffers:
        for param, (start, stop, bucket_id, *_) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            size = bucket.grad_data.numel() // ranks
            first, last = ((entry - bucket.offset) // size for entry in (start, stop - 1))
            groups = ((-1, part.data_parallel_group),) if first != last else ()
            shard = Shard(tuple(param.shape), flat=(0, 0), groups=groups, number=next(number))
            if param in here:
                place = part._get_model_param_range_map(param)["param"]
                shard = Shard(shard.shape, None, (place.start, place.end), groups, shard.number)
                yield here[param], shard
            elif groups:
                yield param, shard


def _adam_mini(
    part: MegatronOptimizer, places: _Places, names: Mapping[Tensor, str], **options: Any
) -> AdamMini:
    for param, inner in places.here.items():
        if hasattr(param, "allreduce"):  # Megatron 0.16 does not copy the mark of experts
            inner.allreduce = param.allreduce  # type: ignore[attr-defined]
    known = {inner: names[param] for param, inner in places.here.items()}
    known |= {param: names[param] for param in places.shards if param in names}
    adam = part.optimizer
    defaults = {key: adam.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    shards = places.shards or None
    return AdamMini.for_groups(adam.param_groups, known, shards=shards, **defaults, **options)


def _names(chunks: Sequence[DistributedDataParallel]) -> dict[Tensor, str]:
    """Names in the model, with the number of the chunk if there are several."""
    return {
        param: f"{_prefix(chunks, i)}{name}"
        for i, chunk in enumerate(chunks)
        for name, param in chunk.module.named_parameters()
    }


def _prefix(chunks: Sequence[DistributedDataParallel], i: int) -> str:
    return f"chunk{i}." if len(chunks) > 1 else ""


def _blocks(
    chunks: Sequence[DistributedDataParallel],
    blocks: BlockMap | Sequence[BlockMap] | None,
    preset: Preset,
    strict: bool,
) -> BlockMap:
    """By the names of `_names`."""
    if blocks is None:
        maps = [infer_blocks(chunk.module, preset, strict=strict) for chunk in chunks]
    else:
        maps = [blocks] if isinstance(blocks, BlockMap) else list(blocks)
    if len(maps) != len(chunks):
        raise ValueError(
            f"blocks: expected a map for each of {len(chunks)} model chunks, found {len(maps)}"
        )
    entries = {}
    for i, (chunk, given) in enumerate(zip(chunks, maps, strict=True)):
        for name, param in chunk.module.named_parameters():
            key = block_name(name, given)
            if key is None:
                raise ValueError(f"blocks: expected an entry for parameter {name!r}, found none")
            given[key].layout.validate(name, param)
            entries[_prefix(chunks, i) + name] = given[key]
    return BlockMap(entries)


def _check(
    config: OptimizerConfig, chunks: Sequence[DistributedDataParallel], pg_collection: Any
) -> None:
    _check_config(config, "config")
    for chunk in chunks:
        if not isinstance(chunk, DistributedDataParallel):
            raise ValueError(
                "model_chunks: expected DistributedDataParallel of megatron.core.distributed, "
                f"found {type(chunk).__name__}; under FSDP use trimtab.optim.AdamMini"
            )
        model = chunk.config
        for name, param in chunk.module.named_parameters():
            if getattr(param, "is_gtp_weight_remat", False):
                raise ValueError(
                    f"model_chunks: parameter {name!r} is cut by generalized tensor parallelism, "
                    "whose sums AdamMini does not take; turn it off"
                )
            cut = getattr(param, "tensor_model_parallel", False)
            if cut and ".experts." in name and getattr(param, "allreduce", True):
                sizes = model.expert_tensor_parallel_size, model.tensor_model_parallel_size
                if sizes[0] != sizes[1]:
                    raise ValueError(
                        f"expert_tensor_parallel_size: expected {sizes[1]}, as of the other "
                        f"layers, without expert parallelism, found {sizes[0]}"
                    )
    group = getattr(pg_collection, "tp", None)
    if group is not None and group.size() > 1:
        known = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
        if known is not group:
            raise ValueError(
                "pg_collection: expected the tensor-parallel group of parallel_state, which "
                "AdamMini adds up over, found another; call initialize_model_parallel"
            )


def _check_config(config: OptimizerConfig, owner: str) -> None:
    for name, (expected, why) in _EXPECTED.items():
        found = getattr(config, name, expected)
        if found != expected:
            raise ValueError(f"{owner}.{name}: expected {expected!r}, found {found!r}: {why}")


def _check_part(part: MegatronOptimizer) -> None:
    if type(part) not in _KINDS:
        if isinstance(getattr(part, "optimizer", None), AdamMini):
            raise ValueError("optimizer: expected an Adam to replace, found an AdamMini already")
        kinds = ", ".join(kind.__name__ for kind in _KINDS)
        raise ValueError(f"optimizer: expected {kinds}, found {type(part).__name__}")
    if type(part.optimizer).__name__ not in _ADAMS:
        found = type(part.optimizer).__name__
        raise ValueError(f"optimizer: expected an Adam to replace, found {found}")
    _check_config(part.config, "optimizer.config")  # it may have been made with another one
    if part.optimizer.state:
        raise ValueError(
            "optimizer: expected one without state, found one that has been stepped or loaded; "
            "replace it first, then load the checkpoint, which may be Adam's"
        )
