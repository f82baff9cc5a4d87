"""One Adam-mini step on many tensors: which pieces run how, block sums, the norm of the gradient.

Two ways through a tensor. Where each unit of it is a whole block that is here, and nothing about
the gradient has to be known first, one call does everything. Else two phases: sums of g^2 over the
units, added up to blocks and over process groups in one packed all-reduce; then second moments, a
few numbers a tensor, in plain PyTorch; then one streaming pass over parameter and first moment.
"""

import logging
from collections.abc import Sequence
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..triton_kernels import adam_mini as kernels
from ..triton_kernels.adam_mini import HYPER, Work
from . import native
from .pieces import Plan
from .sharding import all_reduce_packed

_logger = logging.getLogger(__name__)
_told: set[str] = set()

_STEP_SIZE, _WEIGHT2, _ROOT, _EPS, _GRAD_SCALE, _SKIP = map(
    HYPER.index, ("step_size", "weight2", "root", "eps", "grad_scale", "skip")
)

_REFERENCE = SimpleNamespace(
    one_pass=kernels.one_pass_reference,
    unit_sums=kernels.unit_sums_reference,
    apply=kernels.apply_reference,
)


class Update(NamedTuple):
    """One tensor to update; every tensor is local and contiguous.

    Args:
        plan: its pieces and blocks.
        param, grad, exp_avg: the local shard.
        exp_avg_sq: the second moments that `plan` numbers.
        hyper: 8 numbers, see HYPER: floats, or a tensor on the device.
        step: t, as the state will keep it.
        key: of stochastic rounding: an integer, or an int64 tensor of no dims on the device.
        fused: True for Triton or native kernels, an error where they cannot run; False for PyTorch
            alone; None for kernels where they can run, unless `foreach` is given.
        foreach: False to work on one tensor at a time, True for PyTorch on all together.
        present: one number, 1, or 0 where this rank has no gradient but others may have one; it is
            added up over `plan.groups`, and where it stays 0 nothing is updated. None if a gradient
            is there.
        number: sums are added up over ranks in this order; updates of one number in their own.
    """

    plan: Plan
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    hyper: Any
    step: Tensor
    key: Any = 0
    fused: bool | None = None
    foreach: bool | None = None
    present: Tensor | None = None
    number: int = 0


class Elsewhere(NamedTuple):
    """A tensor that only other ranks update, whose sums this rank helps to add up.

    plan: without pieces.
    device: of the sums.
    dtype: of the second moments.
    asked: whether the others ask which ranks have a gradient.
    number: as of an Update.
    """

    plan: Plan
    device: torch.device
    dtype: torch.dtype
    asked: bool
    number: int


class Numbering:
    """How the units and the blocks of several plans lie one after another; nothing of it changes.

    Args:
        plans: one per tensor of a batch.
        device: of the tensors.
    """

    def __init__(self, plans: Sequence[Plan], device: torch.device) -> None:
        self.plans = plans  # their identity is the key of a cache: keep them alive
        self.cut = [i for i, plan in enumerate(plans) if not plan.elementwise]
        n_units = [sum(piece.n_units for piece in plan.pieces) for plan in plans]
        self.block_sizes = [plans[i].lengths.numel() for i in self.cut]
        self.n_units = sum(n_units)
        self.n_blocks = sum(self.block_sizes)

        def repeat(values: Sequence[int], counts: Sequence[int]) -> Tensor:
            values = torch.tensor(values, dtype=torch.int64)
            return values.repeat_interleave(torch.tensor(counts, dtype=torch.int64))

        everyone = range(len(plans))
        self.piece_owner = repeat(everyone, [len(plan.pieces) for plan in plans]).to(device)
        unit_owner = repeat(everyone, n_units)
        # Units by the process groups that hold the rest of their tensors; None: all of them.
        groups = list(dict.fromkeys(plan.groups for plan in plans))
        number = torch.tensor([groups.index(plan.groups) for plan in plans])[unit_owner]
        self.units_of = {
            group: None if len(groups) == 1 else (number == i).nonzero().view(-1).to(device)
            for i, group in enumerate(groups)
        }
        self.block_owner = repeat(self.cut, self.block_sizes).to(device)
        lengths = [plans[i].lengths for i in self.cut]
        self.lengths = torch.cat(lengths).to(device) if lengths else None
        # Units of cut tensors among all units (None: all of them), and the block of each of these
        # (None: they are the blocks, in order).
        is_cut = torch.tensor([not plan.elementwise for plan in plans])
        of_cut = is_cut[unit_owner].nonzero().view(-1)
        self.cut_units = None if len(self.cut) == len(plans) else of_cut.to(device)
        index, first, identity = [], 0, True
        for i, size in zip(self.cut, self.block_sizes, strict=True):
            blocks = plans[i].blocks
            identity &= blocks is None
            index.append(first + (torch.arange(size) if blocks is None else blocks))
            first += size
        self.index = None if identity else torch.cat(index).to(device)


