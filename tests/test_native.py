import logging
import multiprocessing
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from closeness import assert_as_close_as

from trimtab.optim import native
from trimtab.triton_kernels.adam_mini import (
    Piece,
    Work,
    apply_reference,
    one_pass_reference,
    round_stochastically,
    rounding_noise,
    unit_sums_reference,
)

pytestmark = pytest.mark.skipif(native.load() is None, reason="no native library here")

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
CHUNK, ITEM, LONG, STRIP, WIDTH = 128, 2**16, 2**19, 256, 1024  # of the C++ file
# below, at and one past a chunk, a run of elementwise sums and the length that is cut; several
# items, the last one shorter; one unit and one entry
ROWS = [(1, 1), (5, 1), (3, 15), (4, 17), (3, CHUNK - 1), (2, CHUNK), (2, CHUNK + 1), (2, 4097),
        (300, 250), (1, LONG), (2, LONG + 1), (1, LONG + 3 * ITEM + 5)]  # fmt: skip
RUNS = [(1,), (16,), (CHUNK + 1,), (4095,), (4096,), (4097,), (ITEM + 1,)]
# a batch, fewer columns than lanes, one past the rows and columns of an item of sums; B = 1
COLUMNS = [(1, 1, 5), (1, 17, 1), (2, 15, 16), (3, 4, 17), (2, STRIP + 1, 33), (1, 7, WIDTH + 1)]
SHAPES = [
    *(("row", shape) for shape in ROWS),
    *(("elementwise", shape) for shape in RUNS),
    *(("column", shape) for shape in COLUMNS),
]
all_shapes = pytest.mark.parametrize(
    ("kind", "shape"), SHAPES, ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x))
)
# param, grad, exp_avg
DTYPES = [(FP32, FP32, FP32), (BF16, BF16, FP32), (BF16, FP32, FP32), (BF16, BF16, BF16),
          (FP32, BF16, FP32), (FP32, FP32, BF16), (FP32, BF16, BF16), (BF16, FP32, BF16),
          (FP64, FP64, FP64), (FP64, FP64, BF16)]  # fmt: skip
all_dtypes = pytest.mark.parametrize(
    "dtypes", DTYPES, ids=lambda d: "-".join(str(x)[6:].replace("float", "") for x in d)
)
PADDING = 3


def hyper_row(lr=1e-2, decay=0.999, beta1=0.9, beta2=0.95, step=3, eps=1e-8, scale=1.0, skip=0):
    root = (1 - beta2**step) ** -0.5
    return [lr / (1 - beta1**step), decay, 1 - beta1, 1 - beta2, root, eps, scale, skip]


def hyper(*rows):
    return torch.tensor(rows or (hyper_row(),), dtype=FP64)


def example(kind, shape, dtypes=DTYPES[0], *, seed=0, key=7):
    """A work whose piece begins 3 entries into its tensors, which go on 3 entries after it."""
    torch.manual_seed(seed)
    piece = Piece(kind, shape, offset=PADDING, first=PADDING, index=2**32 - 9, stride=shape[-1] + 2)
    n = piece.n_entries + 2 * PADDING
    n_moments = (shape[0] if kind == "row" else piece.n_entries) + 2 * PADDING
    param, grad, exp_avg = (torch.randn(n).to(dtype) for dtype in dtypes)
    exp_avg_sq = torch.rand(n_moments, dtype=FP64 if dtypes[0] == FP64 else FP32)
    return Work(piece, param, grad, exp_avg.mul_(0.1), exp_avg_sq, key)


def copy(work, dtype=None):
    tensors = (t.to(dtype or t.dtype, copy=True) for t in work[1:5])
    return Work(work.piece, *tensors, work.key)


def changed(work):
    return {"param": work.param, "exp_avg": work.exp_avg, "exp_avg_sq": work.exp_avg_sq}


