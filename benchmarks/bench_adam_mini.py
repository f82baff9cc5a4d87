"""The Adam-mini step against fused AdamW, other optimizers and other packages, as paired ratios.

    pip install --no-deps adam-mini==1.1.1 pytorch_optimizer==4.1.0 bitsandbytes torchao
    OMP_NUM_THREADS=1 pytest benchmarks/bench_adam_mini.py \
        --benchmark-json=benchmarks/results/bench_adam_mini.json
    python benchmarks/report.py benchmarks/results/bench_adam_mini.json

Llamas of about 10M, 47M and 100M fp32 parameters with random gradients; no forward or backward.
Packages that are not installed are skipped. `--benchmark-min-rounds=1` makes a short run of it
(default 5), `-k "10M and rows"` a part, `--benchmark-disable` only checks.

Ratio: before every timed step a step of torch's fused AdamW is timed, on a model of its own. So
both see the same machine, and find their tensors as far out of the caches as the other's pass
leaves them. Where tensors happen to lie in memory makes up to 8% between two equal models, most of
it by which of them was built first: both are built anew several times, in either order by turns.
The ratio is the geometric mean over these placements of the median over pairs; quartiles are of
all pairs.
`clip` does gradient clipping too: torch's clip_grad_norm_ before the step, ours within it.
Bytes of state: all tensors of the optimizer's state, each once.
Extra memory: by how much the resident memory of the process rises during one step, after freed
memory was given back to the system; whoever allocates it, Python or C++ (Linux only; on CUDA, the
peak of torch's allocator).
GB/s: the bytes that the update needs to move in its form, read and written, by the median time.

Our steps are compared with adam_mini_reference in fp64, by one parameter of every shape and kind of
blocks, and the bench refuses to time a wrong one; of others it checks that every parameter moved
against its gradient.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from measure import DEVICE, commit, device_name, extra_bytes, synchronize, versions
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw as adamw_update
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.optim import AdamMini, adam_mini_reference, native

SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0
WARMUP = 2


class Size(NamedTuple):
    """A Llama, how often it is built anew, and rounds in each place by --benchmark-min-rounds."""

    vocabulary: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    places: int
    rounds: int


SIZES = {
    "10M": Size(256, 384, 1024, 6, 6, 2, places=4, rounds=2),
    "47M": Size(2048, 768, 2048, 7, 12, 4, places=4, rounds=1),
    "100M": Size(4800, 1024, 2816, 8, 16, 4, places=2, rounds=2),
}


class Provider(NamedTuple):
    """An optimizer to time.

    Args:
        label: its name in tables.
        make: from the model; `clip` tells ours to clip within the step.
        entry_bytes: what a step has to move for each entry, at least; None where that is not known,
            and for ours, where it depends on the blocks.
        ours: it clips by itself.
        peer: of a package that may be missing here, or not run here.
    """

    label: str
    make: Callable[..., Optimizer]
    entry_bytes: int | None = None
    ours: bool = False
    peer: bool = False


def build_model(size: Size) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(DEVICE)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-2
    return model


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on norms: as AdamMini.for_model does."""
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def ours(label: str, **options: Any) -> Provider:
    def make(model: nn.Module, clip: bool) -> Optimizer:
        if DEVICE.type == "cpu" and options.get("fused") is None and native.load() is None:
            pytest.skip("the native step could not be compiled here, see the log")
        return AdamMini.for_model(
            model, max_grad_norm=CLIP if clip else None, **options, **SETTINGS
        )

    return Provider(label, make, ours=True)


def adamw(model: nn.Module, **options: bool) -> Optimizer:
    return torch.optim.AdamW(groups(model), **options, **SETTINGS)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(
        groups(model),
        lr=SETTINGS["lr"],
        momentum=SETTINGS["betas"][0],
        weight_decay=SETTINGS["weight_decay"],
        fused=True,
    )


def authors(model: nn.Module) -> Optimizer:
    package = pytest.importorskip("adam_mini", reason="adam-mini is not installed")
    config = model.config
    return package.Adam_mini(
        list(model.named_parameters()),
        dim=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        verbose=False,
        **SETTINGS,
    )


def pytorch_optimizer(model: nn.Module) -> Optimizer:
    package = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    config = model.config
    return package.AdamMini(
        model,
        num_embeds=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        **SETTINGS,
    )


def bitsandbytes(model: nn.Module) -> Optimizer:
    package = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return package.optim.AdamW8bit(groups(model), **SETTINGS)


