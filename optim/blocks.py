"""Which entries of a parameter share one second moment in Adam-mini, as data.

A block is a group of entries of one parameter; a `BlockLayout` cuts a parameter into equal blocks:
    elementwise  every entry alone                (Adam itself)
    row          one index of dim 0               (a neuron of nn.Linear, a token of nn.Embedding)
    column       one index of the last dim        (a neuron of transformers' Conv1D, in x out)
    head         `size` consecutive rows          (a query or key head)
    whole        the parameter
`infer_blocks` reads the layouts from a model's modules and shapes, never from parts of names.

Source: arXiv 2406.16793, the partition principle; the authors' package matches names instead.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

Kind = Literal["elementwise", "row", "column", "head", "whole"]
Preset = Literal["rows", "paper"]

_logger = logging.getLogger(__name__)

# Modules that store one output neuron, channel or token per index of dim 0.
_ROW_MODULES = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.RNNBase,
    nn.RNNCellBase,
)
_NORM_MODULES = (nn.LayerNorm, nn.RMSNorm)  # the norms whose weight can have 2 dimensions or more


@dataclass(frozen=True)
class BlockLayout:
    """How one parameter is cut into blocks of equal length.

    Args:
        kind: elementwise, row, column, head or whole.
        shape: the parameter's shape; row and head need 1 dimension or more, column 2 or more.
        size: rows per head, a divisor of shape[0]; 1 for every other kind.

    Raises:
        ValueError: an unknown kind, or a shape or size that the kind cannot cut.

    Source: arXiv 2406.16793, the partition principle.
    """

    kind: Kind
    shape: tuple[int, ...]
    size: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {get_args(Kind)}, found {self.kind!r}")
        least = {"row": 1, "head": 1, "column": 2}.get(self.kind, 0)
        if len(self.shape) < least:
            raise ValueError(
                f"shape: {self.kind} expects {least} or more dimensions, found {self.shape}"
            )
        if self.kind != "head" and self.size != 1:
            raise ValueError(f"size: expected 1 for kind {self.kind!r}, found {self.size}")
        if self.kind == "head" and (self.size < 1 or self.shape[0] % self.size):
            raise ValueError(f"size: expected a divisor of {self.shape[0]} rows, found {self.size}")

    @property
    def n_blocks(self) -> int:
        """Number of blocks, and so of second moments."""
        if self.kind == "elementwise":
            return prod(self.shape)
        if self.kind == "whole":
            return 1
        return self.shape[-1] if self.kind == "column" else self.shape[0] // self.size

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the second moments: the parameter's if elementwise, else (n_blocks,)."""
        return self.shape if self.kind == "elementwise" else (self.n_blocks,)

    @property
    def reduce_dims(self) -> tuple[int, ...]:
        """The dims of `view(tensor)` that a block spans; none if elementwise."""
        return {"elementwise": (), "column": (0,)}.get(self.kind, (1,))

    def view(self, tensor: Tensor) -> Tensor:
        """Reshapes a tensor of the parameter's shape so that `reduce_dims` span exactly one block.

        Args:
            tensor: `shape`, any dtype.

        Returns:
            Elementwise: the tensor; column: [-1, n_blocks]; else [n_blocks, -1]. A copy where
            strides demand it.
        """
        if self.kind == "elementwise":
            return tensor
        length = prod(self.shape) // max(self.n_blocks, 1)  # -1 is ambiguous for an empty tensor
        shape = (length, self.n_blocks) if self.kind == "column" else (self.n_blocks, length)
        return tensor.reshape(shape)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over each block: `shape` in, `state_shape` out, same dtype."""
        if self.kind == "elementwise":  # torch reads dim=() as every dim
            return tensor
        return self.view(tensor).mean(dim=self.reduce_dims)

    def broadcastable(self, values: Tensor) -> Tensor:
        """Shapes one value per block so that it broadcasts against the parameter.

        Args:
            values: `state_shape`, any dtype.

        Returns:
            A tensor that broadcasts to `shape`; a view, but for heads [rows, 1, ...].
        """
        if self.kind in ("elementwise", "column"):
            return values
        if self.kind == "whole":
            return values.view((1,) * len(self.shape))
        if self.kind == "head":
            values = values.repeat_interleave(self.size)
        return values.view(-1, *(1,) * (len(self.shape) - 1))

    def index(self, device: torch.device | str | None = None) -> Tensor:
        """The block number of every entry: `shape`, int64, each in [0, n_blocks)."""
        if self.kind == "elementwise":
            return torch.arange(self.n_blocks, device=device).view(self.shape)
        if self.kind == "whole":
            return torch.zeros(self.shape, dtype=torch.int64, device=device)
        if self.kind == "column":
            return torch.arange(self.shape[-1], device=device).expand(self.shape)
        rows = torch.arange(self.shape[0], device=device) // self.size
        return rows.view(-1, *(1,) * (len(self.shape) - 1)).expand(self.shape)

    def validate(self, name: str, parameter: Tensor) -> None:
        """Checks that a parameter has the shape this layout was made for.

        Args:
            name: the parameter's name, for the message.
            parameter: any tensor.

        Raises:
            ValueError: the shapes differ.
        """
        if tuple(parameter.shape) != self.shape:
            found = tuple(parameter.shape)
            raise ValueError(
                f"parameter {name!r}: its block layout expects shape {self.shape}, found {found}"
            )


def geometric_layout(parameter: Tensor) -> BlockLayout:
    """The layout from the shape alone: by row from 2 dimensions on, else elementwise.

    Args:
        parameter: any shape and dtype; only its shape is read.

    Returns:
        The layout of its second moments.

    Source: arXiv 2406.16793, the partition principle; the fallback for roles it does not name.
    """
    return BlockLayout("row" if parameter.ndim >= 2 else "elementwise", tuple(parameter.shape))


class BlockEntry(NamedTuple):
    """One parameter of a BlockMap: its layout, and the reason for it in words."""

    layout: BlockLayout
    reason: str


class BlockMap(Mapping[str, BlockEntry]):
    """An immutable mapping from parameter name to (layout, reason), which prints as a table.

    Args:
        entries: (layout, reason) by parameter name.
    """

    def __init__(self, entries: Mapping[str, tuple[BlockLayout, str]]) -> None:
        self._entries = {name: BlockEntry(*entry) for name, entry in entries.items()}

    def __getitem__(self, name: str) -> BlockEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __str__(self) -> str:
        rows = [("parameter", "shape", "kind", "blocks", "why")]
        for name, (layout, reason) in self.items():
            kind = f"head of {layout.size}" if layout.kind == "head" else layout.kind
            shape = "x".join(map(str, layout.shape)) or "scalar"
            rows.append((name, shape, kind, str(layout.n_blocks), reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        form = "  ".join(f"{{:{width}}}" for width in widths)
        return "\n".join(form.format(*row).rstrip() for row in rows)

    def __repr__(self) -> str:
        return f"BlockMap({len(self)} parameters)"

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The map as plain dicts, lists, strings and ints, fit for JSON or a checkpoint."""
        return {
            name: {"kind": x.kind, "shape": list(x.shape), "size": x.size, "reason": reason}
            for name, (x, reason) in self.items()
        }

    @classmethod
    def from_dict(cls, entries: Mapping[str, Mapping[str, Any]]) -> "BlockMap":
        """The inverse of `to_dict`.

        Args:
            entries: by parameter name, a mapping with kind, shape, size and reason.

        Returns:
            The BlockMap.

        Raises:
            ValueError: the entry of a named parameter lacks a key or describes no layout.
        """
        made = {}
        for name, entry in entries.items():
            try:
                layout = BlockLayout(entry["kind"], tuple(entry["shape"]), entry["size"])
                made[name] = (layout, entry["reason"])
            except KeyError as missing:
                raise ValueError(
                    f"entries[{name!r}]: expected key {missing}, found {sorted(entry)}"
                ) from None
            except ValueError as error:
                raise ValueError(f"entries[{name!r}]: {error}") from None
        return cls(made)


