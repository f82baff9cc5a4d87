import copy
from types import SimpleNamespace

import pytest
import torch
from adam_mini_cases import (
    DTYPES,
    LAYOUTS,
    MODES,
    assert_same,
    assert_unchanged,
    dtype_id,
    give_gradients,
    layout_id,
    optimizer_for,
    run_definition,
    small_model,
    snapshot,
)
from torch import nn

from trimtab.optim import AdamMini, BlockLayout
from trimtab.triton_kernels import _adam_mini_reference as kernels

BF16 = torch.bfloat16
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def standard_errors(found, exact):
    """By how many standard errors the mean of bf16 numbers misses the mean of exact ones.

    `found` is `exact` rounded up or down once: the variance of one entry is that of the choice.
    """
    down = exact.float().view(torch.int32) & -0x10000
    ulp = (down + 0x10000).view(torch.float32).double() - down.view(torch.float32).double()
    up = (exact.double() - down.view(torch.float32)) / ulp
    variance = (ulp.square() * up * (1 - up)).sum()
    return float((found.double() - exact.double()).sum() / variance.sqrt())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("mode", [MODES["auto"], MODES["pytorch"]], ids=["auto", "pytorch"])
def test_second_moment_follows_a_gradient_that_drops_a_hundredfold(dtype, mode):
    """v is fp32 also for bf16 parameters: in bf16 it would stop moving."""
    beta2, steps = 0.999, 1500
    param = nn.Parameter(torch.ones(2, 8, dtype=dtype))
    optimizer = AdamMini([param], betas=(0.9, beta2), lr=1e-6, **mode)
    for t in range(100 + steps):
        param.grad = torch.full_like(param, 1.0 if t < 100 else 0.01)
        optimizer.step()
    start, drop = 1 - beta2**100, float(param.grad[0, 0]) ** 2
    exact = drop + (start - drop) * beta2**steps
    v = optimizer.state[param]["exp_avg_sq"]
    torch.testing.assert_close(v.double(), torch.full((2,), exact).double(), rtol=2e-3, atol=0)
    frozen = torch.tensor(start, dtype=BF16)
    for _ in range(steps):
        frozen = frozen.lerp(torch.tensor(drop, dtype=BF16), 1 - beta2)
    assert frozen > 4 * exact


def test_fp16_gradients_are_squared_in_fp32():
    param = nn.Parameter(torch.zeros(2, 3, dtype=torch.float16))
    param.grad = torch.tensor([[1000.0], [1e-5]], dtype=torch.float16).expand(2, 3).clone()
    optimizer = AdamMini([param], betas=(0.9, 0.5), max_grad_norm=1e9)
    optimizer.step()
    want = 0.5 * param.grad[:, 0].double().square()  # 1e6 overflows fp16, 1e-10 underflows it
    found = optimizer.state[param]["exp_avg_sq"].double()
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
    assert float(optimizer.grad_norm) == pytest.approx(float(param.grad.double().norm()))


@modes
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=dtype_id)
def test_low_precision_parameters_are_rounded_once(dtype, mode, device):
    torch.manual_seed(0)
    layout = BlockLayout("row", (64, 32))
    start, grad = torch.randn(64, 32).to(dtype), torch.randn(64, 32).to(dtype)
    param = nn.Parameter(start.clone().to(device))
    param.grad = grad.to(device)
    optimizer_for(layout, param, lr=1e-2, weight_decay=0.1, **mode).step()
    exact, _, _ = run_definition(start.double(), [grad], layout, torch.float64, lr=1e-2,
                                 weight_decay=0.1)  # fmt: skip
    ulp = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    error = (param.cpu().double() - exact).abs()
    assert (error <= 0.5 * ulp * (1 + 1e-3)).all()  # half an ulp, and fp32's own error


