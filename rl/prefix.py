"""Shared-prefix training: a group's prompt is computed once, forward and backward.

A group is one prompt and its responses. Let prefix = prompt[:-1]; a response's input is the last
prompt token and the response but its last token, so that the head never runs on the prefix.

    A  forward of the prefix; its keys and values of each layer are kept
    B  waves: some responses, forward and backward, against the kept keys and values; the gradients
       of those add up in buffers, each wave's graph is freed
    C  backward of the prefix, once, with the buffers added to its keys' and values' gradients

Gradients are those of each trajectory on its own, to rounding: backward is linear at a fixed
forward, and the kept keys and values are the only way from a response to the prefix.

    step = SharedPrefix(model)
    with step.group(prompt_ids) as g:
        for wave in g.waves(responses):
            out = g.forward(wave)
            g.backward(loss_fn(out, wave))

Source: arXiv 2606.01143. Shapes: G responses, T tokens of the longest, P prefix tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..triton_kernels.prefix_attention import Packing
from ..triton_kernels.token_stats import TokenStats
from .prefix_checks import check_options, check_statistics, prompt_tokens, response_tokens
from .prefix_host import ForwardResult, TransformersHost
from .prefix_metrics import ForwardCost, PrefixMetrics, expected_gain
from .prefix_parallel import Ranks
from .prefix_phases import Offload, Phase, PrefixStore
from .prefix_router import RouterSums, router_loss
from .prefix_support import refuse_unsupported
from .prefix_verify import Record, Upstream, compare_with_dense
from .prefix_waves import (
    LossFunction,
    Tokens,
    Wave,
    WaveOutput,
    joined,
    padded_rows,
    split_rows,
    wave_of,
)

logger = logging.getLogger(__name__)

PrefixMemory = Literal["keep", "recompute", "offload"]


class SharedPrefix:
    """Trains a causal LM on groups of responses to one prompt, which is computed once a group.

    Also for log-probabilities: under `torch.no_grad()` a group has phase A and waves only.

    Args:
        model: transformers causal LM; may be wrapped by DDP or PEFT, or sharded by `fully_shard`.
        prefix_memory: between phases A and C, "keep" keeps the prefix's graph; "recompute" keeps
            nothing of it and runs the prefix forward again; "offload" keeps it in CPU memory (not
            under FSDP2).
        wave_tokens: most tokens of a wave; a longer response is a wave of its own. Default: 16384,
            on a CPU two thirds of the group's longest trajectory, between 384 and 512.
        accum_dtype: of the prefix's gradient buffers, or that of the keys if wider.
        min_bound: a group that is expected to gain less, by its FLOPs and what calls of the model
            cost beside them, runs densely: each response with its own prompt, `wave_tokens` at a
            time. A group with children is always shared.
        verify: "first" computes the first group with a gradient densely as well, and raises if they
            differ; "never", "always".
        head: "fused" never stores [tokens, vocabulary] logits (not under FSDP2).
        temperature: of the statistics.
        prune: rho of vocabulary pruning in the statistics, or None.
        router_loss: also returns the load-balancing loss of a model with experts.

    Raises:
        ValueError: an argument is out of range, or the model computes something else when its
            prefix is shared: see `refuse_unsupported`; also FSDP1, a model compiled as a whole, a
            capped attention score, hooks that act when a gradient is accumulated.

    Source:
        arXiv 2606.01143; differs from the paper: the boundary token belongs to the responses, so
        phase C has no other gradient than those of keys and values.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prefix_memory: PrefixMemory = "recompute",
        wave_tokens: int | None = None,
        accum_dtype: torch.dtype = torch.float32,
        min_bound: float = 1.2,
        verify: Literal["first", "never", "always"] = "first",
        head: Literal["logits", "fused"] = "logits",
        temperature: float = 1.0,
        prune: float | None = None,
        router_loss: bool = False,
    ) -> None:
        check_options(prefix_memory, wave_tokens, accum_dtype, min_bound, verify, head)
        check_statistics(temperature, prune)
        self.host = TransformersHost(model, head, temperature, prune, router_loss)
        if prefix_memory == "offload" and self.host.sharded:
            raise ValueError(
                "prefix_memory: expected keep or recompute under FSDP2, whose gathered parameters "
                "offload would copy, got 'offload'"
            )
        self.prefix_memory, self.wave_tokens = prefix_memory, wave_tokens
        self.accum_dtype, self.min_bound, self.verify = accum_dtype, min_bound, verify
        self.router_loss = router_loss
        self.cost = ForwardCost.of(self.host.inner, self.host.config)
        self.totals = PrefixMetrics()
        self.ranks = Ranks(self.host.model, self.host.sharded, self.host.replicas)
        self._verified = self._said_dense = False
        self._open: PrefixGroup | None = None

    def group(
        self,
        prompt_ids: Tokens,
        *,
        parent: PrefixGroup | None = None,
        attention_mask: Tensor | None = None,
    ) -> PrefixGroup:
        """A prompt whose responses follow; a context manager.

        Args:
            prompt_ids: [P + 1] token ids, or [G, P + 1] with equal rows. With a parent: the tokens
                that go on from the parent's.
            parent: an open group, the last opened: this one is a branch of it, and its tokens'
                statistics are `g.own`.
            attention_mask: [P + 1] or [G, P + 1] of `prompt_ids`, only to refuse padding.

        Raises:
            ValueError: no token, rows that differ, padding, or a token outside the vocabulary.
            RuntimeError: another group is open that is not the parent.
        """
        tokens = prompt_tokens(prompt_ids, attention_mask, self.host.config.vocab_size)
        return PrefixGroup(self, tokens, parent)

    def idle_group(self, *, joint: bool = False) -> None:
        """Takes part with nothing in a group of the other processes (FSDP2; else: no effect).

        Args:
            joint: as they call `accumulate`.
        """
        if self.host.sharded:
            with self.group([0, 0]) as g:
                g.accumulate([], lambda out, _: out.logp.sum(), joint=joint)

    def all_reduce_gradients(self, *, average: bool = True) -> None:
        """Adds up the model's `.grad` over its replicas, once after all groups of a step (DDP).

        The phases run without DDP's own synchronisation, which would act after each wave. Under
        FSDP2 gradients are averaged by phase C, and this does nothing. Replicas are the processes
        of DistributedDataParallel, or all. Parameters of a loss that are not the model's are the
        caller's to add up.

        Args:
            average: divide by the number of processes, as DDP does.
        """
        self.ranks.all_reduce(self.host.trained, average)

    def tokens_of_waves(self, prefix: int, lengths: Sequence[int]) -> int:
        """Most tokens of a wave of such a group.

        Args:
            prefix: tokens of the prompt.
            lengths: of the responses.
        """
        if self.wave_tokens is not None:
            return self.wave_tokens
        if self.host.device.type != "cpu":
            return 16384
        # more leave the caches, or need more memory than dense training, a trajectory at a time
        longest = prefix + max(lengths, default=1)
        return min(512, max(384, 2 * longest // 3))

    def metrics(self) -> dict[str, float]:
        """Of the groups closed since the last call, by name; see `PrefixMetrics`."""
        found, self.totals = self.totals.as_dict(), PrefixMetrics(self.totals.dense_rate)
        return found

    def _verifies(self) -> bool:
        return self.verify == "always" or (self.verify == "first" and not self._verified)

    def _check(
        self, records: list[Record], attended: set[torch.dtype], metrics: PrefixMetrics
    ) -> None:
        """Computes a group densely as well; raises if it differs."""
        seconds = compare_with_dense(self.host, self.ranks, records, attended)
        if seconds is None:
            return
        self._verified = True
        calls = self.cost.calls(sum(len(record.responses) for record in records), True)
        if calls:  # an idle group of FSDP2 has none
            self.totals.dense_rate = seconds / (metrics.dense_flops + calls)

    def _say_dense(self, gain: float, bound: float, prefix: int, lengths: Sequence[int]) -> None:
        if not self._said_dense:
            self._said_dense = True
            logger.warning(
                "shared prefix: sharing %d tokens among %d responses of %.0f tokens is expected to "
                "be %.2f times as fast (%.2f by FLOPs alone), less than min_bound %.2f: such "
                "groups run densely",
                prefix, len(lengths), sum(lengths) / len(lengths), gain, bound, self.min_bound,
            )  # fmt: skip


class PrefixGroup:
    """One prompt, or a branch of one; made by `SharedPrefix.group`.

    On an error inside the `with` block, gradients are what they were before the outermost group,
    also those of other parameters that a loss has used (unless reentrant checkpointing hides them
    from its graph). Until the block ends, `.grad` holds this group's alone: zero gradients, clip
    and step outside.

    Args:
        step: whose group it is.
        tokens: of the prompt, or of the branch.
        parent: the group it branches from.

    Attributes:
        own: of a branch, the statistics of its tokens as a `WaveOutput` of [1, T], leaves; a loss
            of them goes into `backward`, alone or with a wave's, as often as wanted.
        shared: whether the prompt is computed once; None before the first wave.
    """

    def __init__(self, step: SharedPrefix, tokens: list[int], parent: PrefixGroup | None) -> None:
        self.step, self.parent, self.tokens = step, parent, tokens
        self.root: PrefixGroup = self if parent is None else parent.root
        self.shared: bool | None = None if parent is None else True
        self.own: WaveOutput | None = None
        self.wave_tokens = step.wave_tokens  # None until there are responses
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []
        self._attention: str | None = None
        self._state: Literal["new", "open", "closed"] = "new"

    # ------------------------------------------------------------------ opening and closing

    def __enter__(self) -> PrefixGroup:
        step, parent = self.step, self.parent
        if self._state != "new":
            raise RuntimeError("group: it was entered before; make another")
        if step._open is not parent:
            raise RuntimeError(
                "group: another group is open; nest with group(.., parent=the last opened)"
            )
        if parent is not None and parent.train and not torch.is_grad_enabled():
            raise RuntimeError("group: a branch under torch.no_grad() of a group that trains")
        if parent is not None and step.host.sharded:
            raise ValueError("parent: branches are not supported under FSDP2")
        context = [] if parent is None else parent.context
        self.context = context + self.tokens
        # inputs whose keys and values the responses see; the last token is each response's first
        self.ids = (context[-1:] + self.tokens)[:-1]
        # a rank of FSDP2 without a prefix computes one that nobody sees, as others compute theirs
        self._stands_in = step.host.sharded and not self.ids
        if self._stands_in:
            self.ids = self.tokens
        self.train = torch.is_grad_enabled() if parent is None else parent.train
        self.device = step.host.device
        self.store = PrefixStore(step.accum_dtype if self.train else None)
        self._first_pass: tuple[ForwardResult, Phase] | None = None
        self._own_stats = self._own_router = None
        self._computed = False
        self._untaken: list[Upstream] = []
        self._state = "open"
        step._open = self
        try:
            if parent is None:
                self._open_root()
            else:
                parent._share()
                self._share()
        except BaseException:
            self._abandon()
            raise
        return self

    def _open_root(self) -> None:
        step = self.step
        self.metrics = PrefixMetrics()
        self.records: list[Record] | None = [] if self.train and step._verifies() else None
        self.attended: set[torch.dtype] = set()
        self._failed = False
        self._going_backward = False
        self._autocast: AbstractContextManager = nullcontext()
        self._autocast_dtype: torch.dtype | None = None
        step.ranks.reshard()
        self._gradients = [(p, p.grad) for p in step.host.trained] if self.train else []
        for parameter, _ in self._gradients:
            parameter.grad = None
        step.ranks.synchronize(False)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self._finish()
        except BaseException:
            self._abandon()
            raise

    def _finish(self) -> None:
        step = self.step
        if any(not upstream.arrived for upstream in self._untaken):
            raise RuntimeError(
                "a wave was not taken backward before its group ended: call g.backward(loss) for "
                "each, inside the group; a wave without a loss is forwarded under torch.no_grad()"
            )
        if self.root._failed:
            raise RuntimeError("a branch of this group failed; gradients are as before the group")
        if self.train:
            step.ranks.synchronize(True)
            if self._computed and self.ids:
                self._phase_c()
            else:
                step.ranks.take_part()  # a backward pass that adds nothing reduces the waves' sums
        self._close()
        if self.parent is None:
            if self.records is not None and self._computed:
                with self._autocast:
                    step._check(self.records, self.attended, self.metrics)
            for parameter, before in self._gradients:
                if before is not None:
                    parameter.grad = (
                        before if parameter.grad is None else before.add_(parameter.grad)
                    )
            step.totals.add(self.metrics)

    def _abandon(self) -> None:
        """Everything as before the group; a branch leaves gradients to its root."""
        self.root._failed = True
        self._close()
        if self.parent is None:
            for parameter, before in self._gradients:
                parameter.grad = before
            self.step.ranks.forget()

    def _close(self) -> None:
        self._state = "closed"
        self.store.clear()
        self._first_pass = self._own_stats = self._own_router = None
        self._untaken.clear()
        self.step._open = self.parent
        if self.parent is None:
            self.step.ranks.reshard()
        if self.parent is None and self._attention is not None:
            self.step.host.restore_attention(self._attention)

    def _check_open(self) -> None:
        if self._state != "open":
            raise RuntimeError(
                f"group: expected an open one (with step.group(..)), it is {self._state}"
            )
        if self.step._open is not self:
            raise RuntimeError("group: a branch of it is open, which must be closed first")

    # ------------------------------------------------------------------ phase A and phase C

    def _share(self) -> None:
        """Phase A, once."""
        self.shared = True
        if self._computed:
            return
        self._computed = True
        step, root = self.step, self.root
        if root._attention is None:
            root._attention = step.host.attention()
            device = self.device.type
            if torch.is_autocast_enabled(device):  # phase C computes what phase A did
                root._autocast_dtype = torch.get_autocast_dtype(device)
                root._autocast = torch.autocast(device, root._autocast_dtype)
        if not self.ids:
            return
        keep = self.train and step.prefix_memory != "recompute"
        hooks: AbstractContextManager = nullcontext()
        if keep and step.prefix_memory == "offload":
            hooks = Offload(step.host.resident(), self.store)
        with root.metrics.timed("prefix_forward", self.device), hooks, torch.set_grad_enabled(keep):
            result, phase = self._prefix_pass()
        step.host.check_layers(len(self.store.segments))
        root.attended |= phase.dtypes
        root.metrics.add_prefix(
            len(self.ids),
            self.store.bytes,
            self._prefix_flops(),
            self._prefix_passes() * step.cost.call,
        )
        self._first_pass = (result, phase) if keep else None
        self._leave_own(result)

    def _prefix_pass(self) -> tuple[ForwardResult, Phase]:
        path = [] if self.parent is None else self.parent._path()
        phase = Phase(path, Packing([len(self.ids)], self.device), self.store, len(self.context))
        start = max(0, len(self.context) - 1 - len(self.ids))
        positions = list(range(start, start + len(self.ids)))
        labels = None if self.parent is None else self.tokens
        return self.step.host.forward(self.ids, positions, phase, labels), phase

    def _path(self) -> list[PrefixStore]:
        above = [] if self.parent is None else self.parent._path()
        return [*above, self.store] if self.ids and not self._stands_in else above

    def _leave_own(self, result: ForwardResult) -> None:
        """What losses take of the prefix pass, cut off from its graph; phase C goes on there."""
        if result.stats is not None:
            stats = TokenStats(
                *(x if x is None else _leaf(x[None], self.train) for x in result.stats)
            )
            self._own_stats = Upstream.of(stats)
            self.own = WaveOutput(stats.logp, stats, None)
            if self.root.records is not None:
                record = Record(self.parent.context, [self.tokens], stats, None, self._own_stats)
                self.root.records.append(record)
        if result.router is not None:
            probabilities = _leaf(result.router.probabilities, self.train)
            self._own_router = Upstream.of([probabilities])
            self._router = result.router._replace(probabilities=probabilities)

    def _path_router(self) -> RouterSums | None:
        """Of the prefixes; a leaf's gradient is what phase C starts from."""
        above = None if self.parent is None else self.parent._path_router()
        if self._own_router is None or self._stands_in:
            return above
        return self._router if above is None else above + self._router

    def _phase_c(self) -> None:
        with self.root.metrics.timed("prefix_backward", self.device):
            found, self._first_pass = self._first_pass, None
            if found is None:
                self.store.drop_keys()
                with self.root._autocast, torch.enable_grad():
                    found = self._prefix_pass()
            result, phase = found
            if result.stats is None and result.router is None and self.step.host.plain:
                phase.backward_from_last()
                self.store.check_arrived()
                return
            with torch.enable_grad():
                parts = [] if result.root is None else [result.root]
                if result.stats is not None:
                    parts += [0.0 * result.stats.logp.sum()]
                    own = [g if g is None else g[0] for g in self._own_stats.grads]
                    parts += _products(result.stats, own)
                if result.router is not None:
                    parts += _products([result.router.probabilities], self._own_router.grads)
                # one scalar root: FSDP2 and reentrant checkpointing break with several
                total = sum(parts)
            if total.requires_grad:  # of a frozen model, nothing below the head may be trained
                total.backward()
            self.store.check_arrived()

    # ------------------------------------------------------------------ phase B

    def waves(self, responses: Sequence[Tokens]) -> Iterator[Wave]:
        """Splits responses into waves; before, decides the route and computes the prefix.

        Args:
            responses: token ids of each response, without the prompt and without padding.

        Raises:
            ValueError: a response is empty or has a token outside the vocabulary, a window of the
                model is shorter than prompt and response; on the first group, see `SharedPrefix`.
        """
        waves = self._prepare(responses)

        def each() -> Iterator[Wave]:
            yield from waves
            self._take_missing()

        return each()

    def _prepare(self, responses: Sequence[Tokens], joint: bool = False) -> list[Wave]:
        """Waves of this process; `_missing` is by how many another has more."""
        self._check_open()
        step = self.step
        vocabulary = step.host.config.vocab_size
        tokens = response_tokens(responses, vocabulary, empty=step.host.sharded)
        lengths = [len(response) for response in tokens]
        refuse_unsupported(step.host.inner, len(self.context) + max(lengths, default=1))
        if self.wave_tokens is None:
            self.wave_tokens = step.tokens_of_waves(len(self.context), lengths)
        self._decide(lengths, joint)
        rows = self._rows(lengths, bool(self.shared))
        self._missing = step.ranks.most(len(rows)) - len(rows)
        return [wave_of(some, tokens, self.device) for some in rows]

    def _take_missing(self) -> None:
        """This process's part in the waves that others have beyond its own."""
        for _ in range(self._missing):
            self.step.ranks.take_part()

    def _decide(self, lengths: list[int], joint: bool) -> None:
        step, metrics = self.step, self.root.metrics
        cost, prefix = step.cost, len(self.context) - 1
        train = self.train and torch.is_grad_enabled()
        dense, waves = cost.group(prefix, lengths, train)
        dense_count, count = (len(self._rows(lengths, shared)) for shared in (False, True))
        dense_calls = cost.calls(dense_count, train)
        calls = cost.calls(count, train)
        if joint and count > 1:  # each runs forward once more
            waves, calls = waves * 4 / 3, calls * 4 / 3
        if joint and dense_count > 1:
            dense, dense_calls = dense * 4 / 3, dense_calls * 4 / 3
        once = once_calls = 0.0
        if not self._computed:
            once, once_calls = self._prefix_flops(), self._prefix_passes() * cost.call
        if self.shared is not True:
            gain, bound = expected_gain(
                *step.ranks.sums(dense, dense_calls, waves + once, calls + once_calls)
            )
            if gain >= step.min_bound and self.ids:
                self._share()
            else:
                self.shared = False
                if prefix and lengths:
                    step._say_dense(gain, bound, prefix, lengths)
        metrics.add_waves(
            dense=dense,
            dense_calls=dense_calls,
            shared=waves if self.shared else waves + once,
            shared_calls=calls if self.shared else calls + once_calls,
            logical=sum(prefix + n for n in lengths),
            unique=sum(lengths) if self.shared else sum(prefix + n for n in lengths),
            is_shared=bool(self.shared),
        )

    def _rows(self, lengths: list[int], shared: bool) -> list[list[int]]:
        """Responses of each wave."""
        before = 0 if shared else len(self.context)
        alone = self.step.router_loss and not shared
        return split_rows([before + n for n in lengths], 1 if alone else self.wave_tokens)

    def _prefix_flops(self) -> float:
        before = max(0, len(self.context) - 1 - len(self.ids))
        return self._prefix_passes() * self.step.cost.layers(len(self.ids), before)

    def _prefix_passes(self) -> int:
        """Forward passes that phases A and C cost, a backward pass counted as two."""
        again = self.step.prefix_memory == "recompute"
        return (4 if again else 3) if self.train else 1

    def forward(self, wave: Wave) -> WaveOutput:
        """Statistics of a wave's tokens, with a graph unless gradients are off.

        Args:
            wave: of this group's `waves`.

        Raises:
            ValueError: it is not a wave.
            RuntimeError: the group is not open, has no waves yet, was opened under no_grad while
                gradients are on now, or its prompt was computed under another autocast.
        """
        self._check_open()
        if not isinstance(wave, Wave):
            raise ValueError(f"wave: expected one of group.waves(..), got {type(wave).__name__}")
        if self.shared is None:
            raise RuntimeError("group: it has no waves yet, call g.waves(responses) first")
        if torch.is_grad_enabled() and not self.train:
            raise RuntimeError(
                "group: it was opened under torch.no_grad(), but gradients are on now"
            )
        responses = wave.responses
        if self.shared and self.ids:
            self._check_autocast()
        with self.root.metrics.timed("waves", self.device):
            result = (
                self._wave_pass(responses)
                if self.shared
                else self.step.host.dense(self.context, responses)
            )
        _, stats = padded_rows(result.stats, wave.mask)
        router = self._router_loss(result.router)
        if torch.is_grad_enabled():
            upstream = Upstream(len(stats) + 1)
            if self.root.records is not None:
                record = Record(self.context, responses, stats, router, upstream)
                self.root.records.append(record.detached())
            self._untaken.append(upstream)
            *stats, router = (
                _WaveOutput.apply(x, i, upstream, self.root)
                if x is not None and x.requires_grad
                else x
                for i, x in enumerate((*stats, router))
            )
            stats = TokenStats(*stats)
        return WaveOutput(stats.logp, stats, router)

    def _check_autocast(self) -> None:
        device = self.device.type
        now = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if now != self.root._autocast_dtype:
            raise RuntimeError(
                f"group: its prompt was computed under autocast to {self.root._autocast_dtype}, "
                f"this wave under {now}; put autocast around the whole group"
            )

    def _wave_pass(self, responses: list[list[int]]) -> ForwardResult:
        last, start = self.context[-1], len(self.context) - 1
        ids = [token for response in responses for token in (last, *response[:-1])]
        positions = [start + t for response in responses for t in range(len(response))]
        labels = [token for response in responses for token in response]
        packing = Packing([len(response) for response in responses], self.device)
        phase = Phase(self._path(), packing, longest=start + 1 + max(packing.lengths))
        result = self.step.host.forward(ids, positions, phase, labels)
        self.root.attended |= phase.dtypes
        return result

    def _router_loss(self, sums: RouterSums | None) -> Tensor | None:
        if sums is None:
            return None
        above = self._path_router() if self.shared else None
        return router_loss(sums if above is None else sums + above)

    def backward(self, loss: Tensor, *, by: Callable[[Tensor], object] = Tensor.backward) -> None:
        """Backward of one wave's loss, whose graph is freed.

        Args:
            loss: scalar; the group's loss is the sum over waves, so its normalisers are global. It
                depends on the model through the wave's output alone: a weight penalty, say, goes
                backward outside of the group.
            by: what goes backward: Lightning's `manual_backward`, Accelerate's `backward`.

        Raises:
            ValueError: the loss is not a scalar with a graph.
            RuntimeError: the group is not open.
        """
        self._check_open()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"loss: expected a scalar tensor with a graph, got {loss!r}")
        root = self.root
        known = {id(p) for p, _ in root._gradients}
        for leaf in _leaves_of(loss):
            if id(leaf) not in known:  # a temperature, a value head: as the model's parameters
                root._gradients.append((leaf, leaf.grad))
                leaf.grad = None
        root._going_backward = True
        try:
            with root.metrics.timed("waves", self.device):
                by(loss)
        finally:
            root._going_backward = False

    # ------------------------------------------------------------------ whole groups

    def accumulate(
        self,
        responses: Sequence[Tokens],
        loss: LossFunction,
        *,
        joint: bool = False,
        by: Callable[[Tensor], object] = Tensor.backward,
    ) -> float:
        """Waves forward and backward; a wave too large for the memory is split, not failed.

        If memory runs out, the group starts again with waves of half the tokens, so `loss` must
        give the same each time.

        Args:
            responses: as in `waves`.
            loss: of a wave; or with `joint` of all responses at once.
            joint: the loss needs every response of the group (a baseline over the group, say): if
                they are more than one wave, all are computed first without gradients, the loss is
                taken of the results, and the waves go backward with its gradients. It is called
                with tensors that have no graph but their own. Each wave then runs forward twice,
                which the gate counts.
            by: as in `backward`.

        Returns:
            Sum of the losses.
        """
        return self._split_if_needed(
            responses, lambda: self._accumulate(responses, loss, joint, by)
        )

    def _accumulate(
        self,
        responses: Sequence[Tokens],
        loss: LossFunction,
        joint: bool,
        by: Callable[[Tensor], object],
    ) -> float:
        total: Tensor | float = 0.0
        waves = self._prepare(responses, joint)
        if not joint or len(waves) + self._missing < 2:
            for wave in waves:
                value = loss(self.forward(wave), wave)
                self.backward(value, by=by)
                total = total + value.detach()
            self._take_missing()
            return float(total)
        with torch.no_grad():
            outs = [self.forward(wave) for wave in waves]
            self._take_missing()
        grads: list[Tensor | None] = []
        if waves:
            whole = wave_of(range(len(responses)), response_tokens(responses), self.device)
            found = joined(outs, waves, whole)
            leaves = [_leaf(x, True) for x in (*found.stats, found.router_loss)]
            upstream = Upstream.of(leaves)
            stats = TokenStats(*leaves[:-1])
            value = loss(WaveOutput(stats.logp, stats, leaves[-1]), whole)
            self.backward(value, by=by)
            total = total + value.detach()
            grads = upstream.grads
        for wave in waves:
            out = self.forward(wave)
            own = [_of_rows(g, wave) for g in grads]
            parts = [0.0 * out.logp.sum(), *_products([*out.stats, out.router_loss], own)]
            self.backward(sum(parts))
        self._take_missing()
        return float(total)

    def statistics(self, responses: Sequence[Tokens]) -> WaveOutput:
        """Of all responses, without a graph: old or reference log-probabilities.

        Args:
            responses: as in `waves`.

        Returns:
            WaveOutput of [G, T] tensors.
        """
        with torch.no_grad():
            return self._split_if_needed(responses, lambda: self._statistics(responses))

    def _statistics(self, responses: Sequence[Tokens]) -> WaveOutput:
        waves = self._prepare(responses)
        whole = wave_of(range(len(responses)), response_tokens(responses), self.device)
        outs = [self.forward(wave) for wave in waves]
        self._take_missing()
        return joined(outs, waves, whole)

    def _split_if_needed(self, responses: Sequence[Tokens], run: Callable[[], Any]) -> Any:
        """`run`, again from the prefix on with smaller waves while memory runs out."""
        untouched = self.parent is None and self.shared is None
        while True:
            try:
                return run()
            except torch.OutOfMemoryError:
                lengths = [len(response) for response in responses]
                alone = len(split_rows(lengths, self.wave_tokens)) == len(lengths)
                if alone or not untouched or self.step.host.sharded:
                    raise
            self._restart()
            self.wave_tokens = min(self.wave_tokens, sum(lengths)) // 2
            logger.warning("shared prefix: out of memory, waves of %d tokens", self.wave_tokens)

    def _restart(self) -> None:
        """As after opening: nothing of the waves is left."""
        self.store.clear()
        self._first_pass, self.shared, self._computed = None, None, False
        self._untaken.clear()
        self.metrics = PrefixMetrics()
        if self.records is not None:
            self.records.clear()
        for parameter, _ in self._gradients:
            parameter.grad = None


class _WaveOutput(torch.autograd.Function):
    """A copy; here the graph of a wave ends and that of the user's loss begins."""

    @staticmethod
    def forward(ctx, x, i, upstream, root):
        ctx.i, ctx.upstream, ctx.root = i, upstream, root
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if not ctx.root._going_backward:
            raise RuntimeError(
                "a wave's gradient was taken outside of group.backward(loss): whatever goes "
                "backward through a wave adds to the gradient of the prefix; for gradients of a "
                "loss alone, call it with out.logp.detach().requires_grad_()"
            )
        ctx.upstream.add(ctx.i, grad)
        return grad, None, None, None


def _leaves_of(loss: Tensor) -> Iterator[Tensor]:
    """Leaves with a gradient that a loss has beside the waves' outputs."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen or node.name() == "_WaveOutputBackward":
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        left += [after for after, _ in node.next_functions]


def _leaf(x: Tensor | None, train: bool) -> Tensor | None:
    if x is None:
        return None
    return x.detach().requires_grad_(train and x.is_floating_point())


def _of_rows(grad: Tensor | None, wave: Wave) -> Tensor | None:
    """A wave's part of [G, T] or [G] gradients."""
    if grad is None:
        return None
    own = grad[wave.rows]
    return own if own.ndim < 2 else own[:, : wave.mask.shape[1]]


def _products(tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Scalars whose backward gives each tensor its gradient."""
    pairs = zip(tensors, grads, strict=True)
    return [(x * g).sum() for x, g in pairs if x is not None and g is not None]