def assert_agree(mine, reference, truth):
    """As close to fp64; of what was rounded stochastically nearly all is equal."""
    for name, k in changed(mine).items():
        r, t = changed(reference)[name], changed(truth)[name]
        assert k.dtype == r.dtype
        assert_as_close_as(k, r, t, name=name)
        if k.dtype == BF16:
            assert (k != r).sum() <= 1 + 0.002 * k.numel()


def assert_padding_kept(work, before):
    for k, b in zip(work[1:5], before[1:5], strict=True):
        torch.testing.assert_close(k[:PADDING], b[:PADDING], rtol=0, atol=0)
        torch.testing.assert_close(k[-PADDING:], b[-PADDING:], rtol=0, atol=0)


@all_shapes
def test_one_pass_matches_reference(kind, shape):
    work = example(kind, shape)
    mine, reference, truth = copy(work), copy(work), copy(work, FP64)
    native.one_pass([mine], hyper())
    one_pass_reference([reference], hyper())
    one_pass_reference([truth], hyper())
    assert_agree(mine, reference, truth)
    assert_padding_kept(mine, work)


@all_shapes
def test_sums_and_apply_match_reference(kind, shape):
    work = example(kind, shape)
    truth64 = unit_sums_reference([copy(work, FP64)])
    sums = native.unit_sums([work])
    assert sums.dtype == FP32 and sums.shape == (work.piece.n_units,)
    assert_as_close_as(sums, unit_sums_reference([work]), truth64, name="sums")

    steps = torch.rand(work.piece.n_units)
    mine, reference, truth = copy(work), copy(work), copy(work, FP64)
    native.apply([mine], hyper(), steps)
    apply_reference([reference], hyper(), steps)
    apply_reference([truth], hyper(), steps)
    assert_agree(mine, reference, truth)
    assert_padding_kept(mine, work)
    if kind != "elementwise":
        torch.testing.assert_close(mine.exp_avg_sq, work.exp_avg_sq, rtol=0, atol=0)


@pytest.mark.parametrize("round_params", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("kind", ["elementwise", "row", "long", "column"])
@all_dtypes
def test_every_dtype(dtypes, kind, round_params):
    shapes = {"row": (20, 333), "elementwise": (6000,), "column": (2, 300, 37)}
    shape = shapes.get(kind, (1, LONG + 1))
    kind = "row" if kind == "long" else kind
    work = example(kind, shape, dtypes)
    truth = unit_sums_reference([copy(work, FP64)])
    assert_as_close_as(native.unit_sums([work]), unit_sums_reference([work]), truth, name="sums")

    steps = torch.rand(work.piece.n_units, dtype=work.exp_avg_sq.dtype)
    pairs = [(native.apply, apply_reference, (steps,)), (native.one_pass, one_pass_reference, ())]
    for fast, slow, more in pairs[: 1 if kind == "column" else 2]:
        mine, reference, truth = copy(work), copy(work), copy(work, FP64)
        fast([mine], hyper(), *more, round_params=round_params)
        slow([reference], hyper(), *more, round_params=round_params)
        slow([truth], hyper(), *more)
        assert_agree(mine, reference, truth)
        if dtypes[2] == FP64:
            torch.testing.assert_close(changed(mine), changed(reference), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["row", "column"])
def test_stochastic_rounding_has_the_bits_of_the_reference(kind):
    shape = (3, 700) if kind == "row" else (1, 3, 700)
    piece = Piece(kind, shape, index=2**32 - 900, stride=1000)  # passes 2^32 within the first row
    torch.manual_seed(0)
    g = torch.randn(2100) * 10.0 ** torch.randint(-38, 38, (2100,))
    g[0] = 3.4e38  # rounds up to infinity
    work = Work(
        piece, *(torch.randn(2100).bfloat16() for _ in range(3)), torch.zeros(3), 0xDEADBEEF
    )
    work = work._replace(grad=g)
    # weight1 = 1 makes m = g, decay = 0 and steps of -1 make p = g, all exactly
    native.apply(
        [work], hyper([1, 0, 1, 0, 1, 1, 1, 0]), -torch.ones(piece.n_units), round_params=True
    )
    rows, columns = torch.arange(3)[:, None], torch.arange(700)
    noise = rounding_noise(piece.index + rows * 1000 + columns, work.key).view(-1)
    for rounded, bits in ((work.exp_avg, noise & 0xFFFF), (work.param, noise >> 16)):
        torch.testing.assert_close(rounded, round_stochastically(g, bits), rtol=0, atol=0)


def test_params_are_rounded_to_the_nearest_as_torch_does():
    """Ties above all: fp32 halfway between two bf16, the lower one even or odd."""
    torch.manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (5000,), dtype=torch.int32) << 16 | 0x8000
    g = bits.view(FP32)
    g = g[g.isfinite()]
    work = Work(
        Piece("row", (1, g.numel())),
        torch.zeros(g.numel()).bfloat16(),
        g,
        torch.zeros(g.numel()),
        torch.zeros(1),
    )
    native.apply([work], hyper([1, 0, 1, 0, 1, 1, 1, 0]), -torch.ones(1))
    assert torch.equal(work.param, g.bfloat16())


