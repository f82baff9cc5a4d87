import math

import pytest
import torch
from row_cases import DTYPES, SHAPES, LargestBuffer, assert_right, example, value_and_gradients

from trimtab.triton_kernels import imitation
from trimtab.triton_kernels._rows import BUFFER_BYTES
from trimtab.triton_kernels.divergence import token_kl
from trimtab.triton_kernels.imitation import teacher_kl, teacher_kl_reference

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, interpreting
]
INF = math.inf
OPTIONS = {"plain": {}, "capped": {"temperature": 0.9, "softcap": 4.0}}
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=["kernel", "chunked"])
def path(request, monkeypatch):
    if request.param == "chunked":
        monkeypatch.setattr(imitation, "runs_kernel", lambda x: False)
    return request.param


def teacher(shape, k, device, *, top=True):
    """Ids [N, K] in no order and log-probabilities of a teacher: his top k, or any k."""
    v = shape[1]
    log_q = example(shape, "cpu", seed=1)[:, :v].log_softmax(-1)
    score = log_q if top else example(shape, "cpu", seed=2)[:, :v]
    ids = score.topk(k, -1).indices
    ids = ids[:, torch.randperm(k, generator=torch.Generator().manual_seed(0))]
    return ids.to(device), log_q.gather(-1, ids).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-V{s[1]}")
def test_matches_reference(path, shape, options, dtype, device):
    n, v = shape
    ids, log_q = teacher(shape, min(v, 7), device)
    mask = torch.ones(n, dtype=torch.bool, device=device)
    mask[n // 2] = n < 3
    logits = [example(shape, device, dtype=DTYPES[dtype])]
    others = (ids, log_q)
    assert_right(
        teacher_kl, teacher_kl_reference, logits, v, *others, mask=mask, **OPTIONS[options]
    )


# one entry; some, in all blocks, in the first alone and at the edges of blocks; more than a warp
@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("where", ["any", "first", "edges"])
def test_wherever_the_entries_lie(path, where, k, device):
    shape = (2, 9001)
    ids, log_q = teacher(shape, k, device, top=False)
    if where == "first":
        ids = torch.arange(k, device=device).flip(0).expand(2, -1)
    if where == "edges":
        edges = torch.tensor([4096, 8192, 0, 9000, 4095, 8191])
        rest = torch.arange(100, 100 + k)
        ids = torch.cat([edges, rest])[:k].expand(2, -1).to(device)
    logits = [example(shape, device)]
    assert_right(teacher_kl, teacher_kl_reference, logits, 9001, ids, log_q)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("k", [1, 5, 12])
@pytest.mark.parametrize("fn", [teacher_kl_reference, teacher_kl], ids=["reference", "chunked"])
def test_gradients_are_derivatives(fn, k, options, device):
    """In fp64, where the public function is the chunked one."""
    ids, log_q = teacher((4, 12), k, device)
    x = example((4, 12), device)[:, :12].double().requires_grad_()
    mask = torch.tensor([True, False, True, True], device=device)
    options = OPTIONS[options]
    assert torch.autograd.gradcheck(lambda x: fn(x, ids, log_q, mask=mask, **options), x)


def test_float64_stays_float64(device):
    x = example((3, 50), device)[:, :50].double()
    ids, log_q = teacher((3, 50), 5, device)
    expected = teacher_kl_reference(x, ids, log_q.double())
    found = teacher_kl(x, ids, log_q.double())
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-13)


