"""How unequal Adam's second moments are along rows, columns and heads: where may they be shared?

For every line l of a matrix (a row, a column, a head) and the second moments v of its entries:
    snr = mean over l of mean(v_l)^2 / var(v_l)                         no unit, in [0, inf]
A high value says that the entries of a line are alike, so that one second moment for all of them
loses little: cut along that axis. Below about 1 their spread exceeds their mean, and sharing one
learning rate slows most of them down. Squared Gaussian gradients of one scale give 1/2 by chance
alone if they come from a single batch; moments averaged over many steps say more.

Source: arXiv 2503.01843, its SNR_K for the two fans; over heads it is our addition.
"""

import re
from collections.abc import Iterator, Mapping
from math import inf, nan
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .blocks import infer_blocks
from .layouts import BlockLayout, BlockMap


class LineSNR(NamedTuple):
    """The SNR of the second moments of one matrix; NaN where there are no lines to judge.

    row: along rows, the indices of dim 0 (of every stacked matrix).
    column: along columns, the indices of the last dim.
    head: over the blocks of several rows or columns that the block map has.
    """

    row: float
    column: float
    head: float

    @property
    def flattest(self) -> str:
        """The field with the highest value: the axis that loses least; "" if all are NaN."""
        finite = {field: snr for field, snr in self._asdict().items() if snr == snr}
        return max(finite, key=finite.__getitem__, default="")


class BlockStats(Mapping[str, LineSNR]):
    """SNRs by parameter name, which print as a table, one line for parameters of the same role.

    Args:
        lines: by parameter name.
    """

    def __init__(self, lines: Mapping[str, LineSNR]) -> None:
        self._lines = dict(lines)

    def __getitem__(self, name: str) -> LineSNR:
        return self._lines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def by_pattern(self) -> dict[str, LineSNR]:
        """Means over parameters whose names differ in numbers only, by pattern: `h.*.q.weight`.

        The patterns are what `BlockMap.edited` takes. The least flat come first.
        """
        groups: dict[str, list[LineSNR]] = {}
        for name, line in self.items():
            groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name), []).append(line)
        means = {
            pattern: LineSNR(*(torch.tensor(x).nanmean().item() for x in zip(*lines, strict=True)))
            for pattern, lines in groups.items()
        }
        best = {
            p: getattr(line, line.flattest) if line.flattest else inf for p, line in means.items()
        }
        return {pattern: means[pattern] for pattern in sorted(means, key=best.__getitem__)}

    def __str__(self) -> str:
        rows = [("parameters", *LineSNR._fields)]
        for pattern, line in self.by_pattern().items():
            cells = []
            for field, snr in line._asdict().items():
                shown = "-" if snr != snr else f"{snr:.3g}"
                cells.append(shown + ("*" if field == line.flattest else " "))
            rows.append((pattern, *cells))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        form = f"{{:{widths[0]}}}" + "".join(f"  {{:>{width}}}" for width in widths[1:])
        return "\n".join(form.format(*row).rstrip() for row in rows)

    def __repr__(self) -> str:
        return f"BlockStats({len(self)} parameters)"


def block_stats(
    source: Optimizer | nn.Module,
    blocks: BlockMap | None = None,
    *,
    model: nn.Module | None = None,
) -> BlockStats:
    """The SNR of second moments along the rows, columns and heads of every matrix.

    Take it from an AdamW run that went well, then choose a preset, or edit its map:
    `infer_blocks(model).edited({"*.v_proj.weight": "column"})`. Lines without any gradient (tokens
    that never came up) are left out; DTensors are gathered, so that every rank must call.

    Args:
        source: an AdamW or Adam that made a step, whose `exp_avg_sq` is read; or a module with
            gradients, whose squares are.
        blocks: the map whose heads are judged; by default the `paper` map of `model`, or of
            `source` if it is a module.
        model: with an optimizer, the module that names its parameters and has the heads.

    Returns:
        SNRs of the parameters that are matrices and have moments or gradients.

    Raises:
        ValueError: a source without any; parameters whose names are needed and not known, or not in
            `blocks`, or of another shape there.

    Source: arXiv 2503.01843.
    """
    gradients = isinstance(source, nn.Module)
    if gradients:
        model = source
        read = {name: p.grad for name, p in source.named_parameters() if p.grad is not None}
    else:
        read = _second_moments(source, model, named=blocks is not None)
    if not read:
        expected = "gradients" if gradients else "exp_avg_sq of full shape"
        raise ValueError(f"source: expected {expected} to read, found none; take a step first")
    if blocks is None and model is not None:
        blocks = infer_blocks(model, "paper")
    lines = {}
    for name, tensor in read.items():
        if sum(n > 1 for n in tensor.shape) < 2:
            continue
        if blocks is not None and name not in blocks:
            raise ValueError(f"blocks: no entry for parameter {name!r}")
        shape = tuple(tensor.shape)
        layout = blocks[name].layout if blocks is not None else BlockLayout("row", shape)
        layout.validate(name, tensor)
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        v = (full.to_dense() if full.is_sparse else full).double()
        lines[name] = _line_snr(v.square() if gradients else v, layout)
    if not lines:
        raise ValueError(
            "source: expected matrices with one second moment an entry (AdamW's), found none"
        )
    return BlockStats(lines)


def _second_moments(
    optimizer: Optimizer, model: nn.Module | None, *, named: bool
) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    found = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            v = optimizer.state.get(parameter, {}).get("exp_avg_sq")
            if v is None or v.shape != parameter.shape:
                continue
            listed = group["param_names"][i] if "param_names" in group else None
            name = names.get(id(parameter), listed)
            if name is None and (named or model is not None):
                raise ValueError(
                    f"model: expected a module that names the optimizer's parameters, found none "
                    f"for parameter {i} of group {g}"
                )
            found[name or f"parameter {i} of group {g}"] = v
    return found


def _line_snr(v: Tensor, layout: BlockLayout) -> LineSNR:
    batch = v.shape[: layout.stacked].numel()
    lines = v.reshape(batch, v.shape[layout.stacked], -1)
    row = _snr(lines.mean(2), lines.var(2, correction=0)) if lines.shape[2] > 1 else nan
    column = nan
    if v.ndim == layout.stacked + 2 and lines.shape[1] > 1:
        column = _snr(lines.mean(1), lines.var(1, correction=0))
    head = nan
    if layout.kind in ("row", "column") and not layout.plain:
        means = layout.mean(v)
        variances = layout.mean((v - layout.expand(means)).square())
        several = layout.block_lengths() > layout.unit_length
        head = _snr(means.flatten()[several], variances.flatten()[several])
    return LineSNR(row, column, head)


def _snr(means: Tensor, variances: Tensor) -> float:
    """Mean of means^2 / variances over the lines that had gradients; NaN if none had."""
    touched = means > 0
    return (means[touched].square() / variances[touched]).mean().item()
