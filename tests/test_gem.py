import math

import pytest
import torch
from row_cases import DTYPES, SHAPES, LargestBuffer, assert_right, example, value_and_gradients

from trimtab.triton_kernels import gem
from trimtab.triton_kernels._rows import BUFFER_BYTES
from trimtab.triton_kernels.gem import gem_loss, gem_loss_from_stats, gem_loss_reference
from trimtab.triton_kernels.token_stats import token_stats

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, interpreting
]
INF = math.inf
OPTIONS = {"plain": {}, "other": {"beta": 1.3, "softcap": 4.0}}
both_h = pytest.mark.parametrize("h", ["linear", "logsigmoid"])


@pytest.fixture(params=["kernel", "chunked"])
def path(request, monkeypatch):
    if request.param == "chunked":
        monkeypatch.setattr(gem, "runs_kernel", lambda x: False)
    return request.param


def labels_of(n, v, device):
    return torch.randint(v, (n,), generator=torch.Generator().manual_seed(3)).to(device)


@both_h
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-V{s[1]}")
def test_matches_reference(path, shape, options, dtype, h, device):
    n, v = shape
    labels = labels_of(n, v, device)
    labels[n // 2] = -100 if n > 2 else labels[n // 2]
    logits = [example(shape, device, dtype=DTYPES[dtype])]
    assert_right(gem_loss, gem_loss_reference, logits, v, labels, h=h, **OPTIONS[options])


@both_h
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("fn", [gem_loss_reference, gem_loss], ids=["reference", "chunked"])
def test_gradients_are_derivatives_with_constant_weights(fn, options, h, device):
    """In fp64; q w is taken where the derivative is, and does not move with the logits."""
    x = example((4, 12), device)[:, :12].double().requires_grad_()
    labels = labels_of(4, 12, device)
    labels[1] = -100
    beta, cap = OPTIONS[options].get("beta", 0.7), OPTIONS[options].get("softcap")

    def z_of(x):
        return x if cap is None else cap * (x / cap).tanh()

    def gap_of(x):
        return z_of(x) - z_of(x).gather(-1, labels.clamp_min(0)[:, None])

    gap = gap_of(x).detach()
    w = torch.sigmoid(gap / 100) if h == "logsigmoid" else 1
    q = (z_of(x).detach() / beta).softmax(-1)

    def constant(x):
        return (q * w * gap_of(x)).sum(-1).masked_fill(labels == -100, 0)

    assert torch.autograd.gradcheck(constant, x)
    found = value_and_gradients(fn, [x], 12, labels, h=h, **OPTIONS[options])
    for f, t in zip(found, value_and_gradients(constant, [x], 12)):
        torch.testing.assert_close(f, t, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("beta", [0.3, 0.7, 1.0])
def test_linear_gradient_is_that_of_cross_entropy_at_temperature_beta(path, beta, device):
    x, labels = example((3, 5000), device), labels_of(3, 5000, device)
    _, gradient = value_and_gradients(gem_loss, [x], 5000, labels, beta=beta)

    def cross_entropy(z, y):
        return beta * torch.nn.functional.cross_entropy(z / beta, y, reduction="none")

    _, expected = value_and_gradients(cross_entropy, [x], 5000, labels)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_from_statistics(path, beta, device):
    x, labels = example((3, 5000), device), labels_of(3, 5000, device)
    labels[1] = -100

    def from_stats(z, y):
        return gem_loss_from_stats(token_stats(z, y, temperature=beta), beta=beta)

    found = value_and_gradients(from_stats, [x], 5000, labels)
    expected = value_and_gradients(gem_loss, [x], 5000, labels, beta=beta)
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"beta.*0\.0"):
        gem_loss_from_stats(token_stats(x, labels), beta=0.0)
    with pytest.raises(ValueError, match=r"stats: expected .* whole vocabulary, got pruned"):
        gem_loss_from_stats(token_stats(x, labels, prune=0.1), beta=1.0)


@both_h
def test_gradient_sums_to_zero(path, h, device):
    x, labels = example((3, 9001), device), labels_of(3, 9001, device)
    _, gradient = value_and_gradients(gem_loss, [x], 9001, labels, h=h)
    assert gradient.double().sum(-1).abs().max() < 1e-6 and gradient.abs().max() > 1e-3


@both_h
@pytest.mark.parametrize("logit", [0.0, 80.0, -1e4, 1e30])
def test_constant_logits_have_no_loss(path, logit, h, device):
    x = torch.full((2, 5000), logit, device=device)
    loss, gradient = value_and_gradients(gem_loss, [x], 5000, torch.tensor([0, 4999]), h=h)
    assert loss.tolist() == [0, 0]
    upstream = torch.randn(2, generator=torch.Generator().manual_seed(1)).to(device)
    w = 0.5 if h == "logsigmoid" else 1
    expected = (upstream * w / 5000)[:, None].repeat(1, 5000)
    expected[[0, 1], [0, 4999]] -= upstream * w
    torch.testing.assert_close(gradient, expected)


@both_h
@pytest.mark.parametrize("top", [1e4, 3e38])
def test_extreme_logits(path, top, h, device):
    x = torch.zeros(2, 5000, device=device)
    x[:, 4500] = top
    x[:, 7] = torch.finfo(torch.float32).min  # minus 3e38 is -inf
    labels = torch.tensor([4500, 3], device=device)
    loss, gradient = value_and_gradients(gem_loss, [x], 5000, labels, h=h, beta=1.0)
    torch.testing.assert_close(loss, torch.tensor([0.0, top], device=device))
    assert gradient.isfinite().all() and gradient.sum(-1).abs().max() < 1e-6


@both_h
@pytest.mark.parametrize("beta", [0.01, 100.0])
def test_extreme_betas(path, beta, h, device):
    x, labels = example((3, 5000), device), labels_of(3, 5000, device)
    assert_right(gem_loss, gem_loss_reference, [x], 5000, labels, h=h, beta=beta)


@both_h
def test_offset_of_all_logits(path, h, device):
    x, labels = example((3, 5000), device), labels_of(3, 5000, device)
    assert_right(gem_loss, gem_loss_reference, [x + 1e4], 5000, labels, h=h)


@both_h
@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped"])
def test_masked_vocabulary_changes_nothing(path, cap, h, device):
    alone, labels = example((3, 5000), device)[:, :5000], labels_of(3, 5000, device)
    masked = torch.full((3, 9500), -INF, device=device)
    masked[:, 4200:9200] = alone
    loss, gradient = value_and_gradients(gem_loss, [masked], 9500, labels + 4200, softcap=cap, h=h)
    expected, plain = value_and_gradients(gem_loss, [alone], 5000, labels, softcap=cap, h=h)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[:, 4200:9200], plain, atol=1e-6, rtol=1e-5)
    assert (gradient[:, :4200] == 0).all() and (gradient[:, 9200:] == 0).all()


