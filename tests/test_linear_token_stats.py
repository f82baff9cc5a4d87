import math
from unittest import mock

import pytest
import torch
from closeness import assert_as_close_as
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from trimtab.triton_kernels import _linear_token_stats_cpu as cpu
from trimtab.triton_kernels import _linear_token_stats_triton as kernels
from trimtab.triton_kernels import linear_token_stats as module
from trimtab.triton_kernels.linear_token_stats import (
    linear_token_stats,
    linear_token_stats_reference,
)
from trimtab.triton_kernels.token_stats import TokenStats, token_stats

pytestmark = pytest.mark.interpreter

INF = math.inf
DIFFERENTIABLE = ("logp", "entropy", "sum_p2", "logsumexp", "log_kept_mass")
TILE_N, TILE_V, TILE_D = 16, 32, 16
# (N, V, D): least; exactly one tile; one past it in each size; several tiles and chunks, primes
SHAPES = [(1, 2, 3), (16, 32, 16), (17, 33, 17), (37, 101, 40)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles at sizes that the interpreter can do; chunks of two by three tiles."""
    small = kernels.Tiles(TILE_N, TILE_V, TILE_D, 4, 2)
    monkeypatch.setattr(kernels, "TILES", {2: small, 4: small})
    monkeypatch.setattr(kernels, "CHUNK_TOKENS", 2 * TILE_N)
    monkeypatch.setattr(kernels, "SPLITS", 2)
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setattr(kernels, "CHUNK_SHARE", 1)
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 2 * 3 * TILE_N * TILE_V * 4)
    monkeypatch.setattr(cpu, "ROWS", TILE_N)
    monkeypatch.setattr(cpu, "ENTRIES", TILE_N * TILE_V)


def tiled(*args, **options):
    """`linear_token_stats` where no kernel can run."""
    with mock.patch.object(module, "runs_kernel", return_value=False):
        return linear_token_stats(*args, **options)


both_paths = pytest.mark.parametrize("fn", [linear_token_stats, tiled], ids=["kernel", "tiled"])
all_paths = pytest.mark.parametrize(
    "fn",
    [linear_token_stats, tiled, linear_token_stats_reference],
    ids=["kernel", "tiled", "reference"],
)


def example(shape, device, *, dtype=torch.float32, scale=1.0):
    """hidden (rows strided), weight (rows strided), bias, labels."""
    torch.manual_seed(0)
    n, v, d = shape
    hidden = (scale * torch.randn(n, d + 8)).to(device, dtype)[:, :d]
    weight = torch.randn(v, d + 8).to(device, dtype)[:, :d]
    return hidden, weight, torch.randn(v).to(device, dtype), torch.randint(v, (n,), device=device)


def peaked(device, *, tiles=8, d=24):
    """Rows whose kept entries lie in one tile or two of eight; labels in the tile of the maximum.

    Token blocks 0 and 1 look at tiles 1 and 4; the third at both; the fourth is ignored.
    """
    torch.manual_seed(0)
    n, v = 4 * TILE_N, tiles * TILE_V
    of_tile = torch.arange(v) // TILE_V
    weight = torch.randn(v, d) * 0.1
    weight[torch.arange(v), of_tile] += 4.0
    look = torch.tensor([1, 4, 1, 5]).repeat_interleave(TILE_N)
    look[2 * TILE_N + 3] = 4
    hidden = torch.randn(n, d) * 0.1
    hidden[torch.arange(n), look] += 6.0
    labels = look * TILE_V + torch.randint(TILE_V, (n,))
    labels[3 * TILE_N :] = -100
    live = torch.zeros(4, tiles, dtype=torch.bool)
    live[0, 1] = live[1, 4] = live[2, 1] = live[2, 4] = True
    return hidden.to(device), weight.to(device), labels.to(device), live.to(device)


def upstream_of(stats, names=DIFFERENTIABLE):
    names = [name for name in names if getattr(stats, name) is not None]
    torch.manual_seed(1)
    return {name: torch.randn(stats.logp.shape).to(stats.logp) for name in names}


def grads_of(stats, inputs, upstream):
    outputs = [getattr(stats, name) for name in upstream]
    return torch.autograd.grad(outputs, inputs, list(upstream.values()), retain_graph=True)


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-V{s[1]}-D{s[2]}")
@both_paths
def test_matches_reference(fn, shape, prune, dtype, device):
    check_against_reference(fn, shape, device, dtype=dtype, prune=prune, temperature=1.3)


# past one tile of 512 x 1024 in both directions; the largest vocabulary; thousands of tokens
@pytest.mark.parametrize(
    "shape", [(515, 2500, 8), (2, 262_144, 3), (3001, 37, 5)], ids=lambda s: f"N{s[0]}-V{s[1]}"
)
def test_tiles_of_their_real_size_match_reference(shape, device, monkeypatch):
    monkeypatch.setattr(cpu, "ROWS", 512)
    monkeypatch.setattr(cpu, "ENTRIES", 512 * 1024)
    check_against_reference(tiled, shape, device, dtype=torch.float32, prune=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 5.0, "bias": True},
        {"softcap": 5.0, "bias": True, "prune": 1e-2, "temperature": 0.7},
        {"temperature": 0.01, "scale": 0.1, "bias": True},
        {"temperature": 100.0, "prune": 0.9},
    ],
    ids=["cap", "cap-pruned", "cold", "hot-pruned"],
)
@both_paths
def test_options_match_reference(fn, options, device):
    # The backward computes z again. Where the product's order depends on the tile, as that of the
    # interpreter's BLAS does on some CPUs, a p of 1 is off by ulp(z) / T; the reference's is exact.
    slack = 40.0 if options.get("temperature") == 0.01 else 4.0
    check_against_reference(fn, (37, 101, 24), device, dtype=torch.float32, slack=slack, **options)


ORDERS = 8  # of the sums over D: how much one of them errs is luck, up to 29 times when cold


def check_against_reference(
    fn, shape, device, *, dtype, bias=False, scale=1.0, slack=4.0, **options
):
    """The kernel errs at most `slack` times as much as the worst of the reference's orders."""
    hidden, weight, offsets, labels = example(shape, device, dtype=dtype, scale=scale)
    offsets *= scale
    if shape[0] > 2:
        labels[2] = -100

    def outputs(fn, dtype, order=None):
        h, w = (hidden, weight) if order is None else (hidden[:, order], weight[:, order])
        inputs = leaves(h.to(dtype), w.to(dtype), offsets.to(dtype))
        used = inputs if bias else inputs[:2]
        stats = fn(*inputs[:2], labels, bias=inputs[2] if bias else None, **options)
        upstreams = {name: {name: g} for name, g in upstream_of(stats).items()}
        upstreams["three"] = upstream_of(stats, DIFFERENTIABLE[:3])
        upstreams["all"] = upstream_of(stats)
        grads = {}
        for name, upstream in upstreams.items():
            for which, grad in zip(("hidden", "weight", "bias"), grads_of(stats, used, upstream)):
                ordered = order is not None and which != "bias"
                grads[name, which] = grad[:, order.argsort()] if ordered else grad
        return stats, grads

    torch.manual_seed(2)
    orders = [torch.randperm(shape[2], device=device) for _ in range(ORDERS)]
    kernel, kernel_grads = outputs(fn, dtype)
    references = [outputs(linear_token_stats_reference, dtype, order) for order in orders]
    truth, truth_grads = outputs(linear_token_stats_reference, torch.float64)

    def check(k, rs, t, name):
        worst = max(rs, key=lambda r: (r.double() - t).abs().max().item())
        assert_as_close_as(k, worst, t, name=name, slack=slack)

    for i, (name, k, t) in enumerate(zip(TokenStats._fields, kernel, truth, strict=True)):
        if t is None:
            assert k is None or name == "skipped_fraction"
        elif t.is_floating_point():
            assert k.dtype == torch.float32
            check(k, [reference[i] for reference, _ in references], t, name)
        else:
            torch.testing.assert_close(k, t, msg=name)
    for name, t in truth_grads.items():
        assert kernel_grads[name].dtype == dtype
        check(
            kernel_grads[name],
            [grads[name] for _, grads in references],
            t,
            f"grad of {' for '.join(name)}",
        )


@pytest.mark.parametrize("prune", [None, 0.1], ids=["whole", "pruned"])
def test_gradients_are_derivatives(prune, device):
    hidden, weight, bias, labels = example((5, 37, 4), device, scale=0.5)
    labels[1] = -100
    inputs = [x.double().requires_grad_() for x in (hidden, weight, bias)]

    def differentiable(hidden, weight, bias):
        stats = linear_token_stats(
            hidden, weight, labels, bias=bias, temperature=0.7, softcap=3.0, prune=prune
        )
        return [o for o in (getattr(stats, name) for name in DIFFERENTIABLE) if o is not None]

    assert torch.autograd.gradcheck(differentiable, inputs)


@both_paths
def test_equals_the_statistics_of_the_logits(fn, device):
    hidden, weight, bias, labels = example((20, 100, 24), device)
    for prune in (None, 1e-2):
        ours = fn(hidden, weight, labels, bias=bias, prune=prune)
        theirs = token_stats(hidden @ weight.t() + bias, labels, prune=prune)
        for name, a, b in zip(TokenStats._fields, ours, theirs):
            if b is not None:
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5, msg=name)