@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["wd0", "wd"])
def test_updates_far_below_an_ulp_move_bf16_parameters_on_average(weight_decay, device):
    """Every step moves an entry by 2e-4 of 1, where neighbours of 1 are 2^-8 and 2^-7 away."""
    n, steps, lr = 1 << 16, 40, 2e-4
    moved = {}
    for stochastic in (False, True):
        param = nn.Parameter(torch.ones(256, n // 256, dtype=BF16, device=device))
        optimizer = AdamMini(
            [param], lr=lr, weight_decay=weight_decay, eps=0.0, stochastic_rounding=stochastic
        )
        for _ in range(steps):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[stochastic] = 1 - param.detach().double()
    exact = 1.0
    for _ in range(steps):
        exact = exact * (1 - lr * weight_decay) - lr
    error = float(moved[True].std()) / n**0.5
    assert abs(float(moved[True].mean()) - (1 - exact)) < 5 * error < 0.1 * (1 - exact)
    assert not moved[False].any()  # rounded to the nearest, nothing ever moves


def first_moments(grad, steps=1, device="cpu", **options):
    param = nn.Parameter(torch.zeros(grad.shape, device=device))
    optimizer = AdamMini([param], lr=1e-3, momentum_dtype=BF16, **options)
    for _ in range(steps):
        param.grad = grad.clone().to(device)
        optimizer.step()
    return optimizer.state[param]["exp_avg"].cpu()


@modes
def test_bf16_momentum_is_unbiased(mode, device):
    """Over the entries of a tensor; and rounding to the nearest would fail this test."""
    for seed, value in enumerate((0.3, -0.7, 1e-3, 1.234e-6, 3e4)):
        grad = torch.full((64, 1024), value)
        exact = torch.zeros_like(grad).lerp(grad, 1 - 0.9)
        found = first_moments(grad, seed=seed, device=device, **mode)
        assert ((found.double() - exact).abs() < 2**-7 * exact.abs()).all()  # a neighbour
        assert found.unique().numel() == 2
        assert abs(standard_errors(found, exact)) < 5
        assert abs(standard_errors(exact.to(BF16), exact)) > 50
    torch.manual_seed(0)
    grad = torch.randn(64, 1024)
    exact = torch.zeros_like(grad).lerp(grad, 1 - 0.9)
    found = first_moments(grad, device=device, **mode)
    weights = grad.sign()  # rounding towards 0 or away from it would show
    for part in (grad > 0, grad < 0):
        assert abs(standard_errors(found[part], exact[part])) < 5
    assert abs(standard_errors(found * weights, exact * weights)) < 5


def test_bf16_momentum_is_unbiased_over_seeds():
    grad = torch.tensor([[0.3, -0.7, 1e-3, 4.9]])
    exact = torch.zeros_like(grad).lerp(grad, 1 - 0.9)
    found = torch.cat([first_moments(grad, seed=seed, foreach=False) for seed in range(1000)])
    for i in range(4):
        assert abs(standard_errors(found[:, i], exact[:, i].expand(1000))) < 5


def test_bf16_momentum_stays_unbiased_over_many_steps(device):
    """The recursion is linear: the expected value is the exact moment, after any step."""
    torch.manual_seed(0)
    grads = [torch.full((64, 1024), float(x)) for x in torch.randn(30)]
    param = nn.Parameter(torch.zeros(64, 1024, device=device))
    optimizer = AdamMini([param], betas=(0.95, 0.999), lr=1e-3, momentum_dtype=BF16)
    exact = 0.0
    for grad in grads:
        param.grad = grad.to(device)
        optimizer.step()
        exact = 0.95 * exact + 0.05 * float(grad[0, 0])
    found = optimizer.state[param]["exp_avg"].double()
    assert abs(float(found.mean()) - exact) < 5 * float(found.std()) / found.numel() ** 0.5
    assert float(found.std()) < 0.02 * abs(exact) + 0.01


def test_roundings_of_neighbours_steps_parameters_and_seeds_are_independent():
    n = 1 << 16
    shape = (64, n // 64)

    def ups(optimizer, params):
        for p in params:
            p.grad = torch.full(shape, 0.3)
        optimizer.step()
        states = [optimizer.state[p]["exp_avg"] for p in params]
        choices = [(m > m.min()).double().view(-1) for m in states]
        for m in states:
            m.zero_()
        return choices

    seen = []
    for seed in (0, 1):
        params = [nn.Parameter(torch.ones(shape)) for _ in range(2)]
        optimizer = AdamMini(params, momentum_dtype=BF16, seed=seed)
        seen += ups(optimizer, params) + ups(optimizer, params)
    bits = torch.stack(seen)
    bits = bits - bits.mean(1, keepdim=True)
    limit = 5 / n**0.5
    correlation = torch.corrcoef(bits) - torch.eye(len(bits))
    assert correlation.abs().max() < limit
    for shift in (1, 2, 3, 64, 1024):
        moved = bits.roll(shift, 1)
        own = (bits * moved).mean(1) / bits.var(1)
        assert own.abs().max() < limit


def test_bits_of_momentum_and_parameter_are_independent():
    n = 1 << 16
    param = nn.Parameter(torch.ones(64, n // 64, dtype=BF16))
    optimizer = AdamMini([param], lr=1e-3, momentum_dtype=BF16, stochastic_rounding=True, eps=0)
    param.grad = torch.full_like(param, 0.3)
    optimizer.step()
    moment = optimizer.state[param]["exp_avg"]
    bits = torch.stack([(moment > moment.min()).view(-1), (param == 1).view(-1)]).double()
    assert torch.corrcoef(bits)[0, 1].abs() < 5 / n**0.5


@modes
def test_bits_depend_on_seed_step_and_position_alone(mode):
    def run(seed, stop=None):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(x.shape).to(BF16)) for x in LAYOUTS]
        layouts = dict(zip(params, LAYOUTS, strict=True))
        options = dict(momentum_dtype=BF16, stochastic_rounding=True, seed=seed)
        optimizer = AdamMini(params, blocks=layouts, **options, **mode)
        for t in range(6):
            if t == stop:  # resume
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = AdamMini(params, blocks=layouts, **options, **mode)
                optimizer.load_state_dict(saved)
            torch.manual_seed(t)  # the global generator is not read
            give_gradients(params, t)
            optimizer.step()
        return params

    assert_same(run(1), run(1, stop=3))
    assert any(not torch.equal(p, q) for p, q in zip(run(1), run(2), strict=True))


def test_all_forms_round_with_the_same_bits(device):
    """Where their fp32 numbers agree: here the products are exact."""
    results = []
    for mode in MODES.values():
        param = nn.Parameter(torch.ones(8, 512, dtype=BF16, device=device))
        options = dict(momentum_dtype=BF16, stochastic_rounding=True, lr=2**-12, eps=0.0)
        optimizer = AdamMini([param], betas=(0.25, 0.75), **options, **mode)
        param.grad = torch.full_like(param, 1 + 2**-7)
        optimizer.step()
        results.append((optimizer.state[param]["exp_avg"].clone(), param.detach()))
    assert results[0][0].unique().numel() == 2 and results[0][1].unique().numel() == 2
    for found in results[1:]:
        assert_same(found, results[0])


def test_numbers_that_bf16_holds_stay_and_infinities_survive():
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-126, 3.3895314e38, torch.inf, -torch.inf])
    for noise in (0, 0xFFFF):
        rounded = kernels.round_stochastically(exact, torch.full((8,), noise))
        assert torch.equal(rounded, exact.to(BF16)) and rounded[1].signbit()
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for noise in (0, 0xFFFF):
        assert kernels.round_stochastically(nan, torch.full((3,), noise)).isnan().all()


def test_a_rounding_up_has_the_probability_of_the_part_cut_off():
    x = torch.tensor([1.0 + 2**-9], dtype=torch.float32)  # a quarter of the way to the next
    noise = torch.arange(1 << 16)
    rounded = kernels.round_stochastically(x.expand(1 << 16), noise)
    assert int((rounded > 1).sum()) == 1 << 14
    assert int((kernels.round_stochastically(-x.expand(1 << 16), noise) < -1).sum()) == 1 << 14


# fp16 and GradScaler


def scaled_run(model, optimizer, scaler, steps, poison=None, clip=None):
    """Trains on the loss times the scale; in step `poison` the gradients overflow."""
    generator = torch.Generator().manual_seed(0)
    skipped = []
    for t in range(steps):
        x = torch.randn(4, 6, generator=generator)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if t == poison:
            loss = loss * torch.inf
        (loss if scaler is None else scaler.scale(loss)).backward()
        before = snapshot(optimizer)
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            if t != poison:
                optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        after = snapshot(optimizer)
        skipped.append(all(torch.equal(p, q) for p, q in zip(before[0], after[0], strict=True)))
        if skipped[-1]:
            for key, state in after[1]["state"].items():
                fresh = {name: torch.zeros_like(value) for name, value in state.items()}
                assert_same(state.values(), before[1]["state"].get(key, fresh).values())
    return skipped


@pytest.mark.parametrize("amp_scaling", [False, True], ids=["plain", "amp_scaling"])
@pytest.mark.parametrize("poison", [None, 0, 2])
@modes
def test_grad_scaler_steps_like_no_scaler_and_skips_infinities(mode, poison, amp_scaling):
    """Scales are powers of two, so nothing is rounded otherwise."""
    runs = []
    for scaled in (False, True):
        model = small_model()
        options = dict(max_grad_norm=0.05, weight_decay=0.1, **mode)
        optimizer = AdamMini.for_model(model, 1e-2, amp_scaling=scaled and amp_scaling, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        skipped = scaled_run(model, optimizer, scaler if scaled else None, 6, poison)
        assert skipped == [t == poison for t in range(6)]
        runs.append(list(model.parameters()))
    assert scaler.get_scale() == {None: 2.0**13, 0: 2.0**11, 2: 2.0**11}[poison]
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@modes
def test_unscaled_and_clipped_gradients_are_the_ones_used(mode):
    runs = []
    for scaled in (False, True):
        model = small_model()
        optimizer = AdamMini.for_model(model, 1e-2, weight_decay=0.1, **mode)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        scaled_run(model, optimizer, scaler, 4, poison=1, clip=0.05)
        runs.append(list(model.parameters()))
    assert_same(*runs)


def test_grad_scaler_with_autocast_trains():
    model = small_model()
    optimizer = AdamMini.for_model(model, 1e-2)
    scaler = torch.amp.GradScaler("cpu")
    x, losses = torch.randn(16, 6), []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = (model(x) - 1).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def clipped_pair(dtype, mode, **options):
    """Parameters of every layout under `max_grad_norm`, and a copy to be clipped by torch."""
    torch.manual_seed(0)
    runs = []
    for clip in (options, {}):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(x.shape, dtype=dtype)) for x in LAYOUTS]
        layouts = dict(zip(params, LAYOUTS, strict=True))
        groups = [{"params": params[:6]}, {"params": params[6:], "lr": 0.05, "maximize": True}]
        settings = dict(lr=1e-2, weight_decay=0.1, eps=1e-3, **clip, **mode)
        runs.append(SimpleNamespace(
            params=params, optimizer=AdamMini(groups, blocks=layouts, **settings)
        ))  # fmt: skip
    return runs


