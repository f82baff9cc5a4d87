import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from closeness import assert_as_close_as
from test_kernels_compile import MAX_REGISTERS, TARGETS, compile_all

from trimtab.triton_kernels import _adam_mini_table as tables
from trimtab.triton_kernels import adam_mini
from trimtab.triton_kernels.adam_mini import (
    ELEMENTWISE_UNIT,
    HYPER,
    Piece,
    Work,
    apply,
    apply_reference,
    one_pass,
    one_pass_reference,
    round_stochastically,
    rounding_key,
    rounding_noise,
    unit_sums,
    unit_sums_reference,
    why_not,
)

pytest.importorskip("triton")
# NumPy's, from the interpreter: NaN and infinity are compared and multiplied on purpose
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# of param, grad, exp_avg
DTYPES = {
    "fp32": (F32, F32, F32),
    "bf16": (BF16, BF16, F32),
    "bf16-bf16m": (BF16, BF16, BF16),
    "master": (F32, BF16, F32),
    "main-grad": (BF16, F32, BF16),
    "fp16": (F16, F16, F32),
}
ROWS = [
    (1, 1),  # one entry
    (3, 5),  # below the narrowest tile (16 entries x 256 rows), rows not aligned
    (257, 16),  # at its width and one row past it
    (3, 17),  # one entry past it
    (17, 256),  # at a tile of 16 rows and one row past it
    (2, 4095),  # below, at and one past a tile of one row; from there on, two loops
    (2, 4096),
    (2, 4097),
    (2, 12288),  # three blocks, aligned
    (1, 28672),  # the longest row of one program
    (2, 28673),  # one past it: two phases, two chunks
    (2, 32768),  # two whole chunks
]
LONGEST = (1, 300_001)  # 19 partial sums: more than the narrow reduction takes (16)
COLUMNS = [
    (1, 1, 1),  # one entry
    (1, 3, 5),  # below a tile
    (3, 2, 7),  # stacked
    (1, 256, 128),  # at a chunk of rows and a tile of the sums: no partial sums
    (2, 257, 129),  # one past both, stacked
    (1, 17, 257),  # one past the tile of the update (16 x 256)
    (1, 40, 520),  # aligned, several tiles down and across
    (1, 4352, 3),  # 17 partial sums: one more than the narrow reduction takes
]
ELEMENTWISE = [(1,), (1023,), (1024,), (1025,), (4096,), (4097,), (9000,)]
ONE_PASS = [("row", s) for s in ROWS] + [("elementwise", s) for s in ELEMENTWISE]
ALL = ONE_PASS + [("column", s) for s in COLUMNS]
# every regime once: short rows, two loops, two phases, stacked columns, elementwise
REGIMES = [
    ("row", (5, 24)),
    ("row", (2, 5000)),
    ("row", (2, 28673)),
    ("column", (2, 300, 40)),
    ("elementwise", (1500,)),
]
# lr 1e-2, betas (0.9, 0.95), weight decay 1, t = 3; eps is large enough to be seen
STEP = {
    "step_size": 1e-2 / (1 - 0.9**3),
    "decay": 1 - 1e-2,
    "weight1": 0.1,
    "weight2": 0.05,
    "root": (1 - 0.95**3) ** -0.5,
    "eps": 1e-2,
    "grad_scale": 0.5,
    "skip": 0.0,
}
# Where p = m = 0 and v = 1, m becomes g / 4, s = 1/2 and p = -g / 8: exact before it is rounded.
EXACT = STEP | {
    "step_size": 0.5, "decay": 1.0, "weight1": 0.25, "weight2": 0.0, "root": 1.0, "eps": 0.0,
    "grad_scale": 1.0,
}  # fmt: skip


def hyper_rows(works, device, *, dtype=F32, **changes):
    row = [(STEP | changes)[name] for name in HYPER]
    return torch.tensor([row] * len(works), dtype=dtype, device=device)


def ids(case):
    return "x".join(map(str, case)) if isinstance(case, tuple) else case