class Batch:
    """Updates of one device and one set of dtypes, which a backend takes in one call."""

    def __init__(
        self, updates: Sequence[Update], backend: Any, numbering: Numbering, *, round_params: bool
    ) -> None:
        self.updates = updates
        self.backend = backend
        self.numbering = numbering
        self.rounding: dict[str, Any] = {"round_params": round_params}
        first = updates[0]
        keys_on_device = isinstance(first.key, Tensor)
        if keys_on_device:
            keys = torch.stack([u.key for u in updates])
            self.rounding["keys"] = keys[numbering.piece_owner]
        self.works = [
            Work(piece, u.param, u.grad, u.exp_avg, u.exp_avg_sq, 0 if keys_on_device else u.key)
            for u in updates
            for piece in u.plan.pieces
        ]
        if isinstance(first.hyper, Tensor):
            self.hyper = torch.stack([u.hyper for u in updates])
        else:
            device = first.param.device
            dtype = torch.float64 if device.type == "cpu" else torch.float32
            self.hyper = torch.tensor([u.hyper for u in updates], dtype=dtype, device=device)

    def one_pass(self) -> None:
        """The whole step, of updates whose plans allow it."""
        hyper = self.hyper[self.numbering.piece_owner]
        self.backend.one_pass(self.works, hyper, **self.rounding)

    def sum_squares(self) -> None:
        """First phase: `sums` of g^2 of all units, and `blocks` of the cut tensors.

        What is here of each: not added up over process groups.
        """
        n = self.numbering
        self.sums = self.backend.unit_sums(self.works).to(self.updates[0].exp_avg_sq.dtype)
        cut = self.sums if n.cut_units is None else self.sums[n.cut_units]
        self.blocks = cut if n.index is None else _scatter_add(cut, n.index, n.n_blocks)

    def squares(self) -> list[tuple[tuple[Any, ...], Tensor]]:
        """(process groups, what is here of the square of the gradient's norm) pairs."""
        scale = self.hyper[0, _GRAD_SCALE].square()  # up to its sign the same for all
        return [
            (groups, (self.sums if mine is None else self.sums[mine]).sum() * scale)
            for groups, mine in self.numbering.units_of.items()
        ]

    def skip_absent(self) -> None:
        """Between the phases: marks tensors for which no rank has a gradient."""
        for i, u in enumerate(self.updates):
            if u.present is not None:
                self.hyper[i, _SKIP] += (u.present == 0).to(self.hyper)

    def update(self, grad_scale: Tensor | None) -> None:
        """Second phase, from `blocks`: second moments, then parameters and first moments.

        Args:
            grad_scale: one more factor on all gradients, on the device; None for 1.
        """
        hyper, n = self.hyper, self.numbering
        if grad_scale is not None:
            hyper = hyper.clone()
            hyper[:, _GRAD_SCALE] *= grad_scale.to(hyper.device, hyper.dtype)
        steps = self.sums  # of the right length; elementwise pieces do not read theirs
        if n.cut:
            steps = self._second_moments(hyper)
            steps = steps if n.index is None else steps[n.index]
            if n.cut_units is not None:
                steps = torch.zeros_like(self.sums).index_copy_(0, n.cut_units, steps)
        self.backend.apply(self.works, hyper[n.piece_owner], steps, **self.rounding)

    def _second_moments(self, hyper: Tensor) -> Tensor:
        """Updates exp_avg_sq of the cut tensors; returns the step size of every block."""
        n = self.numbering
        targets = [self.updates[i].exp_avg_sq.view(-1) for i in n.cut]
        old = torch.cat(targets)
        h = hyper.to(old.dtype)[n.block_owner]
        scale, weight = h[:, _GRAD_SCALE], h[:, _WEIGHT2]
        means = self.blocks / n.lengths * scale.square()
        means = means.where(scale != 0, 0)  # clipped by a norm that has overflowed, as the sums
        new = torch.lerp(old, means, weight).where(~old.isinf(), old)  # no inf - inf
        new = torch.where(h[:, _SKIP] == 0, new, old)
        torch._foreach_copy_(targets, list(new.split(n.block_sizes)))
        return h[:, _STEP_SIZE] / (new.sqrt() * h[:, _ROOT] + h[:, _EPS])


def step(
    updates: Sequence[Update],
    cache: dict[Any, Numbering],
    *,
    round_params: bool = False,
    max_grad_norm: float | None = None,
    error_if_nonfinite: bool = False,
    elsewhere: Sequence[Elsewhere] = (),
) -> Tensor | None:
    """Updates every tensor, in place.

    Args:
        updates: of any devices and dtypes; the same tensors in the same order on every rank, or
            of ascending numbers that all ranks share.
        cache: kept by the caller from step to step.
        round_params: bf16 parameters are rounded stochastically.
        max_grad_norm: gradients are scaled so that their norm over all updates is at most this.
        error_if_nonfinite: refuse NaN or infinite gradients.
        elsewhere: tensors that are cut over process groups of this rank, which has none of them.

    Returns:
        The norm of the gradients before clipping, fp32 or fp64, if one of the last two is given.

    Raises:
        ValueError: `fused` where no kernel can run, or a norm that is not finite under
            `error_if_nonfinite`; nothing has changed then.
    """
    whole = max_grad_norm is not None or error_if_nonfinite
    waits = [whole or u.present is not None or not _one_pass(u) for u in updates]
    first = [u for u, wait in zip(updates, waits, strict=True) if not wait]
    second = [u for u, wait in zip(updates, waits, strict=True) if wait]
    ready, waiting = (_batches(some, cache, round_params) for some in (first, second))
    for batch in waiting:
        batch.sum_squares()
    norm = _reduce(updates, waiting, elsewhere, with_norm=whole)
    for batch in waiting:
        batch.skip_absent()
    grad_scale = None
    if norm is not None:
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise ValueError(f"gradients: expected a finite norm, found {float(norm)}")
        if max_grad_norm is not None:  # as torch.nn.utils.clip_grad_norm_
            grad_scale = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    for batch in ready:
        batch.one_pass()
    for batch in waiting:
        batch.update(grad_scale)
    return norm


