"""Shapes, examples and comparisons that the tests of losses over rows of logits share."""

import torch
from closeness import assert_as_close_as
from torch.utils._python_dispatch import TorchDispatchMode

# (N, V): one entry; two; a prime below the block (4096); one below it, at it, one past it; twice
# past it and no multiple of 16
SHAPES = [(1, 1), (3, 2), (3, 997), (1, 4095), (2, 4096), (2, 4097), (3, 9001)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def example(shape, device, *, dtype=torch.float32, scale=3.0, seed=0):
    """Logits [N, V + 3]; callers see [:, :V], so the row stride is not V.

    The maximum of every other row is in its last column: sums of earlier blocks must move to it.
    """
    generator = torch.Generator().manual_seed(seed)
    n, v = shape
    x = scale * torch.randn(n, v + 3, generator=generator)
    x[::2, v - 1] = x[::2, :v].amax(-1) + scale / 2 if n else 0
    return x.to(device, dtype)


def value_and_gradients(fn, padded, v, *others, dtype=None, **options):
    """Output, and gradients for each of `padded` (of which `fn` sees [:, :v], cast to `dtype`)."""
    leaves = [x.detach().clone().requires_grad_() for x in padded]
    out = fn(*(x[:, :v].to(dtype or x.dtype) for x in leaves), *others, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator).to(out)
    gradients = torch.autograd.grad(out, leaves, upstream)
    assert all((x[:, v:] == 0).all() for x in gradients)
    return out.detach(), *(x[:, :v] for x in gradients)


def assert_right(fn, reference, padded, v, *others, **options):
    """Value and gradients of `fn` are as close to float64 as those of fp32 PyTorch."""
    found = value_and_gradients(fn, padded, v, *others, **options)
    plain = value_and_gradients(reference, padded, v, *others, dtype=torch.float32, **options)
    truth = value_and_gradients(reference, [x.double() for x in padded], v, *others, **options)
    assert found[0].dtype == torch.float32
    assert [x.dtype for x in found[1:]] == [x.dtype for x in padded]
    for i, (f, r, t) in enumerate(zip(found, plain, truth)):
        assert_as_close_as(f, r, t, name="value" if i == 0 else f"gradient {i}")


class LargestBuffer(TorchDispatchMode):
    """Bytes of the largest tensor that anything returned, but for the gradients of `shape`."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.nbytes = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.shape != self.shape:
                self.nbytes = max(self.nbytes, x.nbytes)
        return out