@both_paths
def test_pruned_backward_skips_the_tiles_without_a_kept_entry_exactly(fn, device):
    hidden, weight, labels, live = peaked(device)
    stats = fn(hidden, weight, labels, prune=1e-3)
    share = 1 - live.float().mean(1)
    share[3] = 0  # ignored rows
    torch.testing.assert_close(stats.skipped_fraction, share.repeat_interleave(TILE_N))
    grads = compare_gradients(fn, hidden, weight, labels, DIFFERENTIABLE[:3])
    dead = ~live.any(0).repeat_interleave(TILE_V)
    assert (grads[1][dead] == 0).all() and (grads[1][~dead] != 0).any(1).all()


# a tile of the other split, where the row's maximum is not known; one after it in the same split
@pytest.mark.parametrize("tile", [7, 3])
@both_paths
def test_a_label_outside_the_safe_set_keeps_its_tile_only(fn, tile, device):
    """It is no help to the bounds, so tiles before the maximum's are computed, and found dead."""
    hidden, weight, labels, live = peaked(device)
    labels[5] = tile * TILE_V + 3
    live[0, tile] = True
    stats = fn(hidden, weight, labels, prune=1e-3)
    expected = 1 - live[:3].float().mean(1).repeat_interleave(TILE_N)
    torch.testing.assert_close(stats.skipped_fraction[: 3 * TILE_N], expected)
    truth = linear_token_stats_reference(hidden, weight, labels, prune=1e-3)
    torch.testing.assert_close(stats.logp, truth.logp, atol=1e-5, rtol=1e-5)
    assert not stats.in_safe_set[5] and torch.equal(stats.safe_count, truth.safe_count)
    compare_gradients(fn, hidden, weight, labels, DIFFERENTIABLE[:3], kept=TILE_V + 1)


