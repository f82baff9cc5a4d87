import copy
import re

import pytest
import torch
from adam_mini_cases import (
    DTYPES,
    LAYOUTS,
    MODES,
    assert_same,
    dtype_id,
    give_gradients,
    layout_id,
    optimizer_for,
    run_definition,
    small_model,
)
from architectures import tiny
from closeness import assert_as_close_as
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, causal_lm
from torch import nn

from trimtab.optim import AdamMini, BlockLayout, BlockMap, adam_mini_reference, native

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def assert_matches_the_definition(layout, start, grads, param, optimizer, **settings):
    """`param` took a step for every gradient: it and its state are no further off than PyTorch."""
    state = optimizer.state[param]
    own = torch.promote_types(param.dtype, torch.float32)
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == own
    assert state["exp_avg_sq"].shape == layout.state_shape
    assert state["step"].shape == () and float(state["step"]) == len(grads)
    reference = run_definition(start, grads, layout, own, **settings)
    truth = run_definition(start, grads, layout, torch.float64, **settings)
    found = (param.detach(), state["exp_avg"], state["exp_avg_sq"])
    names = ("param", "exp_avg", "exp_avg_sq")
    for name, k, r, t in zip(names, found, reference, truth, strict=True):
        if param.dtype == torch.float64:
            torch.testing.assert_close(k.cpu(), t, rtol=1e-13, atol=1e-15)
        else:
            assert_as_close_as(k.cpu(), r, t, name=name)


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_matches_the_definition(layout, dtype, mode, device):
    torch.manual_seed(0)
    start = torch.randn(layout.shape).to(dtype)
    grads = [(torch.randn(layout.shape) * 10.0**-t).to(dtype) for t in range(5)]
    settings = dict(lr=3e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    param = nn.Parameter(start.clone().to(device))
    optimizer = optimizer_for(layout, param, **mode, **settings)
    for grad in grads:
        param.grad = grad.to(device)
        assert optimizer.step() is None
        assert torch.equal(param.grad.cpu(), grad)
    assert_matches_the_definition(layout, start, grads, param, optimizer, **settings)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.9 has no grad_dtype")
@modes
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_gradients_may_have_a_dtype_of_their_own(grad_dtype, mode, device):
    torch.manual_seed(0)
    layout = BlockLayout("row", (6, 5), ((2, 1), (1, 4)))
    start = torch.randn(6, 5)
    grads = [torch.randn(6, 5).to(grad_dtype) for _ in range(3)]
    param = nn.Parameter(start.clone().to(device))
    param.grad_dtype = grad_dtype
    optimizer = optimizer_for(layout, param, lr=1e-2, **mode)
    for grad in grads:
        param.grad = grad.to(device)
        optimizer.step()
    assert_matches_the_definition(layout, start, grads, param, optimizer, lr=1e-2)


# Against the chunks of 2^17 entries and the runs of 4096 that the step works on.
LARGE = [
    BlockLayout("row", (300, 1000)),  # several chunks of whole rows
    BlockLayout("row", (2, 140_000)),  # rows longer than a chunk
    BlockLayout("row", (300, 1000), ((1, 60),)),
    BlockLayout("row", (3, 90, 800), ((2, 30), (30, 1)), 1),
    BlockLayout("column", (1000, 300)),
    BlockLayout("column", (2, 140_000)),
    BlockLayout("whole", (300, 1000)),
    BlockLayout("elementwise", (4095,)),
    BlockLayout("elementwise", (140_001,)),
]


@pytest.mark.parametrize("mode", [MODES["auto"], MODES["pytorch"]], ids=["auto", "pytorch"])
@pytest.mark.parametrize("layout", LARGE, ids=layout_id)
def test_large_tensors_match_the_definition(layout, mode, device):
    torch.manual_seed(0)
    start = torch.randn(layout.shape)
    grads = [torch.randn(layout.shape) for _ in range(2)]
    settings = dict(lr=1e-2, weight_decay=0.1)
    param = nn.Parameter(start.clone().to(device))
    optimizer = optimizer_for(layout, param, max_grad_norm=1e9, **mode, **settings)
    for grad in grads:
        param.grad = grad.to(device)
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm.cpu(), grad.double().norm().float())
    assert_matches_the_definition(layout, start, grads, param, optimizer, **settings)