def torchao(model: nn.Module) -> Optimizer:
    package = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    return package.AdamW8bit(groups(model), **SETTINGS)


PROVIDERS = {
    "snr": ours("trimtab, snr (default)", preset="snr"),
    "rows": ours("trimtab, rows", preset="rows"),
    "paper": ours("trimtab, paper", preset="paper"),
    "bf16-momentum": ours("trimtab, snr, bf16 momentum", momentum_dtype=torch.bfloat16),
    "snr-pytorch": ours("trimtab, snr, PyTorch alone", preset="snr", fused=False),
    "rows-pytorch": ours("trimtab, rows, PyTorch alone", preset="rows", fused=False),
    "adamw-fused": Provider("torch AdamW, fused", lambda model: adamw(model, fused=True), 28),
    "adamw-foreach": Provider("torch AdamW, foreach", lambda model: adamw(model, foreach=True)),
    "sgd-momentum": Provider("torch SGD with momentum, fused", sgd, 20),
    "authors": Provider("adam-mini", authors, peer=True),
    "pytorch-optimizer": Provider("pytorch-optimizer AdamMini", pytorch_optimizer, peer=True),
    "bitsandbytes": Provider("bitsandbytes AdamW8bit", bitsandbytes, peer=True),
    "torchao": Provider("torchao AdamW8bit, compiled", torchao, peer=True),
}
PACKAGES = ("torch", "transformers", "trimtab", "adam-mini", "pytorch_optimizer", "bitsandbytes",
            "torchao")  # fmt: skip


class Subject:
    """A model of its own with an optimizer, ready for steps."""

    def __init__(self, size: Size, provider: Provider, *, clip: bool) -> None:
        self.provider, self.clip = provider, clip
        self.model = build_model(size)
        self.parameters = list(self.model.parameters())
        self.n = sum(p.numel() for p in self.parameters)
        options = {"clip": clip} if provider.ours else {}
        self.optimizer = provider.make(self.model, **options)

    def step(self) -> None:
        if self.clip and not self.provider.ours:
            nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        synchronize()

    def bytes_to_move(self) -> int | None:
        if not self.provider.ours:
            entry = self.provider.entry_bytes
            return entry and self.n * (entry + 12 * self.clip)  # read g; read and write g
        return sum(self._entry_bytes(p) * p.numel() for p in self.parameters)

    def _entry_bytes(self, parameter: Tensor) -> int:
        kind = self.optimizer.layout(parameter).kind
        momentum = self.optimizer.state[parameter]["exp_avg"]
        twice = self.clip or kind == "column"  # sums of g^2 first
        return 12 + 2 * momentum.element_size() + 4 * twice + 8 * (kind == "elementwise")


class Pair:
    """A provider and the baseline it is measured by; `times` has the baseline's, place by place."""

    def __init__(self, size: Size, provider: Provider, rounds: int, *, clip: bool) -> None:
        self.size, self.provider, self.rounds, self.clip = size, provider, rounds, clip
        self.times: list[float] = []
        self.subject, self.baseline = self._built(baseline_first=True)
        (check_ours if provider.ours else check_direction)(self.subject)

    def time_baseline(self) -> None:
        done, rest = divmod(len(self.times), self.rounds)
        if done and not rest:
            del self.subject, self.baseline
            self.subject, self.baseline = self._built(baseline_first=done % 2 == 0)
        if not rest:
            for _ in range(WARMUP):
                self.baseline.step()
                self.subject.step()
        start = time.perf_counter()
        self.baseline.step()
        self.times.append(time.perf_counter() - start)

    def step(self) -> None:
        self.subject.step()

    def _built(self, *, baseline_first: bool) -> list[Subject]:
        gc.collect()  # models of earlier rounds and tests
        providers = [self.provider, PROVIDERS["adamw-fused"]]
        order = -1 if baseline_first else 1
        return [Subject(self.size, p, clip=self.clip) for p in providers[::order]][::order]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("clip", [False, True], ids=["step", "clip"])
