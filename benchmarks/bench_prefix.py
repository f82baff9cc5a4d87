"""Shared-prefix training against dense training, one trajectory a microbatch, as speed-ups.

    pip install --no-deps prefix-grouper==0.0.1.post1
    OMP_NUM_THREADS=1 pytest benchmarks/bench_prefix.py \
        --benchmark-json=benchmarks/results/bench_prefix.json
    python benchmarks/report.py benchmarks/results/bench_prefix.json

A step is the gradient of the mean log-probability of G responses of S tokens to one prompt of P. On
a CPU the model is an eight-layer Llama of width 256 (8 heads, 4 of keys; vocabulary 4096) in fp32;
on a GPU layers of Llama-3-8B's shape in bf16, against a dense baseline with compiled layers.

Speed-up: before every timed step a dense one is timed, so both see the same machine; the median
over pairs, and the extremes. Bound: FLOPs of dense training over those of the provider, backward
counted as twice forward; `share` is the speed-up's part of it. A run with `prefix_memory=
"recompute"` has one more forward pass of the prompt in its bound.
Peak: by how much memory rises during a step (measure.py), gradients included, of dense training and
of the provider.

Providers: SharedPrefix as it is by default ("default": it decides itself whether to share), forced
to share, keeping the prompt's graph ("keep"); this package's packed row; prefix-grouper, whose
groups are one microbatch. Each is first compared with the dense gradient, and not timed if wrong.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, commit, device_name, extra_bytes, synchronize, versions
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from trimtab.rl.prefix import SharedPrefix
from trimtab.rl.responses import response_logits
from trimtab.triton_kernels.token_stats import token_stats

GPU = DEVICE.type == "cuda"
ROUNDS = 3


class Shape(NamedTuple):
    """Prompt, response, group."""

    p: int
    s: int
    g: int


if GPU:
    SIZES = dict(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=4,
        num_attention_heads=32, num_key_value_heads=8, rope_theta=5e5,
    )  # fmt: skip
    LENGTHS, GROUPS, DTYPE = ((10_240, 2048), (2048, 10_240)), (16, 32, 128), torch.bfloat16
else:
    SIZES = dict(
        vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    LENGTHS = ((512, 64), (1024, 128), (2048, 128), (256, 1024))
    GROUPS, DTYPE = (4, 8, 16), torch.float32
SHAPES = [Shape(p, s, g) for p, s in LENGTHS for g in GROUPS]


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = LlamaConfig(**SIZES, **ends, max_position_embeddings=16_384)
    with DEVICE:
        return LlamaForCausalLM(config).to(DTYPE).train()


def peer_attention(_module, query, key, value, _mask, *, prefix_grouper, **_):
    """An entry of transformers' registry by which prefix-grouper calls PyTorch's attention."""

    def attend(query: Tensor, key: Tensor, value: Tensor, _padding: Tensor) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        rows, columns = query.shape[2], key.shape[2]
        mask = None
        if rows != columns:  # suffixes, behind their copy of the prefix
            seen = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
            mask = seen.tril(columns - rows)
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
        return out.transpose(1, 2)

    return prefix_grouper.forward(attend, query, key, value), None


class Work:
    """One shape's tokens, and the step of each provider."""

    def __init__(self, model: LlamaForCausalLM, shape: Shape) -> None:
        g = torch.Generator().manual_seed(0)
        self.model, self.shape = model, shape
        tokens = torch.randint(SIZES["vocab_size"], (shape.p + shape.g * shape.s,), generator=g)
        self.prompt = tokens[: shape.p].tolist()
        self.responses = tokens[shape.p :].view(shape.g, shape.s).tolist()
        self.scale = 1 / (shape.g * shape.s)

    def zero(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return token_stats(logits, labels).logp.sum() * self.scale

    def dense(self, responses: list[list[int]] | None = None) -> None:
        """One trajectory a microbatch; the head at the response alone."""
        p, s, _ = self.shape
        kept = torch.arange(p - 1, p + s - 1, device=DEVICE)
        for response in responses or self.responses:
            ids = torch.tensor([self.prompt + response[:-1]], device=DEVICE)
            logits = self.model(ids, use_cache=False, logits_to_keep=kept).logits[0]
            self.loss(logits, torch.tensor(response, device=DEVICE)).backward()

    def shared(self, step: SharedPrefix) -> None:
        with step.group(self.prompt) as group:
            group.accumulate(self.responses, lambda out, _: out.logp.sum() * self.scale)

    def packed(self) -> None:
        tokens = torch.tensor(self.responses, device=DEVICE)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        index = torch.zeros(len(tokens), dtype=torch.long, device=DEVICE)
        logits = response_logits(self.model, [self.prompt], tokens, mask, index)
        self.loss(logits, tokens.flatten()).backward()

    def prefix_grouper(self) -> None:
        """The peer, with the boundary token in the suffixes, so that its head is as small."""
        peer = importlib.import_module("prefix_grouper")
        p, s, g = self.shape
        grouper = peer.PrefixGrouper([[p - 1, *[s] * g]], device=DEVICE)
        ids = self.prompt[:-1] + [
            token for response in self.responses for token in (self.prompt[-1], *response[:-1])
        ]
        positions = torch.cat([torch.arange(p - 1), torch.arange(p - 1, p - 1 + s).repeat(g)])
        config = self.model.config
        before, config._attn_implementation = (
            config._attn_implementation,
            "prefix_grouper",
        )
        try:
            logits = self.model(
                torch.tensor([ids], device=DEVICE),
                position_ids=positions[None].to(DEVICE),
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=DEVICE),
                use_cache=False,
                logits_to_keep=torch.arange(p - 1, len(ids), device=DEVICE),
                prefix_grouper=grouper,
            ).logits[0]
        finally:
            config._attn_implementation = before
        labels = torch.tensor(self.responses, device=DEVICE).flatten()
        self.loss(logits, labels).backward()

    def gradient(self, run: Callable[[], None]) -> Tensor:
        self.zero()
        run()
        found = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        self.zero()
        return found

    def time(self, run: Callable[[], None]) -> float:
        self.zero()
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start