def test_a_teacher_known_in_full_is_token_kl(path, device):
    n, v = 2, 61
    x, u = (example((n, v), device, seed=seed) for seed in (0, 1))
    ids = torch.stack([torch.randperm(v) for _ in range(n)]).to(device)
    log_q = u[:, :v].log_softmax(-1).gather(-1, ids)
    found = value_and_gradients(teacher_kl, [x], v, ids, log_q, temperature=0.8)
    expected = value_and_gradients(
        lambda x: token_kl(x, u[:, :v], temperature=0.8, other_temperature=1.0), [x], v
    )
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("drop", [20.0, 60.0, 300.0])
def test_a_tiny_tail_of_the_policy(path, drop, device):
    """p_tail far below the rounding of 1: it must not come from a difference."""
    v = 9001
    x = example((2, v), device)
    ids, _ = teacher((2, v), 3, device)
    x.scatter_(-1, ids, x.gather(-1, ids) + drop)
    log_q = torch.tensor([[0.2, 0.3, 0.4]] * 2, device=device).log()
    assert_right(teacher_kl, teacher_kl_reference, [x], v, ids, log_q)
    # the gradient of the tail is of its own size
    x = x[:, :v].requires_grad_()
    (gradient,) = torch.autograd.grad(teacher_kl(x, ids, log_q).sum(), x)
    y = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(teacher_kl_reference(y, ids, log_q.double()).sum(), y)
    tail = torch.ones_like(x, dtype=torch.bool).scatter(-1, ids, False)
    torch.testing.assert_close(gradient[tail].double(), truth[tail], atol=1e-37, rtol=1e-3)


@pytest.mark.parametrize("left", [0.0, 1e-9, -5e-4, 1e-3])
def test_a_teacher_without_a_tail_to_rounding(path, left, device):
    """q_tail = 1 - sum, but eps at least: finite, with the policy all in the tail, too."""
    x = torch.zeros(1, 5000, device=device)
    ids = torch.tensor([[3, 4500]], device=device)
    log_q = torch.tensor([[0.5, 0.5 - left]], dtype=torch.float64, device=device).log().float()
    kl, gradient = value_and_gradients(teacher_kl, [x], 5000, ids, log_q)
    tail = math.log(max(left, EPS))
    p = 1 / 5000
    expected = 2 * p * math.log(p / 0.5) + (1 - 2 * p) * (math.log(1 - 2 * p) - tail)
    # at 1e-3 the log-probabilities' own rounding is in q_tail
    torch.testing.assert_close(kl, torch.tensor([expected], device=device), atol=1e-3, rtol=0)
    assert gradient.isfinite().all()
    empty = torch.full_like(x, -INF).scatter_(-1, ids, 0.0)  # nor has the policy one
    kl, gradient = value_and_gradients(teacher_kl, [empty], 5000, ids, log_q)
    assert kl.abs() < 2e-3 and gradient.abs().max() < 2e-3


def test_a_reported_zero(path, device):
    """q_v = 0: nothing if p_v = 0, else +inf with gradient 0."""
    x = torch.zeros(2, 5000, device=device)
    x[0, 4500] = -INF
    ids = torch.tensor([[4500, 1], [4500, 1]], device=device)
    log_q = torch.tensor([[-INF, -1.0]] * 2, device=device)
    kl, gradient = value_and_gradients(teacher_kl, [x], 5000, ids, log_q)
    assert kl[0].isfinite() and gradient[0].isfinite().all() and gradient[0, 4500] == 0
    assert kl[1] == INF and (gradient[1] == 0).all()


@pytest.mark.parametrize("top", [1e4, 3e38])
@pytest.mark.parametrize("column", [4500, 17], ids=["reported", "tail"])
def test_extreme_logits(path, top, column, device):
    x = torch.zeros(1, 5000, device=device)
    x[:, column] = top
    x[:, 7] = torch.finfo(torch.float32).min  # minus 3e38 is -inf
    ids = torch.tensor([[4500, 7]], device=device)
    log_q = torch.tensor([[0.5, 0.25]], device=device).log()
    kl, gradient = value_and_gradients(teacher_kl, [x], 5000, ids, log_q)
    expected = math.log(2 if column == 4500 else 4)
    torch.testing.assert_close(kl, torch.tensor([expected], device=device))
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(path, temperature, device):
    logits = [example((3, 5000), device)]
    others = teacher((3, 5000), 7, device)
    assert_right(teacher_kl, teacher_kl_reference, logits, 5000, *others, temperature=temperature)


