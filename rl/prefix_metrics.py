"""What sharing a prefix can save, and what it saved: operations, tokens, seconds, bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

# What a call of the model costs whatever its tokens, in the time of FLOPs: so many a layer (Python,
# launches), and as so many more tokens (weights are read, and their gradients written, for the
# fewest tokens too). CPU: fits benchmarks/prefix_gate.py. CUDA: 30 launches of 8 us a layer at 400
# TFLOP/s, and an H200's FLOPs for each byte that it reads; not measured.
_CALL_OF_LAYER = {"cpu": 4e7, "cuda": 1e11}
_CALL_IN_TOKENS = {"cpu": 60, "cuda": 200}


def call_cost(device: torch.device, layers: int, token: float) -> float:
    """FLOPs in the time that a forward call takes beside its own.

    Args:
        device: of the model.
        layers: of the model.
        token: FLOPs of a token.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    return _CALL_OF_LAYER[kind] * layers + _CALL_IN_TOKENS[kind] * token


def expected_gain(
    dense: float, dense_calls: float, shared: float, shared_calls: float
) -> tuple[float, float]:
    """How many times as fast a group may be with its prefix computed once.

    Args:
        dense: FLOPs with a prefix for each response.
        dense_calls: what the calls cost beside them, as FLOPs.
        shared: FLOPs with one.
        shared_calls: as `dense_calls`.

    Returns:
        What is to be expected, and the bound by FLOPs alone; the former is not more.
    """
    bound = dense / shared if shared else 1.0
    return min(bound, (dense + dense_calls) / max(shared + shared_calls, 1.0)), bound


class ForwardCost(NamedTuple):
    """FLOPs of a forward pass.

    Args:
        token: of the linear layers, a token.
        pair: of attention, a query token and a token that it sees.
        head: of the output head, a predicted token.
        call: what a call costs beside its FLOPs (Python, launches, weights that are read for few
            tokens), as FLOPs; a backward pass costs it twice more.
    """

    token: float
    pair: float
    head: float
    call: float

    @classmethod
    def of(cls, model: nn.Module, config: PreTrainedConfig) -> ForwardCost:
        """Counted from the parameters; of experts, those that a token visits.

        Args:
            model: causal LM.
            config: of its text model.
        """
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        head = model.get_output_embeddings()
        tables.add(id(head.weight))
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        experts = next(filter(None, (getattr(config, name, None) for name in names)), None)
        share = getattr(config, "num_experts_per_tok", 1) / experts if experts else 1
        token = sum(
            2 * parameter.numel() * (share if ".experts." in name else 1)
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and id(parameter) not in tables
        )
        heads = config.num_attention_heads
        try:
            width = getattr(config, "head_dim", None) or config.hidden_size // heads
        except Exception as error:  # a configuration whose layers differ says so in its own way
            raise ValueError(
                f"model: layers of different head widths, refused ({error})"
            ) from error
        pair = 4 * heads * width * config.num_hidden_layers
        call = call_cost(head.weight.device, config.num_hidden_layers, float(token))
        return cls(float(token), float(pair), 2.0 * head.weight.numel(), call)

    def layers(self, tokens: int, before: int = 0) -> float:
        """Of `tokens` tokens that follow `before` others, without the head."""
        pairs = tokens * before + tokens * (tokens + 1) / 2
        return self.token * tokens + self.pair * pairs

    def calls(self, count: int, train: bool) -> float:
        """What so many calls cost beside their FLOPs, as FLOPs."""
        return (3 if train else 1) * count * self.call

    def group(self, prefix: int, lengths: Sequence[int], train: bool) -> tuple[float, float]:
        """FLOPs of responses after a prefix, a backward pass counted as two forward passes.

        Args:
            prefix: tokens before each response's input.
            lengths: tokens of the responses.
            train: forward and backward, else forward.

        Returns:
            (with a prefix for each, without any prefix).
        """
        passes = 3 if train else 1
        own = passes * sum(self.layers(n, prefix) + self.head * n for n in lengths)
        return own + passes * len(lengths) * self.layers(prefix), own