def test_keys_stand_in_for_those_of_the_works():
    works = [example("row", (3, 50), DTYPES[3], seed=i) for i in range(2)]
    twins = [copy(w)._replace(key=k) for w, k in zip(works, (5, 2**32 - 1), strict=True)]
    keys, rows = torch.tensor([5, 2**32 - 1]), hyper(hyper_row(), hyper_row())
    native.one_pass(works, rows, round_params=True, keys=keys)
    native.one_pass(twins, rows, round_params=True)
    native.apply(works, rows, torch.ones(6), round_params=True, keys=keys)
    native.apply(twins, rows, torch.ones(6), round_params=True)
    assert all(torch.equal(a.param, b.param) for a, b in zip(works, twins, strict=True))
    assert all(torch.equal(a.exp_avg, b.exp_avg) for a, b in zip(works, twins, strict=True))


def test_stochastic_rounding_keeps_the_expected_value():
    n, x = 200_000, 1 + 0.3 * 2**-7  # three tenths of the way to the next bf16
    work = Work(Piece("row", (1, n)), *(torch.zeros(n) for _ in range(3)), torch.zeros(1), 3)
    work = work._replace(grad=torch.full((n,), x), exp_avg=torch.zeros(n).bfloat16())
    native.apply([work], hyper([1, 1, 1, 0, 1, 1, 1, 0]), torch.zeros(1))
    share = (work.exp_avg > 1).double().mean().item()
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5


def test_many_works_in_one_call():
    """Each with its own hyper-parameters, some of them parts of the same tensors."""
    whole = example("elementwise", (5000,), seed=1)
    parts = [
        whole._replace(piece=Piece("row", (10, 100), 0, 0, 0, 100)),
        whole._replace(piece=Piece("elementwise", (1001,), 1000, 10, 1000)),
        whole._replace(piece=Piece("row", (1, 2999), 2001, 1011, 2001)),
    ]
    rows = [hyper_row(lr=1e-3), hyper_row(beta1=0.2, beta2=0.3), hyper_row(skip=1), hyper_row(lr=1)]
    other, column = example("row", (7, 31), seed=2), example("column", (2, 40, 3), seed=3)

    def copies(dtype=None):
        shared = copy(whole, dtype)
        return [*(shared._replace(piece=w.piece) for w in parts), copy(other, dtype)]

    mine, reference, truth = copies(), copies(), copies(FP64)
    native.one_pass(mine, hyper(*rows))
    one_pass_reference(reference, hyper(*rows))
    one_pass_reference(truth, hyper(*rows))
    for k, r, t in zip(mine, reference, truth, strict=True):
        assert_agree(k, r, t)
    torch.testing.assert_close(mine[0].param[2001:], whole.param[2001:], rtol=0, atol=0)  # skipped

    mine, reference = [copy(column), *copies()], [copy(column), *copies()]
    rows.insert(0, hyper_row(decay=0.5))
    sums = native.unit_sums(mine)
    torch.testing.assert_close(sums, unit_sums_reference(mine))
    native.apply(mine, hyper(*rows), sums)
    apply_reference(reference, hyper(*rows), sums)
    for k, r in zip(mine, reference, strict=True):
        torch.testing.assert_close(changed(k), changed(r))