@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped"])
def test_masked_vocabulary_changes_nothing(path, cap, device):
    alone = example((3, 5000), device)[:, :5000]
    ids, log_q = teacher((3, 5000), 5, device)
    masked = torch.full((3, 9500), -INF, device=device)
    masked[:, 4200:9200] = alone
    kl, gradient = value_and_gradients(teacher_kl, [masked], 9500, ids + 4200, log_q, softcap=cap)
    expected, plain = value_and_gradients(teacher_kl, [alone], 5000, ids, log_q, softcap=cap)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(gradient[:, 4200:9200], plain, atol=1e-6, rtol=1e-5)
    assert (gradient[:, :4200] == 0).all() and (gradient[:, 9200:] == 0).all()


@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped"])
@pytest.mark.parametrize("reported", [False, True])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF], ids=["nan", "inf", "no-finite"])
def test_broken_rows_give_nan(path, bad, reported, cap, device):
    logits = torch.zeros(2, 6000, device=device)
    logits[0, 5000 if bad != -INF else slice(None)] = bad
    ids = torch.tensor([[5000 if reported else 3, 17]] * 2, device=device)
    log_q = torch.full((2, 2), -1.0, device=device)
    kl = teacher_kl(logits, ids, log_q, softcap=cap)
    assert kl.isnan().tolist() == [True, False]


def test_masked_rows_are_not_read(path, device):
    """Neither their logits nor their teacher."""
    x = example((3, 5000), device)
    ids, log_q = teacher((3, 5000), 5, device)
    x[1], ids[1], log_q[1] = math.nan, -1, math.nan
    mask = torch.tensor([True, False, True], device=device)
    for fn in (teacher_kl, teacher_kl_reference):
        kl, gradient = value_and_gradients(fn, [x], 5000, ids, log_q, mask=mask)
        assert kl[1] == 0 and kl.isfinite().all()
        assert (gradient[1] == 0).all() and gradient.isfinite().all() and gradient[0].any()


def test_strided_arguments(path, device):
    x = example((3, 5000), device)
    ids, log_q = teacher((3, 5000), 5, device)
    mask = torch.tensor([True, False, True, False, True, False], device=device)[::2]
    expected = value_and_gradients(teacher_kl, [x], 5000, ids, log_q)
    ids, log_q = (t.t().contiguous().t() for t in (ids, log_q))
    found = value_and_gradients(teacher_kl, [x], 5000, ids, log_q, mask=mask)
    assert all(f.equal(e) for f, e in zip(found, expected))
    x = x[:, :5000].requires_grad_()
    (once,) = torch.autograd.grad(teacher_kl(x, ids, log_q).sum(), x)  # upstream of stride 0
    (summed,) = torch.autograd.grad(teacher_kl(x, ids, log_q), x, torch.ones(3, device=device))
    assert once.equal(summed)


def test_no_rows(path, device):
    x, ids = torch.zeros(0, 10, device=device), torch.zeros(0, 3, dtype=torch.int64, device=device)
    found = value_and_gradients(teacher_kl, [x], 10, ids, torch.zeros(0, 3, device=device))
    assert [t.shape for t in found] == [(0,), (0, 10)]


def test_the_teacher_gets_no_gradient(path, device):
    x = example((2, 5000), device)[:, :5000]
    ids, log_q = teacher((2, 5000), 5, device)
    log_q.requires_grad_()
    assert not teacher_kl(x, ids, log_q).requires_grad
    teacher_kl(x.requires_grad_(), ids, log_q).sum().backward()
    assert log_q.grad is None and x.grad.any()


def test_chunked_buffers_are_small(monkeypatch):
    monkeypatch.setattr(imitation, "runs_kernel", lambda x: False)
    x = torch.randn(24, 32768).bfloat16().requires_grad_()
    ids, log_q = teacher((24, 32768), 8, "cpu")
    with LargestBuffer(x.shape) as largest:
        teacher_kl(x, ids, log_q, temperature=0.7, softcap=5.0).sum().backward()
    assert 0 < largest.nbytes <= BUFFER_BYTES