@pytest.mark.parametrize("path", ["kernel", "tiled"])
def test_skipped_tiles_are_not_computed(path, device):
    """Of 32 tiles 4 are live: the pruned sweep and the backward compute no others."""
    hidden, weight, labels, live = peaked(device)
    x, w = leaves(hidden, weight)
    if path == "kernel":
        # tiles that are not written hold NaN (conftest fills torch.empty); reading one would show
        seen = []
        multiply = kernels._multiply

        def watched(a, b, out, k, live, *args, **options):
            seen.append(None if live is None else int(live.sum()))
            return multiply(a, b, out, k, live, *args, **options)

        with mock.patch.object(kernels, "_multiply", watched):
            linear_token_stats(x, w, labels, prune=1e-3).logp.sum().backward()
        assert sum(seen) == 2 * int(live.sum())  # for hidden and for weight
        assert x.grad.isfinite().all() and w.grad.isfinite().all()
        return
    computed = []
    tile = cpu.Head.tile

    def counted(self, *args):
        computed.append(1)
        return tile(self, *args)

    with mock.patch.object(cpu.Head, "tile", counted):
        stats = tiled(x, w, labels, prune=1e-3)
        assert len(computed) == 3 * 8 + 4  # a sweep over the live rows, and the kept tiles
        computed.clear()
        stats.logp.sum().backward()
        assert len(computed) == 4