@pytest.mark.parametrize("scale", [-1.0, 0.25])
@pytest.mark.parametrize(("kind", "shape"), [("row", (3, 50)), ("row", (1, LONG + 1)),
                                             ("elementwise", (77,))])  # fmt: skip
def test_grad_scale_is_a_factor_on_the_gradient(kind, shape, scale):
    work = example(kind, shape)
    mine, expected = copy(work), copy(work)._replace(grad=work.grad * scale)
    native.one_pass([mine], hyper(hyper_row(scale=scale)).float())
    native.one_pass([expected], hyper().float())
    torch.testing.assert_close(changed(mine), changed(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_extreme_betas_are_exact(betas):
    """With beta = 0 the moments are the new values, with beta = 1 the old ones, to the bit."""
    work = example("row", (3, 129))
    row = [1.0, 1.0, 1 - betas[0], 1 - betas[1], 1.0, 1.0, 1.0, 0.0]
    mine, reference = copy(work), copy(work)
    native.one_pass([mine], hyper(row))
    one_pass_reference([reference], hyper(row))
    torch.testing.assert_close(changed(mine), changed(reference), rtol=1e-6, atol=1e-6)
    if betas[0] != 0.5:
        torch.testing.assert_close(mine.exp_avg, reference.exp_avg, rtol=0, atol=0)


# the last one is the NaN of all ones, whose bits overflow when noise is added
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1], ids=["nan", "inf", "ones"])
@pytest.mark.parametrize(
    "dtypes", [DTYPES[0], DTYPES[3], DTYPES[7]], ids=["fp32", "bf16", "fp32 gradient"]
)
def test_nan_and_inf_spread_as_in_the_reference(dtypes, bad):
    works = [example("row", (4, 140), dtypes), example("elementwise", (150,), dtypes),
             example("row", (2, LONG + 1), dtypes)]  # fmt: skip
    column = example("column", (1, 20, 9), dtypes)
    for work, at in zip([*works, column], (141, 141, 141, 13), strict=True):
        bits = work.grad.view(torch.int32 if dtypes[1] == FP32 else torch.int16)
        where = bits if bad == -1 else work.grad
        where[PADDING + at] = bad
    mine, reference = [copy(w) for w in works], [copy(w) for w in works]
    rows = hyper(*[hyper_row()] * 3)
    native.one_pass(mine, rows, round_params=True)
    one_pass_reference(reference, rows, round_params=True)
    for k, r in zip(mine, reference, strict=True):
        for name, x in changed(k).items():
            assert torch.equal(x.isnan(), changed(r)[name].isnan()), name
            assert torch.equal(x.isinf(), changed(r)[name].isinf()), name
    assert native.unit_sums([column]).isfinite().logical_not().tolist() == [
        c == 4 for c in range(9)
    ]


def test_threads_change_no_bit():
    shapes = [("row", (500, 400)), ("row", (2, LONG + ITEM)), ("elementwise", (3 * ITEM + 7,)),
              ("row", (ITEM, 1))]  # fmt: skip
    works = [example(*x, (FP32, FP32, BF16)) for x in shapes]
    column = example("column", (2, 1000, 1300))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            mine, turned = [copy(w) for w in works], copy(column)
            native.one_pass(mine, hyper(*[hyper_row()] * len(works)))
            sums = native.unit_sums([*works, column])
            native.apply([turned], hyper(), sums[-turned.piece.n_units :])
            results.append([sums, *(t for w in [*mine, turned] for t in changed(w).values())])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_to_do():
    assert native.unit_sums([]).shape == (0,)
    native.one_pass([], torch.zeros(0, 8))
    for kind, shape in [
        ("row", (3, 0)),
        ("row", (0, 3)),
        ("elementwise", (0,)),
        ("column", (2, 0, 3)),
    ]:
        work = example(kind, shape)
        mine = copy(work)
        assert torch.equal(native.unit_sums([mine]), torch.zeros(work.piece.n_units))
        native.apply([mine], hyper(), torch.ones(work.piece.n_units))
        if kind != "column":
            native.one_pass([mine], hyper())
        assert all(torch.equal(a, b) for a, b in zip(mine[1:5], work[1:5], strict=True))


