"""Token statistics against torch and other packages, from logits and from hidden states, as ratios.

    pip install --no-deps trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1
    OMP_NUM_THREADS=2 pytest benchmarks/bench_token_stats.py \
        --benchmark-json=benchmarks/results/bench_token_stats.json
    python benchmarks/report.py benchmarks/results/bench_token_stats.json

Heads of Llama-3 (V = 128,256, D = 4096), Qwen (151,936; 3584), Gemma (262,144; 3840): 8192 tokens
in bf16 on a GPU; on a CPU 128 tokens, D = 256, fp32 and once bf16. Packages that are not installed,
or do not run on the device, are skipped. `--benchmark-disable` only checks, `-k` picks a part.

Providers differ in what they compute, and the table says so: `logp` alone, its `sum`, or `all` of
logp, entropy and sum_p2. `backward` includes the forward and takes the gradient of the sum of all
that is computed. "verl's formulas" are those of its helpers in eager torch, written here from their
definitions: row by row logsumexp, entropy by softmax times logits, sum_p2 by two logsumexps.

Ratio: before every timed call a baseline is timed, cross_entropy over the logits, for heads with
the product before it; so both see the same machine. The median over pairs, and quartiles.
Extra memory: by how much memory rises during a call (measure.py), above the inputs; backward has
the gradients in it.
`of_peak`, in the rows: the time of a copy of the bytes that the logits need to be moved (for heads:
of the products that they need), timed in the same run, over the median time.

Each provider is compared with the float64 reference first, and not timed if it is wrong.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, commit, device_name, extra_bytes, synchronize, versions
from torch import Tensor

from trimtab.triton_kernels.linear_token_stats import linear_token_stats
from trimtab.triton_kernels.token_stats import token_stats, token_stats_reference

GPU = DEVICE.type == "cuda"
PRUNE = 2.2603e-6  # e^-13


class Shape(NamedTuple):
    """Tokens, vocabulary, width, dtype."""

    n: int
    v: int
    d: int
    dtype: torch.dtype


def shapes() -> dict[str, Shape]:
    heads = {"llama3": (128_256, 4096), "qwen": (151_936, 3584), "gemma": (262_144, 3840)}
    if GPU:
        bf16 = torch.bfloat16
        return {f"{name}, bf16": Shape(8192, v, d, bf16) for name, (v, d) in heads.items()}
    found = {f"{name}, fp32": Shape(128, v, 256, torch.float32) for name, (v, _) in heads.items()}
    return found | {"llama3, bf16": Shape(128, 128_256, 256, torch.bfloat16)}


SHAPES = shapes()


class Provider(NamedTuple):
    """A function of (logits, labels) or (hidden, weight, labels).

    Args:
        computes: "all" of logp, entropy and sum_p2, "logp", its "sum", or "nothing" of them.
        call: returns them, in this order.
        tolerance: of its check. Those that round logits or products to bf16 need a larger one.
        options: of the reference that it is compared with.
    """

    computes: str
    call: Callable[..., list[Tensor]]
    tolerance: float = 0.2
    options: dict[str, Any] = {}  # noqa: RUF012


def torch_statistics(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """As most people write it."""
    logp = logits.float().log_softmax(-1)
    p = logp.exp()
    chosen = logp.gather(-1, labels[:, None]).squeeze(-1)
    return [chosen, -(p * logp).sum(-1), p.square().sum(-1)]


def verl_statistics(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """logprobs, entropy and sum of squares as verl's helpers define them."""
    if logits.dtype == torch.float32:
        chosen = logits.gather(-1, labels[:, None]).squeeze(-1)
        logp = chosen - torch.stack([row.logsumexp(-1) for row in logits])
    else:
        rows = zip(logits, labels)
        logp = torch.stack([row.log_softmax(-1)[label] for row, label in rows])
    p = logits.softmax(-1)
    entropy = logits.logsumexp(-1) - (p * logits).sum(-1)
    sum_p2 = ((2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)).exp()
    return [logp, entropy, sum_p2]


def trl_logp(logits: Tensor, labels: Tensor) -> list[Tensor]:
    utils = pytest.importorskip("trl.trainer.utils", exc_type=ImportError)
    return [utils.selective_log_softmax(logits, labels)]


