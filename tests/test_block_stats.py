import copy
from math import inf, isnan, nan

import pytest
import torch
from architectures import tiny
from torch import nn

from trimtab.optim import BlockLayout, BlockMap
from trimtab.optim.block_stats import BlockStats, LineSNR, block_stats
from trimtab.optim.blocks import infer_blocks


def with_gradient(gradient):
    """A module whose parameter `weight` has this gradient."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros_like(gradient))
    module.weight.grad = gradient
    return module


def snr(v, layout=None):
    """Of second moments `v`, under a map that has this layout."""
    layout = layout or BlockLayout("row", tuple(v.shape))
    return block_stats(with_gradient(v.sqrt()), BlockMap({"weight": (layout, "")}))["weight"]


def test_a_product_of_two_profiles():
    """Rows that are multiples of b have the SNR of b, columns that of a."""
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0])
    line = snr(torch.outer(a, b))
    assert line.row == pytest.approx(2**2 / 1)  # mean 2, variance 1
    assert line.column == pytest.approx(2**2 / (2 / 3))
    assert isnan(line.head) and line.flattest == "column"


def test_flat_lines_are_infinitely_safe():
    line = snr(torch.tensor([[1.0, 1.0], [4.0, 4.0]]))
    assert line.row == inf and line.column == pytest.approx(2.5**2 / 1.5**2)


def test_gaussian_gradients_of_one_scale():
    torch.manual_seed(0)
    line = block_stats(with_gradient(torch.randn(400, 400)))["weight"]
    # mean 1, variance 2; a sample of 400 makes 1 / variance about 1 + 1/10 larger
    assert line.row == pytest.approx(0.5, rel=0.15) and line.column == pytest.approx(0.5, rel=0.15)


def test_heads_are_judged_and_single_neurons_are_not():
    v = torch.tensor([[1.0, 1.0], [3.0, 3.0], [5.0, 99.0], [2.0, 2.0], [2.0, 6.0], [1.0, 50.0]])
    line = snr(v, BlockLayout("row", (6, 2), ((1, 2), (1, 1))))
    assert line.head == pytest.approx((2**2 / 1 + 3**2 / 3) / 2)  # rows 0-1 and 3-4
    transposed = snr(v.t().contiguous(), BlockLayout("column", (2, 6), ((1, 2), (1, 1))))
    assert transposed.head == pytest.approx(line.head)
    assert (transposed.row, transposed.column) == pytest.approx((line.column, line.row))


def test_experts_are_matrices_of_their_own():
    experts = torch.rand(3, 4, 5) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    line = snr(experts, BlockLayout("row", (3, 4, 5), stacked=1))
    each = [snr(expert) for expert in experts]
    assert line.row == pytest.approx(sum(x.row for x in each) / 3, rel=1e-5)
    assert line.column == pytest.approx(sum(x.column for x in each) / 3, rel=1e-5)


def test_lines_that_never_had_a_gradient_are_left_out():
    v = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert snr(v).row == pytest.approx(4.0)
    assert isnan(snr(torch.zeros(2, 2)).row)


def test_gradients_of_half_precision_do_not_overflow():
    gradient = torch.tensor([[1e4, 3e4], [1.0, 2.0]], dtype=torch.float16)
    assert block_stats(with_gradient(gradient))["weight"] == pytest.approx(
        block_stats(with_gradient(gradient.double()))["weight"], nan_ok=True
    )


def test_small_moments_do_not_underflow():
    v = torch.outer(torch.tensor([1e-30, 2e-30]), torch.tensor([1.0, 3.0]))
    assert snr(v).row == pytest.approx(4.0, rel=1e-5)


def test_kernels_have_no_columns():
    v = torch.rand(4, 3, 2, 2)
    assert isnan(snr(v).column) and snr(v).row == pytest.approx(snr(v.flatten(1)).row)


def test_an_optimizer_and_the_gradients_of_its_first_step_agree():
    model = tiny("Llama")
    tokens = torch.randint(1, 64, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    want = block_stats(model)
    for make in (torch.optim.AdamW, torch.optim.Adam):
        for parameters in (model.parameters(), model.named_parameters()):
            optimizer = make(parameters, lr=0.0)
            optimizer.step()
            found = block_stats(optimizer, model=model)
            assert found.keys() == want.keys()
            for name, line in want.items():
                assert found[name] == pytest.approx(line, rel=1e-5, nan_ok=True)
    named = block_stats(optimizer)  # the last one has names, but nobody told it of heads
    assert named.keys() == want.keys() and isnan(
        named["model.layers.0.self_attn.q_proj.weight"].head
    )
    assert want["model.layers.0.self_attn.q_proj.weight"].head > 0
    assert isnan(want["model.layers.0.self_attn.v_proj.weight"].head)
    assert "model.norm.weight" not in want  # vectors have no lines to choose from


def test_parameters_without_names():
    layer = nn.Linear(3, 2)
    layer(torch.randn(4, 3)).square().sum().backward()
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step()
    assert list(block_stats(optimizer)) == ["parameter 0 of group 0"]
    assert list(block_stats(optimizer, model=layer)) == ["weight"]


def test_the_table_joins_layers_and_marks_the_flattest():
    stats = BlockStats(
        {
            "h.0.q.weight": LineSNR(3.0, 1.0, 2.0),
            "h.11.q.weight": LineSNR(5.0, 1.0, nan),
            "h.0.v.weight": LineSNR(0.5, 0.25, nan),
            "head.weight": LineSNR(1.0, inf, nan),
        }
    )
    assert list(stats.by_pattern()) == ["h.*.v.weight", "h.*.q.weight", "head.weight"]
    assert stats.by_pattern()["h.*.q.weight"] == LineSNR(4.0, 1.0, 2.0)
    lines = [line.split() for line in str(stats).splitlines()]
    assert lines == [
        ["parameters", "row", "column", "head"],
        ["h.*.v.weight", "0.5*", "0.25", "-"],
        ["h.*.q.weight", "4*", "1", "2"],
        ["head.weight", "1", "inf*", "-"],
    ]


def test_patterns_are_those_of_edited():
    model = tiny("Mixtral")
    tokens = torch.randint(1, 64, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    blocks = infer_blocks(model)
    stats = block_stats(model, blocks)
    edited = blocks.edited({pattern: line.flattest for pattern, line in stats.by_pattern().items()})
    assert {entry.layout.kind for entry in edited.values()} == {"row", "column", "elementwise"}
    assert edited["model.layers.0.mlp.experts.down_proj"].layout.stacked == 1


def test_bad_input_is_named():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="source: expected gradients"):
        block_stats(layer)
    optimizer = torch.optim.AdamW(layer.parameters())
    with pytest.raises(ValueError, match="source: expected exp_avg_sq"):
        block_stats(optimizer)
    layer(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="blocks: no entry for parameter 'weight'"):
        block_stats(layer, BlockMap({}))
    with pytest.raises(ValueError, match=r"model: .* parameter 0 of group 0"):
        block_stats(optimizer, model=copy.deepcopy(layer))
    with pytest.raises(ValueError, match="model: "):
        block_stats(optimizer, BlockMap({}))
    wrong = BlockMap({"weight": (BlockLayout("row", (3, 2)), "")})
    with pytest.raises(ValueError, match=r"'weight'.*\(3, 2\), found \(2, 3\)"):
        block_stats(layer, wrong)


# Edits to block_stats.py that must turn this file red:
#   1. _line_snr: lines.mean(2), lines.var(2, ...) -> lines.mean(1), lines.var(1, ...)
#   2. correction=0 -> correction=1
#   3. _line_snr: drop [several] (single neurons count as heads)
#   4. _snr: touched = means > 0 -> means >= 0
#   5. block_stats: v = dense.double() -> dense.float()
