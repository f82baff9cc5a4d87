"""A Megatron-core model without its wrappers."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from torch import nn


def unwrapped(model: nn.Module | Sequence[nn.Module]) -> tuple[nn.Module, GPTModel]:
    """The model's one chunk, as it is called and without its wrappers.

    Args:
        model: GPTModel, or a list of one; in DistributedDataParallel, Float16Module or both.

    Returns:
        The chunk, and the GPTModel in it.

    Raises:
        ValueError: several chunks, or another module or wrapper.
    """
    if isinstance(model, Sequence):
        if len(model) != 1:
            raise ValueError(f"model: expected one chunk (no virtual pipeline), got {len(model)}")
        model = model[0]
    inner = model
    while isinstance(inner, DistributedDataParallel | Float16Module):
        inner = inner.module
    if not isinstance(inner, GPTModel):
        raise ValueError(
            "model: expected a GPTModel, alone or in Megatron's DistributedDataParallel or "
            f"Float16Module, got {type(inner).__name__}"
        )
    return model, inner