def infer_blocks(model: nn.Module, preset: Preset = "rows", *, strict: bool = False) -> BlockMap:
    """Reads the block layout of every parameter from the module that owns it.

    Both presets cut matrices by output neuron (embeddings by token, transformers' Conv1D by column,
    as it is stored in x out) and leave norms, biases, vectors and scalars elementwise. `paper` also
    joins the rows of one query or key head, in modules with `q_proj`, `k_proj` and `head_dim`
    (Llama, Mistral, Qwen 2 and 3, Gemma); fused projections stay by row. A tied parameter has one
    entry, under the name `named_parameters` gives it.

    Args:
        model: any module.
        preset: "rows" or "paper".
        strict: refuse, instead of logging once, parameters whose role is not known and are
            therefore cut by row.

    Returns:
        A BlockMap with an entry for every name in `model.named_parameters()`.

    Raises:
        ValueError: an unknown preset, or under `strict` a parameter of unknown role.

    Source: arXiv 2406.16793, the partition principle; `rows` differs from it: q and k by row.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"preset: expected one of {get_args(Preset)}, found {preset!r}")
    head_rows, doubts = _head_rows(model) if preset == "paper" else ({}, {})
    entries: dict[str, BlockEntry] = {}
    name_of: dict[nn.Parameter, str] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{key}" if prefix else key
            layout, reason, known = _layout_by_role(module, parameter, head_rows)
            first = name_of.setdefault(parameter, name)
            if first in entries:
                if entries[first].layout != layout:
                    _logger.warning("%s keeps the blocks of %s, to which it is tied", name, first)
                continue
            entries[name] = BlockEntry(layout, reason)
            if not known or parameter in doubts:
                doubt = doubts.get(parameter, reason)
                doubts[parameter] = f"{name} {layout.shape}: {doubt}"
    if doubts:
        listed = "; ".join(doubts.values())
        if strict:
            raise ValueError(f"model: strict expects parameters of known role, found {listed}")
        _logger.warning("cut by row for want of better knowledge: %s", listed)
    return BlockMap(entries)


def _head_rows(model: nn.Module) -> tuple[dict[Tensor, int], dict[Tensor, str]]:
    """Rows per head of each q and k weight, and the q and k weights that cannot be cut by head."""
    rows: dict[Tensor, int] = {}
    doubts: dict[Tensor, str] = {}
    for module in model.modules():
        if not (hasattr(module, "q_proj") and hasattr(module, "k_proj")):
            continue
        head_dim = getattr(module, "head_dim", None)
        for projection in (module.q_proj, module.k_proj):
            weight = getattr(projection, "weight", None)
            if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
                continue
            stored_by_row = not _is_transformers_conv1d(projection)
            fits = isinstance(head_dim, int) and head_dim > 0 and weight.shape[0] % head_dim == 0
            if stored_by_row and fits:
                rows[weight] = head_dim
            else:
                doubts[weight] = f"{type(module).__name__}.head_dim is {head_dim}"
    return rows, doubts


def _layout_by_role(
    module: nn.Module, parameter: nn.Parameter, head_rows: dict[Tensor, int]
) -> tuple[BlockLayout, str, bool]:
    """The layout of a parameter of `module`, the reason for it, and whether its role is known."""
    shape = tuple(parameter.shape)
    owner = type(module).__name__
    if parameter.ndim < 2:
        return BlockLayout("elementwise", shape), f"{parameter.ndim}-D of {owner}", True
    if isinstance(module, _NORM_MODULES):
        return BlockLayout("elementwise", shape), f"norm {owner}", True
    if parameter in head_rows:
        return BlockLayout("head", shape, head_rows[parameter]), "query or key head", True
    if _is_transformers_conv1d(module):
        return BlockLayout("column", shape), f"output neuron of {owner}, stored in x out", True
    if isinstance(module, _ROW_MODULES):
        unit = "token" if isinstance(module, nn.Embedding | nn.EmbeddingBag) else "output neuron"
        return BlockLayout("row", shape), f"{unit} of {owner}", True
    return BlockLayout("row", shape), f"unknown role in {owner}", False


def _is_transformers_conv1d(module: nn.Module) -> bool:
    """Recognised without importing transformers, which this package does not need."""
    home = "transformers.pytorch_utils"
    return any(c.__name__ == "Conv1D" and c.__module__ == home for c in type(module).__mro__)