def make(kind, shape, dtypes, device, *, margin=16, seed=0, **fields):
    """A piece with `margin` entries of other data before and after it, in all four tensors."""
    generator = torch.Generator().manual_seed(seed)
    stride = 0 if kind == "elementwise" else shape[-1]
    fields = {"offset": margin, "first": margin // 2, "stride": stride} | fields
    piece = Piece(kind, shape, **fields)
    n = piece.n_entries + 2 * margin
    blocks = n if kind == "elementwise" else piece.n_units + 2 * margin
    param, grad, exp_avg = (
        torch.randn(n, generator=generator).to(device, dtype) for dtype in dtypes
    )
    exp_avg_sq = torch.rand(blocks, generator=generator).to(device)
    return Work(piece, param, grad, exp_avg, exp_avg_sq, rounding_key(1, seed, 3))


def copy(works, dtype=None):
    """With tensors of their own; with a dtype, all of it."""
    return [
        Work(work.piece, *(t.to(dtype or t.dtype, copy=True) for t in work[1:5]), work.key)
        for work in works
    ]


def entries(piece):
    """By the definition: for every unit, where its entries lie in the flattened tensor."""
    flat = piece.offset + torch.arange(piece.n_entries)
    if piece.kind == "elementwise":
        return list(flat.split(ELEMENTWISE_UNIT))
    if piece.kind == "row":
        return list(flat.view(piece.shape))
    batch, _, units = piece.shape
    return [flat.view(piece.shape)[b, :, u] for b in range(batch) for u in range(units)]


def define(works, hyper, steps=None):
    """The formulas of the module's docstring, one unit at a time, in fp64; all of a new Work."""
    works = copy(works, F64)
    units = iter([] if steps is None else steps.double())
    for work, h in zip(works, hyper.double(), strict=True):
        h = dict(zip(HYPER, h, strict=True))
        for u, where in enumerate(entries(work.piece)):
            s = next(units) if steps is not None else None
            g = work.grad[where] * h["grad_scale"]
            if h["skip"] != 0:
                continue
            if work.piece.kind == "elementwise":
                v, mean = work.exp_avg_sq, g**2
                at = work.piece.first - work.piece.offset + where
            else:
                v, mean, at = work.exp_avg_sq, (g**2).mean(), work.piece.first + u
            if s is None or work.piece.kind == "elementwise":
                v[at] = v[at] + (mean - v[at]) * h["weight2"]
                s = h["step_size"] / (v[at].sqrt() * h["root"] + h["eps"])
            m = work.exp_avg[where] + (g - work.exp_avg[where]) * h["weight1"]
            work.exp_avg[where] = m
            work.param[where] = work.param[where] * h["decay"] - m * s
    return works


def define_sums(works):
    sums = [(work.grad.double()[where] ** 2).sum() for work in works for where in entries(work[0])]
    return torch.stack(sums)


def assert_updated(kernel, reference, truth, *, name=""):
    for k, r, t in zip(kernel, reference, truth, strict=True):
        for field in ("param", "exp_avg", "exp_avg_sq"):
            label = f"{name} {field} of {k.piece.kind} {k.piece.shape}"
            assert_as_close_as(getattr(k, field), getattr(r, field), getattr(t, field), name=label)


def assert_same(left, right, *, names=("param", "exp_avg", "exp_avg_sq")):
    """Bit for bit, NaN too."""
    for a, b in zip(left, right, strict=True):
        for name in names:
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype
            integer = torch.int32 if x.element_size() == 4 else torch.int16
            assert torch.equal(x.view(integer), y.view(integer)), (a.piece, name)


@pytest.mark.parametrize(("kind", "shape"), ALL, ids=ids)
def test_references_are_the_definition(kind, shape, device):
    works = copy([make(kind, shape, (F32,) * 3, device, margin=3)], F64)
    hyper = hyper_rows(works, device, dtype=F64)
    sums = unit_sums_reference(works)
    torch.testing.assert_close(sums, define_sums(works), rtol=1e-12, atol=0)
    steps = torch.rand(sums.shape, dtype=F64, device=device)
    calls = [(apply_reference, (steps,)), (one_pass_reference, ())]
    for call, arguments in calls:
        found, expected = copy(works), define(works, hyper, *arguments)
        call(found, hyper, *arguments)
        for name in ("param", "exp_avg", "exp_avg_sq"):
            x, y = getattr(found[0], name), getattr(expected[0], name)
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("kind", "shape", "dtypes"),
    [(*case, dtypes) for dtypes in DTYPES for case in ONE_PASS] + [("row", LONGEST, "fp32")],
    ids=ids,
)
def test_one_pass(kind, shape, dtypes, device):
    dtypes = DTYPES[dtypes]
    works = [make(kind, shape, dtypes, device)]
    hyper = hyper_rows(works, device)
    kernel, reference = copy(works), copy(works)
    one_pass(kernel, hyper, round_params=dtypes[2] == BF16)
    one_pass_reference(reference, hyper, round_params=dtypes[2] == BF16)
    assert_updated(kernel, reference, define(works, hyper))


@pytest.mark.parametrize(
    ("kind", "shape", "dtypes"),
    [(*case, dtypes) for dtypes in DTYPES for case in ALL] + [("row", LONGEST, "bf16-bf16m")],
    ids=ids,
)
def test_sums_then_apply(kind, shape, dtypes, device):
    dtypes = DTYPES[dtypes]
    works = [make(kind, shape, dtypes, device)]
    sums = unit_sums(works)
    assert sums.dtype == F32
    assert_as_close_as(sums, unit_sums_reference(works), define_sums(works), name="sums")
    hyper = hyper_rows(works, device)
    steps = torch.rand(sums.shape).to(device)
    kernel, reference = copy(works), copy(works)
    apply(kernel, hyper, steps, round_params=dtypes[2] == BF16)
    apply_reference(reference, hyper, steps, round_params=dtypes[2] == BF16)
    assert_updated(kernel, reference, define(works, hyper, steps))


@pytest.mark.parametrize("case", [("row", (2, 50_000)), ("column", (2, 1100, 20))], ids=ids)
def test_more_partial_sums_than_one_block_of_the_reduction(case, monkeypatch, device):
    monkeypatch.setattr(tables, "REDUCE_WIDTHS", (2, 2))
    works = [make(*case, (F32,) * 3, device)]
    sums = unit_sums(works)
    assert_as_close_as(sums, unit_sums_reference(works), define_sums(works), name="sums")


def mixture(device, kinds):
    """Works of all regimes and dtypes, at any alignment; two of them share their tensors."""
    dtypes, margins = list(DTYPES.values()), (16, 1, 0, 3, 8, 5)
    works = [
        make(kind, shape, dtypes[(i + shift) % 6], device, margin=margins[(2 * i + shift) % 6])
        for i, (kind, shape) in enumerate(REGIMES)
        for shift in (0, 3)
        if kind in kinds
    ]
    whole = make("row", (8, 24), DTYPES["bf16"], device, seed=9)
    parts = [
        whole.piece._replace(shape=(3, 24)),
        whole.piece._replace(shape=(5, 24), offset=16 + 72, first=8 + 3, index=72),
    ]
    return works + [whole._replace(piece=part) for part in parts]


