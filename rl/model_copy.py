"""A copy of the trainer's policy that samples in this process, whatever decodes with it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .prefix_support import refuse_unsupported


def quantize_weights_(model: nn.Module, bits: int, group: int = 64) -> None:
    """Rounds every linear weight to `bits` integers with one scale per `group` input columns.

    Weight-only round-to-nearest, kept dequantised in the model's dtype: the numbers an integer
    engine would compute with, without its kernels. Embeddings, the output head, and experts that
    are stacked in one parameter stay as they are.

    Args:
        model: changed in place.
        bits: 4 or 8.
        group: columns that share a scale.

    Raises:
        ValueError: bits is neither 4 nor 8.
    """
    if bits not in (4, 8):
        raise ValueError(f"quantize_bits: expected 4 or 8, got {bits}")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            weight = module.weight.data
            if isinstance(module, Conv1D):  # GPT-2's layers keep [in, out]
                weight = weight.T
            rows, columns = weight.shape
            padded = nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
            top = 2 ** (bits - 1) - 1
            scale = padded.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
            rounded = (padded / scale).round().clamp(-top - 1, top) * scale
            weight.copy_(rounded.view(rows, -1)[:, :columns])


class ModelCopy:
    """What the engines of this process have in common: the model, its dtype and its weights.

    The copy may have another dtype or rounded weights than the trainer's model: then the mismatch
    between the two is the real thing, as between a training and an inference engine.

    Args:
        model: a causal LM whose attention goes through transformers' attention registry; copied.
        dtype: of the copy; float32 is the control without mismatch.
        quantize_bits: 4 or 8 rounds the copy's linear weights; None does not.
        max_rows: most rollouts decoded at a time.

    Raises:
        ValueError: the model has layers whose attention this engine cannot do exactly, or max_rows
            is no count.
    """

    attention: ClassVar[str]

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype = torch.bfloat16,
        quantize_bits: int | None = None,
        max_rows: int = 512,
    ) -> None:
        refuse_unsupported(model)
        if max_rows < 1:
            raise ValueError(f"max_rows: expected a count >= 1, got {max_rows}")
        self.quantize_bits, self.max_rows, self.version = quantize_bits, max_rows, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            # not model.to(dtype): buffers would go along, and bf16 rotary frequencies turn far
            # positions by the wrong angle
            parameter.data = parameter.data.to(dtype)
        self.model.set_attn_implementation(self.attention)
        if quantize_bits is not None:
            quantize_weights_(self.model, quantize_bits)

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copies new weights in, cast to the engine's dtype and rounded if it rounds.

        Args:
            named_tensors: (checkpoint name, tensor) pairs; every name must exist here. One at a
                time: what is gathered or merged for it needs no memory together.
            version: number the following samples carry.

        Raises:
            ValueError: a name is unknown or a shape differs; what came before it is copied.
        """
        own = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in named_tensors:
            if name not in own or own[name].shape != tensor.shape:
                expected = tuple(own[name].shape) if name in own else "no such weight"
                raise ValueError(
                    f"named_tensors: {name} is {tuple(tensor.shape)}, here: {expected}"
                )
            own[name].copy_(tensor)
        if self.quantize_bits is not None:
            quantize_weights_(self.model, self.quantize_bits)
        self.version = version

    def to(self, device: torch.device) -> None:
        """Moves the engine's copy of the model.

        Args:
            device: where it samples from now on.
        """
        self.model.to(device)

    def close(self) -> None:
        """Nothing to free."""
