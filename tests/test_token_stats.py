import math
from unittest import mock

import pytest
import torch
from closeness import assert_as_close_as
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from trimtab.triton_kernels import token_stats as module
from trimtab.triton_kernels._rows import BUFFER_BYTES
from trimtab.triton_kernels._token_sums import ELSEWHERE, Options
from trimtab.triton_kernels.token_stats import (
    TokenStats,
    _TokenStats,
    token_stats,
    token_stats_reference,
)

pytestmark = pytest.mark.interpreter

INF = math.inf
DIFFERENTIABLE = ("logp", "entropy", "sum_p2", "logsumexp", "log_kept_mass")
# (N, V): one row, one entry; V below, at, one past and twice past the block (4096);
# 1000 and 9001 are no multiple of 16
SHAPES = [(1, 1), (1, 8), (3, 1000), (2, 4096), (2, 4097), (5, 9001)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rho = 1e-2 leaves sampled labels outside the safe set, rho = e^-13 hardly any
RHOS = [None, 1e-2, math.exp(-13)]


def chunked(logits, labels, **options):
    """`token_stats` where no kernel can run."""
    with mock.patch.object(module, "runs_kernel", return_value=False):
        return token_stats(logits, labels, **options)


both_paths = pytest.mark.parametrize("fn", [token_stats, chunked], ids=["kernel", "chunked"])
all_paths = pytest.mark.parametrize(
    "fn", [token_stats, chunked, token_stats_reference], ids=["kernel", "chunked", "reference"]
)


def example(shape, device, *, dtype=torch.float32, scale=4.0):
    torch.manual_seed(0)
    n, v = shape
    # callers see [:, :v], so the row stride is not V
    padded = (scale * torch.randn(n, v + 3)).to(device, dtype)
    return padded, torch.randint(v, (n,), device=device)


def upstream_of(stats):
    """Random upstream gradients for every differentiable output, the same ones for each caller."""
    names = [name for name in DIFFERENTIABLE if getattr(stats, name) is not None]
    torch.manual_seed(1)
    return {name: torch.randn(stats.logp.shape).to(stats.logp) for name in names}


def grad_of(stats, logits, upstream):
    outputs = [getattr(stats, name) for name in upstream]
    return torch.autograd.grad(outputs, logits, list(upstream.values()), retain_graph=True)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("prune", RHOS, ids=["whole", "rho1e-2", "rho2e-6"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-V{s[1]}")
@both_paths
def test_matches_reference(fn, shape, prune, dtype, device):
    check_against_reference(fn, shape, device, dtype=dtype, prune=prune, temperature=1.3)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 5.0},  # logits of scale 4: half of them are well inside the bend
        {"softcap": 5.0, "prune": 1e-2, "temperature": 0.7},
        {"temperature": 0.01},
        {"temperature": 100.0, "prune": 0.9},
    ],
    ids=["cap", "cap-pruned", "cold", "hot-pruned"],
)
@both_paths
def test_options_match_reference(fn, options, device):
    check_against_reference(fn, (4, 5003), device, dtype=torch.float32, **options)


# 2, the least with a choice; a prime past several blocks; the largest; thousands of rows (which
# the chunked path splits in uneven chunks)
@pytest.mark.parametrize(
    ("fn", "shape"),
    [
        (token_stats, (2, 2)),
        (token_stats, (1, 262_144)),
        (chunked, (2, 2)),
        (chunked, (2, 262_144)),
        (chunked, (2, 262_139)),
        (chunked, (3001, 101)),
    ],
    ids=lambda x: f"N{x[0]}-V{x[1]}" if isinstance(x, tuple) else x.__name__,
)
def test_sizes_at_the_ends_match_reference(fn, shape, device):
    check_against_reference(fn, shape, device, dtype=torch.float32, prune=1e-3)