def different(works, device):
    """Hyper-parameters that differ from piece to piece; every fourth piece is skipped."""
    hyper = hyper_rows(works, device)
    factor = torch.linspace(0.5, 1.5, len(works), device=device)
    hyper *= factor[:, None]
    hyper[:, HYPER.index("weight1")] = torch.linspace(0.05, 1, len(works), device=device)
    hyper[:, HYPER.index("skip")] = (torch.arange(len(works), device=device) % 4 == 2).float()
    return hyper


def copy_sharing(works):
    made = {}
    return [
        work._replace(**{n: made.setdefault(getattr(work, n).data_ptr(), getattr(work, n).clone())
                         for n in ("param", "exp_avg", "exp_avg_sq")})
        for work in works
    ]  # fmt: skip


def test_many_tensors_at_once_are_each_of_them_alone(device):
    """Bit for bit, whatever else is in the call and in whatever order; margins stay."""
    works = mixture(device, ("row", "elementwise"))
    hyper = different(works, device)
    together, reverse, alone = (copy_sharing(works) for _ in range(3))
    reference = copy_sharing(works)
    one_pass(together, hyper, round_params=True)
    one_pass(reverse[::-1], hyper.flip(0), round_params=True)
    for i, work in enumerate(alone):
        one_pass([work], hyper[i : i + 1], round_params=True)
    one_pass_reference(reference, hyper, round_params=True)
    assert_same(together, reverse)
    assert_same(together, alone)
    assert_updated(together[:-2], reference[:-2], define(works[:-2], hyper[:-2]))
    assert_updated(together[-1:], reference[-1:], define_both(works[-2:], hyper[-2:]))

    works = mixture(device, ("row", "elementwise", "column"))
    hyper = different(works, device)
    sums = unit_sums(works)
    assert torch.equal(sums, torch.cat([unit_sums([work]) for work in works]))
    assert_as_close_as(sums, unit_sums_reference(works), define_sums(works), name="sums")
    steps = torch.rand(sums.shape).to(device)
    together, alone, reference = (copy_sharing(works) for _ in range(3))
    apply(together, hyper, steps, round_params=True)
    start = 0
    for i, work in enumerate(alone):
        stop = start + work.piece.n_units
        apply([work], hyper[i : i + 1], steps[start:stop], round_params=True)
        start = stop
    apply_reference(reference, hyper, steps, round_params=True)
    assert_same(together, alone)
    assert_updated(together[:-2], reference[:-2], define(works[:-2], hyper[:-2], steps))


def define_both(works, hyper):
    """Two works of the same tensors, one after the other."""
    first = define(works[:1], hyper[:1])[0]
    return define([first._replace(piece=works[1].piece)], hyper[1:])


@pytest.mark.parametrize(("kind", "shape"), REGIMES, ids=ids)
def test_skipped_pieces_stay_as_they_are(kind, shape, device):
    """Also where the gradient holds NaN: it is what an overflow under a loss scale looks like."""
    works = [make(kind, shape, (BF16, BF16, BF16), device)]
    works[0].grad.fill_(math.nan)
    hyper = hyper_rows(works, device, skip=1.0)
    for call in (apply, apply_reference, one_pass, one_pass_reference)[: 2 if "c" in kind else 4]:
        steps = [torch.full((works[0].piece.n_units,), math.nan, device=device)]
        left = copy(works)
        call(left, hyper, *(steps if "apply" in call.__name__ else []), round_params=True)
        assert_same(left, works)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("kind", "shape"), REGIMES, ids=ids)
def test_a_broken_unit_breaks_no_other(kind, shape, bad, device):
    clean = make(kind, shape, (F32, F32, F32), device)
    broken = copy([clean])[0]
    where = entries(clean.piece)[-1]
    broken.grad[where[-1]] = bad
    hyper = hyper_rows([clean], device)
    sums, expected = unit_sums([broken]), unit_sums([clean])
    assert not sums[-1].isfinite() and torch.equal(sums[:-1], expected[:-1])
    if kind == "column":
        steps = torch.rand(sums.shape, device=device)
        apply([broken], hyper, torch.where(sums.isfinite(), steps, math.nan))
        apply([clean], hyper, steps)
    else:
        one_pass([broken], hyper)
        one_pass([clean], hyper)
    if kind == "elementwise":
        where = where[-1:]
    assert not broken.param[where[-1]].isfinite()
    others = torch.ones(clean.param.shape, dtype=torch.bool)
    others[where] = False
    for name in ("param", "exp_avg"):
        assert torch.equal(getattr(broken, name)[others], getattr(clean, name)[others])


def test_default_device_and_dtype_do_not_matter(monkeypatch, device):
    monkeypatch.setattr(tables, "_kept", tables.OrderedDict())
    works = [make("row", (3, 24), (BF16,) * 3, device)]
    hyper, steps = hyper_rows(works, device), torch.ones(3, device=device)
    plain, odd = copy(works), copy(works)
    moved = [odd[0]._replace(grad=odd[0].grad.clone())]
    for _ in range(2):
        one_pass(plain, hyper)
    apply(plain, hyper, steps)
    torch.set_default_dtype(F64)
    try:
        with torch.device("meta"):
            one_pass(odd, hyper)
            one_pass(moved, hyper)
            apply(odd, hyper, steps)
            sums = unit_sums(odd)
    finally:
        torch.set_default_dtype(F32)
    assert_same(plain, odd)
    assert torch.equal(sums, unit_sums(plain))