@st.composite
def block_layouts(draw):
    def sizes(least, most):
        return draw(st.lists(st.integers(1, 4), min_size=least, max_size=most))

    kind = draw(st.sampled_from(["elementwise", "row", "column", "whole"]))
    if kind in ("elementwise", "whole"):
        return BlockLayout(kind, tuple(sizes(0, 3)))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    segments = tuple(draw(st.lists(pair, min_size=1, max_size=3)))
    units = draw(st.integers(1, 2)) * sum(count * size for count, size in segments)
    stack = sizes(0, 2)
    shape = (units, *sizes(0, 2)) if kind == "row" else (*sizes(1, 2), units)
    return BlockLayout(kind, (*stack, *shape), segments, len(stack))


@settings(max_examples=80, deadline=None)
@given(
    layout=block_layouts(),
    mode=st.sampled_from(list(MODES)),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
    weight_decay=st.sampled_from([0.0, 0.3]),
    maximize=st.booleans(),
    steps=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_any_layout_matches_the_definition(
    layout, mode, betas, weight_decay, maximize, steps, seed
):
    torch.manual_seed(seed)
    settings = dict(lr=0.1, betas=betas, eps=1e-3, weight_decay=weight_decay, maximize=maximize)
    start = torch.randn(layout.shape, dtype=torch.float64)
    grads = [torch.randn_like(start) for _ in range(steps)]
    param = nn.Parameter(start.clone())
    optimizer = optimizer_for(layout, param, **MODES[mode], **settings)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    p, m, v = run_definition(start, grads, layout, torch.float64, **settings)
    torch.testing.assert_close(param.detach(), p, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], m, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], v, rtol=1e-11, atol=1e-12)