@both_h
def test_masked_label(path, h, device):
    """Infinitely unlikely: loss +inf, no gradient of its own, q w for the others."""
    x = example((2, 5000), device)[:, :5000]
    x[0, 2] = -INF
    x.requires_grad_()
    labels = torch.tensor([2, 3], device=device)
    for fn in (gem_loss, gem_loss_reference):
        loss = fn(x, labels, h=h)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert loss[0] == INF and loss[1].isfinite()
        torch.testing.assert_close(gradient[0], (x[0] / 0.7).softmax(-1).detach())


@both_h
@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped"])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF], ids=["nan", "inf", "no-finite"])
@pytest.mark.parametrize("label", [5000, 1], ids=["label", "other"])
def test_broken_rows_give_nan(path, label, bad, cap, h, device):
    logits = torch.zeros(2, 6000, device=device)
    logits[0, 5000 if bad != -INF else slice(None)] = bad
    loss = gem_loss(logits, torch.tensor([label] * 2, device=device), softcap=cap, h=h)
    assert loss.isnan().tolist() == [True, False]


@both_h
def test_ignored_rows_are_not_read(path, h, device):
    x, labels = example((3, 5000), device), labels_of(3, 5000, device)
    x[1], labels[1] = math.nan, -7
    loss, gradient = value_and_gradients(gem_loss, [x], 5000, labels, ignore_index=-7, h=h)
    assert loss[1] == 0 and loss.isfinite().all()
    assert (gradient[1] == 0).all() and gradient.isfinite().all() and gradient[0].any()
    labels[1] = 4  # a column may be what is ignored
    loss, gradient = value_and_gradients(gem_loss, [x], 5000, labels, ignore_index=4, h=h)
    assert loss[1] == 0 and loss.isfinite().all() and gradient.isfinite().all()