def check_against_reference(fn, shape, device, *, dtype, **options):
    n, v = shape
    padded, labels = example(shape, device, dtype=dtype)
    labels[n // 2] = -100 if n > 2 else labels[n // 2]

    def outputs(fn, x):
        x = x.detach().clone().requires_grad_()
        logits = x[:, :v] if fn is not token_stats_reference else x[:, :v].to(reference_dtype)
        stats = fn(logits, labels, **options)
        upstream = upstream_of(stats)
        grads = {name: grad_of(stats, x, {name: g}) for name, g in upstream.items()}
        grads["all"] = grad_of(stats, x, upstream)
        assert all((g[:, v:] == 0).all() for g in grads.values())
        return stats, {name: g[:, :v] for name, g in grads.items()}

    kernel, kernel_grads = outputs(fn, padded)
    reference_dtype = torch.float32
    reference, reference_grads = outputs(token_stats_reference, padded)
    reference_dtype = torch.float64
    truth, truth_grads = outputs(token_stats_reference, padded.double())

    for name, k, r, t in zip(TokenStats._fields, kernel, reference, truth, strict=True):
        if t is None:
            assert k is None
        elif t.is_floating_point():
            assert k.dtype == torch.float32
            assert_as_close_as(k, r, t, name=name)
        else:
            assert k.dtype == t.dtype
            torch.testing.assert_close(k, t, msg=name)
    for name, t in truth_grads.items():
        assert kernel_grads[name].dtype == dtype
        assert_as_close_as(kernel_grads[name], reference_grads[name], t, name=f"grad of {name}")


@pytest.mark.parametrize("prune", [None, 0.1], ids=["whole", "pruned"])
@pytest.mark.parametrize("fn", [token_stats_reference, chunked], ids=["reference", "chunked"])
def test_gradients_are_derivatives(fn, prune, device):
    padded, labels = example((4, 12), device, scale=1.5)
    labels[1] = -100
    logits = padded.double().requires_grad_()

    def differentiable(x):
        stats = fn(x, labels, temperature=0.7, prune=prune)
        return [o for o in (getattr(stats, name) for name in DIFFERENTIABLE) if o is not None]

    assert torch.autograd.gradcheck(differentiable, logits)


def test_float64_stays_float64(device):
    padded, labels = example((3, 50), device)
    for stats in (token_stats(padded.double(), labels), chunked(padded.double(), labels)):
        expected = token_stats_reference(padded.double(), labels)
        torch.testing.assert_close(stats[:5], expected[:5], atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("logit", [0.0, 80.0, -1e4, 1e30])
@all_paths
def test_constant_logits_have_known_answers(fn, logit, device):
    v = 5000
    logits = torch.full((2, v), logit, device=device)
    stats = fn(logits, torch.tensor([0, v - 1], device=device), prune=0.5)
    log_v = torch.full((2,), float(v), device=device).log()
    torch.testing.assert_close(stats.entropy, log_v, atol=1e-5, rtol=0)
    torch.testing.assert_close(stats.logp, -log_v, atol=1e-5, rtol=0)
    torch.testing.assert_close(stats.sum_p2, torch.full_like(log_v, 1 / v))
    assert stats.log_kept_mass.abs().max() < 1e-6
    assert stats.safe_count.tolist() == [v, v]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter
@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
@pytest.mark.parametrize("top", [1e4, 3e38])
@all_paths
def test_extreme_logits_stay_finite(fn, top, prune, device):
    v = 5000
    logits = torch.zeros(2, v, device=device)
    logits[:, 4500] = top
    logits[:, 7] = torch.finfo(torch.float32).min  # minus 3e38 is -inf
    logits.requires_grad_()
    labels = torch.tensor([4500, 3], device=device)
    stats = fn(logits, labels, prune=prune)
    torch.testing.assert_close(stats.logp, torch.tensor([0.0, -top], device=device))
    torch.testing.assert_close(stats.entropy, torch.zeros(2, device=device))
    torch.testing.assert_close(stats.sum_p2, torch.ones(2, device=device))
    grad = grad_of(stats, logits, upstream_of(stats))
    assert grad.isfinite().all()
    if prune is not None:
        assert stats.safe_count.tolist() == [1, 2]  # the label is forced into the second row's set
        assert stats.in_safe_set.tolist() == [True, False]


@all_paths
def test_pruned_and_whole_agree_through_the_kept_mass(fn, device):
    padded, labels = example((4, 5000), device)
    pruned, whole = fn(padded, labels, prune=1e-2), fn(padded, labels)
    torch.testing.assert_close(pruned.logp + pruned.log_kept_mass, whole.logp)
    torch.testing.assert_close(pruned.logsumexp, whole.logsumexp)
    assert (pruned.log_kept_mass < 0).all() and not pruned.in_safe_set.all()
    assert whole[5:8] == (None, None, None) and not whole.broken.any()


@all_paths
def test_pruned_gradient_is_exactly_zero_outside_the_kept_set(fn, device):
    padded, labels = example((4, 5000), device)
    logits = padded.requires_grad_()
    stats = fn(logits, labels, prune=1e-2)
    upstream = {name: torch.ones_like(labels, dtype=torch.float32) for name in DIFFERENTIABLE[:3]}
    grad = grad_of(stats, logits, upstream)
    kept = logits >= logits.amax(-1, keepdim=True) + math.log(1e-2)
    kept.scatter_(-1, labels[:, None], True)
    assert (grad[~kept] == 0).all() and (grad[kept] != 0).all()
    assert stats.safe_count.tolist() == kept.sum(-1).tolist()


@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
@all_paths
def test_masked_vocabulary_changes_nothing(fn, prune, device):
    """-inf entries, the whole first block of them, give what the row without them gives."""
    padded, labels = example((3, 5000), device)
    masked = torch.full((3, 9500), -INF, device=device)
    masked[:, 4200:9200] = padded[:, :5000]
    masked.requires_grad_()
    alone = padded[:, :5000].requires_grad_()
    stats = fn(masked, labels + 4200, prune=prune)
    expected = fn(alone, labels, prune=prune)
    for value, plain in zip(stats, expected, strict=True):
        torch.testing.assert_close(value, plain, atol=1e-6, rtol=1e-5)
    grad = grad_of(stats, masked, upstream_of(stats))
    plain_grad = grad_of(expected, alone, upstream_of(expected))
    torch.testing.assert_close(grad[:, 4200:9200], plain_grad, atol=1e-6, rtol=1e-5)
    assert (grad[:, :4200] == 0).all() and (grad[:, 9200:] == 0).all()


@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
@all_paths
def test_masked_label_has_no_probability(fn, prune, device):
    logits = torch.zeros(1, 8, device=device)
    logits[0, 2] = -INF
    logits.requires_grad_()
    stats = fn(logits, torch.tensor([2], device=device), prune=prune)
    assert stats.logp.item() == -INF
    torch.testing.assert_close(stats.entropy, torch.tensor([7.0], device=device).log())
    grad = torch.autograd.grad(stats.logp.sum(), logits)[0]
    assert grad[0, 2] == 0 and grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter
@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF], ids=["nan", "inf", "no-finite"])
@all_paths
def test_broken_rows_give_nan(fn, bad, prune, device):
    logits = torch.zeros(3, 6000, device=device)
    logits[0, 5000 if bad != -INF else slice(None)] = bad
    logits.requires_grad_()
    labels = torch.tensor([1, 2, 3], device=device)
    stats = fn(logits, labels, prune=prune)
    assert stats.broken.tolist() == [True, False, False]
    for name, value in stats._asdict().items():
        if value is not None and value.is_floating_point():
            assert value.isnan().tolist() == [True, False, False], name
    if prune is not None:
        assert stats.safe_count.tolist()[0] == 0 and not stats.in_safe_set[0]
    if fn is not token_stats_reference:
        skipped = fn(logits, labels, prune=prune, nonfinite="skip")
        assert skipped.broken.tolist() == [True, False, False]
        grad = grad_of(skipped, logits, upstream_of(skipped))
        assert (grad[0] == 0).all() and grad.isfinite().all()
        for name, value in skipped._asdict().items():
            if value is not None and name != "broken":
                assert value[0] == (name == "in_safe_set"), name
                torch.testing.assert_close(value[1:], getattr(stats, name)[1:])
        with pytest.raises(ValueError, match=r"NaN or \+inf.* 1 of 3 rows.* row 0"):
            fn(logits, labels, prune=prune, nonfinite="raise")


