"""Is a group's gradient that of its trajectories on their own? Computes it densely and compares.

The dense passes start from the gradients that reached the group's statistics, so the user's loss is
not called again. Norm and cosine are compared, and each token's log-probability.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..triton_kernels.token_stats import TokenStats
from .prefix_host import TransformersHost
from .prefix_parallel import Ranks
from .prefix_router import router_loss


class Tolerance(NamedTuple):
    """Most that may differ.

    Args:
        norm: of the gradient, relative.
        cosine: 1 - cosine.
        logp: of one log-probability, nats.
        mean_logp: their mean.
        part: of the gradient, relative to the parts that it is the sum of: where those cancel
            (equal responses of unequal advantages), their rounding is all that is left of it.
    """

    norm: float
    cosine: float
    logp: float
    mean_logp: float
    part: float


_TOLERANCES = {
    torch.float64: Tolerance(1e-6, 1e-9, 1e-6, 1e-6, 1e-9),
    torch.float32: Tolerance(2e-3, 1e-4, 5e-3, 1e-3, 1e-4),
}
# rounding of 8 or 11 bits, in dense training as well
_LOW_PRECISION = Tolerance(5e-2, 5e-3, 0.5, 0.05, 5e-2)


class Upstream:
    """Gradients that reach some tensors, added up over backward passes.

    Args:
        count: of the tensors.
    """

    def __init__(self, count: int) -> None:
        self.grads: list[Tensor | None] = [None] * count

    @classmethod
    def of(cls, leaves: Sequence[Tensor | None]) -> Upstream:
        """Of leaves; those without gradients are passed over."""
        found = cls(len(leaves))
        for i, x in enumerate(leaves):
            if x is not None and x.requires_grad:
                x.register_hook(partial(found.add, i))
        return found

    def add(self, i: int, grad: Tensor) -> None:
        found = self.grads[i]
        self.grads[i] = grad.detach() if found is None else found + grad.detach()

    @property
    def arrived(self) -> bool:
        return any(grad is not None for grad in self.grads)


class Record(NamedTuple):
    """Responses of a group, and what came out.

    Args:
        context: tokens before each.
        responses: token ids.
        stats: of [b, T] tensors, right-padded.
        router_loss: [b] or None.
        upstream: gradients of the stats' fields, and of router_loss where there is one.
    """

    context: list[int]
    responses: list[list[int]]
    stats: TokenStats
    router_loss: Tensor | None
    upstream: Upstream

    def detached(self) -> Record:
        stats = TokenStats(*(x if x is None else x.detach() for x in self.stats))
        return self._replace(stats=stats, router_loss=None)

    def row(self, i: int, tensor: Tensor | None) -> Tensor | None:
        """[T] of the i-th response's tokens."""
        return None if tensor is None else tensor[i][: len(self.responses[i])]


def compare_with_dense(
    host: TransformersHost, ranks: Ranks, records: Sequence[Record], attended: set[torch.dtype]
) -> float | None:
    """Compares the gradients in `.grad` with those of dense passes, which are dropped.

    Args:
        host: the model.
        ranks: its processes.
        records: what was computed.
        attended: dtypes of the queries that the group's attention saw.

    Returns:
        Seconds of the dense passes; None if the gradient decides nothing: it is zero, or
        not finite because the loss is not, or in fp16.

    Raises:
        RuntimeError: they differ.
    """
    with _gradients_apart(host) as shared:
        started = time.perf_counter()
        difference = _dense_passes(host, ranks, records)
        if host.device.type == "cuda":
            torch.cuda.synchronize(host.device)
        seconds = time.perf_counter() - started
        ranks.reshard()
        products = _inner_products([(p.grad, grad) for p, grad in shared])
    dense2, shared2, mixed, apart2 = ranks.sums(*products)
    worst = ranks.most(max(difference, default=0.0))
    mean = ranks.most(sum(difference) / max(len(difference), 1))
    precision = _precision(host, attended)
    # fp16 overflows at a large loss scale, and a sum over responses before each of them does
    overflow = precision == torch.float16 and not math.isfinite(dense2 + shared2)
    # a loss that is not finite (a NaN reward, say) is for the training loop to skip
    upstream = [g for record in records for g in record.upstream.grads if g is not None]
    broken = ranks.most(float(any(not g.isfinite().all() for g in upstream)))
    if overflow or broken or (dense2 == 0 and shared2 == 0):
        return None
    tolerance = _TOLERANCES.get(precision, _LOW_PRECISION)
    norm = (shared2 / dense2) ** 0.5 if dense2 > 0 else float("inf")
    cosine = mixed / (dense2 * shared2) ** 0.5 if dense2 * shared2 > 0 else 0.0
    fine = abs(norm - 1) <= tolerance.norm and 1 - cosine <= tolerance.cosine
    if not fine:
        fine = apart2 <= tolerance.part**2 * _largest_sum(host, ranks, records)
    if not (fine and worst <= tolerance.logp and mean <= tolerance.mean_logp):
        raise RuntimeError(
            "verify: the group's gradient with a shared prefix is not that of its trajectories on "
            f"their own: norm ratio {norm:.6f}, cosine {cosine:.8f}, largest difference of a "
            f"log-probability {worst:.2e} nats, mean {mean:.2e}. If the loss has a term beside the "
            "waves' output (a weight penalty, say), take that backward outside of the group; else "
            "the model is refused, train it without sharing"
        )
    return seconds