def test_autograd_sees_that_a_parameter_changed():
    work = example("row", (2, 3))
    weight = torch.nn.Parameter(work.param)
    out = (weight * weight).sum()
    native.one_pass([work._replace(param=weight)], hyper())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_why_not_names_the_reason():
    work = example("row", (2, 8))
    assert native.why_not([work]) is None
    assert "float16" in native.why_not([work._replace(grad=work.grad.half())])
    assert "float64" in native.why_not([work, example("row", (2, 8), (FP64,) * 3)])
    assert "float64" in native.why_not([work._replace(param=work.param.double())])
    beyond = work.piece._replace(offset=7)
    for bad in (
        work._replace(piece=beyond),
        work._replace(grad=work.grad.to("meta")),
        work._replace(exp_avg=torch.zeros(22, 2)[:, 0]),
    ):
        assert "contiguous CPU tensors" in native.why_not([bad])
    with pytest.raises(ValueError, match="contiguous CPU tensors"):
        native.one_pass([work._replace(piece=work.piece._replace(first=7))], hyper())
    with pytest.raises(ValueError, match="steps: expected"):
        native.apply([work], hyper(), torch.ones(3))
    with pytest.raises(ValueError, match="hyper: expected"):
        native.one_pass([work], hyper()[:, :7])