@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
@all_paths
def test_ignored_rows_are_zero(fn, prune, device):
    """Also when they hold NaN: padding is never initialised with care."""
    padded, labels = example((3, 5000), device)
    padded[1] = math.nan
    labels[1] = 7
    logits = padded.requires_grad_()
    stats = fn(logits, labels, prune=prune, ignore_index=7)
    for name, value in zip(TokenStats._fields, stats, strict=True):
        if value is not None:
            assert value[1] == (1 if name == "in_safe_set" else 0), name  # nor is it broken
    assert stats.logit_grad_energy[1] == 0
    grad = grad_of(stats, logits, upstream_of(stats))
    assert (grad[1] == 0).all()
    assert grad[[0, 2]].isfinite().all() and (grad[[0, 2]] != 0).any()


@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
@all_paths
def test_energy_is_the_squared_gradient_norm(fn, prune, device):
    padded, labels = example((4, 50), device)
    logits = padded.requires_grad_()
    stats = fn(logits, labels, prune=prune)
    grad = torch.autograd.grad(stats.logp.sum(), logits)[0]
    torch.testing.assert_close(stats.logit_grad_energy, grad.square().sum(-1))
    assert not stats.logit_grad_energy.requires_grad


@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
@both_paths
def test_backward_in_place_of_the_logits(fn, prune, device):
    padded, labels = example((4, 5000), device)
    labels[1] = -100
    leaf = padded.requires_grad_()

    def run(inplace):
        logits = (2 * leaf)[:, :5000]
        stats = fn(logits, labels, prune=prune, inplace_backward=inplace)
        upstream = upstream_of(stats)
        outputs = [getattr(stats, name) for name in upstream]
        return logits, outputs, list(upstream.values())

    logits, outputs, upstream = run(True)
    storage = logits.untyped_storage().data_ptr()
    grad = torch.autograd.grad(outputs, logits, upstream, retain_graph=True)[0]
    assert grad.untyped_storage().data_ptr() == storage
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, leaf, upstream)
    plain_logits, plain_outputs, _ = run(False)
    expected = torch.autograd.grad(plain_outputs, plain_logits, upstream)[0]
    assert torch.equal(grad, expected)


