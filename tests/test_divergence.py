import math

import pytest
import torch
from closeness import assert_as_close_as
from row_cases import (
    DTYPES,
    SHAPES,
    LargestBuffer,
    assert_right,
    example,
    value_and_gradients,
)

from trimtab.triton_kernels import divergence
from trimtab.triton_kernels._rows import BUFFER_BYTES
from trimtab.triton_kernels.divergence import token_kl, token_kl_reference

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, interpreting
]
INF = math.inf
OPTIONS = {
    "plain": {},
    "scaled": {"temperature": 1.3, "other_temperature": 0.8},
    "capped": {"temperature": 0.9, "softcap": 4.0, "other_softcap": 7.0},
}


@pytest.fixture(params=["kernel", "chunked"])
def path(request, monkeypatch):
    if request.param == "chunked":
        monkeypatch.setattr(divergence, "runs_kernel", lambda x: False)
    return request.param


def pair(shape, device, dtype=torch.float32):
    return [example(shape, device, dtype=dtype, seed=seed) for seed in (0, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-V{s[1]}")
def test_matches_reference(path, shape, options, dtype, device):
    n, v = shape
    mask = torch.ones(n, dtype=torch.bool, device=device)
    mask[n // 2] = n < 3
    logits = pair(shape, device, DTYPES[dtype])
    assert_right(token_kl, token_kl_reference, logits, v, mask=mask, **OPTIONS[options])


def test_two_dtypes(path, device):
    logits = [x.to(t) for x, t in zip(pair((3, 5000), device), (torch.bfloat16, torch.float32))]
    assert_right(token_kl, token_kl_reference, logits, 5000)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("fn", [token_kl_reference, token_kl], ids=["reference", "chunked"])
def test_gradients_are_derivatives(fn, options, device):
    """In fp64, where the public function is the chunked one."""
    logits = [x[:, :12].double().requires_grad_() for x in pair((4, 12), device)]
    mask = torch.tensor([True, False, True, True], device=device)
    assert torch.autograd.gradcheck(lambda x, u: fn(x, u, mask=mask, **OPTIONS[options]), logits)


def test_float64_stays_float64(device):
    logits = [x.double() for x in pair((3, 50), device)]
    expected = token_kl_reference(*logits)
    torch.testing.assert_close(token_kl(*logits), expected, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("logit", [0.0, 80.0, -1e4, 1e30])
def test_equal_logits_do_not_diverge(path, logit, device):
    for x in (torch.full((2, 5000), logit, device=device), example((2, 4997), device) + logit):
        kl, *gradients = value_and_gradients(token_kl, [x, x], x.shape[1])
        assert kl.tolist() == [0, 0]
        assert all(g.abs().max() < 1e-6 for g in gradients)


def test_known_answers(path, device):
    """p = (1/2, 1/2, 0 ...) against the uniform q: ln V - ln 2; and the other way round: +inf."""
    v = 5000
    x = torch.full((1, v), -INF, device=device)
    x[:, [3, 4800]] = 7.0
    u = torch.zeros(1, v, device=device)
    kl = token_kl(x, u)
    torch.testing.assert_close(kl, torch.tensor([math.log(v / 2)], device=device))
    assert token_kl(u, x).tolist() == [INF]


# how the maxima move over the blocks: both up together, not at all, apart (p up, q down)
ORDERS = {"up": (False, False), "down": (True, True), "apart": (False, True)}


@pytest.mark.parametrize("step", [1.0, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("order", ORDERS)
def test_small_divergences_are_accurate(path, order, step, device):
    """Relative to the divergence: of the order of step^2, far below the rounding of ln sum e^x."""
    x, noise = (t[:, :12999] for t in pair((3, 12999), device))
    u = x + step * noise
    u[2] = u[2] + step  # the same distribution for an offset: moves w as a whole
    if order == "apart":
        x, u = x.sort(-1).values, u.sort(-1, descending=True).values
    else:
        index = x.argsort(-1, descending=order == "down")
        x, u = x.gather(-1, index), u.gather(-1, index)
    truth = token_kl_reference(x.double(), u.double())
    torch.testing.assert_close(token_kl(x, u).double(), truth, atol=0, rtol=1e-3)
    assert (truth < step**2 * 30).all() or order == "apart"


@pytest.mark.parametrize("top", [1e4, 3e38])
def test_extreme_logits(path, top, device):
    v = 5000
    x, u = (torch.zeros(2, v, device=device) for _ in range(2))
    x[:, 4500] = top  # one-hot
    u[0, 3] = top  # another one-hot; row 1 uniform
    x[:, 7] = u[:, 8] = torch.finfo(torch.float32).min  # minus 3e38 is -inf
    kl, *gradients = value_and_gradients(token_kl, [x, u], v)
    expected = torch.tensor([top, math.log(v - 1)], device=device)
    torch.testing.assert_close(kl, expected)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(path, temperature, device):
    logits = pair((3, 5000), device)
    assert_right(token_kl, token_kl_reference, logits, 5000, temperature=temperature)


def test_offset_between_the_two(path, device):
    x, u = pair((3, 5000), device)
    assert_right(token_kl, token_kl_reference, [x, u + 1e4], 5000)
    assert_right(token_kl, token_kl_reference, [x - 1e4, u + 1e4], 5000)


@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped"])
def test_masked_vocabulary_changes_nothing(path, cap, device):
    """-inf entries, the whole first block of them, give what the row without them gives."""
    alone = [x[:, :5000] for x in pair((3, 5000), device)]
    masked = [torch.full((3, 9500), -INF, device=device) for _ in alone]
    for x, y in zip(masked, alone):
        x[:, 4200:9200] = y
    options = {"softcap": cap, "other_softcap": cap}
    kl, *gradients = value_and_gradients(token_kl, masked, 9500, **options)
    expected, *plain = value_and_gradients(token_kl, alone, 5000, **options)
    torch.testing.assert_close(kl, expected)
    for g, h in zip(gradients, plain):
        torch.testing.assert_close(g[:, 4200:9200], h, atol=1e-6, rtol=1e-5)
        assert (g[:, :4200] == 0).all() and (g[:, 9200:] == 0).all()


def test_only_p_masked(path, device):
    """Entries that q has and p has not, also a block in which p has nothing, or the first one."""
    for columns in (slice(0, 4200), slice(4000, 8300), slice(8000, None), slice(1, None, 2)):
        x, u = (t[:, :9001] for t in pair((2, 9001), device))
        x[:, columns] = -INF
        truth = value_and_gradients(token_kl_reference, [x.double(), u.double()], 9001)
        found = value_and_gradients(token_kl, [x, u], 9001)
        for f, t in zip(found, truth):
            assert_as_close_as(f, f.double(), t, name="p masked", slack=0)


@pytest.mark.parametrize("column", [2, 4500, 8999])
def test_q_without_an_entry_of_p(path, column, device):
    """+inf; gradient 0 for p, q - p for q; the row beside it is as ever."""
    x, u = (t[:, :9001] for t in pair((2, 9001), device))
    u[0, column] = -INF
    x, u = x.requires_grad_(), u.requires_grad_()
    kl = token_kl(x, u)
    assert kl[0] == INF
    gradient, other = torch.autograd.grad(kl.sum(), [x, u])
    assert (gradient[0] == 0).all() and other[0, column] == 0
    expected = u[0].softmax(-1) - x[0].softmax(-1)
    expected[column] = 0
    torch.testing.assert_close(other[0], expected, atol=1e-6, rtol=1e-5)
    assert torch.autograd.grad(token_kl(x, u)[1], x)[0].isfinite().all()  # upstream 0 in row 0
    beside = value_and_gradients(token_kl, [x[1:], u[1:]], 9001)
    assert kl[1] == beside[0] and gradient[1].isfinite().all() and gradient[1].any()


@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped"])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF], ids=["nan", "inf", "no-finite"])
@pytest.mark.parametrize("which", [0, 1])
def test_broken_rows_give_nan(path, which, bad, cap, device):
    logits = [torch.zeros(3, 6000, device=device) for _ in range(2)]
    logits[which][0, 5000 if bad != -INF else slice(None)] = bad
    logits[1 - which][2, 3] = -1e4
    kl = token_kl(*logits, softcap=cap, other_softcap=cap)
    assert kl.isnan().tolist() == [True, False, False]


def test_nan_where_p_is_masked(path, device):
    x, u = (torch.zeros(2, 5000, device=device) for _ in range(2))
    x[:, 4500] = -INF
    u[0, 4500] = math.nan
    assert token_kl(x, u).isnan().tolist() == [True, False]


def test_masked_rows_are_not_read(path, device):
    logits = pair((3, 5000), device)
    for x in logits:
        x[1] = math.nan
    mask = torch.tensor([True, False, True], device=device)
    kl, *gradients = value_and_gradients(token_kl, logits, 5000, mask=mask)
    assert kl[1] == 0 and kl[[0, 2]].isfinite().all()
    for g in gradients:
        assert (g[1] == 0).all() and g[[0, 2]].isfinite().all() and g[0].any()


def test_no_row_at_all_or_none_live(path, device):
    x = torch.zeros(0, 10, device=device)
    assert [t.shape for t in value_and_gradients(token_kl, [x, x], 10)] == [(0,), (0, 10), (0, 10)]
    x = torch.full((2, 10), math.nan, device=device)
    mask = torch.zeros(2, dtype=torch.bool, device=device)
    assert not any(t.any() for t in value_and_gradients(token_kl, [x, x], 10, mask=mask))


def test_only_some_gradients(path, device, monkeypatch):
    x, u = pair((3, 5000), device)
    _, *both = value_and_gradients(token_kl, [x, u], 5000)
    made = []
    for name in ("_kernel_gradients", "_chunked_gradients"):
        fill = getattr(divergence, name)
        monkeypatch.setattr(divergence, name, lambda *a, f=fill: made.append(a[5:7]) or f(*a))
    for i in range(2):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, u))]
        token_kl(*(t[:, :5000] for t in leaves)).sum().backward()  # an expanded upstream gradient
        assert leaves[1 - i].grad is None and made[-1][1 - i] is None
        generator = torch.Generator().manual_seed(1)
        scale = torch.randn(3, generator=generator).to(device)[:, None]
        torch.testing.assert_close(leaves[i].grad[:, :5000] * scale, both[i], atol=1e-6, rtol=1e-5)
    assert not token_kl(x, u).requires_grad
    y = x[:, :5000].clone().requires_grad_()
    token_kl(y, y, temperature=2.0, other_temperature=1.0).sum().backward()
    z = x[:, :5000].clone().requires_grad_()
    token_kl_reference(z, z, temperature=2.0, other_temperature=1.0).sum().backward()
    torch.testing.assert_close(y.grad, z.grad, atol=1e-6, rtol=1e-5)


def test_chunked_buffers_are_small(monkeypatch):
    """Nothing but the gradients exceeds one buffer, whatever N is."""
    monkeypatch.setattr(divergence, "runs_kernel", lambda x: False)
    x, u = (torch.randn(24, 32768).bfloat16().requires_grad_() for _ in range(2))
    with LargestBuffer(x.shape) as largest:
        token_kl(x, u, temperature=0.7, softcap=5.0).sum().backward()
    assert 0 < largest.nbytes <= BUFFER_BYTES


LOGITS = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, r"logits \[N, V\].*\(2, 3, 4\)"),
        ({"other_logits": torch.zeros(3)}, r"other_logits \[N, V\].*\(3,\)"),
        ({"other_logits": torch.zeros(3, 5)}, r"one shape.*\(3, 4\) and \(3, 5\)"),
        ({"logits": torch.zeros(3, 0)}, r"V > 0.*\(3, 0\)"),
        ({"logits": LOGITS.int()}, r"logits of fp32.*torch\.int32"),
        ({"other_logits": LOGITS.int()}, r"other_logits of fp32.*torch\.int32"),
        ({"other_logits": LOGITS.double()}, r"both fp64 or neither.*float32 and torch\.float64"),
        ({"other_logits": LOGITS.to("meta")}, r"other_logits is on meta"),
        ({"logits": torch.zeros(4, 3).t()}, r"logits must be contiguous along V.*\(1, 3\)"),
        ({"other_logits": torch.zeros(4, 3).t()}, r"other_logits must be contiguous.*\(1, 3\)"),
        ({"temperature": 0.0}, r"temperature: expected a finite number.*got 0\.0"),
        ({"temperature": math.nan}, r"temperature.*nan"),
        ({"other_temperature": -1.0}, r"other_temperature.*-1\.0"),
        ({"softcap": 0.0}, r"softcap.*0\.0"),
        ({"other_softcap": INF}, r"other_softcap.*inf"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask of shape \[3\], got \(2,\)"),
        ({"mask": torch.ones(3)}, r"mask of torch\.bool, got torch\.float32"),
        ({"mask": torch.ones(3, dtype=torch.bool, device="meta")}, r"mask is on meta"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    arguments = {"logits": LOGITS, "other_logits": LOGITS} | arguments
    logits, other = arguments.pop("logits"), arguments.pop("other_logits")
    with pytest.raises(ValueError, match=message):
        token_kl(logits, other, **arguments)


# Edits to divergence.py that must turn this file red:
#   sums kernel: `keep_p * gap - kept * move`               ->  without `- kept * move`
#   sums kernel: `near` in the new excess                   ->  `s_q - s_p + gap` always (small KLs)
#   sums kernel: top_q starts at -inf                       (masked first block)
#   gradient kernel: `mass = tl.where(kl == inf, 0.0, p)`   ->  p
#   _finish: `small`                                        ->  y.abs() < _SMALL (temperature 0.01)