def test_fp16_gradients_are_squared_in_fp32(device):
    works = [make("row", shape, (F16, F16, F32), device) for shape in ((2, 24), (1, 9000))]
    for work in works:
        work.grad.fill_(60000.0)
    expected = torch.tensor([24.0, 24.0, 9000.0], device=device) * 3.6e9
    torch.testing.assert_close(unit_sums(works), expected)
    # and unscaled after it: a loss scale of 2^16
    hyper = hyper_rows(works, device, grad_scale=2.0**-16, weight2=1.0)
    one_pass(works, hyper)
    for work in works:
        v = work.exp_avg_sq[8 : 8 + work.piece.shape[0]]
        torch.testing.assert_close(v, torch.full_like(v, (60000 / 2**16) ** 2))


@pytest.mark.parametrize(("kind", "shape"), REGIMES, ids=ids)
def test_without_momentum_m_is_the_gradient(kind, shape, device):
    """At beta1 = 0 exactly, however large the moment was."""
    work = make(kind, shape, (F32, F32, F32), device)
    work.exp_avg.mul_(1e6)
    hyper = hyper_rows([work], device, weight1=1.0, grad_scale=1.0)
    done = copy([work]) + copy([work])
    apply(done[:1], hyper, torch.ones(work.piece.n_units, device=device))
    if kind != "column":
        one_pass(done[1:], hyper)
    for after in done[: 1 if kind == "column" else 2]:
        assert torch.equal(after.exp_avg[16:-16], work.grad[16:-16])


@pytest.mark.parametrize(("kind", "shape"), REGIMES, ids=ids)
def test_zero_gradients_at_lr_zero_change_nothing(kind, shape, device):
    """So torch's distributed checkpoints make the state of an optimizer."""
    work = make(kind, shape, (BF16, BF16, BF16), device)
    for tensor in work[2:5]:
        tensor.zero_()
    before = copy([work])
    hyper = hyper_rows([work], device, step_size=0.0, decay=1.0)
    if kind != "column":
        one_pass([work], hyper, round_params=True)
    apply([work], hyper, torch.zeros(work.piece.n_units, device=device), round_params=True)
    assert_same([work], before)


def exact_update(works, device, **options):
    """`apply` and, where it can be, `one_pass` with EXACT: pairs (name, works after it)."""
    hyper = hyper_rows(works, device, **EXACT)
    for work in works:
        work.param.zero_()
        work.exp_avg.zero_()
        work.exp_avg_sq.fill_(1)
    steps = torch.full((sum(work.piece.n_units for work in works),), 0.5, device=device)
    done = {"apply": copy(works)}
    apply(done["apply"], hyper, steps, **options)
    if all(work.piece.kind != "column" for work in works):
        done["one_pass"] = copy(works)
        one_pass(done["one_pass"], hyper, **options)
    return done


@pytest.mark.parametrize(("kind", "shape"), REGIMES, ids=ids)
def test_stochastic_rounding_has_the_bits_of_the_reference(kind, shape, device):
    """Also where numbers of entries pass 2^32, and with a key above 2^31."""
    wide = {"stride": 0 if kind == "elementwise" else shape[-1] + 1000, "index": 2**32 - 1200}
    work = make(kind, shape, (BF16, F32, BF16), device, **wide)._replace(key=0xF0000001)
    piece = work.piece
    lines = torch.arange(piece.n_entries, device=device).view(-1, shape[-1])
    row = torch.arange(len(lines), device=device)[:, None]
    index = piece.index + row * piece.stride + torch.arange(shape[-1], device=device)
    assert index.min() < 2**32 < index.max()
    noise = rounding_noise(index, work.key)
    g = work.grad[16:-16].view(index.shape)
    m = round_stochastically(g / 4, noise & 0xFFFF).flatten()
    p = round_stochastically(-g / 8, noise >> 16).flatten()
    for name, (after,) in exact_update([work], device, round_params=True).items():
        assert torch.equal(after.exp_avg[16:-16], m), name
        assert torch.equal(after.param[16:-16], p), name
        assert torch.equal(after.param[:16], work.param[:16])
    (reference,) = copy([work])
    steps = torch.full((piece.n_units,), 0.5, device=device)
    apply_reference([reference], hyper_rows([work], device, **EXACT), steps, round_params=True)
    assert torch.equal(reference.exp_avg[16:-16], m)
    assert torch.equal(reference.param[16:-16], p)


def test_rounding_does_not_depend_on_sharding(device):
    """A matrix in one piece, and cut as a flat shard is: a part of a row, rows, a part of a row."""
    length, index = 40, 2**32 - 100
    whole = make("row", (5, length), (BF16, F32, BF16), device, index=index)
    lines = [(0, 1, 13), (13, 1, 27), (40, 3, 40), (160, 1, 7), (167, 1, 33)]
    cut = [
        Piece("row", (rows, n), 16 + start, 0, index + start, length) for start, rows, n in lines
    ]
    together = exact_update([whole], device, round_params=True)["apply"][0]
    shards = copy([whole])[0]
    parts = [shards._replace(piece=piece) for piece in cut]
    steps = torch.full((7,), 0.5, device=device)
    apply(parts, hyper_rows(parts, device, **EXACT), steps, round_params=True)
    assert_same([together], [shards], names=("param", "exp_avg"))


@pytest.mark.parametrize("call", [one_pass, one_pass_reference], ids=["kernel", "reference"])
def test_stochastic_rounding_is_unbiased(call, device):
    """20 steps of 1e-4 at bf16 1, where the next number is 1/256 below: to the nearest, none."""
    work = make("row", (8, 1024), (BF16, BF16, F32), device, margin=0)
    for tensor in work[1:5]:
        tensor.fill_(1)
    nearest = copy([work])
    hyper = hyper_rows([work], device, **EXACT | {"step_size": 1e-4})
    for t in range(20):
        call([work._replace(key=rounding_key(0, 0, t))], hyper, round_params=True)
        call(nearest, hyper)
    moved = 1 - work.param.double()
    # the spread of a sum of 20 roundings, each up or down by 1/256 with probability 0.0256
    spread = (20 * 0.0256 * 0.9744) ** 0.5 / 256
    assert abs(moved.mean() - 20e-4) < 5 * spread / work.param.numel() ** 0.5
    assert abs(moved.std() - spread) < 0.1 * spread
    assert (nearest[0].param == 1).all()