@both_paths
def test_backward_in_place_is_refused_by_autograd_where_another_needs_the_logits(fn, device):
    padded, labels = example((2, 50), device)
    logits = 2 * padded.requires_grad_()
    stats = fn(logits, labels, inplace_backward=True)
    other = logits.square().sum()  # saves the logits for its own backward
    first = torch.autograd.grad(stats.logp.sum(), logits, retain_graph=True)[0]
    assert first.isfinite().all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other, logits)


@both_paths
def test_checkpointing_recomputes_it(fn, device):
    padded, labels = example((2, 5000), device)
    plain, again = (padded.clone().requires_grad_() for _ in range(2))

    def entropy(x):
        return fn(2 * x, labels, prune=1e-2).entropy

    entropy(plain).sum().backward()
    checkpoint(entropy, again, use_reentrant=False).sum().backward()
    assert torch.equal(plain.grad, again.grad)


@both_paths
def test_max_logit_and_counts_carry_no_gradient(fn, device):
    padded, labels = example((2, 50), device)
    stats = fn(padded.requires_grad_(), labels, prune=0.1)
    carries = {
        name for name, value in stats._asdict().items() if value is not None and value.requires_grad
    }
    assert carries == set(DIFFERENTIABLE)


@both_paths
def test_only_some_outputs_used(fn, device):
    """Unused outputs have no upstream gradient; an expanded one has stride 0."""
    padded, labels = example((3, 5000), device)
    for name in DIFFERENTIABLE:
        for prune in (1e-2,) if name == "log_kept_mass" else (None, 1e-2):
            grads = []
            for f in (fn, token_stats_reference):
                logits = padded.clone().requires_grad_()
                getattr(f(logits, labels, prune=prune), name).sum().backward()
                grads.append(logits.grad)
            torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
@all_paths
def test_no_tokens(fn, prune, device):
    logits = torch.zeros(0, 10, device=device, requires_grad=True)
    stats = fn(logits, torch.zeros(0, dtype=torch.int64, device=device), prune=prune)
    assert all(value.shape == (0,) for value in stats if value is not None)
    assert grad_of(stats, logits, upstream_of(stats)).shape == (0, 10)