@both_paths
def test_gradient_of_the_whole_softmax_is_not_skipped(fn, device):
    """Under pruning logsumexp and log_kept_mass have a gradient outside K."""
    hidden, weight, labels, _ = peaked(device)
    compare_gradients(fn, hidden, weight, labels, ["logsumexp"])
    x, w = leaves(0.2 * hidden, weight)  # less peaked: the kept mass is not 1
    t, u = leaves(0.2 * hidden, weight)
    fn(x, w, labels, prune=1e-3).log_kept_mass.sum().backward()
    linear_token_stats_reference(t, u, labels, prune=1e-3).log_kept_mass.sum().backward()
    torch.testing.assert_close((x.grad, w.grad), (t.grad, u.grad), atol=1e-5, rtol=1e-4)


def compare_gradients(fn, hidden, weight, labels, names, kept=TILE_V):
    """Those of `fn`, pruned, after comparison with float64."""

    def run(fn, dtype):
        inputs = leaves(hidden.to(dtype), weight.to(dtype))
        stats = fn(*inputs, labels, prune=1e-3)
        assert stats.safe_count.max() <= kept
        return grads_of(stats, inputs, upstream_of(stats, names))

    grads = run(fn, torch.float32)
    reference = run(linear_token_stats_reference, torch.float32)
    truth = run(linear_token_stats_reference, torch.float64)
    for which, k, r, t in zip(("hidden", "weight"), grads, reference, truth):
        assert_as_close_as(k, r, t, name=f"{names} for {which}")
    return grads