def test_numbers_that_bf16_holds_are_not_rounded(device):
    kept = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-133, math.inf, -math.inf])
    for noise in (0, 0xFFFF):
        rounded = round_stochastically(kept, torch.full(kept.shape, noise))
        assert torch.equal(rounded.view(torch.int16), kept.bfloat16().view(torch.int16))
    # bits that noise would turn into infinity or zero; the second is what a GPU computes
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(F32)
    assert round_stochastically(nan, torch.full((3,), 0xFFFF)).isnan().all()
    work = make("row", (1, 24), (BF16, F32, BF16), device, margin=0)
    work.grad[: len(kept)] = 4 * kept.to(device)
    work.grad[12:15] = nan.to(device)
    after = exact_update([work], device, round_params=True)["apply"][0]
    assert torch.equal(after.exp_avg[: len(kept)].cpu(), kept.bfloat16())
    assert after.exp_avg[12:15].isnan().all() and after.param[12:15].isnan().all()
    assert exact_update([work], device)["apply"][0].param[12:15].isnan().all()


def test_other_bf16_is_rounded_to_the_nearest(device):
    """Bit for bit as torch does, also under the interpreter, whose own cast truncates."""
    work = make("row", (2, 300), (BF16, F32, F32), device, margin=0)
    ties = torch.arange(0x3F800000, 0x3F880000, 0x8000, dtype=torch.int32).view(F32)
    work.grad[: len(ties)] = 8 * ties.to(device)
    for after in exact_update([work], device).values():
        assert torch.equal(after[0].param, (-work.grad / 8).bfloat16())
    work.grad[100:104] = torch.tensor([math.inf, -math.inf, math.nan, 3e38], device=device)
    after = exact_update([work], device)["apply"][0]
    expected = (-work.grad / 8).bfloat16()
    torch.testing.assert_close(after.param, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("call", [one_pass, one_pass_reference], ids=["kernel", "reference"])
def test_keys_on_the_device_take_the_place_of_keys_of_works(call, device):
    works = [make("row", (3, 24), (BF16,) * 3, device, seed=i) for i in range(2)]
    keys = torch.tensor([7, 0xFFFFFFFF], device=device)
    hyper = hyper_rows(works, device)
    given, own, other = (copy(works) for _ in range(3))
    call(given, hyper, round_params=True, keys=keys)
    own = [work._replace(key=key) for work, key in zip(own, keys.tolist(), strict=True)]
    call(own, hyper, round_params=True)
    call(other, hyper, round_params=True)
    assert_same(given, own)
    for a, b in zip(given, other, strict=True):
        assert not torch.equal(a.exp_avg, b.exp_avg)


def test_noise_is_spread_evenly():
    """Of neighbouring entries and of neighbouring steps, in both halves."""
    entries = torch.arange(4096)
    steps = torch.stack([rounding_noise(entries, rounding_key(5, 2, t)) for t in range(64)])
    for part in (steps & 0xFFFF, steps >> 16):
        uniform = part.double() / 2**16
        assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / uniform.numel()) ** 0.5
        for dim in (0, 1):
            assert uniform.mean(dim).std() < 1.2 * (1 / 12 / uniform.shape[dim]) ** 0.5
        pairs = torch.corrcoef(torch.stack([uniform[:-1].flatten(), uniform[1:].flatten()]))
        assert abs(pairs[0, 1]) < 5 / uniform.numel() ** 0.5
    assert not torch.equal(rounding_noise(entries, 1), rounding_noise(entries + 2**32, 1))


@pytest.mark.parametrize("empty", [("row", (0, 5)), ("row", (3, 0)), ("elementwise", (0,)),
                                   ("column", (2, 0, 3)), ("column", (2, 3, 0)),
                                   ("column", (0, 3, 2))], ids=ids)  # fmt: skip
def test_empty_pieces(empty, device):
    """Their sums are 0; moments of rows without entries stay, as they have no mean."""
    works = [make(*case, (F32,) * 3, device) for case in (("row", (2, 3)), empty, ("row", (1, 2)))]
    before = copy(works)
    hyper = hyper_rows(works, device)
    units = works[1].piece.n_units
    for call in (unit_sums, unit_sums_reference):
        sums = call(works)
        assert sums.shape == (3 + units,)
        assert (sums[2 : 2 + units] == 0).all() and (sums[:2] > 0).all() and sums[-1] > 0
        alone = call(works[1:2])
        assert alone.shape == (units,) and (alone == 0).all()
    for call in (apply, apply_reference):
        call(works, hyper, sums)
        call(works[1:2], hyper[1:2], alone)
    if empty[0] != "column":
        for call in (one_pass, one_pass_reference):
            call(works, hyper)
            call(works[1:2], hyper[1:2])
    assert_same(works[1:2], before[1:2])
    assert not torch.equal(works[0].param, before[0].param)


def test_no_works(device):
    nothing = torch.zeros(0, 8, device=device)
    for call in (one_pass, one_pass_reference):
        call([], nothing)
    for call in (unit_sums, unit_sums_reference):
        assert call([]).shape == (0,)
    for call in (apply, apply_reference):
        call([], nothing, torch.zeros(0, device=device))


