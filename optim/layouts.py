"""Which entries of a parameter share one second moment in Adam-mini, as data.

A block is a group of entries of one parameter. A `BlockLayout` names them by geometry:
    elementwise  every entry alone                    (Adam itself)
    row          runs of rows, the indices of dim 0   (a neuron of nn.Linear, a query head)
    column       runs of columns, of the last dim     (a neuron of transformers' Conv1D, in x out)
    whole        the parameter
`segments` says how long the runs are, where rows of several roles are fused; `stacked` leading
dims number matrices that are cut alike (experts).

Source: arXiv 2406.16793, the partition principle; the authors' package matches names instead.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from operator import index
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Kind = Literal["elementwise", "row", "column", "whole"]


@dataclass(frozen=True)
class BlockLayout:
    """How one parameter is cut into blocks.

    Args:
        kind: elementwise, row, column or whole.
        shape: the parameter's shape. Row and column need `stacked` + 1 and `stacked` + 2
            dimensions or more.
        segments: (count, size) pairs for row and column: `count` blocks of `size` rows each, then
            the next pair; the pattern repeats until all rows of a matrix are used. The default cuts
            every row; ((1, 64),) cuts heads of 64 rows.
        stacked: number of leading dims that index matrices of their own; row and column only.

    Raises:
        ValueError: an unknown kind, or a shape, segments or stacked that do not tile it exactly.

    Source: arXiv 2406.16793, the partition principle.
    """

    kind: Kind
    shape: tuple[int, ...]
    segments: tuple[tuple[int, int], ...] = ((1, 1),)
    stacked: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(index(n) for n in self.shape))
        object.__setattr__(self, "segments", _one_spelling(self.segments))
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {get_args(Kind)}, found {self.kind!r}")
        if any(n < 0 for n in self.shape):
            raise ValueError(f"shape: expected no negative sizes, found {self.shape}")
        if self.kind in ("elementwise", "whole"):
            if self.segments != ((1, 1),) or self.stacked:
                raise ValueError(
                    f"segments, stacked: {self.kind} takes none, found {self.segments} and "
                    f"{self.stacked}"
                )
            return
        least = self.stacked + (1 if self.kind == "row" else 2)
        if self.stacked < 0 or len(self.shape) < least:
            raise ValueError(
                f"shape: {self.kind} with {self.stacked} stacked dimensions expects {least} or "
                f"more dimensions, found {self.shape}"
            )
        if not self.segments or any(count < 1 or size < 1 for count, size in self.segments):
            raise ValueError(
                f"segments: expected positive (count, size) pairs, found {self.segments}"
            )
        if self.n_units % self._period:
            done = self.n_units - self.n_units % self._period
            raise ValueError(
                f"segments: {self.segments} takes {self._period} {self.kind}s at a time, of "
                f"{self.n_units} in shape {self.shape}: {self.kind}s {done} to "
                f"{self.n_units - 1} are left over"
            )

    @property
    def _period(self) -> int:
        return sum(count * size for count, size in self.segments)

    @property
    def unit_dim(self) -> int:
        """The dim whose indices are the rows or columns; row and column only."""
        return self.stacked if self.kind == "row" else len(self.shape) - 1

    @property
    def n_units(self) -> int:
        """Rows or columns of one matrix."""
        return self.shape[self.unit_dim]

    @property
    def unit_length(self) -> int:
        """Entries of one row or column."""
        dims = self.shape[self.stacked :]
        return prod(dims[1:] if self.kind == "row" else dims[:-1])

    @property
    def plain(self) -> bool:
        """Whether every row or column is a block of its own."""
        return self.kind in ("row", "column") and all(size == 1 for _, size in self.segments)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the second moments: `shape` if elementwise, else stacked dims, then blocks."""
        if self.kind == "elementwise":
            return self.shape
        if self.kind == "whole":
            return (1,)
        blocks = sum(count for count, _ in self.segments) * (self.n_units // self._period)
        return (*self.shape[: self.stacked], blocks)

    @property
    def n_blocks(self) -> int:
        """Number of blocks, and so of second moments."""
        return prod(self.state_shape)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(first row, number of blocks, rows a block) of every run of blocks of one matrix."""
        if len(self.segments) == 1:
            size = self.segments[0][1]
            return ((0, self.n_units // size, size),)
        runs, start = [], 0
        while start < self.n_units:
            for count, size in self.segments:
                runs.append((start, count, size))
                start += count * size
        return tuple(runs)

    def unit_blocks(self) -> Tensor:
        """The block number of every row or column of one matrix: [n_units], int64."""
        sizes = self._sizes()
        return torch.arange(sizes.numel()).repeat_interleave(sizes)

    def block_lengths(self) -> Tensor:
        """Entries of every block: [n_blocks], int64."""
        if self.kind == "elementwise":
            return torch.ones(self.n_blocks, dtype=torch.int64)
        if self.kind == "whole":
            return torch.tensor([prod(self.shape)])
        batch = prod(self.shape[: self.stacked])
        return (self._sizes() * self.unit_length).repeat(batch)

    def _sizes(self) -> Tensor:
        """Rows or columns of every block of one matrix: [blocks], int64."""
        sizes = [size for _, count, size in self.runs for _ in range(count)]
        return torch.tensor(sizes, dtype=torch.int64)

    def index(self, device: torch.device | str | None = None) -> Tensor:
        """The block number of every entry: `shape`, int64, each in [0, n_blocks)."""
        return self.expand(torch.arange(self.n_blocks, device=device).view(self.state_shape))

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over each block: `shape` in, `state_shape` out, same dtype."""
        if self.kind == "elementwise":
            return tensor
        if self.kind == "whole":
            return tensor.mean().view(1)
        batch, units = prod(self.shape[: self.stacked]), self.n_units
        if self.kind == "row":
            sums = tensor.reshape(batch, units, self.unit_length).sum(2)
        else:
            sums = tensor.reshape(batch, self.unit_length, units).sum(1)
        blocks = tensor.new_zeros(batch, self.state_shape[-1])
        blocks.index_add_(1, self.unit_blocks().to(tensor.device), sums)
        lengths = self.block_lengths().to(tensor.device, tensor.dtype)
        return (blocks.view(-1) / lengths).view(self.state_shape)

    def expand(self, values: Tensor) -> Tensor:
        """Gives every entry the value of its block: `state_shape` in, `shape` out."""
        if self.kind == "elementwise":
            return values
        if self.kind == "whole":
            return values.view((1,) * len(self.shape)).expand(self.shape)
        rest = (1,) * (len(self.shape) - self.stacked - 1)
        units = values[..., self.unit_blocks().to(values.device)]
        batch = units.shape[:-1]
        n = self.n_units
        form = (*batch, n, *rest) if self.kind == "row" else (*batch, *rest, n)
        return units.view(form).expand(self.shape)

    @property
    def rule(self) -> str:
        """The cut in words, as the table of a BlockMap prints it."""
        if self.kind in ("elementwise", "whole"):
            return self.kind
        if len(self.segments) == 1:
            size = self.segments[0][1]
            return self.kind if size == 1 else f"{size} {self.kind}s"
        return " + ".join(f"{count} x {size}" for count, size in self.segments) + f" {self.kind}s"

    def validate(self, name: str, parameter: Tensor) -> None:
        """Checks that a parameter has the shape this layout was made for.

        Args:
            name: the parameter's name, for the message.
            parameter: any tensor.

        Raises:
            ValueError: the shapes differ.
        """
        found = tuple(parameter.shape)
        if found == self.shape:
            return
        which = ""
        if self.shape and found[1:] == self.shape[1:]:
            first, last = sorted((self.shape[0], found[0]))
            rows = f"rows {first} to {last - 1}"
            which = f": {rows} are in no block" if last == found[0] else f": it has no {rows}"
        raise ValueError(
            f"parameter {name!r}: its block layout expects shape {self.shape}, found {found}{which}"
        )


def _one_spelling(segments: Any) -> tuple[tuple[int, int], ...]:
    """Neighbours of one size as one pair, so that equal cuts compare equal."""
    merged: list[tuple[int, int]] = []
    try:
        for count, size in segments:
            if merged and merged[-1][1] == size:
                count += merged.pop()[0]
            merged.append((index(count), index(size)))
    except TypeError:
        raise ValueError(f"segments: expected (count, size) pairs, found {segments}") from None
    if len(merged) == 1 and merged[0][0] > 0:
        merged = [(1, merged[0][1])]
    return tuple(merged)


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
        rows = [("parameter", "shape", "rule", "blocks", "why")]
        for name, (layout, reason) in self.items():
            shape = "x".join(map(str, layout.shape)) or "scalar"
            rows.append((name, shape, layout.rule, str(layout.n_blocks), reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        form = "  ".join(f"{{:{width}}}" for width in widths)
        return "\n".join(form.format(*row).rstrip() for row in rows)

    def __repr__(self) -> str:
        return f"BlockMap({len(self)} parameters)"

    def edited(
        self, rules: Mapping[str, Kind | BlockLayout | Sequence[tuple[int, int]]]
    ) -> "BlockMap":
        """A map in which the parameters that match a pattern are cut as its rule says.

        Args:
            rules: by shell pattern on parameter names (`*.q_proj.weight`), a kind, a BlockLayout,
                or (count, size) pairs, the segments of the present rows or columns. Kinds and
                segments keep the stacked dims. Of several patterns that match, the last counts.

        Returns:
            A new BlockMap; the reason of an edited entry names the pattern.

        Raises:
            ValueError: a pattern that matches no parameter, or a rule that does not tile one.
        """
        winners = {}
        for pattern in rules:
            matched = [name for name in self if fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(
                    f"rules[{pattern!r}]: none of {len(self)} parameters has this name"
                )
            winners.update(dict.fromkeys(matched, pattern))
        entries = dict(self._entries)
        for name, pattern in winners.items():
            try:
                layout = _recut(self[name].layout, rules[pattern])
            except (TypeError, ValueError) as error:
                raise ValueError(f"rules[{pattern!r}]: parameter {name!r}: {error}") from None
            entries[name] = BlockEntry(layout, f"set by pattern {pattern!r}")
        return BlockMap(entries)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The map as plain dicts, lists, strings and ints, fit for JSON or a checkpoint."""
        return {
            name: {
                "kind": x.kind,
                "shape": list(x.shape),
                "segments": [list(pair) for pair in x.segments],
                "stacked": x.stacked,
                "reason": reason,
            }
            for name, (x, reason) in self.items()
        }

    @classmethod
    def from_dict(cls, entries: Mapping[str, Mapping[str, Any]]) -> "BlockMap":
        """The inverse of `to_dict`.

        Args:
            entries: by parameter name, a mapping with kind, shape, segments, stacked and reason.

        Returns:
            The BlockMap.

        Raises:
            ValueError: the entry of a named parameter lacks a key or describes no layout.
        """
        made = {}
        for name, entry in entries.items():
            try:
                segments = tuple((count, size) for count, size in entry["segments"])
                layout = BlockLayout(
                    entry["kind"], tuple(entry["shape"]), segments, entry["stacked"]
                )
                made[name] = (layout, entry["reason"])
            except KeyError as missing:
                raise ValueError(
                    f"entries[{name!r}]: expected key {missing}, found {sorted(entry)}"
                ) from None
            except (TypeError, ValueError) as error:
                raise ValueError(f"entries[{name!r}]: {error}") from None
        return cls(made)


def _recut(
    layout: BlockLayout, rule: Kind | BlockLayout | Sequence[tuple[int, int]]
) -> BlockLayout:
    """The layout of the same parameter that a rule of `BlockMap.edited` asks for."""
    if isinstance(rule, BlockLayout):
        if rule.shape != layout.shape:
            raise ValueError(f"expected a layout of shape {layout.shape}, found {rule.shape}")
        return rule
    if isinstance(rule, str):
        stacked = layout.stacked if rule in ("row", "column") else 0
        return BlockLayout(rule, layout.shape, stacked=stacked)
    kind = layout.kind if layout.kind in ("row", "column") else "row"
    return BlockLayout(kind, layout.shape, tuple(rule), layout.stacked)