@both_paths
def test_threshold_leaves_out_small_probabilities_only(fn, device):
    hidden, weight, labels, _ = peaked(device)
    # A label that the row does not look at: its tile stays, and its logit is no help to the bounds.
    labels[5] = 7 * TILE_V + 3

    def run(fn, **options):
        x, w = leaves(hidden, weight)
        stats = fn(x, w, labels, **options)
        grads = grads_of(stats, (x, w), {"logp": torch.ones_like(stats.logp)})
        return stats, grads

    stats, grads = run(fn, skip_below=1e-4)
    exact, exact_grads = run(linear_token_stats_reference)
    torch.testing.assert_close(stats.logp, exact.logp, atol=1e-5, rtol=1e-5)
    assert stats.skipped_fraction[0] <= 6 / 8 and stats.skipped_fraction[TILE_N] == 7 / 8
    x, w = leaves(hidden[TILE_N:], weight)
    rest = fn(x, w, labels[TILE_N:], skip_below=1e-4)
    seen = grads_of(rest, (x, w), {"logp": torch.ones_like(rest.logp)})
    assert (seen[1][0:TILE_V] == 0).all() and (exact_grads[1][0:TILE_V] != 0).any()
    assert grads[1][labels[5]].abs().max() > 1
    left_out = 1e-4 * len(weight) * weight.abs().max()
    assert (grads[0] - exact_grads[0]).abs().max() < left_out
    stats, grads = run(fn, skip_below=1e-30)
    assert (stats.skipped_fraction == 0).all()
    for k, t in zip(grads, exact_grads):
        torch.testing.assert_close(k, t, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert fn(hidden, weight, labels, skip_below=1e-4).skipped_fraction is None


@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
@all_paths
def test_ignored_rows_are_zero(fn, prune, device):
    """Also when their hidden states are NaN, and when they fill a token block."""
    hidden, weight, _, labels = example((3 * TILE_N, 50, 20), device)
    labels[3] = 7
    labels[TILE_N : 2 * TILE_N] = 7
    ignored = labels == 7
    ignored[:] = False
    ignored[3] = True
    ignored[TILE_N : 2 * TILE_N] = True
    labels[~ignored & (labels == 7)] = 8
    hidden = hidden.clone()
    hidden[ignored] = math.nan
    x, w = leaves(hidden, weight)
    stats = fn(x, w, labels, prune=prune, ignore_index=7)
    for name, value in zip(TokenStats._fields, stats, strict=True):
        if value is not None:
            assert (value[ignored] == (name == "in_safe_set")).all(), name
    grads = grads_of(stats, (x, w), upstream_of(stats))
    assert (grads[0][ignored] == 0).all() and (grads[0][~ignored] != 0).any(1).all()
    assert grads[1].isfinite().all() and (grads[1] != 0).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter
@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@both_paths
def test_broken_rows(fn, bad, prune, device):
    hidden, weight, _, labels = example((20, 100, 24), device)
    weight = weight.abs()
    hidden = hidden.clone()
    hidden[1, 3] = bad  # -inf: no finite logit
    x, w = leaves(hidden, weight)
    stats = fn(x, w, labels, prune=prune)
    assert stats.broken.tolist() == [n == 1 for n in range(20)]
    for name in ("logp", "entropy", "sum_p2", "logsumexp", "max_logit"):
        assert getattr(stats, name).isnan().tolist() == stats.broken.tolist(), name
    if bad != -INF:  # masked everywhere: no gradient reaches it
        assert grads_of(stats, (x,), {"logp": torch.ones_like(stats.logp)})[0][1].isnan().any()

    stats = fn(x, w, labels, prune=prune, nonfinite="skip")
    assert stats.broken.sum() == 1 and stats.logp[1] == 0
    grads = grads_of(stats, (x, w), upstream_of(stats))
    assert grads[0].isfinite().all() and (grads[0][1] == 0).all() and grads[1].isfinite().all()
    keep = torch.arange(20) != 1
    rest = fn(*leaves(hidden[keep], weight), labels[keep], prune=prune)
    torch.testing.assert_close(stats.logp[keep], rest.logp)
    with pytest.raises(ValueError, match=r" 1 of 20 rows.* row 1"):
        fn(x, w, labels, prune=prune, nonfinite="raise")


@both_paths
def test_skipped_rows_do_not_move_the_tiles_of_others(fn, device):
    """A broken row that is skipped leaves the blocks of rows as they were."""
    n, v = 2 * TILE_N + 1, 4 * TILE_V
    weight = torch.randn(v, 8, generator=torch.Generator().manual_seed(0)).to(device) * 0.1
    hidden = torch.zeros(n, 8, device=device)
    weight[torch.arange(v), torch.arange(v) // TILE_V] += 4.0
    look = torch.zeros(n, dtype=torch.int64)
    look[-1] = 3
    hidden[torch.arange(n), look] = 6.0
    labels = (look * TILE_V).to(device)
    ignoring = labels.clone()
    ignoring[0] = -100
    broken = hidden.clone()
    broken[0] = math.nan
    for options in ({"prune": 1e-3}, {"skip_below": 1e-3}):
        grads = []
        for h, y in ((broken, labels), (hidden, ignoring)):
            x, w = leaves(h, weight)
            stats = fn(x, w, y, nonfinite="skip", **options)
            stats.logp[-1].backward()
            grads.append((x.grad, w.grad))
        torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)
        assert grads[0][0][-1].abs().max() > 1e-3


@both_paths
def test_a_weight_of_nan_reaches_no_ignored_row(fn, device):
    hidden, weight, _, labels = example((20, 100, 24), device)
    labels[4] = -100
    weight = weight.clone()
    weight[7] = math.nan
    x = hidden.clone().requires_grad_()
    fn(x, weight, labels).logp.sum().backward()
    assert (x.grad[4] == 0).all()


@pytest.mark.parametrize("precision", ["high", "medium"])
@both_paths
def test_rounded_products_have_no_label_floor(fn, precision, device):
    """What a tile computes in tf32 or bf16, a bound in fp32 does not bound."""
    hidden, weight, labels, _ = peaked(device)
    labels[:3] = 7 * TILE_V
    torch.set_float32_matmul_precision(precision)
    try:
        stats = fn(hidden, weight, labels, prune=1e-3)
    finally:
        torch.set_float32_matmul_precision("highest")
    truth = linear_token_stats_reference(hidden, weight, labels, prune=1e-3)
    torch.testing.assert_close(stats.logp, truth.logp, atol=0.2, rtol=1e-2)


@both_paths
def test_checkpointing_recomputes_it(fn, device):
    hidden, weight, _, labels = example((20, 100, 24), device)

    def logp(x):
        return fn(x, weight, labels, prune=1e-2).logp

    plain, again = leaves(hidden, hidden)
    logp(plain).sum().backward()
    checkpoint(logp, again, use_reentrant=False).sum().backward()
    assert torch.equal(plain.grad, again.grad)


@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
@both_paths
def test_extreme_logits_stay_finite(fn, prune, device):
    """+-1e4: a one-hot row, a row of equal logits, a label far from the maximum."""
    v = 100
    weight = torch.zeros(v, 4, device=device)
    weight[70, 0], weight[:, 1], weight[5, 0] = 1e4, 1.0, -1e4
    hidden = torch.tensor([[1.0, 0, 0, 0], [0, 1e4, 0, 0], [1.0, 0, 0, 0]], device=device)
    labels = torch.tensor([70, 3, 5], device=device)
    x, w = leaves(hidden, weight)
    stats = fn(x, w, labels, prune=prune)
    expected = torch.tensor([0.0, -math.log(v), -2e4], device=device)
    torch.testing.assert_close(stats.logp, expected)
    entropy = torch.tensor([0.0, math.log(v), 0.0], device=device)
    torch.testing.assert_close(stats.entropy, entropy, atol=1e-5, rtol=1e-5)
    assert all(g.isfinite().all() for g in grads_of(stats, (x, w), upstream_of(stats)))
    if prune is not None:
        assert stats.safe_count.tolist() == [1, v, 2]
        assert stats.in_safe_set.tolist() == [True, True, False]


@both_paths
def test_only_needed_gradients(fn, device):
    hidden, weight, bias, labels = example((20, 100, 24), device)
    expected = None
    for needs in (
        (True, True, True),
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ):
        inputs = [x.clone().requires_grad_(need) for x, need in zip((hidden, weight, bias), needs)]
        fn(*inputs[:2], labels, bias=inputs[2]).entropy.sum().backward()
        grads = [x.grad for x in inputs]
        expected = expected or grads
        for grad, e, need in zip(grads, expected, needs):
            assert torch.equal(grad, e) if need else grad is None


@both_paths
def test_same_bits_every_time(fn, device):
    hidden, weight, _, labels = example((37, 101, 20), device)
    runs = []
    for _ in range(2):
        x, w = leaves(hidden, weight)
        stats = fn(x, w, labels, prune=1e-2)
        runs.append((*stats[:6], *grads_of(stats, (x, w), upstream_of(stats))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@both_paths
def test_autocast_runs_in_its_dtype(fn, device):
    hidden, weight, bias, labels = example((20, 100, 24), device)
    x, w, b = leaves(hidden, weight, bias)
    with torch.autocast(device, torch.bfloat16):
        stats = fn(x, w, labels, bias=b)
    expected = fn(x.bfloat16(), w.bfloat16(), labels, bias=b.bfloat16())
    assert torch.equal(stats.logp, expected.logp)
    stats.logp.sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32
    for prune in (None, 1e-2):
        grads = []
        for inside in (True, False):  # Lightning calls backward inside
            inputs = leaves(hidden, weight, bias)
            with torch.autocast(device, torch.bfloat16):
                stats = fn(*inputs[:2], labels, bias=inputs[2], prune=prune)
            with torch.autocast(device, torch.bfloat16, enabled=inside):
                stats.logp.sum().backward()
            grads.append([t.grad for t in inputs])
        assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
@all_paths
def test_no_tokens(fn, prune, device):
    _, weight, bias, _ = example((1, 50, 8), device)
    hidden = torch.zeros(0, 8, device=device, requires_grad=True)
    w = weight.clone().requires_grad_()
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    stats = fn(hidden, w, labels, bias=bias, prune=prune)
    assert all(value.shape == (0,) for value in stats if value is not None)
    grads = grads_of(stats, (hidden, w), upstream_of(stats))
    assert grads[0].shape == (0, 8) and (grads[1] == 0).all()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.nbytes)
        return out


@both_paths
def test_no_temporary_is_larger_than_the_weight(fn, device):
    """The logits would be 4 times as large. (The interpreter copies what a kernel is given.)"""
    hidden, weight = torch.randn(32, 8, device=device), torch.randn(1024, 8, device=device)
    labels = torch.randint(1024, (32,), device=device)
    for prune in (None, 1e-2):
        x = hidden.clone().requires_grad_()
        with Largest() as watch:
            stats = fn(x, weight, labels, prune=prune)
            (stats.logp + stats.entropy).sum().backward()
        assert watch.bytes <= weight.nbytes


def test_temporaries_do_not_grow_with_the_vocabulary(device):
    largest = []
    for v in (2048, 4096):
        hidden, weight, _, labels = example((32, v, 8), device)
        x = hidden.clone().requires_grad_()
        with Largest() as watch:
            stats = tiled(x, weight, labels, prune=1e-2)
            (stats.logp + stats.entropy).sum().backward()
        largest.append(watch.bytes)
    assert largest[0] == largest[1]


HIDDEN, WEIGHT = torch.zeros(3, 4), torch.zeros(5, 4)
LABELS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.zeros(1, 3, 4)}, r"hidden \[N, D\].*\(1, 3, 4\)"),
        ({"weight": torch.zeros(5, 6)}, r"\(3, 4\) and \(5, 6\)"),
        ({"weight": torch.zeros(0, 4)}, r"V and D > 0.*\(0, 4\)"),
        ({"labels": LABELS[:2]}, r"labels of shape \[3\], got \(2,\)"),
        ({"bias": torch.zeros(4)}, r"bias of shape \[5\], got \(4,\)"),
        ({"hidden": HIDDEN.bfloat16()}, r"weight of torch\.bfloat16, got torch\.float32"),
        ({"bias": torch.zeros(5).half()}, r"bias of torch\.float32, got torch\.float16"),
        ({"hidden": HIDDEN.int(), "weight": WEIGHT.int()}, r"torch\.int32"),
        ({"labels": LABELS.int()}, r"int64.*torch\.int32"),
        ({"weight": WEIGHT.to("meta")}, r"weight is on meta"),
        ({"weight": torch.zeros(4, 5).t()}, r"weight must be contiguous along D.*\(1, 5\)"),
        ({"bias": torch.zeros(10)[::2]}, r"bias must be contiguous.*\(2,\)"),
        ({"labels": torch.tensor([0, 1, 5])}, r"\[0, 5\).*labels\[2\] = 5"),
        ({"temperature": -1.0}, r"temperature.*-1\.0"),
        ({"prune": 1.5}, r"prune.*1\.5"),
        ({"skip_below": 1.0}, r"skip_below.*1\.0"),
        ({"skip_below": 0.1, "prune": 0.1}, r"skip_below.*without prune.*both"),
        ({"softcap": -1.0}, r"softcap.*-1\.0"),
        ({"group": object()}, r"group: expected a torch.distributed.ProcessGroup.*got object"),
        ({"weight": torch.nn.Linear(4, 5)}, r"weight: expected a torch.Tensor, got Linear"),
        ({"prune": "0.1"}, r"prune: expected a finite number in \(0, 1\), got str 0.1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_input_is_named(arguments, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | arguments
    with pytest.raises(ValueError, match=message):
        linear_token_stats(**arguments)


# Edits to _linear_kernels.py that must turn this file red:
# 1. whole_kernel: drop `* keep * keep` from s2 (sum_p2, several tiles in a split)
# 2. kept_kernel: drop `& (v[None, :] != y[:, None])` (a label outside the safe set)
# 3. kept_kernel: `here` without its tile's bound, i.e. skip also tiles that hold a label
# 4. product_kernel: drop MASK_ROWS's line (hidden states of ignored rows that are NaN)
# 5. gradients (_linear_token_stats_triton.py): `accumulate=True` for weight_sum (it is torch.empty)