def test_strided_labels(path, device):
    x, labels = example((3, 5000), device), labels_of(3, 5000, device)
    expected = value_and_gradients(gem_loss, [x], 5000, labels)
    found = value_and_gradients(gem_loss, [x], 5000, labels[:, None].repeat(1, 4)[:, 1])
    assert all(f.equal(e) for f, e in zip(found, expected))


def test_no_rows(path, device):
    x, labels = torch.zeros(0, 10, device=device), labels_of(0, 10, device)
    found = value_and_gradients(gem_loss, [x], 10, labels)
    assert [t.shape for t in found] == [(0,), (0, 10)]


def test_kernel_does_not_read_past_the_row(path, monkeypatch, device):
    """On a GPU labels are not checked: one out of range gives NaN, not a stray read."""
    monkeypatch.setattr(gem, "check_labels", lambda *a: None)
    labels = torch.tensor([10**12, -3, 1], device=device)
    assert gem_loss(torch.zeros(3, 10, device=device), labels).isnan().tolist() == [
        True,
        True,
        False,
    ]


def test_chunked_buffers_are_small(monkeypatch):
    monkeypatch.setattr(gem, "runs_kernel", lambda x: False)
    x = torch.randn(24, 32768).bfloat16().requires_grad_()
    with LargestBuffer(x.shape) as largest:
        gem_loss(x, labels_of(24, 32768, "cpu"), h="logsigmoid", softcap=5.0).sum().backward()
    assert 0 < largest.nbytes <= BUFFER_BYTES


LOGITS, LABELS = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, r"logits \[N, V\].*\(2, 3, 4\)"),
        ({"logits": torch.zeros(3, 0)}, r"V > 0.*\(3, 0\)"),
        ({"logits": LOGITS.int()}, r"logits of fp32.*torch\.int32"),
        ({"logits": torch.zeros(4, 3).t()}, r"contiguous along V.*\(1, 3\)"),
        ({"labels": LABELS[:2]}, r"labels of shape \[3\], got \(2,\)"),
        ({"labels": LABELS.int()}, r"labels of torch\.int64, got torch\.int32"),
        ({"labels": LABELS.to("meta")}, r"labels is on meta"),
        ({"labels": torch.tensor([0, 1, 4])}, r"\[0, 4\).*labels\[2\] = 4"),
        ({"labels": torch.tensor([0, -1, 9])}, r"labels\[1\] = -1"),
        ({"beta": 0.0}, r"beta.*0\.0"),
        ({"beta": math.nan}, r"beta.*nan"),
        ({"softcap": INF}, r"softcap.*inf"),
        ({"h": "sigmoid"}, r"h must be 'linear' or 'logsigmoid', got 'sigmoid'"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    arguments = {"logits": LOGITS, "labels": LABELS} | arguments
    logits, labels = arguments.pop("logits"), arguments.pop("labels")
    with pytest.raises(ValueError, match=message):
        gem_loss(logits, labels, **arguments)


# Edits to gem.py that must turn this file red:
#   sums kernel: `weight = keep * weight + ...`             ->  without `keep`
#   sums kernel: `tl.exp((top - new) * inv_beta)`           ->  without `* inv_beta`
#   sums kernel: `tl.where(e > 0, ew * gap, 0.0)`           ->  ew * gap (masked entries)
#   gradient kernel: `tl.where(v == y, weight, 0.0)`        ->  1.0 instead of weight
#   _GEMLoss.forward: `wrong | ~(s1 > 0)`                   ->  ~(s1 > 0)