@pytest.fixture
def sent(monkeypatch):
    """Counts the tables that are built and sent in a test; none are kept from others."""
    counts = {"built": 0, "sent": 0}
    build, send = tables.Table.__init__, tables.Table._send

    def counted_build(self, *args):
        counts["built"] += 1
        build(self, *args)

    def counted_send(self):
        counts["sent"] += 1
        send(self)

    monkeypatch.setattr(tables, "_kept", tables.OrderedDict())
    monkeypatch.setattr(tables, "_captured", [])
    monkeypatch.setattr(tables.Table, "__init__", counted_build)
    monkeypatch.setattr(tables.Table, "_send", counted_send)
    return counts


def test_table_is_kept_and_follows_the_gradients(sent, device):
    cases = (("row", (5, 24)), ("row", (1, 28673)), ("elementwise", (1500,)))
    works = [make(*case, (F32,) * 3, device, seed=i) for i, case in enumerate(cases)]
    hyper = hyper_rows(works, device)

    def step(works):
        reference = copy(works)
        one_pass_reference(reference, hyper)
        one_pass(works, hyper)
        for k, r in zip(works, reference, strict=True):
            torch.testing.assert_close(k.param, r.param)
            torch.testing.assert_close(k.exp_avg, r.exp_avg)

    step(works)
    step(works)
    assert sent == {"built": 1, "sent": 1}
    for seed in range(3):  # other gradients, more often than there are buffers to send them from
        torch.manual_seed(seed)
        works = [work._replace(grad=torch.randn_like(work.grad)) for work in works]
        step(works)
    assert sent == {"built": 1, "sent": 4}
    # aligned in another way: one of them can no longer be read in vectors
    shifted = torch.randn(works[0].grad.numel() + 1).to(works[0].grad)[1:]
    step([works[0]._replace(grad=shifted), *works[1:]])
    assert sent["built"] == 2
    step(copy(works))  # other parameters
    assert sent["built"] == 3
    unit_sums(works)  # another call
    assert sent["built"] == 4


@pytest.mark.parametrize("call", ["one_pass", "unit_sums", "apply"])
def test_alignment_is_promised_where_it_is(call, device):
    """The interpreter does not see a wrong promise; a GPU would fault, or read other entries."""
    cases = [*REGIMES, ("row", (3, 20)), ("row", (3, 22)), ("column", (1, 9, 4))]
    works = [
        make(*case, dtypes, device, margin=margin)
        for case in cases
        for dtypes in DTYPES.values()
        for margin in (0, 1, 2, 4, 8)
        if call != "one_pass" or case[0] != "column"
    ]
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    promises = set()
    table = tables.Table(call, works, False)
    for launch in table.launches:
        kernel, options = launch[:2]
        if kernel == "reduce":
            continue
        reads = [1] if "sums" in kernel else [0, 1, 2]
        reads += [3] * (options.get("KIND") == "elementwise")
        for row in table.rows[launch.map.unique()].tolist():
            work = works[row[4]]
            vector = 16 // min(getattr(work, names[at]).element_size() for at in reads)
            lengths = [row[7], row[14] if kernel == "row_sums" else 0]
            fits = all(row[at] % 16 == 0 for at in reads) and not any(n % vector for n in lengths)
            assert options["VECTOR"] == (vector if fits else 1), (work.piece, options)
            promises.add(options["VECTOR"])
    assert promises == {1, 4, 8}


def test_a_buffer_waits_for_its_last_copy(device):
    """Two buffers take turns; a copy from pinned memory may still be under way."""
    work = make("row", (2, 24), (F32,) * 3, device)
    table = tables.Table("unit_sums", [work], False)
    waited = []
    first, second = table._staged
    for turn, buffer in enumerate((second, first, second, first)):
        event = SimpleNamespace(synchronize=lambda turn=turn: waited.append(turn))
        assert table.refresh([work._replace(grad=work.grad.clone())])
        assert table._staged[0] is buffer
        table._sent[0] = event
    assert waited == [0, 1]


def test_kept_tables_are_bounded(sent, monkeypatch, device):
    monkeypatch.setattr(tables, "_KEPT_TABLES", 2)
    works = [make("row", (2, 24), (F32,) * 3, device, seed=i) for i in range(3)]
    for work in works:
        unit_sums([work])
    unit_sums([works[2]])
    assert len(tables._kept) == 2 and sent["built"] == 3
    unit_sums([works[0]])
    assert sent["built"] == 4


def test_capture_finds_its_table_and_freezes_it(sent, monkeypatch, device):
    works = [make("row", (2, 24), (BF16,) * 3, device)]
    hyper, keys = hyper_rows(works, device), torch.tensor([3], device=device)
    moved = [works[0]._replace(grad=works[0].grad.clone())]

    def capturing(answer):
        for module in (tables, adam_mini):
            monkeypatch.setattr(module, "is_capturing", lambda device: answer)

    capturing(True)
    with pytest.raises(RuntimeError, match=r"one_pass: .*warm-up.*set_to_none=False"):
        one_pass(works, hyper, keys=keys)
    capturing(False)
    one_pass(works, hyper, keys=keys)
    capturing(True)
    one_pass(works, hyper, keys=keys)
    assert sent == {"built": 1, "sent": 1}
    with pytest.raises(RuntimeError, match="warm-up"):
        one_pass(moved, hyper, keys=keys)
    with pytest.raises(RuntimeError, match=r"hyper: expected a tensor on"):
        one_pass(works, hyper.to("meta"), keys=keys)
    captured = next(iter(tables._kept.values()))
    rows = captured.rows.clone()
    capturing(False)
    one_pass(moved, hyper, keys=keys)  # a step without the graph
    assert sent == {"built": 2, "sent": 2}
    assert torch.equal(captured.rows, rows) and tables._captured == [captured]