class PrefixMetrics:
    """Sums over groups.

    Args:
        dense_rate: seconds of dense training per FLOP, calls counted by what they cost, where a
            verification has measured it.
    """

    def __init__(self, dense_rate: float | None = None) -> None:
        self.dense_rate = dense_rate
        self.groups = self.shared_groups = 0
        self.dense_flops = self.dense_calls = self.shared_flops = self.shared_calls = 0.0
        self.logical_tokens = self.unique_tokens = self.hot_bytes = 0
        self.seconds = dict.fromkeys(("prefix_forward", "waves", "prefix_backward"), 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self, phase: str, device: torch.device) -> Iterator[None]:
        """Adds the time of a phase; on CUDA that of the device, without waiting for it."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            try:
                yield
            finally:
                end.record()
                self._events.append((phase, start, end))
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started

    def add_prefix(self, tokens: int, hot_bytes: int, flops: float, calls: float) -> None:
        """A prefix that was computed once; `calls` as in `add_waves`."""
        self.unique_tokens += tokens
        self.hot_bytes += hot_bytes
        self.shared_flops += flops
        self.shared_calls += calls

    def add_waves(
        self,
        *,
        dense: float,
        dense_calls: float,
        shared: float,
        shared_calls: float,
        logical: int,
        unique: int,
        is_shared: bool,
    ) -> None:
        """One pass over responses: FLOPs, what calls cost beside them (as FLOPs) and tokens, with a
        prompt each and with one for all."""
        self.dense_flops += dense
        self.dense_calls += dense_calls
        self.shared_calls += shared_calls
        self.shared_flops += shared
        self.logical_tokens += logical
        self.unique_tokens += unique
        self.groups += 1
        self.shared_groups += is_shared

    def add(self, other: PrefixMetrics) -> None:
        """Another group's; `hot_bytes` is the largest, the rest adds up."""
        for name in (
            "groups", "shared_groups", "dense_flops", "dense_calls", "shared_flops",
            "shared_calls", "logical_tokens", "unique_tokens",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.hot_bytes = max(self.hot_bytes, other.hot_bytes)
        for phase, seconds in other.seconds.items():
            self.seconds[phase] += seconds
        self._events += other._events

    def as_dict(self) -> dict[str, float]:
        """By name; waits for the device.

        Returns:
            prefix/bound: FLOPs with a prompt each over those with one prompt for all: at most so
                many times as fast.
            prefix/expected: the same with what calls of the model cost, which decides the route.
            prefix/shared: share of the groups that ran with one prompt.
            prefix/logical_tokens, unique_tokens, saved_tokens: tokens of all trajectories, tokens
                computed (once, even if forward ran twice), and the difference; each `waves`,
                `accumulate` or `statistics` of a group counts its responses.
            prefix/hot_bytes: most bytes of keys, values and their gradients.
            prefix/seconds_*: of the phases A, B and C.
            prefix/speedup: seconds of the dense route over seconds, the former from its FLOPs and
                calls at the rate that `verify` measured in the first group; absent without.
        """
        for phase, start, end in self._events:
            end.synchronize()
            self.seconds[phase] += start.elapsed_time(end) / 1e3
        self._events.clear()
        if not self.groups:
            return {}
        expected, bound = expected_gain(
            self.dense_flops, self.dense_calls, self.shared_flops, self.shared_calls
        )
        found = {
            "prefix/bound": bound,
            "prefix/expected": expected,
            "prefix/shared": self.shared_groups / self.groups,
            "prefix/logical_tokens": self.logical_tokens,
            "prefix/unique_tokens": self.unique_tokens,
            "prefix/saved_tokens": self.logical_tokens - self.unique_tokens,
            "prefix/hot_bytes": self.hot_bytes,
        }
        found |= {f"prefix/seconds_{name}": seconds for name, seconds in self.seconds.items()}
        total = sum(self.seconds.values())
        if self.dense_rate is not None and total > 0:
            dense = self.dense_rate * (self.dense_flops + self.dense_calls)
            found["prefix/speedup"] = dense / total
        return found