@modes
def test_groups_are_updated_like_optimizers_of_their_own(mode, device):
    """Also with all kinds, dtypes and settings mixed; bit for bit, whatever runs together."""
    settings = [
        dict(lr=1e-2),
        dict(lr=3e-2, betas=(0.5, 0.9), eps=1e-3),
        dict(weight_decay=0.5, maximize=True),
        dict(lr=torch.tensor(0.05), capturable=True),
    ]
    torch.manual_seed(0)
    starts = [
        (layout, torch.randn(layout.shape).to(device, DTYPES[i % 4]), settings[i // 4 % 4])
        for i, layout in enumerate(LAYOUTS)
    ]
    blocks = BlockMap({str(i): (layout, "test") for i, (layout, _, _) in enumerate(starts)})
    together = [nn.Parameter(start.clone()) for _, start, _ in starts]
    groups = [
        {"params": [(str(i), p)], **copy.deepcopy(own)}
        for i, (p, (_, _, own)) in enumerate(zip(together, starts, strict=True))
    ]
    optimizer = AdamMini(groups, blocks=blocks, **mode)
    alone = [nn.Parameter(start.clone()) for _, start, _ in starts]
    optimizers = [
        optimizer_for(layout, p, **{**mode, **copy.deepcopy(own)})
        for p, (layout, _, own) in zip(alone, starts, strict=True)
    ]
    for t in range(4):
        give_gradients(together, t)
        give_gradients(alone, t)
        together[t].grad = alone[t].grad = None  # another one each time
        optimizer.step()
        for o in optimizers:
            o.step()
    assert_same(together, alone)
    for p, q, o in zip(together, alone, optimizers, strict=True):
        assert_same(optimizer.state[p].values(), o.state[q].values())


@modes
@pytest.mark.parametrize("layout", LAYOUTS[:9], ids=layout_id)
def test_strides_do_not_matter(layout, mode, device):
    torch.manual_seed(0)
    start, grad = torch.randn(layout.shape), torch.randn(layout.shape)

    def strided(x):
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]

    def transposed(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    results = []
    for change in (torch.clone, strided, transposed):
        param = nn.Parameter(change(start.to(device)))
        optimizer = optimizer_for(layout, param, weight_decay=0.1, **mode)
        for other in (change, torch.clone, strided):
            param.grad = other(grad.to(device))
            optimizer.step()
        assert optimizer.state[param]["exp_avg"].is_contiguous()
        assert param.stride() == change(start).stride()
        results.append(param.detach())
    assert_same(results[1:], results[:1] * 2)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["wd0", "wd"])
@pytest.mark.parametrize("maximize", [False, True], ids=["min", "max"])
@modes
def test_elementwise_blocks_are_adamw(weight_decay, maximize, mode):
    torch.manual_seed(0)
    shapes = [(5, 7), (11,), ()]
    ours = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(
        lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=weight_decay, maximize=maximize
    )
    layouts = {p: BlockLayout("elementwise", tuple(p.shape)) for p in ours}
    a = AdamMini(ours, blocks=layouts, **settings, **mode)
    b = torch.optim.AdamW(theirs, **settings)
    for t in range(20):
        give_gradients(ours, t)
        give_gradients(theirs, t)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(a.state[p][key], b.state[q][key], rtol=1e-12, atol=1e-18)


def test_closed_form_of_a_constant_gradient():
    """Corrected, m = g and v_b = mean(g_b^2): every step moves by lr * g / rms(g_b)."""
    param = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    grad = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    optimizer = AdamMini([param], lr=0.1, eps=0.0)
    for _ in range(7):
        param.grad = grad.clone()
        optimizer.step()
    rms = grad.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(param.detach(), -0.7 * grad / rms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("preset", ["rows", "paper"])
def test_state_is_half_of_adamws(preset):
    model = causal_lm("llama_gqa")
    optimizer = AdamMini.for_model(model, preset=preset)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        layout = optimizer.blocks[name].layout
        assert optimizer.state[p]["exp_avg_sq"].shape == layout.state_shape
        assert layout == optimizer.layout(p)
    moments = [
        t for s in optimizer.state.values() for key, t in s.items() if key.startswith("exp_avg")
    ]
    numel = sum(p.numel() for p in model.parameters())
    blocks = sum(entry.layout.n_blocks for entry in optimizer.blocks.values())
    assert sum(t.nbytes for t in moments) == 4 * (numel + blocks)
    assert blocks < 0.04 * numel  # AdamW: 8 bytes an entry


def test_for_model_groups():
    model = causal_lm("qwen2")  # with biases
    model.model.norm.weight.requires_grad_(False)
    optimizer = AdamMini.for_model(model, 1e-3, (0.9, 0.95), weight_decay=0.1, preset="paper")
    decay, free = optimizer.param_groups
    assert (decay["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 2 for p in decay["params"]) and all(p.ndim == 1 for p in free["params"])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(decay["param_names"] + free["param_names"]) == sorted(trainable)
    assert len(AdamMini.for_model(model, no_decay_1d=False).param_groups) == 1
    assert len(AdamMini.for_model(nn.Linear(2, 2, bias=False)).param_groups) == 1
    with pytest.raises(ValueError, match=r"model: .*none"):
        AdamMini.for_model(nn.Linear(2, 2).requires_grad_(False))
    named = dict(small_model().named_parameters())
    whole = BlockMap({n: (BlockLayout("whole", tuple(p.shape)), "") for n, p in named.items()})
    model = small_model()
    assert AdamMini.for_model(model, blocks=whole).layout(model[0].weight).kind == "whole"


def test_vectors_of_two_dimensions_are_not_decayed():
    model = tiny("gpt-oss")
    optimizer = AdamMini.for_model(model, weight_decay=0.1)
    free = {n for g in optimizer.param_groups if not g["weight_decay"] for n in g["param_names"]}
    biases = {n for n, p in model.named_parameters() if n.endswith("bias") and p.ndim == 2}
    assert biases and biases < free
    assert not any(model.get_parameter(n).ndim == 3 for n in free)


@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_trains_a_language_model(momentum_dtype, device):
    model = causal_lm("llama_gqa").to(device)
    optimizer = AdamMini.for_model(
        model, lr=3e-3, weight_decay=0.1, preset="paper", max_grad_norm=1.0,
        momentum_dtype=momentum_dtype,
    )  # fmt: skip
    tokens = torch.randint(VOCAB, (4, 16), generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    for _ in range(40):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_closure_is_called_first_with_gradients_enabled():
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamMini([param], lr=0.1)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.9))


def test_scheduled_hyperparameters_are_the_ones_used():
    param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdamMini([param], lr=1.0, eps=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    moved = []
    for _ in range(4):
        before = param.item()
        param.grad = torch.ones_like(param)
        optimizer.step()
        schedule.step()
        moved.append(before - param.item())
    assert moved == pytest.approx([1.0, 0.5, 0.25, 0.125], rel=1e-12)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    assert optimizer.param_groups[0]["betas"][0] != 0.9  # it moves the first beta
    optimizer.step()


def test_added_groups_have_settings_of_their_own():
    frozen, moving, late = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizer = AdamMini([{"params": [frozen], "lr": 0.0}, {"params": [moving]}], lr=0.1)
    optimizer.add_param_group({"params": late, "lr": 0.2, "maximize": True})
    for p in (frozen, moving, late):
        p.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(2, 2))
    torch.testing.assert_close(moving.detach(), torch.full((2, 2), 0.9))
    torch.testing.assert_close(late.detach(), torch.full((2, 2), 1.2))
    assert optimizer.layout(late).kind == "row"


def test_parameters_replaced_by_a_host_get_their_layout():
    """Mixed-precision wrappers put fp32 copies into the groups after construction."""
    model = small_model().to(torch.bfloat16)
    optimizer = AdamMini.for_model(model)
    masters = []
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().float()) for p in group["params"]]
        masters += group["params"]
    give_gradients(masters, 0)
    optimizer.step()
    shapes = [tuple(optimizer.state[p]["exp_avg_sq"].shape) for p in masters]
    assert shapes == [(8,), (3,), (8,), (3,)]


@modes
def test_parameters_without_a_gradient_are_skipped(mode):
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamMini([used, unused], weight_decay=0.5, **mode)
    optimizer.step()
    assert not optimizer.state
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2)) and unused not in optimizer.state
    unused.grad = torch.ones(2)
    optimizer.step()
    assert (float(optimizer.state[used]["step"]), float(optimizer.state[unused]["step"])) == (2, 1)


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_step_of_zero_lr_leaves_the_parameter(dtype, mode):
    """torch's distributed checkpoints create the state by such a step, with zero gradients."""
    torch.manual_seed(0)
    start = torch.randn(5, 4).to(dtype)
    options = dict(lr=0.0, weight_decay=0.1, stochastic_rounding=True, max_grad_norm=1.0, **mode)
    for grad in (torch.zeros_like(start), torch.randn(5, 4).to(dtype)):
        param = nn.Parameter(start.clone())
        param.grad = grad
        AdamMini([param], **options).step()
        assert torch.equal(param, start)