def test_chunked_buffers_are_small():
    """No allocation of the forward exceeds one buffer, whatever N is."""
    logits, labels = torch.randn(64, 32768).bfloat16(), torch.randint(32768, (64,))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.nbytes)
            return out

    with Watch(), torch.no_grad():
        chunked(logits, labels, prune=1e-2)
    assert 0 < largest <= BUFFER_BYTES


@pytest.mark.parametrize("prune", [None, 1e-2], ids=["whole", "pruned"])
def test_kernel_does_not_read_past_the_row(prune, device):
    """On a GPU labels are not checked: one out of range gives NaN, not a stray read."""
    logits = torch.zeros(2, 10, device=device)
    labels = torch.tensor([10**12, 1], device=device)
    y = torch.where(labels < 10, labels, ELSEWHERE)
    stats = _TokenStats.apply(logits, y, Options(1.0, None, prune, None, "nan"), False)
    assert stats[0].isnan().tolist() == stats[-1].tolist() == [True, False]


LOGITS, LABELS = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, r"\[N, V\].*\(2, 3, 4\)"),
        ({"labels": LABELS[:2]}, r"labels of shape \[3\], got \(2,\)"),
        ({"logits": torch.zeros(3, 0)}, r"V > 0.*\(3, 0\)"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int32)}, r"torch\.int32"),
        ({"labels": LABELS.int()}, r"int64.*torch\.int32"),
        ({"labels": LABELS.to("meta")}, r"labels is on meta"),
        ({"logits": torch.zeros(4, 3).t()}, r"contiguous along V.*\(1, 3\)"),
        ({"labels": torch.tensor([0, 1, 4])}, r"\[0, 4\).*labels\[2\] = 4"),
        ({"labels": torch.tensor([0, -1, 9])}, r"labels\[1\] = -1"),
        ({"temperature": 0.0}, r"temperature.*0\.0"),
        ({"temperature": math.nan}, r"temperature.*nan"),
        ({"prune": 0.0}, r"prune.*0\.0"),
        ({"prune": 1.0}, r"prune.*1\.0"),
        ({"softcap": 0.0}, r"softcap.*0\.0"),
        ({"nonfinite": "ignore"}, r"nonfinite.*skip.*'ignore'"),
        ({"group": "tp"}, r"group: expected a torch.distributed.ProcessGroup.*got str"),
        ({"temperature": torch.tensor(1.0)}, r"temperature: expected a finite number.*Tensor"),
        ({"temperature": "1"}, r"temperature: expected a finite number.*str 1"),
        ({"temperature": 1e-45}, r"temperature: expected.*> 1e-38"),
        ({"softcap": True}, r"softcap.*True"),
        ({"ignore_index": torch.tensor([True])}, r"ignore_index: expected an int, got Tensor"),
        ({"logits": [[1.0]]}, r"logits: expected a torch.Tensor, got list"),
        ({"logits": torch.zeros(3, 4, requires_grad=True), "inplace_backward": True}, r"leaf"),
        (
            {"logits": torch.zeros(1, 3, 4, requires_grad=True)[0], "inplace_backward": True},
            r"got a leaf",
        ),
        (
            {
                "logits": torch.zeros(4, requires_grad=True).mul(1).expand(3, 4),
                "inplace_backward": True,
            },
            r"rows do not overlap, got strides \(0, 1\)",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_input_is_named(arguments, message):
    arguments = {"logits": LOGITS, "labels": LABELS} | arguments
    logits, labels = arguments.pop("logits"), arguments.pop("labels")
    with pytest.raises(ValueError, match=message):
        token_stats(logits, labels, **arguments)


# Edits to _token_stats_kernels.py that must turn this file red:
# 1. _whole_sums: drop `moved * s1` from the rescaling of sd (entropy, several blocks)
# 2. _whole_sums: drop one factor `keep` from the rescaling of s2 (sum_p2, several blocks)
# 3. logit_gradient: drop `& (is_label == 0)` (gradient of a label forced into the set)
# 4. transformed_gradient (_transform.py): drop `grad *= inv_temperature` (every gradient)
# 5. _whole_sums: start m at -inf (masked first block)