# ---- how the library is made -----------------------------------------------------------------


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache folder, and a compiler that copies the library there is and keeps a count."""
    library = Path(native.load()._name)
    if not library.exists():
        pytest.skip("the library of this machine is not in a cache")
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo 1.0; exit; fi\n'
        f"echo run >> {tmp_path}/count\n"
        'while [ "$1" != -o ]; do shift; done\n'
        f'cp {library} "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._library.cache_clear()
    yield tmp_path / "cache" / "trimtab"
    native._library.cache_clear()


def compilations(folder):
    return len((folder.parent.parent / "count").read_text().split())


def loaded_again():
    native._library.cache_clear()
    return native.load()


def test_compiled_once_and_kept(empty_cache, caplog):
    with caplog.at_level(logging.INFO):
        library = native.load()
        native.load()
    (file,) = empty_cache.iterdir()
    assert library._name == str(file)
    (record,) = caplog.records
    assert str(file) in record.getMessage()
    assert stat.S_IMODE(empty_cache.stat().st_mode) == 0o700
    assert loaded_again()._name == str(file)
    assert compilations(empty_cache) == 1


def test_other_source_compiler_or_cpu_is_another_library(empty_cache, monkeypatch, tmp_path):
    assert native.load()
    compiler = Path(os.environ["CXX"])
    compiler.write_text(compiler.read_text().replace("1.0", "2.0"))
    assert loaded_again()
    monkeypatch.setattr(native, "_machine", lambda: "another CPU")
    assert loaded_again()
    source = tmp_path / "other.cpp"
    source.write_text("//")
    monkeypatch.setattr(native, "_SOURCE", source)
    assert loaded_again()
    assert compilations(empty_cache) == len(list(empty_cache.iterdir())) == 4


@pytest.mark.parametrize("cut_to", [0, 100, 20_000])
def test_damaged_library_is_compiled_again(empty_cache, cut_to):
    file = Path(native.load()._name)
    whole = file.read_bytes()
    file.unlink()  # it may be mapped: another file in its place
    file.write_bytes(whole[:cut_to])
    assert loaded_again()
    assert file.read_bytes() == whole
    assert compilations(empty_cache) == 2


@pytest.mark.parametrize("why", ["a file in the way", "others may write", "another user's"])
def test_without_a_cache_it_is_compiled_for_this_process(empty_cache, monkeypatch, caplog, why):
    if why == "a file in the way":
        empty_cache.parent.write_text("")
    elif why == "others may write":
        empty_cache.mkdir(parents=True)
        empty_cache.chmod(0o777)
    else:
        empty_cache.mkdir(parents=True)
        euid = os.geteuid()
        calls = iter([euid + 1])  # only for the cache folder
        monkeypatch.setattr(os, "geteuid", lambda: next(calls, euid))
    with caplog.at_level(logging.WARNING):
        library = native.load()
    assert library is not None and str(empty_cache) not in library._name
    (record,) = caplog.records
    assert "cache" in record.getMessage()
    work = example("row", (3, 5))
    native.one_pass([work], hyper())  # the file is deleted, the library stays


def test_another_users_library_is_not_loaded(empty_cache, monkeypatch):
    assert native.load()
    euid = os.geteuid()
    calls = iter([euid, euid + 1])  # of the cache folder, of the file in it
    monkeypatch.setattr(os, "geteuid", lambda: next(calls, euid))
    assert loaded_again()
    assert compilations(empty_cache) == 2


@pytest.mark.parametrize("problem", ["no compiler", "failing compiler", "not a library"])
def test_without_a_library_the_reason_is_logged_once(empty_cache, monkeypatch, caplog, problem):
    compiler = Path(os.environ["CXX"])
    if problem == "no compiler":
        monkeypatch.setenv("PATH", "")
        monkeypatch.setenv("CXX", "/nowhere/c++")
        reason = "found no C.. compiler"
    elif problem == "failing compiler":
        compiler.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
        reason = "it is broken"
    else:
        compiler.write_text(compiler.read_text().replace("cp ", "echo "))
        reason = "file too short|invalid ELF|not a mach-o"
    with caplog.at_level(logging.WARNING):
        assert native.load() is None
        assert native.load() is None
    last = caplog.records[-1].getMessage()
    assert re.search(reason, last, re.IGNORECASE)
    assert len(caplog.records) == (2 if problem == "not a library" else 1)
    work = example("row", (2, 3))
    assert re.search(reason, native.why_not([work]), re.IGNORECASE)
    with pytest.raises(ValueError, match="no native library"):
        native.one_pass([work], hyper())


def test_a_machine_that_lost_its_compiler_takes_the_library_that_is_there(empty_cache, monkeypatch):
    assert native.load()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "")
    assert loaded_again()
    assert compilations(empty_cache) == 1


def _load_and_step(results):
    native._library.cache_clear()
    work = example("row", (3, 5))
    native.one_pass([work], hyper())
    results.put((native.load()._name, work.param.tolist()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_that_start_together_share_one_library(empty_cache, monkeypatch, tmp_path):
    """Three forks of this process, with the real compiler (unoptimised, to be quick)."""
    native._library.cache_clear()
    monkeypatch.delenv("CXX")
    compiler = Path(tmp_path / "quick")
    compiler.write_text(f'#!/bin/sh\nexec {native._compiler()[0]} "$@" -O0\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=_load_and_step, args=(results,)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert all(x == found[0] for x in found)
    assert [str(x) for x in empty_cache.iterdir()] == [found[0][0]]


# Five edits to adam_mini_step.cpp that each turn a test above red (tried):
#   SquareSum::total                    without `+ rest_`
#   update                              `high` for `(high + (here < low))`: past entry 2^32
#   lerp                                `a + weight * (b - a)` at every weight
#   bf16_of                             `0x8000` for `0x7FFF + (bits >> 16 & 1)`: ties away from 0
#   bf16_of                             `bits + up` for what is not finite, too