def _one_pass(update: Update) -> bool:
    """Whether one pass can update the tensor. Triton's has no form for columns."""
    pieces = update.plan.pieces
    columns = bool(pieces) and pieces[0].kind == "column"
    return update.plan.one_pass and not (columns and update.param.device.type != "cpu")


def _batches(
    updates: Sequence[Update], cache: dict[Any, Numbering], round_params: bool
) -> list[Batch]:
    buckets: dict[Any, list[Update]] = {}
    for i, u in enumerate(updates):
        dtypes = (u.param.dtype, u.grad.dtype, u.exp_avg.dtype, u.exp_avg_sq.dtype)
        alone = i if u.foreach is False and not u.fused else None
        kind = (u.param.device, dtypes, isinstance(u.hyper, Tensor), u.fused, u.foreach, alone)
        buckets.setdefault(kind, []).append(u)
    batches = []
    for bucket in buckets.values():
        backend = _backend(next((u for u in bucket if u.plan.pieces), bucket[0]))
        plans, device = [u.plan for u in bucket], bucket[0].param.device
        key = (device, *map(id, plans))
        if key not in cache:
            with torch.device("cpu"):  # whatever the default device is
                cache[key] = Numbering(plans, device)
        batches.append(Batch(bucket, backend, cache[key], round_params=round_params))
    return batches


def _backend(update: Update) -> Any:
    """What runs the pieces of updates that are like this one."""
    if update.fused is False or (update.fused is None and update.foreach is not None):
        return _REFERENCE
    if not update.plan.pieces:  # nothing of it is on this rank
        return _REFERENCE
    kind: Any = native if update.param.device.type == "cpu" else kernels
    work = Work(update.plan.pieces[0], update.param, update.grad, update.exp_avg, update.exp_avg_sq)
    reason = kind.why_not([work])
    if reason is None:
        return kind
    if update.fused:
        raise ValueError(f"fused: expected tensors that a kernel can update, found {reason}")
    if reason not in _told:
        _told.add(reason)
        _logger.warning("AdamMini steps in plain PyTorch: %s", reason)
    return _REFERENCE


def _scatter_add(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Sums of values by index: [n]. In a fixed order, so that a resumed run repeats its numbers."""
    sums = values.new_zeros(n)
    if values.is_cuda:  # index_add_ is atomic there
        return sums.index_put_((index,), values, accumulate=True)
    return sums.index_add_(0, index, values)


def _reduce(
    updates: Sequence[Update],
    batches: Sequence[Batch],
    elsewhere: Sequence[Elsewhere],
    *,
    with_norm: bool,
) -> Tensor | None:
    """Adds up over process groups what they hold of the blocks, and of the norm if asked for it.

    In the order of the numbers, then of `updates`: ranks may batch them in different ways.

    Returns:
        The norm of all gradients, or None.
    """
    slots: dict[int, Tensor] = {}
    totals: dict[tuple[Any, ...], Any] = {u.plan.groups: 0 for u in updates}
    for batch in batches:
        n = batch.numbering
        blocks = batch.blocks.split(n.block_sizes)
        slots |= {id(batch.updates[i]): slot for i, slot in zip(n.cut, blocks, strict=True)}
        if with_norm:
            for groups, square in batch.squares():
                totals[groups] = square + totals[groups]
    sums = [(u.number, u.plan.reduce, slots[id(u)]) for u in updates if u.plan.reduce]
    flags = [(u.number, u.plan.groups, u.present) for u in updates if u.present is not None]
    for e in elsewhere:
        if e.plan.reduce:
            nothing = torch.zeros(len(e.plan.lengths), dtype=e.dtype, device=e.device)
            sums.append((e.number, e.plan.reduce, nothing))
        if e.asked:
            flags.append((e.number, e.plan.groups, torch.zeros((), device=e.device)))
    parts = [
        (groups, part)
        for some in (sums, flags)
        for _, groups, part in sorted(some, key=itemgetter(0))
    ]
    if with_norm:
        parts += [(groups, total) for groups, total in totals.items() if groups]
    all_reduce_packed(parts)
    if not with_norm:
        return None
    if not totals:
        return torch.zeros(())
    first, *others = totals.values()
    square = sum((total.to(first) for total in others), first)
    return square.sqrt().to(batches[0].sums.dtype)