@pytest.mark.parametrize("size_name", SIZES)
def test_adam_mini(benchmark, request, size_name, clip, provider):
    size = SIZES[size_name]
    rounds = size.rounds * request.config.getoption("benchmark_min_rounds")
    pair = Pair(size, PROVIDERS[provider], rounds, clip=clip)
    benchmark.group = f"{'clip and step' if clip else 'step'}, {size_name}"
    benchmark.pedantic(pair.step, setup=pair.time_baseline, rounds=size.places * rounds)
    if not benchmark.enabled:
        return
    mine = benchmark.stats.stats.data
    ratios = [one / other for one, other in zip(mine, pair.times, strict=True)]
    medians = [statistics.median(some) for some in batched(ratios, rounds)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    subject = pair.subject
    moved = subject.bytes_to_move()
    extra = extra_bytes(subject.step)
    benchmark.extra_info |= {
        "provider": subject.provider.label,
        "size": size_name,
        "clip": clip,
        "ratio": statistics.geometric_mean(medians),
        "ratio_quartiles": [low, high],
        "ratio_of_places": medians,
        "baseline_ms": 1e3 * statistics.median(pair.times),
        "gb_per_s": moved and moved / benchmark.stats.stats.median / 1e9,
        "state_bytes_per_parameter": state_bytes(subject.optimizer) / subject.n,
        "extra_mb": extra if extra is None else extra / 1e6,
        "parameters": subject.n,
        "tensors": len(subject.parameters),
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "versions": versions(PACKAGES),
        "commit": commit("optim", "triton_kernels"),
    }


def batched(values: list[float], n: int) -> list[list[float]]:
    return [values[i : i + n] for i in range(0, len(values), n)]


# Checks


def check_ours(subject: Subject) -> None:
    """Compares a second step with the definition, and elementwise blocks with torch's AdamW."""
    optimizer = subject.optimizer
    optimizer.step()
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    chosen = {(optimizer.layout(p), p.shape): p for p in subject.parameters}.values()
    keys = ("exp_avg", "exp_avg_sq")
    before = [
        [p.detach().double()] + [optimizer.state[p][key].double() for key in keys] for p in chosen
    ]
    scale = 1.0
    if subject.clip:
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in subject.parameters]
        scale = min(1.0, CLIP / (float(torch.stack(norms).norm()) + 1e-6))
    optimizer.step()
    for p, (param, *moments) in zip(chosen, before, strict=True):
        settings = {key: group_of[p][key] for key in SETTINGS}
        grad, layout = p.grad.double() * scale, optimizer.layout(p)
        expected = [adam_mini_reference(param, grad, *moments, layout, step=2, **settings)]
        if layout.kind == "elementwise":
            expected.append(adamw_step(param, grad, *moments, settings))
        for new_param, *new_moments in expected:
            close = torch.testing.assert_close
            close(p.detach().double(), new_param, rtol=3e-7, atol=1e-5 * settings["lr"])
            for key, moment in zip(keys, new_moments, strict=True):
                found = optimizer.state[p][key]
                rtol = 2**-7 if found.dtype == torch.bfloat16 else 1e-5
                close(found.double(), moment, rtol=rtol, atol=1e-30)


def adamw_step(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The second step of torch's AdamW."""
    param, exp_avg, exp_avg_sq = param.clone(), exp_avg.clone(), exp_avg_sq.clone()
    (beta1, beta2), rest = settings["betas"], {k: v for k, v in settings.items() if k != "betas"}
    adamw_update(
        *([t] for t in (param, grad, exp_avg, exp_avg_sq)),
        max_exp_avg_sqs=[],
        state_steps=[torch.tensor(1.0)],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        maximize=False,
        **rest,
    )
    return param, exp_avg, exp_avg_sq


def check_direction(subject: Subject) -> None:
    """Did every parameter move against its gradient? Of Gaussians, sign(g) has a cosine of 0.8."""
    label = subject.provider.label
    before = [p.detach().clone() for p in subject.parameters]
    try:
        subject.optimizer.step()
    except Exception as error:
        if not subject.provider.peer:
            raise
        pytest.skip(f"{label} does not run here: {type(error).__name__}: {error}")
    for p, old in zip(subject.parameters, before, strict=True):
        cosine = torch.cosine_similarity((old - p.detach()).flatten(), p.grad.flatten(), dim=0)
        assert cosine > 0.7, f"{label} moved {tuple(p.shape)}: {cosine:.2f}"


# What else is measured


def state_bytes(optimizer: Optimizer) -> int:
    """Of all tensors in the state; what tensor subclasses are made of, and nothing twice."""
    sizes: dict[int, int] = {}

    def add(tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
        else:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()

    for state in optimizer.state.values():
        for value in filter(torch.is_tensor, state.values()):
            add(value)
    return sum(sizes.values())
