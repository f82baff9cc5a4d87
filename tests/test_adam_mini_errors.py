import pytest
import torch
from adam_mini_cases import (
    MODES,
    assert_same,
    assert_unchanged,
    give_gradients,
    optimizer_for,
    small_model,
    snapshot,
    train,
)
from tiny_models import causal_lm
from torch import nn

from trimtab.optim import AdamMini, BlockLayout, BlockMap, infer_blocks

modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr: expected a finite number, at least 0, found -1.0"),
        ({"lr": float("nan")}, "lr: .*nan"),
        ({"lr": torch.tensor(-1.0)}, "lr: .*-1"),
        ({"lr": torch.ones(2)}, r"lr: expected a tensor of one element, found shape \(2,\)"),
        ({"eps": -1e-8}, "eps: expected a finite number, at least 0, found -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number, at least 0, found -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\), found \(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, "betas: "),
        ({"betas": (0.9, float("nan"))}, "betas: "),
        ({"betas": (0.9,)}, "betas: "),
        ({"betas": 0.9}, "betas: .*found 0.9"),
        ({"betas": ("a", 0.9)}, "betas: "),
        ({"lr": "x"}, "lr: expected a finite number, at least 0, found 'x'"),
        ({"lr": float("inf")}, "lr: .*inf"),
        ({"eps": None}, "eps: .*None"),
        ({"fused": True, "foreach": True}, "fused: .*foreach=True, found True"),
    ],
)
def test_settings_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdamMini([nn.Parameter(torch.ones(1))], **arguments)
    with pytest.raises(ValueError, match=message):
        AdamMini([{"params": [nn.Parameter(torch.ones(1))], **arguments}])
    optimizer = AdamMini([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **arguments})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm: expected more than 0, found 0.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: .*-1.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm: .*nan"),
        ({"max_grad_norm": "1"}, "max_grad_norm: .*'1'"),
        ({"seed": None}, "seed: expected an integer, found None"),
        ({"blocks": "rows"}, "blocks: expected a BlockMap, .*found 'rows'"),
        ({"blocks": [1]}, "blocks: expected a BlockMap, "),
        ({"blocks": {}}, "blocks: expected an entry for parameter"),
        ({"momentum_dtype": torch.float16}, "momentum_dtype: .*found torch.float16"),
        ({"capturable": True, "error_if_nonfinite": True}, "error_if_nonfinite: .*capturable"),
    ],
)
def test_options_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdamMini([nn.Parameter(torch.ones(1))], **arguments)