def ours(logits: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    return list(token_stats(logits, labels, **options)[:3])


def ours_linear(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    return list(linear_token_stats(hidden, weight, labels, **options)[:3])


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    cce = pytest.importorskip("cut_cross_entropy")
    implementation = "cce" if GPU else "torch_compile"
    loss = cce.linear_cross_entropy(hidden, weight, labels, reduction="none", impl=implementation)
    return [-loss]


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    if not GPU:
        pytest.skip("Liger's kernels are Triton only")
    module = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    apply = module.LigerFusedLinearCrossEntropyFunction.apply
    return [-apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum")[0]]


def of_logits(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    return lambda hidden, weight, labels: function(hidden @ weight.t(), labels)


LOGITS = {
    "trimtab": Provider("all", ours, 1e-4),
    "trimtab, pruned": Provider(
        "all", lambda z, y: ours(z, y, prune=PRUNE), 1e-4, {"prune": PRUNE}
    ),
    "cross_entropy": Provider("logp", lambda z, y: [-F.cross_entropy(z, y, reduction="none")]),
    "torch": Provider("all", torch_statistics),
    "torch, compiled": Provider("all", torch.compile(torch_statistics, dynamic=False)),
    "verl's formulas": Provider("all", verl_statistics),
    "TRL selective_log_softmax": Provider("logp", trl_logp),
}
LINEAR = {
    "trimtab": Provider("all", ours_linear, 1e-4),
    "trimtab, pruned": Provider(
        "all", lambda h, w, y: ours_linear(h, w, y, prune=PRUNE), 1e-4, {"prune": PRUNE}
    ),
    "product, then trimtab": Provider("all", of_logits(ours), True),
    "product, then cross_entropy": Provider("logp", of_logits(LOGITS["cross_entropy"].call)),
    "product, then torch": Provider("all", of_logits(torch_statistics)),
    "product alone": Provider("nothing", lambda h, w, y: [h @ w.t()]),
    "cut-cross-entropy": Provider("logp", cut_cross_entropy),
    "Liger": Provider("sum", liger),
}
BASELINE = {"logits": "cross_entropy", "linear": "product, then cross_entropy"}
PROVIDERS = {"logits": LOGITS, "linear": LINEAR}
CASES = [
    pytest.param(kind, name, shape, backward, id=f"{kind}-{shape}-{backward}-{name}")
    for kind, providers in PROVIDERS.items()
    for shape in SHAPES
    for backward in ("forward", "backward")
    for name in providers
    if not (backward == "backward" and name == "product alone")
]
PACKAGES = ("torch", "triton", "trimtab", "trl", "liger-kernel", "cut-cross-entropy")


class Work:
    """Inputs of one shape, and the call that is timed."""

    def __init__(self, kind: str, shape: Shape, backward: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.backward = backward
        labels = torch.randint(shape.v, (shape.n,), generator=generator)
        self.labels = labels.to(DEVICE)
        if kind == "logits":
            logits = 3 * torch.randn(shape.n, shape.v, generator=generator)
            inputs = [logits]
        else:
            hidden = torch.randn(shape.n, shape.d, generator=generator)
            weight = 3 * shape.d**-0.5 * torch.randn(shape.v, shape.d, generator=generator)
            inputs = [hidden, weight]
        self.inputs = [x.to(DEVICE, shape.dtype).requires_grad_(backward) for x in inputs]

    def drop_gradients(self) -> None:
        for x in self.inputs:
            x.grad = None

    def run(self, provider: Provider) -> None:
        self.drop_gradients()
        with torch.set_grad_enabled(self.backward):
            outputs = provider.call(*self.inputs, self.labels)
        if self.backward:
            sum(output.sum() for output in outputs).backward()

    def time(self, provider: Provider) -> float:
        synchronize()
        start = time.perf_counter()
        self.run(provider)
        synchronize()
        return time.perf_counter() - start

    def check(self, provider: Provider) -> None:
        """Refuses a provider whose numbers are not those of float64, on a few rows."""
        if provider.computes == "nothing":
            return
        first, labels = self.inputs[0][:8].detach(), self.labels[:8]
        inputs = [first, *(x.detach() for x in self.inputs[1:])]
        logits = first.double()
        if len(inputs) == 2:
            logits = logits @ inputs[1].double().t()
        truth = token_stats_reference(logits, labels, **provider.options)[:3]
        if provider.computes == "sum":
            truth = [truth[0].sum()]
        with torch.no_grad():
            found = provider.call(*inputs, labels)
        for value, expected in zip(found, truth):
            tolerance = {"atol": provider.tolerance, "rtol": provider.tolerance}
            torch.testing.assert_close(value.double(), expected, **tolerance)


def least_seconds(kind: str, work: Work, backward: bool) -> tuple[float, str]:
    """Of a copy of the bytes that logits need, or of the products that a head needs, timed here."""
    with torch.no_grad():
        if kind == "logits":
            source = work.inputs[0]
            target = torch.empty_like(source)
            # a read forward (half a copy); a read and a write more backward
            share, measured = (1.5 if backward else 0.5), lambda: target.copy_(source)
            name = "copy"
        else:
            hidden, weight = work.inputs
            share, measured = (4 if backward else 1), lambda: hidden @ weight.t()
            name = "product"
        times = []
        for _ in range(5):
            synchronize()
            start = time.perf_counter()
            measured()
            synchronize()
            times.append(time.perf_counter() - start)
    return share * statistics.median(times), name


@pytest.mark.parametrize(("kind", "name", "shape", "mode"), CASES)
def test_token_stats(benchmark, kind, name, shape, mode):
    backward = mode == "backward"
    provider = PROVIDERS[kind][name]
    baseline = PROVIDERS[kind][BASELINE[kind]]
    work = Work(kind, SHAPES[shape], backward)
    work.check(provider)
    work.run(provider)  # compiles
    work.drop_gradients()
    extra = extra_bytes(lambda: (work.run(provider), work.drop_gradients()))
    before: list[float] = []
    benchmark.group = f"{kind} {shape} {mode}"
    benchmark.pedantic(
        lambda: (work.run(provider), synchronize()),
        setup=lambda: before.append(work.time(baseline)),
        rounds=7,
        warmup_rounds=1,
    )
    if not benchmark.enabled:
        return
    times = benchmark.stats.stats.data
    ratios = [t / b for t, b in zip(times, before[-len(times) :])]
    floor, of = least_seconds(kind, work, backward)
    low, _, high = statistics.quantiles(ratios, n=4)
    benchmark.extra_info |= {
        "table": f"{kind}, {mode}",
        "provider": name,
        "computes": provider.computes,
        "shape": shape,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [low, high],
        "extra_mb": None if extra is None else extra / 2**20,
        "logits_mb": SHAPES[shape].n * SHAPES[shape].v * SHAPES[shape].dtype.itemsize / 2**20,
        "of_peak": floor / statistics.median(times),
        "peak": of,
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "versions": versions(PACKAGES),
        "commit": commit("triton_kernels"),
    }
