"""What one attention layer does in each phase of shared-prefix training; knows no host.

A host's attention calls `phase.attend(layer, query, key, value, scale)` in place of its own.
Shapes: N packed tokens, Hq query heads, Hk key heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from ..triton_kernels.prefix_attention import Packing, PrefixSegment, prefix_attention


class PrefixStore:
    """Keys and values of one prefix in every layer, detached, and the gradients added to them.

    Args:
        accumulator: dtype of the gradient buffers, at least that of the keys; None: no gradients.
    """

    def __init__(self, accumulator: torch.dtype | None) -> None:
        self.accumulator = accumulator
        self.segments: dict[int, PrefixSegment] = {}
        self.expected: set[tuple[int, str]] = set()
        self.arrived: set[tuple[int, str]] = set()

    def add(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keeps [P, Hk, D] keys and values; a layer that runs again (checkpointing) adds none."""
        if layer in self.segments:
            return
        key, value = _compact(key.detach()), _compact(value.detach())
        grads = (None, None)
        if self.accumulator is not None:
            dtype = torch.promote_types(key.dtype, self.accumulator)
            # explicit shapes: zeros_like would take over the strides of a transposed view
            grads = tuple(torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value))
        self.segments[layer] = PrefixSegment(key, value, *grads)

    @property
    def bytes(self) -> int:
        """Of keys, values and their gradients."""
        tensors = [x for segment in self.segments.values() for x in segment if x is not None]
        return sum(x.numel() * x.element_size() for x in tensors)

    def drop_keys(self) -> None:
        """Frees keys and values when only their gradients are still wanted."""
        for layer, segment in self.segments.items():
            nothing = segment.key.new_empty(0)
            self.segments[layer] = segment._replace(key=nothing, value=nothing)

    def check_arrived(self) -> None:
        """Raises if backward did not come by some keys or values whose gradients wait here.

        Raises:
            RuntimeError: so many.
        """
        missing = self.expected - self.arrived
        if missing:
            raise RuntimeError(
                f"phase C did not reach the keys or values of {len({m[0] for m in missing})} "
                "layers, so the prefix's gradient would be wrong; the model is refused"
            )

    def clear(self) -> None:
        self.segments.clear()
        self.expected.clear()
        self.arrived.clear()


class Phase:
    """Attention over the segments of a path of prefixes and over each sequence itself.

    Args:
        path: stores of the prefixes before these tokens, the root's first.
        packing: lengths of the sequences.
        own: store of these tokens, when they are a prefix themselves: filled in the first pass,
            and the gradients in it are added to the keys' and values' own in a backward pass.
        longest: tokens of the longest sequence with its prefixes; for layers with a window.

    Attributes:
        last: of the last layer that ran with gradients, its keys and values in the graph.
        dtypes: of the queries.
    """

    def __init__(
        self,
        path: Sequence[PrefixStore],
        packing: Packing,
        own: PrefixStore | None = None,
        longest: int = 0,
    ) -> None:
        self.path, self.packing, self.own, self.longest = tuple(path), packing, own, longest
        self.last: tuple[int, Tensor, Tensor] | None = None
        self.dtypes: set[torch.dtype] = set()
        self._seen: set[int] | None = None

    @contextmanager
    def first_run(self) -> Iterator[None]:
        """While the model runs forward, before any replay: each layer attends once, or it raises.

        A layer that attends twice would find the keys of its first call.
        """
        self._seen = set()
        try:
            yield
        finally:
            self._seen = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        """[N, Hq, D] queries, [N, Hk, D] keys and values; output [N, Hq, D].

        Args:
            layer: any number that is the layer's own within the model.
        """
        if self._seen is not None:
            if layer in self._seen:
                raise ValueError("model: a layer calls attention twice in a pass, refused")
            self._seen.add(layer)
        if self.own is not None:
            self.own.add(layer, _as_attention_sees(key), _as_attention_sees(value))
            if torch.is_grad_enabled() and self.own.accumulator is not None:
                self.last = layer, key, value
                for name, x in (("grad_key", key), ("grad_value", value)):
                    if x.requires_grad:
                        self.own.expected.add((layer, name))
                key = _AddGradient.apply(key, self.own, layer, "grad_key")
                value = _AddGradient.apply(value, self.own, layer, "grad_value")
        query, key, value = (_as_attention_sees(x) for x in (query, key, value))
        self.dtypes.add(query.dtype)
        prefixes = [store.segments[layer] for store in self.path]
        return prefix_attention(query, key, value, prefixes, self.packing, scale=scale)

    def backward_from_last(self) -> None:
        """Backward of a pass whose output has no gradient, from the last layer's keys and values.

        What the last layer does after them is left out. Not with FSDP2 ("setStorage out of
        bounds") or checkpointing.
        """
        layer, key, value = self.last
        segment = self.own.segments[layer]
        pairs = [
            (x, getattr(segment, name).to(x.dtype))
            for name, x in (("grad_key", key), ("grad_value", value))
            if x.requires_grad  # nothing below may be trained
        ]
        self.own.arrived |= {(layer, "grad_key"), (layer, "grad_value")}
        if pairs:
            torch.autograd.backward(*zip(*pairs))


class _AddGradient(torch.autograd.Function):
    """Identity; its backward adds what the suffixes left in the store's buffer."""

    @staticmethod
    def forward(ctx, x, store, layer, name):
        ctx.store, ctx.layer, ctx.name = store, layer, name
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.store.arrived.add((ctx.layer, ctx.name))
        added = getattr(ctx.store.segments[ctx.layer], ctx.name)
        return (grad.to(added.dtype) + added).to(grad.dtype), None, None, None


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """Saved tensors go to CPU memory (pinned, for those of a GPU) until backward wants them.

    A tensor that several operations save goes once. On a CPU this only copies.

    Args:
        resident: tensors that stay alive anyway (parameters, buffers): their storage is not moved.
        store: its keys and values stay as well.
    """

    def __init__(self, resident: Iterable[Tensor], store: PrefixStore) -> None:
        self._resident = {_storage(x) for x in resident}
        self._store = store
        self._moved: dict[tuple, tuple[StorageWeakRef, Tensor]] = {}
        self.bytes = 0
        super().__init__(self._pack, self._unpack)

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._moved.clear()

    def _pack(self, x: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        hot = {_storage(y) for s in self._store.segments.values() for y in s if y is not None}
        if _storage(x) in self._resident | hot or x.numel() * x.element_size() < 2**12:
            return x
        alive = StorageWeakRef(
            x.untyped_storage()
        )  # its address is not used again while we hold it
        key = (alive.cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)
        if key not in self._moved or self._moved[key][0].expired():
            self.bytes += x.numel() * x.element_size()
            home = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            self._moved[key] = (alive, home.copy_(x, non_blocking=x.is_cuda))
        return x.device, self._moved[key][1]

    def _unpack(self, packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, home = packed
        return home.to(device, non_blocking=True)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _as_attention_sees(x: Tensor) -> Tensor:
    """`x` in autocast's dtype: rotary embeddings give fp32, which PyTorch's attention casts."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _compact(x: Tensor) -> Tensor:
    """`x`, or a copy if it is a view of a larger tensor that would stay alive with it."""
    if x.untyped_storage().nbytes() > math.prod(x.shape) * x.element_size():
        return x.clone(memory_format=torch.contiguous_format)
    return x
