"""What the test files of AdamMini share: layouts, runs of the definition, small models."""

import copy

import torch
from torch import nn

from trimtab.optim import AdamMini, BlockLayout, BlockMap, adam_mini_reference

LAYOUTS = [
    BlockLayout("elementwise", (6, 5)),
    BlockLayout("row", (6, 5)),
    BlockLayout("column", (6, 5)),
    BlockLayout("row", (6, 5), ((1, 3),)),  # heads of three rows
    BlockLayout("column", (5, 6), ((1, 2),)),
    BlockLayout("whole", (6, 5)),
    BlockLayout("row", (4, 3, 5)),  # a convolution
    BlockLayout("column", (4, 3, 5)),
    BlockLayout("row", (6, 5), ((2, 1), (1, 4))),  # fused, used up once
    BlockLayout("column", (5, 12), ((1, 3), (3, 1))),  # fused, repeated
    BlockLayout("row", (4, 6, 5), stacked=1),  # experts
    BlockLayout("row", (4, 6, 5), ((1, 2), (2, 1), (1, 2)), 1),
    BlockLayout("column", (4, 6, 5), stacked=1),
    BlockLayout("column", (2, 2, 3, 6), ((1, 2), (2, 2)), 2),
    BlockLayout("elementwise", ()),
    BlockLayout("whole", ()),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# The ways to run a step: kernels where they can run, and PyTorch in its three forms.
MODES = {
    "auto": {},
    "pytorch": {"fused": False},
    "foreach": {"foreach": True},
    "forloop": {"foreach": False},
    "capturable": {"capturable": True},
}


def layout_id(layout):
    rule = layout.rule.replace(" ", "")
    stacked = f"-stacked{layout.stacked}" if layout.stacked else ""
    return f"{rule}-{'x'.join(map(str, layout.shape)) or 'scalar'}{stacked}"


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def optimizer_for(layout, param, **options):
    return AdamMini([("w", param)], blocks=BlockMap({"w": (layout, "test")}), **options)


def run_definition(start, grads, layout, dtype, *, maximize=False, **settings):
    """Steps in `dtype`; the parameter is rounded to its own dtype after each."""
    p, own = start.to(dtype), start.dtype
    m, v = torch.zeros_like(p), p.new_zeros(layout.state_shape)
    for t, grad in enumerate(grads, 1):
        g = grad.to(dtype) * (-1 if maximize else 1)
        p, m, v = adam_mini_reference(p, g, m, v, layout, step=t, **settings)
        p = p.to(own).to(dtype)
    return p, m, v


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 6, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def give_gradients(params, t):
    """Random gradients that depend on t alone."""
    generator = torch.Generator().manual_seed(t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def snapshot(optimizer):
    """Parameters and state dict as they are now."""
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return params, copy.deepcopy(optimizer.state_dict())


def assert_unchanged(optimizer, before):
    params, saved = snapshot(optimizer)
    assert_same(before[0], params)
    assert saved["param_groups"] == before[1]["param_groups"]
    assert saved["state"].keys() == before[1]["state"].keys()
    for key, state in saved["state"].items():
        assert state.keys() == before[1]["state"][key].keys()
        assert_same(state.values(), before[1]["state"][key].values())