STEPS = {
    "SharedPrefix, default": dict(min_bound=1.2),
    "SharedPrefix, forced": dict(min_bound=0),
    "SharedPrefix, keep": dict(min_bound=0, prefix_memory="keep"),
}
CASES = [(shape, "SharedPrefix, default") for shape in SHAPES]
CASES += [(shape, "SharedPrefix, forced") for shape in SHAPES if shape.s > shape.p]
CASES += [
    (shape, provider)
    for shape in SHAPES
    if GROUPS.index(shape.g) == 1
    for provider in ("SharedPrefix, keep", "packed row", "prefix-grouper")
]


def case_id(value: Shape | str) -> str:
    return "-".join(map(str, value)) if isinstance(value, Shape) else value.replace(", ", "-")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    model = make_model()
    if GPU:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    return model


@pytest.mark.parametrize(("shape", "provider"), CASES, ids=case_id)
def test_prefix(benchmark, model, shape, provider):
    if provider == "prefix-grouper":
        pytest.importorskip("prefix_grouper")
        AttentionInterface.register("prefix_grouper", peer_attention)
    work = Work(model, shape)
    step = None
    if provider in STEPS:
        step = SharedPrefix(model, verify="never", **STEPS[provider])
        run = lambda: work.shared(step)
    else:
        run = {"packed row": work.packed, "prefix-grouper": work.prefix_grouper}[provider]
    truth, found = work.gradient(work.dense), work.gradient(run)
    error = float((found - truth).norm() / truth.norm())
    assert error < (5e-2 if torch.bfloat16 == DTYPE else 1e-5), error
    del truth, found
    metrics = step.metrics() if step else {}
    two = work.responses[:2]  # in the second microbatch gradients are there, as in later ones
    dense_bytes = extra_bytes(lambda: (work.dense(two), work.zero()))
    own_bytes = extra_bytes(lambda: (run(), work.zero()))
    before: list[float] = []

    def dense_first() -> None:
        before.append(work.time(work.dense))
        work.zero()

    benchmark.group = f"{shape.p}:{shape.s} x {shape.g}"
    benchmark.pedantic(
        lambda: (run(), synchronize()),
        setup=dense_first,
        rounds=ROUNDS,
    )
    if not benchmark.enabled:
        return
    times = benchmark.stats.stats.data
    ratios = [b / t for t, b in zip(times, before[-len(times) :])]
    speedup = statistics.median(ratios)
    bound = metrics.get("prefix/bound")
    benchmark.extra_info |= {
        "provider": provider,
        "prefix": list(shape),
        "route": "-" if step is None else ("shared" if metrics["prefix/shared"] else "dense"),
        "speedup": speedup,
        "speedup_range": [min(ratios), max(ratios)],
        "bound": bound,
        "share": speedup / bound if bound and metrics["prefix/shared"] else None,
        "error": error,
        "peak_mb": None if own_bytes is None else own_bytes / 2**20,
        "dense_peak_mb": None if dense_bytes is None else dense_bytes / 2**20,
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "versions": versions(("torch", "transformers", "prefix-grouper")),
        "commit": commit("rl", "triton_kernels"),
    }