@modes
@pytest.mark.parametrize("max_norm", [0.3, 1e3], ids=["clips", "does_not"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_max_grad_norm_is_clipping_before_the_step(dtype, max_norm, mode):
    ours, theirs = clipped_pair(dtype, mode, max_grad_norm=max_norm)
    for t in range(4):
        for run in (ours, theirs):
            give_gradients(run.params, t)
        ours.params[t].grad = theirs.params[t].grad = None
        given = [None if p.grad is None else p.grad.clone() for p in ours.params]
        norm = nn.utils.clip_grad_norm_(theirs.params, max_norm)
        ours.optimizer.step()
        theirs.optimizer.step()
        assert ours.optimizer.grad_norm.dtype == dtype and ours.optimizer.grad_norm.shape == ()
        torch.testing.assert_close(ours.optimizer.grad_norm, norm)
        for p, grad in zip(ours.params, given, strict=True):
            assert grad is None or torch.equal(p.grad, grad)
    tolerance = (
        dict(rtol=1e-12, atol=1e-14) if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    )
    for p, q in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(p, q, **tolerance)
        for key in ("exp_avg", "exp_avg_sq"):
            found, want = ours.optimizer.state[p][key], theirs.optimizer.state[q][key]
            torch.testing.assert_close(found, want, **tolerance)


def test_the_norm_is_over_all_groups_and_dtypes():
    params = [nn.Parameter(torch.randn(5, 7).to(dtype)) for dtype in DTYPES]
    groups = [{"params": [p]} for p in params]
    optimizer = AdamMini(groups, max_grad_norm=1.0)
    give_gradients(params, 0)
    optimizer.step()
    norm = torch.stack([p.grad.double().norm() for p in params]).norm()
    assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-6)


def test_without_clipping_there_is_no_norm():
    model = small_model()
    optimizer = AdamMini(model.parameters())
    give_gradients(model.parameters(), 0)
    optimizer.step()
    assert optimizer.grad_norm is None


@modes
def test_zero_gradients_have_norm_zero_and_are_not_scaled_up(mode):
    ours, theirs = clipped_pair(torch.float32, mode, max_grad_norm=1.0)
    for run in (ours, theirs):
        for p in run.params:
            p.grad = torch.zeros_like(p)
        run.optimizer.step()
    assert float(ours.optimizer.grad_norm) == 0.0
    assert_same(ours.params, theirs.params)
    for p in ours.params:
        p.grad = None
    ours.optimizer.step()
    assert float(ours.optimizer.grad_norm) == 0.0  # of no gradients
    assert_same(ours.params, theirs.params)


@modes
@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def test_a_norm_that_is_not_finite_does_what_torch_does(value, mode):
    """But that one infinite entry, times zero, does not make NaN of the mean of its block."""
    ours, theirs = clipped_pair(torch.float32, mode, max_grad_norm=1.0)
    for run in (ours, theirs):
        give_gradients(run.params, 0)
        run.params[1].grad[2, 3] = value
    nn.utils.clip_grad_norm_(theirs.params, 1.0)
    for run in (ours, theirs):
        run.optimizer.step()
    assert not ours.optimizer.grad_norm.isfinite()
    assert ours.params[1][2, 3].isnan()
    for p, q in zip(ours.params, theirs.params, strict=True):
        p, q = (x if value != value else x[q.isfinite()] for x in (p, q))
        torch.testing.assert_close(p, q, equal_nan=True)


@modes
@pytest.mark.parametrize("kind", ["row", "elementwise"])
def test_second_moments_do_not_drift(kind, mode):
    """v * beta2 + means * (1 - beta2), each factor rounded to fp32, is off by 1e-5 here."""
    beta2, steps = 0.9999, 2000
    param = nn.Parameter(torch.zeros(2, 8))
    optimizer = optimizer_for(BlockLayout(kind, (2, 8)), param, betas=(0.9, beta2), **mode)
    param.grad = torch.ones_like(param)
    for _ in range(steps):
        optimizer.step()
    v = optimizer.state[param]["exp_avg_sq"]
    torch.testing.assert_close(v, torch.full_like(v, 1 - beta2**steps), rtol=2e-6, atol=0)


@modes
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_squares_that_overflow_leave_finite_parameters(layout, max_grad_norm, mode):
    """As in AdamW: an infinite second moment makes no step, and a clipping factor of 0 neither."""
    param = nn.Parameter(torch.ones(layout.shape))
    optimizer = optimizer_for(layout, param, lr=0.1, max_grad_norm=max_grad_norm, **mode)
    for size in (2e19, 1.0, 1.0):
        param.grad = torch.zeros_like(param)
        param.grad.view(-1)[:1] = size
        optimizer.step()
    assert param.isfinite().all()
    assert not optimizer.state[param]["exp_avg_sq"].isnan().any()


def test_an_infinite_gradient_is_skipped_in_whatever_groups_are_capturable():
    """Groups take `capturable` from a checkpoint; the default of the optimizer may differ."""
    first = nn.Parameter(torch.ones(2, 4))
    old = AdamMini([first])
    give_gradients([first], 0)
    old.step()
    param = nn.Parameter(first.detach().clone())
    optimizer = AdamMini([param], capturable=True, amp_scaling=True)
    optimizer.load_state_dict(old.state_dict())
    before = snapshot(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(param.sum()).backward()
    param.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    assert_unchanged(optimizer, before)


# Edits that must turn this file red:
#   1. _Matrix.update_tile: noise & 0xFFFF for the parameter as well
#   2. _adam_mini_reference.round_stochastically: noise >> 1 (rounds down too often)
#   3. AdamMini._new_state: second moments in param.dtype
#   4. update.step: drop .clamp(max=1.0) (small gradients scaled up)
#   5. AdamMini._updates: rounding_key(self.seed, number, 1) (the same bits at every step)