@modes
def test_nan_gradients_are_not_hidden_and_stay_in_their_block(mode):
    param, vector = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    param.grad, vector.grad = torch.ones(3, 2), torch.ones(3)
    param.grad[1, 0] = vector.grad[1] = torch.nan
    AdamMini([param, vector], **mode).step()
    assert param.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert vector.isnan().tolist() == [False, True, False]


@modes
def test_empty_parameters_are_allowed(mode):
    shapes = [(0, 4), (4, 0), (0,), (2, 3)]
    params = [nn.Parameter(torch.ones(s)) for s in shapes]
    optimizer = AdamMini(params, max_grad_norm=1.0, **mode)
    for t in range(2):
        give_gradients(params, t)
        optimizer.step()
        assert optimizer.grad_norm.isfinite()
    assert not params[-1].isnan().any()
    assert set(optimizer.state) == {params[-1]}


def test_nothing_grows_when_the_set_of_gradients_changes():
    """As in mixtures of experts."""
    params = [nn.Parameter(torch.ones(2, 3)) for _ in range(8)]
    optimizer = AdamMini(params)
    for t in range(200):
        for i, p in enumerate(params):
            p.grad = torch.ones_like(p) if t >> i & 1 else None
        optimizer.step()
    assert len(optimizer._cache) <= 64


@pytest.mark.parametrize("device_type", ["meta", "cpu"])
def test_default_device_and_dtype_do_not_matter(device_type):
    """Models are built on the meta device or in bf16 by such contexts."""
    results = []
    for context in (torch.device("cpu"), torch.device(device_type)):
        params = [nn.Parameter(torch.ones(layout.shape)) for layout in LAYOUTS]
        layouts = dict(zip(params, LAYOUTS, strict=True))
        with context:
            optimizer = AdamMini(params, blocks=layouts, max_grad_norm=1.0)
        if results:
            torch.set_default_dtype(torch.bfloat16)
        try:
            for t in range(2):
                for p in params:
                    p.grad = torch.full_like(p, 0.3 + t)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(state["step"].dtype == torch.float32 for state in optimizer.state.values())
        results.append(params)
    assert_same(*results)