@contextmanager
def _gradients_apart(
    host: TransformersHost,
) -> Iterator[list[tuple[torch.nn.Parameter, Tensor | None]]]:
    """None for the gradients; yields what they were, which they are again afterwards."""
    before = [(p, p.grad) for p in host.trained]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield before
    finally:
        for parameter, grad in before:
            parameter.grad = grad


def _largest_sum(host: TransformersHost, ranks: Ranks, records: Sequence[Record]) -> float:
    """Of the squared norms of the gradients after each dense pass: by that much sums may cancel."""
    found = []

    def look() -> None:
        ranks.reshard()
        (own, *_) = _inner_products([(p.grad, None) for p in host.trained])
        found.extend(ranks.sums(own))

    with _gradients_apart(host):
        _dense_passes(host, ranks, records, look)
    return max(found)


def _dense_passes(
    host: TransformersHost,
    ranks: Ranks,
    records: Sequence[Record],
    after_each: Callable[[], None] | None = None,
) -> list[float]:
    """Backward of every response; differences of the tokens' log-probabilities.

    Args:
        host: the model.
        ranks: its processes.
        records: whose responses.
        after_each: called after each backward pass, which then reduces gradients.
    """
    rows = [(record, i) for record in records for i in range(len(record.responses))]
    differences = []
    missing = ranks.most(len(rows)) - len(rows)
    ranks.synchronize(after_each is not None)
    for record, i in rows:
        with torch.enable_grad():
            found = host.dense(record.context, [record.responses[i]])
            grads = [record.row(i, g) for g in record.upstream.grads[: len(found.stats)]]
            parts = [0.0 * found.stats.logp.sum()]
            parts += [(x * g).sum() for x, g in zip(found.stats, grads) if g is not None]
            of_router = record.upstream.grads[len(found.stats) :]
            if of_router and of_router[0] is not None and found.router is not None:
                parts.append((router_loss(found.router) * of_router[0][i]).sum())
        sum(parts).backward()
        if after_each:
            after_each()
        difference = found.stats.logp.detach() - record.row(i, record.stats.logp.detach())
        differences += difference.abs().tolist()
    for _ in range(missing):
        ranks.take_part()
        if after_each:
            after_each()
    ranks.synchronize(True)
    ranks.take_part()
    return differences


def _inner_products(pairs: Sequence[tuple[Tensor | None, Tensor | None]]) -> tuple[float, ...]:
    """|a|^2, |b|^2, a b and |a - b|^2 over all pairs, of this process's shards, in float64."""
    sums = [0.0] * 4
    for pair in pairs:
        a, b = (_local_float64(x) for x in pair)
        apart = a if b is None else b if a is None else a - b
        for i, (x, y) in enumerate(((a, a), (b, b), (a, b), (apart, apart))):
            if x is not None and y is not None:
                sums[i] += float((x * y).sum())
    return tuple(sums)


def _local_float64(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return (x.to_local() if isinstance(x, DTensor) else x).double()


def _precision(host: TransformersHost, attended: set[torch.dtype]) -> torch.dtype:
    """The coarsest dtype that is computed in: the trained parameters may be finer (LoRA, FSDP2)."""
    stored = {p.dtype for p in host.model.parameters() if p.is_floating_point()}
    if torch.get_float32_matmul_precision() == "medium":
        stored.add(torch.bfloat16)
    return max(stored | attended, key=lambda dtype: torch.finfo(dtype).eps)