def test_unsupported_parameters_are_named():
    with pytest.raises(ValueError, match=r"number 0 .*dense and floating, found torch.complex64"):
        AdamMini([nn.Parameter(torch.ones(1, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"'w'.*int64"):
        AdamMini([("w", nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False))])
    with pytest.raises(ValueError, match=r"'w'.*torch.sparse_coo"):
        AdamMini([("w", torch.ones(2, 2).to_sparse().requires_grad_())])
    with pytest.raises(ValueError, match=r"param: .*found \(1,\)"):
        AdamMini([nn.Parameter(torch.ones(2))]).layout(nn.Parameter(torch.ones(1)))


def test_a_map_that_does_not_tile_its_parameter_is_refused():
    entry = {"kind": "row", "shape": [6, 5], "segments": [[1, 4]], "stacked": 0, "reason": ""}
    with pytest.raises(ValueError, match=r"entries\['w'\].*\(6, 5\): rows 4 to 5 are left over"):
        BlockMap.from_dict({"w": entry})
    for shape, message in (
        ((8, 5), r"'w'.*expects shape \(6, 5\), found \(8, 5\): rows 6 to 7 are in no block"),
        ((4, 5), r"'w'.*expects shape \(6, 5\), found \(4, 5\): it has no rows 4 to 5"),
        ((6, 4), r"'w'.*expects shape \(6, 5\), found \(6, 4\)"),
        ((5, 6), r"'w'.*expects shape \(6, 5\), found \(5, 6\)"),
        ((6,), r"'w'.*expects shape \(6, 5\), found \(6,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer_for(BlockLayout("row", (6, 5)), nn.Parameter(torch.ones(shape)))


def test_a_map_of_another_model_is_refused():
    model = small_model()
    blocks = infer_blocks(nn.Linear(6, 8))
    with pytest.raises(ValueError, match=r"blocks: .*entry for parameter '0.weight', found none"):
        AdamMini(model.named_parameters(), blocks=blocks)
    with pytest.raises(ValueError, match=r"blocks: expected named parameters"):
        AdamMini(model.parameters(), blocks=infer_blocks(model))
    with pytest.raises(ValueError, match=r"blocks: .*'number 1 of its group', found none"):
        AdamMini(model.parameters(), blocks={model[0].weight: BlockLayout("row", (8, 6))})


def test_names_of_an_added_group_are_looked_up():
    model = small_model()
    names = dict(model.named_parameters())
    optimizer = AdamMini([("0.weight", names["0.weight"])], blocks=infer_blocks(model))
    optimizer.add_param_group({"params": [("2.weight", names["2.weight"])]})
    for group, message in (
        ({"params": [("2.wieght", names["2.bias"])]}, "'2.wieght'"),
        ({"params": [("2.bias", names["0.bias"])]}, r"'2.bias'.*\(3,\), found \(8,\)"),
        ({"params": [("2.bias", names["2.bias"])], "lr": -1.0}, "lr: "),
        ({"params": [names["2.bias"]]}, "without names"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": [("2.bias", names["2.bias"])]})


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clip"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_gradients_that_are_not_finite_are_refused_whole(value, options, first):
    model, untouched = small_model(), small_model()
    optimizers = [
        AdamMini.for_model(m, error_if_nonfinite=True, foreach=foreach, **options)
        for m, foreach in ((model, None), (untouched, None))
    ]
    for m, optimizer in zip((model, untouched), optimizers, strict=True):
        train(m, optimizer, 0 if first else 2)
        give_gradients(m.parameters(), 0)
    before = snapshot(optimizers[0])
    model[2].bias.grad[1] = value
    with pytest.raises(ValueError, match=r"gradients: expected a finite norm, found (nan|inf)"):
        optimizers[0].step()
    assert_unchanged(optimizers[0], before)
    give_gradients(model.parameters(), 0)
    for optimizer in optimizers:
        optimizer.step()
    assert_same(model.parameters(), untouched.parameters())


@modes
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_sparse_gradients_are_refused_before_anything_changes(mode, first):
    embedding, linear = nn.Embedding(5, 3, sparse=not first), nn.Linear(3, 1)
    params = [*linear.parameters(), *embedding.parameters()]
    optimizer = AdamMini([{"params": [p]} for p in params], **mode)
    if not first:
        give_gradients(params, 0)
        optimizer.step()
        optimizer.zero_grad()
    embedding.sparse = True
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    before = snapshot(optimizer)
    message = r"gradient of .* expected dense, found torch.sparse_coo \(sparse=True of nn.Embedding"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("capturable", [False, True])
def test_fused_where_no_kernel_can_run_is_refused_before_anything_changes(capturable):
    params = [nn.Parameter(torch.ones(4, 3, dtype=t)) for t in (torch.float32, torch.float16)]
    groups = [{"params": [params[0]]}, {"params": [params[1]]}]
    optimizer = AdamMini(groups, capturable=capturable)
    give_gradients(params, 0)
    optimizer.step()
    optimizer.param_groups[1]["fused"] = True
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="fused: expected tensors that a kernel can update"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_a_parameter_that_was_resized_is_refused():
    """transformers' resize_token_embeddings changes the shape of the very Parameter."""
    model = causal_lm("llama_gqa")
    optimizer = AdamMini.for_model(model)
    give_gradients(model.parameters(), 0)
    optimizer.step()
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 8)
    give_gradients(model.parameters(), 1)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"embed_tokens.* shape \({size}, .*{size + 8}, "):
        optimizer.step()
    assert_same(model.parameters(), before)


def test_a_gradient_of_another_shape_is_refused():
    first, param = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 8))
    optimizer = AdamMini([first, param])
    param.data = torch.ones(8, 4)
    give_gradients([first, param], 0)
    param.data = torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"gradient of parameter .*\(4, 8\), found \(8, 4\)"):
        optimizer.step()
    assert_same([first, param], [torch.ones(3), torch.ones(4, 8)])


def test_a_group_with_fewer_names_than_parameters_is_refused():
    model = small_model()
    optimizer = AdamMini.for_model(model)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2, 2)))
    give_gradients(optimizer.param_groups[0]["params"], 0)
    with pytest.raises(ValueError, match="params: expected a name for each of the 3 parameters"):
        optimizer.step()


def test_parameters_that_were_frozen_may_be_added_without_names():
    model = small_model().requires_grad_(False)
    model[2].requires_grad_(True)
    optimizer = AdamMini.for_model(model)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    assert optimizer.param_groups[-1]["param_names"] == ["0.weight", "0.bias"]
    train(model, optimizer, 1)


# Edits that must turn this file red:
#   1. update.step: raise for a norm that is not finite after the updates
#   2. AdamMini._updates: count in place, state["step"].add_(taken), under capturable
#   3. places.check_gradient: let sparse gradients pass
#   4. AdamMini.add_param_group: do not take the group back
#   5. BlockLayout.validate: compare the number of entries alone
#   6. AdamMini._parts: step a parameter whatever its shape has become