def test_kernel_does_not_read_what_a_wrong_teacher_names(path, monkeypatch, device):
    """On a GPU ids and log-probabilities are not checked: a wrong row gives NaN."""
    monkeypatch.setattr(imitation, "_refuse", lambda *a: None)
    ids = torch.tensor([[1, 10**12], [-1, 5], [3, 3], [1, 2], [1, 2], [1, 2]], device=device)
    log_q = torch.full((6, 2), -1.0, device=device)
    log_q[3, 1], log_q[4] = 0.5, -0.5
    kl = teacher_kl(torch.zeros(6, 5000, device=device), ids, log_q)
    assert kl.isnan().tolist() == [True] * 5 + [False]


LOGITS, IDS = torch.zeros(3, 4), torch.tensor([[0, 2]] * 3)
LOGP = torch.full((3, 2), -1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, r"logits \[N, V\].*\(2, 3, 4\)"),
        ({"logits": torch.zeros(3, 0)}, r"V > 0.*\(3, 0\)"),
        ({"logits": LOGITS.int()}, r"logits of fp32.*torch\.int32"),
        ({"logits": torch.zeros(4, 3).t()}, r"contiguous along V.*\(1, 3\)"),
        ({"ids": IDS[:2]}, r"teacher_ids of shape \[3, any\], got \(2, 2\)"),
        ({"ids": IDS.int()}, r"teacher_ids of torch\.int64, got torch\.int32"),
        ({"ids": IDS[:, :0], "logp": LOGP[:, :0]}, r"teacher_ids \[N, K\] with K > 0.*\(3, 0\)"),
        ({"logp": LOGP[:, :1]}, r"teacher_logp of shape \[3, 2\], got \(3, 1\)"),
        ({"logp": LOGP.bfloat16()}, r"teacher_logp of .*float32 or .*float64, got .*bfloat16"),
        ({"logp": LOGP.to("meta")}, r"teacher_logp is on meta"),
        ({"ids": torch.tensor([[0, 2], [4, 1], [0, 1]])}, r"\[0, 4\).*teacher_ids\[1, 0\] = 4"),
        ({"ids": torch.tensor([[0, 2], [2, 1], [0, -1]])}, r"\[0, 4\).*teacher_ids\[2, 1\] = -1"),
        ({"ids": torch.tensor([[0, 2], [3, 3], [0, 1]])}, r"distinct.*teacher_ids\[1, 1\] = 3"),
        ({"logp": torch.tensor([[-2.0, -1], [-1, 0.5], [-1, -1]])}, r"<= 0.*logp\[1, 1\] = 0\.5"),
        ({"logp": torch.tensor([[-2.0, -1], [math.nan, -1], [-1, -1]])}, r"logp\[1, 0\] = nan"),
        ({"logp": LOGP / 2}, r"sum to <= 1\.001, got 1\.21306 in row 0"),
        ({"temperature": 0.0}, r"temperature.*0\.0"),
        ({"softcap": -1.0}, r"softcap.*-1\.0"),
        ({"mask": torch.ones(3)}, r"mask of torch\.bool, got torch\.float32"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    arguments = {"logits": LOGITS, "ids": IDS, "logp": LOGP} | arguments
    inputs = [arguments.pop(name) for name in ("logits", "ids", "logp")]
    with pytest.raises(ValueError, match=message):
        teacher_kl(*inputs, **arguments)


def test_a_wrong_id_is_named_where_it_was_given():
    """Rows are sorted inside."""
    ids = torch.tensor([[3, 9, 1]])
    with pytest.raises(ValueError, match=r"teacher_ids\[0, 1\] = 9"):
        teacher_kl(LOGITS[:1], ids, torch.full((1, 3), -2.0))


# Edits to imitation.py and _exp_sums.py that must turn this file red:
#   sums kernel: `rest = keep * rest + ...`                 ->  without `keep`
#   gradient kernel: the line with `values_ptr`             ->  removed
#   _ratios: `(listed - top) - log_total`                   ->  listed - (top + log_total)
#   _ratios: p_tail                                         ->  1 - log_p.exp().sum(-1)
#   _log_tail: clamp_min(floor)                             ->  clamp_min(0)
