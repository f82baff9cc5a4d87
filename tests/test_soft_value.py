import math

import pytest
import torch
from row_cases import DTYPES, SHAPES, LargestBuffer, assert_right, example, value_and_gradients

from trimtab.triton_kernels import soft_value
from trimtab.triton_kernels._rows import BUFFER_BYTES
from trimtab.triton_kernels.soft_value import initial_value, initial_value_reference

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, interpreting
]
INF = math.inf
OPTIONS = {"plain": {}, "capped": {"temperature": 0.9, "softcap": 4.0}}


@pytest.fixture(params=["kernel", "chunked"])
def path(request, monkeypatch):
    if request.param == "chunked":
        monkeypatch.setattr(soft_value, "runs_kernel", lambda x: False)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-V{s[1]}")
def test_matches_reference(path, shape, options, dtype, device):
    n, v = shape
    mask = torch.ones(n, dtype=torch.bool, device=device)
    mask[n // 2] = n < 3
    logits = [example(shape, device, dtype=DTYPES[dtype])]
    assert_right(initial_value, initial_value_reference, logits, v, mask=mask, **OPTIONS[options])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("fn", [initial_value_reference, initial_value], ids=["reference", "fp64"])
def test_gradients_are_derivatives(fn, options, device):
    x = example((4, 12), device)[:, :12].double().requires_grad_()
    mask = torch.tensor([True, False, True, True], device=device)
    assert torch.autograd.gradcheck(lambda x: fn(x, mask=mask, **OPTIONS[options]), x)


@pytest.mark.parametrize("logit", [0.0, -1e4, 1e4, 3e38, -3e38])
def test_constant_logits_have_known_answers(path, logit, device):
    value, gradient = value_and_gradients(
        initial_value, [torch.full((2, 5000), logit, device=device)], 5000
    )
    torch.testing.assert_close(value, torch.full_like(value, logit + math.log(5000)))
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, generator=generator).to(device)
    torch.testing.assert_close(gradient, (upstream / 5000)[:, None].expand(-1, 5000))


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(path, temperature, device):
    logits = [example((3, 5000), device)]
    assert_right(initial_value, initial_value_reference, logits, 5000, temperature=temperature)


def test_masked_vocabulary_changes_nothing(path, device):
    alone = example((3, 5000), device)[:, :5000]
    masked = torch.full((3, 9500), -INF, device=device)
    masked[:, 4200:9200] = alone
    value, gradient = value_and_gradients(initial_value, [masked], 9500, softcap=5.0)
    expected, plain = value_and_gradients(initial_value, [alone], 5000, softcap=5.0)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, 4200:9200], plain, atol=1e-6, rtol=1e-5)
    assert (gradient[:, :4200] == 0).all() and (gradient[:, 9200:] == 0).all()


@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped"])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF], ids=["nan", "inf", "no-finite"])
def test_broken_rows_give_nan(path, bad, cap, device):
    logits = torch.zeros(2, 6000, device=device)
    logits[0, 5000 if bad != -INF else slice(None)] = bad
    assert initial_value(logits, softcap=cap).isnan().tolist() == [True, False]


def test_masked_rows_are_not_read(path, device):
    logits = example((3, 5000), device)
    logits[1] = math.nan
    mask = torch.tensor([True, False, True], device=device)
    value, gradient = value_and_gradients(initial_value, [logits], 5000, mask=mask)
    assert value[1] == 0 and not gradient[1].any()
    assert value.isfinite().all() and gradient.isfinite().all()


def test_no_rows(path, device):
    x = torch.zeros(0, 10, device=device)
    assert [t.shape for t in value_and_gradients(initial_value, [x], 10)] == [(0,), (0, 10)]


def test_chunked_buffers_are_small(monkeypatch):
    monkeypatch.setattr(soft_value, "runs_kernel", lambda x: False)
    x = torch.randn(24, 32768).bfloat16().requires_grad_()
    with LargestBuffer(x.shape) as largest:
        initial_value(x, temperature=0.7, softcap=5.0).sum().backward()
    assert 0 < largest.nbytes <= BUFFER_BYTES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, r"logits \[N, V\].*\(2, 3, 4\)"),
        ({"logits": torch.zeros(3, 0)}, r"V > 0.*\(3, 0\)"),
        ({"logits": torch.zeros(3, 4).int()}, r"logits of fp32.*torch\.int32"),
        ({"logits": torch.zeros(4, 3).t()}, r"contiguous along V.*\(1, 3\)"),
        ({"temperature": -2.0}, r"temperature.*-2\.0"),
        ({"softcap": 0.0}, r"softcap.*0\.0"),
        ({"mask": torch.ones(3)}, r"mask of torch\.bool, got torch\.float32"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    arguments = {"logits": torch.zeros(3, 4)} | arguments
    with pytest.raises(ValueError, match=message):
        initial_value(arguments.pop("logits"), **arguments)


# Edits to soft_value.py and _exp_sums.py that must turn this file red (test_imitation.py has more):
#   kernel: `total = keep * total + ...`            ->  without `keep`
#   kernel: `top = -3.4028234663852886e38`          ->  -float("inf")
#   gradient kernel: `mask=v < live_V`              ->  v < V
#   soft_value.py: `.masked_fill(broken, math.nan)` ->  removed
#   soft_value.py: `top + log_total`                ->  log_total