def peak_of_a_step(optimizer):
    """Bytes of the largest tensor that a step allocates, and of all that live at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return max((e.nbytes() for e in events), default=0), peak


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(
    "layout",
    [
        BlockLayout("row", (2048, 2048)),
        BlockLayout("row", (1, 2**22)),
        BlockLayout("row", (2048, 2048), ((1, 512), (1, 256), (1, 256))),
        BlockLayout("column", (2048, 2048)),
        BlockLayout("elementwise", (2**22,)),
        BlockLayout("whole", (2**22,)),
    ],
    ids=layout_id,
)
def test_no_memory_of_the_size_of_a_parameter(layout, dtype, options):
    mode = {"fused": False} if dtype == torch.float32 else {"foreach": True}
    if dtype == torch.bfloat16:  # with the noise of both roundings
        options = options | {"momentum_dtype": dtype, "stochastic_rounding": True}
    param = nn.Parameter(torch.ones(layout.shape, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = optimizer_for(layout, param, **mode, **options)
    optimizer.step()  # makes the state
    largest, peak = peak_of_a_step(optimizer)
    assert 0 < largest <= param.nbytes / 4
    assert peak < param.nbytes


@needs_cuda
@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["plain", "clip"])
def test_a_cuda_graph_repeats_the_step(max_grad_norm):
    def make():
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(x.shape, device="cuda")) for x in LAYOUTS]
        layouts = dict(zip(params, LAYOUTS, strict=True))
        lr = torch.tensor(1e-2, device="cuda")
        options = dict(capturable=True, momentum_dtype=torch.bfloat16, max_grad_norm=max_grad_norm)
        for p in params:
            p.grad = torch.zeros_like(p)
        return params, AdamMini(params, lr=lr, blocks=layouts, **options)

    def load_gradients(params, t):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad.copy_(torch.randn(p.shape, generator=generator))

    eager, by_hand = make()
    captured, recorded = make()
    for t in range(3):
        for params, optimizer in ((eager, by_hand), (captured, recorded)):
            load_gradients(params, t)
            optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded.step()
    for t in range(3, 8):
        load_gradients(eager, t)
        load_gradients(captured, t)
        for optimizer in (by_hand, recorded):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / t)
        by_hand.step()
        graph.replay()
    assert_same(eager, captured)
    for p, q in zip(eager, captured, strict=True):
        assert_same(by_hand.state[p].values(), recorded.state[q].values())


def test_fused_none_takes_the_kernels_and_says_why_not(caplog, monkeypatch):
    if native.load() is None:
        pytest.skip("no compiler")
    calls = []
    monkeypatch.setattr(native, "one_pass", lambda *_, **__: calls.append("native"))
    param = nn.Parameter(torch.ones(4, 3))
    param.grad = torch.ones(4, 3)
    for options in ({}, {"fused": True}, {"fused": False}, {"foreach": True}, {"foreach": False}):
        AdamMini([param], **options).step()
    assert calls == ["native"] * 2
    monkeypatch.setattr(native, "why_not", lambda works: "a reason of the test")
    with caplog.at_level("INFO", logger="trimtab"):
        for _ in range(2):
            AdamMini([param]).step()
    assert caplog.text.count("a reason of the test") == 1
    with pytest.raises(ValueError, match=re.escape("fused: ") + ".*a reason of the test"):
        AdamMini([param], fused=True).step()


@modes
def test_autograd_sees_that_a_parameter_has_changed(mode, device):
    param = nn.Parameter(torch.ones(4, 3, device=device))
    param.grad = torch.ones_like(param)
    loss = param.square().sum()
    AdamMini([param], **mode).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_definition_does_not_change_its_arguments():
    layout = BlockLayout("row", (6, 5))
    given = [torch.randn(6, 5) for _ in range(3)] + [torch.rand(6)]
    before = [x.clone() for x in given]
    adam_mini_reference(*given, layout, step=1, lr=0.1, weight_decay=0.1)
    assert_same(given, before)


# Edits that must turn this file red:
#   1. pieces._whole_plan: drop first += count (second moments of fused rows)
#   2. AdamMini.step: drop copy_(update.param) (strided parameters)
#   3. AdamMini.step: drop self._trim_cache()
#   4. places.places_of: make the plan outside of torch.device("cpu")
#   5. _adam_mini_reference: _CHUNK = 1 << 30 (memory of a step)