class Elsewhere:
    """Stands for a tensor of a GPU that is not here."""

    free = 1 << 40

    def __init__(self, n, dtype):
        self.n, self.dtype, self.device = n, dtype, torch.device("cpu")
        self.address, Elsewhere.free = Elsewhere.free, Elsewhere.free + (n * 4 + 511) // 512 * 512

    def data_ptr(self):
        return self.address

    def element_size(self):
        return self.dtype.itemsize

    def numel(self):
        return self.n

    def is_contiguous(self):
        return True


def elsewhere(kind, shape, dtypes, **fields):
    piece = Piece(kind, shape, **fields)
    return Work(piece, *(Elsewhere(piece.n_entries + piece.offset, t) for t in (*dtypes, F32)))


def llama(preset):
    """The 291 tensors of Llama-3-8B."""
    width, mlp, kv, vocabulary, head = 4096, 14336, 1024, 128256, 128
    layer = {
        "q": (width, width), "k": (kv, width), "v": (kv, width), "o": (width, width),
        "gate": (mlp, width), "up": (mlp, width), "down": (width, mlp),
    }  # fmt: skip
    cases = [("row", (vocabulary, width))] * 2 + [("elementwise", (width,))] * 65
    for name, (rows, columns) in list(layer.items()) * 32:
        if preset == "paper" and name in "qk":
            cases.append(("row", (rows // head, head * columns)))
        elif preset == "snr" and name in ("v", "o", "down"):
            cases.append(("column", (1, rows, columns)))
        else:
            cases.append(("row", (rows, columns)))
    return [elsewhere(*case, (BF16, BF16, F32)) for case in cases]


def test_launches_of_llama():
    """Row blocks take 3 launches; heads are longer than a program takes: two phases."""
    expected = {"rows": (3, 2, 2), "paper": (6, 3, 2), "snr": (2, 3, 3)}
    for preset, counts in expected.items():
        works = llama(preset)
        assert len(works) == 291
        rows = [work for work in works if work.piece.kind != "column"]
        calls = [("one_pass", rows), ("unit_sums", works), ("apply", works)]
        made = [tables.Table(call, some, False) for call, some in calls]
        assert tuple(len(table.launches) for table in made) == counts, preset
        for table, (_, some) in zip(made, calls, strict=True):
            # a program has at least 4 KB of work; the map costs 4 bytes of it
            total = sum(work.piece.n_entries for work in some)
            assert sum(launch.programs for launch in table.launches) < total / 2048
            assert len(table.rows) <= 3 * len(some)


@pytest.mark.parametrize(("kind", "shape", "one", "two"), [
    ("row", (64, 1024), 20, 24),  # the second number: unit_sums, then apply
    ("row", (4, 4096), 20, 24),
    ("row", (2, 8192), 24, 24),  # g twice, the second time from a cache
    ("row", (1, 65536), 24, 24),
    ("elementwise", (65536,), 28, 32),
    ("column", (1, 512, 256), None, 24),
])  # fmt: skip
def test_bytes_an_entry(kind, shape, one, two, monkeypatch, device):
    """What the docstring promises, and 3 % at most for moments, partial sums and tables."""
    if device == "cuda":
        pytest.skip("the interpreter counts")
    from triton.runtime import interpreter

    moved = 0

    def counted(function, position):
        def call(self, pointers, *arguments):
            nonlocal moved
            size = pointers.get_element_ty().primitive_bitwidth // 8
            moved += size * int(arguments[position].data.sum())
            return function(self, pointers, *arguments)

        return call

    builder = interpreter.InterpreterBuilder
    for name, mask in (("create_masked_load", 0), ("create_masked_store", 1)):
        monkeypatch.setattr(builder, name, counted(getattr(builder, name), mask))
    work = make(kind, shape, (F32,) * 3, device)
    n, hyper = work.piece.n_entries, hyper_rows([work], device)
    if one is not None:
        one_pass([work], hyper)
        assert one <= moved / n < one * 1.03
    moved = 0
    apply([work], hyper, unit_sums([work]))
    assert two <= moved / n < two * 1.03


WORK = make("row", (2, 24), (F32,) * 3, "cpu")


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (make("column", (1, 2, 3), (F32,) * 3, "cpu"), "row or elementwise pieces, found column"),
        (copy([WORK], F64)[0], r"can update, found a tensor of torch\.float64"),
        (WORK._replace(exp_avg_sq=WORK.exp_avg_sq.half()), r"second moments of torch\.float16"),
        (WORK._replace(exp_avg_sq=WORK.exp_avg_sq[:9]), r"exp_avg_sq: expected 10 .*\(9,\)"),
        (WORK._replace(param=WORK.param[:63]), r"param: expected 64 contiguous .*\(63,\)"),
        (WORK._replace(grad=torch.randn(160)[::2]), r"grad: .*\(80,\) with strides \(2,\)"),
        (WORK._replace(grad=WORK.grad.to("meta")), "a tensor on meta"),
    ],
    ids=["column", "fp64", "moments", "short-moments", "short", "strided", "device"],
)
def test_works_that_no_kernel_takes(work, message, device):
    if device == "cuda":
        pytest.skip("tensors of the CPU")
    with pytest.raises(ValueError, match=message):
        one_pass([work], hyper_rows([work], device))


def test_wrong_shapes_are_named(device):
    works = [make("row", (2, 24), (BF16,) * 3, device)]
    hyper, steps = hyper_rows(works, device), torch.ones(2, device=device)
    with pytest.raises(ValueError, match=r"hyper: expected \[1, 8\], found \[1, 7\]"):
        one_pass(works, hyper[:, :7])
    with pytest.raises(ValueError, match=r"keys: expected \[1\], found \[2\]"):
        one_pass(works, hyper, keys=torch.ones(2, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"steps: expected \[2\], found \[3\]"):
        apply(works, hyper, torch.ones(3, device=device))
    apply(works, hyper.double().cpu(), steps.double())  # these are converted


def test_autograd_sees_that_parameters_have_changed(device):
    p, g, m = (torch.ones(4, 6, device=device) for _ in range(3))
    work = Work(Piece("row", (4, 6), stride=6), p, g, m, torch.ones(4, device=device))
    hyper = torch.tensor([[0.1, 1, 0.1, 0.1, 1, 1e-8, 1, 0]], device=device)
    weight = p.requires_grad_()
    square = weight.square().sum()  # keeps the weight for its backward
    with torch.no_grad():
        one_pass([work], hyper)
        apply([work], hyper, torch.ones(4, device=device))
    assert weight._version == 2 and m._version == 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_why_not(monkeypatch, device):
    work = make("row", (2, 24), (F32,) * 3, device)
    assert why_not([]) is None and why_not([work]) is None
    assert why_not(copy([work], F64)) == "a tensor of torch.float64"
    if device == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        assert why_not([work]) == "a tensor on cpu"
    monkeypatch.setattr(tables, "triton", None)
    assert why_not([work]) == "Triton is not installed"


# Compilation for GPUs that are not here

COMPILED = [  # call, kind, shape, dtypes
    ("one_pass", "row", (4096, 128), "fp32"),  # several rows a program
    ("one_pass", "row", (4096, 4096), "fp32"),  # one row
    ("one_pass", "row", (4096, 4096), "bf16-bf16m"),
    ("one_pass", "row", (4096, 14336), "bf16"),  # two loops
    ("one_pass", "row", (4096, 14335), "bf16-bf16m"),  # ... not aligned
    ("one_pass", "row", (32, 524288), "master"),  # two phases
    ("one_pass", "elementwise", (4096,), "fp32"),
    ("apply", "column", (1, 4096, 4096), "fp32"),
    ("apply", "column", (1, 4096, 4095), "bf16-bf16m"),
    ("unit_sums", "column", (1, 4096, 4096), "bf16"),
]
POINTERS = {"table_ptr": "*i64", "map_ptr": "*i32", "hyper_ptr": "*fp32", "keys_ptr": "*i64",
            "workspace_ptr": "*fp32", "units_ptr": "*fp32"}  # fmt: skip


def jobs_of(target):
    jobs = []
    for call, kind, shape, name in COMPILED:
        works = [elsewhere(kind, shape, DTYPES[name])]
        for launch in tables.Table(call, works, name == "bf16-bf16m").launches:
            kernel = adam_mini._KERNELS[launch.kernel]
            constants = dict(launch.options)
            job = {
                "module": "trimtab.triton_kernels.adam_mini",
                "kernel": f"_{launch.kernel}_kernel",
                "target": target,
                "num_warps": constants.pop("num_warps"),
                "signature": {n: t for n, t in POINTERS.items() if n in kernel.arg_names},
                "constexprs": constants,
            }
            if job not in jobs:
                jobs.append(job)
    return jobs


@pytest.fixture(scope="module")
def compiled():
    jobs = [job for target in TARGETS.values() for job in jobs_of(target)]
    return list(zip(jobs, compile_all(jobs), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target, compiled):
    rows = [(job, row) for job, row in compiled if job["target"] == TARGETS[target]]
    assert {job["kernel"] for job, _ in rows} == {f"_{name}_kernel" for name in adam_mini._KERNELS}
    for job, row in rows:
        assert row["spilled"] == 0, (job, row)
        assert row["registers"] * job["num_warps"] <= MAX_REGISTERS * 16, (job, row)


LOADS = """
import json, re, sys
import compile_worker
compile_worker._nvidia_resources = lambda asm: {"loads": re.findall(r"ld\\.global\\S*", asm["ptx"])}
json.dump([compile_worker.compile_kernel(job) for job in json.load(sys.stdin)], sys.stdout)
"""


def test_aligned_pieces_are_read_in_vectors():
    """A pointer from a table has lost its alignment: without the hint no load is a vector."""
    jobs = [job for job in jobs_of(TARGETS["sm_90"]) if "VECTOR" in job["constexprs"]]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADS],
        input=json.dumps(jobs), env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for job, row in zip(jobs, json.loads(done.stdout), strict=True):
        loads, aligned = row["loads"], job["constexprs"]["VECTOR"] > 1
        assert any(".v4." in load or ".v8." in load for load in loads) == aligned, (job, loads)
        assert not (aligned and any(load.endswith("b16") for load in loads)), (job, loads)


# Edits that must turn this file red:
# 1. adam_mini.py: drop one factor `scale` of `means`, in the one-pass or in the reduce kernel
# 2. adam_mini.py: drop `matrix * pitch` where columns read their step sizes (stacked matrices)
# 3. adam_mini.py: `done + index` -> `index` in the second loop of long rows (random bits)
# 4. adam_mini.py: drop `+ ((bits >> 16) & 1)` in _store (ties to even)
# 5. adam_mini.py: drop the `tl.where` on skip in the reduce kernel (moments of long rows)
# 6. adam_mini.py: drop `tl.multiple_of(pointer, 16)` (loads are no vectors)
# 7. _adam_mini_table.py: `if False:` for the alignment of gradients that have moved
# 8. _adam_mini_table.py: drop `table.captured or` (a graph's table follows other gradients)
