from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from closeness import assert_as_close_as
from torch._subclasses.fake_tensor import FakeTensorMode

from trimtab.triton_kernels import _prefix_attention_fused as fused
from trimtab.triton_kernels import _prefix_attention_triton as kernels
from trimtab.triton_kernels.prefix_attention import (
    Packing,
    PrefixSegment,
    prefix_attention,
    prefix_attention_reference,
)

pytestmark = pytest.mark.interpreter

pytest.importorskip("triton")

BIG, SMALL = 32, 16
# (lengths, prefix segments, query heads, key heads, width); tiles have 32 rows, over 16 at a time
SHAPES = {
    "one-token": ((1,), (), 1, 1, 32),
    "one-token-one-prefix-token": ((1,), (1,), 2, 1, 32),
    "below-a-tile": ((15,), (15,), 2, 2, 32),
    "at-a-tile": ((32,), (32,), 2, 2, 32),
    "one-past-a-tile": ((33,), (33,), 2, 2, 32),
    "prefix-at-the-small-tile": ((17, 16), (16,), 2, 2, 32),
    "ragged-several-tiles": ((40, 7, 70), (70,), 4, 2, 32),
    "no-segment": ((40, 33), (), 4, 2, 32),
    "three-segments": ((17, 16), (5, 40, 16), 4, 1, 64),
    "width-80": ((20, 5), (37,), 2, 1, 80),
    "width-128": ((20, 5), (37,), 2, 1, 128),
    "width-256": ((20, 5), (20, 3), 2, 1, 256),
    "width-of-no-power": ((5,), (3,), 2, 1, 7),
}
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
both_backends = pytest.mark.parametrize("backend", ["fused", "triton"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles at sizes that the interpreter can do."""
    sizes = [(size, width) for size in (2, 4) for width in (64, 128, 256)]
    rows, keys = kernels.Tiles(BIG, SMALL, 4, 1), kernels.Tiles(SMALL, BIG, 4, 1)
    tiles = {"forward": rows, "query": rows, "keys": keys}
    tables = {kernel: dict.fromkeys(sizes, tile) for kernel, tile in tiles.items()}
    monkeypatch.setattr(kernels, "TILES", tables)
    monkeypatch.setattr(kernels, "AMD_TILES", tables)
    monkeypatch.setattr(kernels, "splits_of", lambda *_: 1)


def contiguous(tensors):
    return tensors


def in_one(tensors):
    """Heads of one [N, heads, D]: strides of a fused projection."""
    heads = [x.shape[1] for x in tensors]
    return torch.cat(tensors, 1).split(heads, 1)


def heads_outside(tensors):
    """[1, H, N, D] seen as [N, H, D]."""
    return [x.transpose(0, 1)[None].contiguous()[0].transpose(0, 1) for x in tensors]


def example(shape, device, *, dtype=FP32, layout=contiguous, offset=1.0):
    """Query, key, value, pairs of prefix keys and values, and the gradient of the output."""
    torch.manual_seed(0)
    lengths, prefixes, heads, key_heads, width = shape

    def draw(tokens, heads):
        return torch.randn(tokens, heads, width).to(device, dtype)

    tokens = sum(lengths)
    rows = layout([draw(tokens, heads), draw(tokens, key_heads), draw(tokens, key_heads)])
    pairs = [layout([draw(n, key_heads), draw(n, key_heads)]) for n in prefixes]
    (grad,) = layout([draw(tokens, heads)])
    return SimpleNamespace(
        rows=rows, pairs=pairs, grad=grad, lengths=lengths, device=device, layout=layout
    )


def cast(case, dtype):
    pairs = [[x.to(dtype) for x in pair] for pair in case.pairs]
    rows = [x.to(dtype) for x in case.rows]
    return SimpleNamespace(
        **vars(case) | {"rows": rows, "pairs": pairs, "grad": case.grad.to(dtype)}
    )


def segments_of(case, filled=1.0):
    """With buffers that hold something already."""
    dtype = torch.promote_types(case.grad.dtype, FP32)
    return [
        PrefixSegment(*pair, *case.layout([torch.full_like(x, filled, dtype=dtype) for x in pair]))
        for pair in case.pairs
    ]


def run(case, backend, segments=None, **options):
    """Everything that comes out, by name."""
    segments = segments_of(case) if segments is None else segments
    leaves = [x.detach().requires_grad_() for x in case.rows]
    packing = Packing(case.lengths, case.device)
    out = prefix_attention(*leaves, segments, packing, backend=backend, **options)
    grads = torch.autograd.grad(out, leaves, case.grad)
    return named(out.detach(), grads, [segment[2:] for segment in segments])


def run_reference(case, **options):
    leaves = [x.detach().requires_grad_() for x in case.rows]
    pairs = [[x.detach().requires_grad_() for x in pair] for pair in case.pairs]
    out = prefix_attention_reference(*leaves, pairs, case.lengths, **options)
    flat = [x for pair in pairs for x in pair]
    grads = torch.autograd.grad(out, leaves + flat, case.grad)
    dtype = torch.promote_types(case.grad.dtype, FP32)
    buffers = [grad.to(dtype) + 1 for grad in grads[3:]]
    return named(out.detach(), grads[:3], list(zip(buffers[::2], buffers[1::2])))


def named(out, grads, buffers):
    found = {"out": out} | dict(zip(("grad query", "grad key", "grad value"), grads))
    for i, pair in enumerate(buffers):
        if pair[0] is not None:
            found |= {f"grad of key {i}": pair[0], f"grad of value {i}": pair[1]}
    return found


def check(case, backend, slack=2.0, **options):
    found, same = run(case, backend, **options), run_reference(case, **options)
    truth = run_reference(cast(case, FP64), **options)
    assert found.keys() == same.keys()
    for name, x in found.items():
        assert x.dtype == same[name].dtype, name
        assert_as_close_as(x, same[name], truth[name], name=name, slack=slack)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@both_backends
def test_matches_reference(backend, shape, device):
    check(example(shape, device), backend)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["ragged-several-tiles", "three-segments", "width-80"])
@both_backends
def test_16_bits_match_reference(backend, name, dtype, device):
    check(example(SHAPES[name], device, dtype=dtype), backend)


@pytest.mark.parametrize("name", ["ragged-several-tiles", "three-segments", "one-token"])
def test_fp64_matches_reference(name):
    check(example(SHAPES[name], "cpu", dtype=FP64), "fused")


@pytest.mark.parametrize("layout", [in_one, heads_outside])
@both_backends
def test_strides(backend, layout, device):
    check(example(SHAPES["three-segments"], device, layout=layout), backend)


@both_backends
def test_expanded_gradient(backend, device):
    case = example(SHAPES["prefix-at-the-small-tile"], device)
    case.grad = torch.ones((), device=device).expand(case.grad.shape)  # that of a sum
    check(case, backend)


@both_backends
def test_scale(backend, device):
    case = example(SHAPES["prefix-at-the-small-tile"], device)
    check(case, backend, scale=0.3)
    default, given = run(case, backend), run(case, backend, scale=32**-0.5)
    assert all(torch.equal(default[name], given[name]) for name in default)


@both_backends
def test_large_scores(backend, device):
    """Far beyond where exp overflows; so that a maximum and a log-sum-exp are really taken off."""
    case = example(SHAPES["three-segments"], device)
    case.rows = [case.rows[0] * 30, *case.rows[1:]]
    check(case, backend, slack=16.0)  # an ulp of such scores is much of a probability


@both_backends
def test_log_sum_exp(backend, device):
    """Keys of zeros: every score is 0, the output the mean, the log-sum-exp the log of a count."""
    case = example(SHAPES["three-segments"], device)
    q, k, v = case.rows
    pairs = [PrefixSegment(torch.zeros_like(a), b) for a, b in case.pairs]
    module = kernels if backend == "triton" else fused
    packing = Packing(case.lengths, device)
    _, lse = module.forward(q, torch.zeros_like(k), v, pairs, packing, 0.1)
    seen = torch.cat([torch.arange(1, n + 1) for n in case.lengths]) + 5 + 40 + 16
    log = torch.log2 if backend == "triton" else torch.log
    torch.testing.assert_close(lse, log(seen.to(device))[:, None].expand(-1, 4).float())


@both_backends
def test_segment_without_buffers(backend, device):
    case = example(SHAPES["three-segments"], device)
    whole = run(case, backend)
    segments = segments_of(case)
    segments[1] = PrefixSegment(*case.pairs[1])
    part = run(case, backend, segments)
    assert set(whole) - set(part) == {"grad of key 1", "grad of value 1"}
    assert all(torch.equal(part[name], whole[name]) for name in part)


@both_backends
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_buffers_in_float64(backend, dtype, device):
    case = example(SHAPES["three-segments"], device, dtype=dtype)
    narrow = run(case, backend)
    segments = [
        PrefixSegment(*s[:2], s.grad_key.double(), s.grad_value.double()) for s in segments_of(case)
    ]
    wide = run(case, backend, segments)
    for name, x in wide.items():
        assert x.dtype == (FP64 if " of " in name else dtype)
        torch.testing.assert_close(x.to(narrow[name].dtype), narrow[name], rtol=1e-6, atol=1e-6)


@both_backends
def test_segments_are_one_prefix(backend, device):
    """The same tokens in one segment or in three."""
    case = example(SHAPES["three-segments"], device)
    parts = run(case, backend)
    case.pairs = [[torch.cat(xs) for xs in zip(*case.pairs)]]
    whole = run(case, backend)
    for name in ("key", "value"):
        grads = [parts.pop(f"grad of {name} {i}") for i in range(3)]
        torch.testing.assert_close(torch.cat(grads), whole.pop(f"grad of {name} 0"))
    torch.testing.assert_close(parts, whole)


@both_backends
def test_waves_add_up(backend, device):
    case = example(((17, 33, 4, 9), (37, 5), 4, 2, 32), device)
    whole = run(case, backend)
    segments, parts = segments_of(case), []
    for tokens, lengths in ((slice(0, 50), (17, 33)), (slice(50, 63), (4, 9))):
        rows = [x[tokens] for x in case.rows]
        changed = {"rows": rows, "grad": case.grad[tokens], "lengths": lengths}
        parts.append(run(SimpleNamespace(**vars(case) | changed), backend, segments))
    for name, x in whole.items():
        # a buffer is the same tensor after both waves
        found = parts[1][name] if " of " in name else torch.cat([part[name] for part in parts])
        torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@both_backends
def test_backward_twice_adds_twice(backend, device):
    case = example(SHAPES["prefix-at-the-small-tile"], device)
    segments = segments_of(case, filled=0.0)
    query, key, value = (x.requires_grad_() for x in case.rows)
    packing = Packing(case.lengths, device)
    out = prefix_attention(query, key, value, segments, packing, backend=backend)
    once = torch.autograd.grad(out, query, case.grad, retain_graph=True)
    first = segments[0].grad_key.clone()
    twice = torch.autograd.grad(out, query, case.grad)
    assert torch.equal(*once, *twice)
    assert torch.equal(segments[0].grad_key, 2 * first)


@both_backends
def test_deterministic(backend, device):
    case = example(SHAPES["three-segments"], device)
    first, second = run(case, backend), run(case, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("splits", [2, 3, 7])
def test_splits_change_only_rounding(splits, device, monkeypatch):
    """Of the 5 blocks of 16 tokens; 7: splits without a block."""
    case = example(((40, 33), (37,), 2, 1, 80), device, layout=in_one)
    whole = run(case, "triton")
    monkeypatch.setattr(kernels, "splits_of", lambda *_: splits)
    first, second = run(case, "triton"), run(case, "triton")
    torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(first[name], second[name]) for name in first)


splits_of = kernels.splits_of


@pytest.mark.parametrize(
    ("programs", "blocks", "expected"),
    [
        (1, 100, 8),  # few programs
        (3, 100, 3),
        (8, 100, 1),  # as many as wanted
        (900, 100, 1),
        (1, 9, 2),  # few blocks
        (1, 1, 1),
    ],
)
def test_splits_of(programs, blocks, expected, monkeypatch):
    monkeypatch.setattr(kernels, "PROCESSORS", 8 // kernels.PROGRAMS)
    assert splits_of(programs, blocks, torch.device("cpu")) == expected


def test_one_segment_is_one_launch_without_a_carry():
    out = torch.zeros(3, 2, 4, dtype=BF16)
    segment = PrefixSegment(torch.zeros(5, 1, 4), torch.zeros(5, 1, 4))
    for prefixes in ((), (segment,)):
        ((*_, carry, into, last),) = kernels._launches(prefixes, out)
        assert carry is None and into is out and last
    first, second, third = kernels._launches((segment,) * 3, out)
    assert first[2] is None and first[3].dtype == FP32 and not first[4]
    assert second[2] is second[3] is first[3] and not second[4]
    assert third[2] is first[3] and third[3] is out and third[4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")
def test_default_backend_on_cpu_is_fused():
    case = example(SHAPES["at-a-tile"], "cpu")
    default, named_fused = run(case, None), run(case, "fused")
    assert all(torch.equal(default[name], named_fused[name]) for name in default)


def test_fused_on_cuda_by_shapes():
    """The operators' CUDA signatures, without a GPU."""
    with FakeTensorMode():
        q = torch.empty(1, 2, 24, 64, device="cuda", dtype=BF16)
        k = torch.empty(1, 2, 7, 64, device="cuda", dtype=BF16)
        out, lse = fused._attend(q, k, k, False, 0.1)
        assert (out.shape, out.dtype, out.device.type) == (q.shape, BF16, "cuda")
        assert (lse.shape, lse.dtype) == (q.shape[:3], FP32)
        grads = fused._attend_backward(out, q, k, k, out, lse, False, 0.1)
        assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]
        assert {grad.dtype for grad in grads} == {BF16}


def test_refusals(device):
    wide = torch.zeros(1, 1, 257)
    assert "width 256" in kernels.refusal(wide) and "257" in kernels.refusal(wide)
    assert "float64" in kernels.refusal(torch.zeros(1, 1, 32, dtype=FP64))
    assert kernels.refusal(torch.zeros(1, 1, 256, device=device)) is None
    with mock.patch.object(kernels, "runs_kernel", return_value=False):
        assert "cpu" in kernels.refusal(torch.zeros(1, 1, 32))
    with mock.patch.object(kernels, "triton", None):
        assert "not installed" in kernels.refusal(torch.zeros(1, 1, 32))
    with FakeTensorMode():
        on_cuda = torch.empty(1, 1, 32, device="cuda")
        assert "float32" in fused.refusal(on_cuda) and fused.refusal(on_cuda.half()) is None


@pytest.mark.parametrize(
    ("lengths", "block", "rows"),
    [
        ((1,), 4, [[0, 0, 1]]),
        ((4,), 4, [[0, 0, 4]]),  # a block is full
        ((5, 2), 4, [[0, 0, 5], [4, 0, 5], [5, 5, 7]]),  # one past; a block lies in one sequence
    ],
)
def test_packing_tiles(lengths, block, rows):
    packing = Packing(lengths, "cpu")
    table = packing.tiles(block)
    assert table.dtype == torch.int32 and table.tolist() == rows
    assert packing.tiles(block) is table
    assert packing.starts == (0, *torch.tensor(lengths).cumsum(0).tolist())
    assert packing.tokens == sum(lengths)


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_wrong_lengths_are_named(lengths):
    with pytest.raises(ValueError, match="lengths"):
        Packing(lengths, "cpu")


Q, K = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8)
P, NARROW = torch.zeros(3, 2, 8), torch.zeros(3, 2, 4)
STRIDED = torch.zeros(5, 8, 2).transpose(1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": [1.0]}, r"query: expected a torch.Tensor, got list"),
        ({"query": Q[0]}, r"query: expected \[tokens, heads, width\], got \(4, 8\)"),
        ({"key": K.bfloat16()}, r"key: expected torch.float32, got torch.bfloat16"),
        ({"query": Q.int(), "key": K.int(), "value": K.int()}, r"query: .*got torch.int32"),
        ({"value": K.to("meta")}, r"value is on meta"),
        ({"key": STRIDED}, r"key: expected stride 1 along its width, got \(16, 1, 2\)"),
        ({"value": K[:4]}, r"expected key and value \[5, Hk, 8\].*\(4, 2, 8\)"),
        ({"key": K[..., :4], "value": K[..., :4]}, r"key and value \[5, Hk, 8\]"),
        ({"key": Q[:, :3], "value": Q[:, :3]}, r"key: its 3 heads do not divide the query's 4"),
        ({"key": Q[:, :0], "value": Q[:, :0]}, r"key: its 0 heads"),
        ({"packing": Packing((4,), "cpu")}, r"packing: 4 tokens, but query has 5"),
        ({"packing": Packing((5,), "cuda")}, r"packing on cuda, but query on cpu"),
        ({"prefixes": [PrefixSegment(P[:0], P[:0])]}, r"prefixes\[0\]: .*at least one token"),
        ({"prefixes": [PrefixSegment(P, P, P)]}, r"prefixes\[0\]: .*both.*or neither"),
        ({"prefixes": [PrefixSegment(P, P[:2])]}, r"prefixes\[0\].value: expected \(3, 2, 8\)"),
        ({"prefixes": [PrefixSegment(NARROW, P)]}, r"prefixes\[0\].key: expected \(3, 2, 8\)"),
        ({"prefixes": [PrefixSegment(P.half(), P)]}, r"prefixes\[0\].key: .*got torch.float16"),
        ({"prefixes": [PrefixSegment(P, P.to("meta"))]}, r"query on cpu.*\[0\].value on meta"),
        (
            {"prefixes": [PrefixSegment(P, P), PrefixSegment(P, P, P, P.half())]},
            r"prefixes\[1\].grad_value: expected torch.float32, got torch.float16",
        ),
        ({"scale": 0.0}, r"scale: .*got 0.0"),
        ({"backend": "cuda"}, r"backend: expected fused, triton or None, got 'cuda'"),
        (
            {"query": Q.double(), "key": K.double(), "value": K.double(), "backend": "triton"},
            r"backend 'triton': .*float64",
        ),
    ],
)
def test_wrong_input_is_named(arguments, message):
    arguments = {"query": Q, "key": K, "value": K, "prefixes": ()} | arguments
    with pytest.raises(ValueError, match=message):
        prefix_attention(**{"packing": Packing((5,), "cpu")} | arguments)


# Edits to _prefix_attention_kernels.py that must turn this file red:
# 1. _attend: drop `* keep` from total (log-sum-exp over several tiles)
# 2. forward_kernel: in `whole`, drop `// BLOCK_S * BLOCK_S` (the prefix's last tile has no mask)
# 3. query_gradient_kernel: `begin` -> 0 in the own keys (a sequence sees the one before it)
# 4. _key_gradients: drop `if CAUSAL` and its line (a key has gradients of earlier tokens)
# 5. prefix_gradients_kernel: _store for _add (what the buffers held is lost)
