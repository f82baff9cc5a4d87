import itertools

import pytest
import torch
from tiny_models import KINDS, VOCAB, causal_lm, keep_norm_dtype
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from trimtab.rl.prefix_support import refuse_unsupported
from trimtab.rl.responses import response_hidden, response_logits

ROUTES = ["packed", "dense"]


def ragged(seed=0, prompts=(9, 1, 4, 6), groups=(3, 2, 4, 1), longest=7):
    """Prompts of unequal length (one of one token), groups of unequal size, rows shuffled."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(VOCAB, (n,), generator=g).tolist() for n in prompts]
    index = torch.cat([torch.full((n,), i) for i, n in enumerate(groups)])
    index = index[torch.randperm(len(index), generator=g)]
    lengths = torch.randint(1, longest + 1, (len(index),), generator=g)
    lengths[0], lengths[-1] = 1, longest
    mask = torch.arange(longest) < lengths[:, None]
    tokens = torch.randint(VOCAB, mask.shape, generator=g)  # the padding holds tokens too
    return {"prompts": ids, "tokens": tokens, "mask": mask, "group_index": index}


def one_by_one(model, prompts, tokens, mask, group_index):
    """The definition: every trajectory alone through the model, as it is."""
    logits = []
    for response, length, group in zip(tokens, mask.sum(-1), group_index, strict=True):
        ids = torch.tensor(prompts[group] + response[:length].tolist())
        logits.append(model(ids[None], use_cache=False).logits[0, len(prompts[group]) - 1 : -1])
    return torch.cat(logits)


def gradient(model, logits):
    """All parameters' gradient, flat, of a loss that weighs every logit by its own number."""
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(logits.shape, generator=g).to(logits)
    loss = (weights * logits.log_softmax(-1)).sum()
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(model.parameters()))])


def relative_l2(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_in_float64(kind, route):
    model = keep_norm_dtype(causal_lm(kind, dtype=torch.float64))
    data = ragged()
    truth = one_by_one(model, **data)
    logits = response_logits(model, **data, route=route)
    assert logits.dtype == torch.float64 and logits.shape == (int(data["mask"].sum()), VOCAB)
    torch.testing.assert_close(logits, truth, atol=1e-11, rtol=0)
    assert relative_l2(gradient(model, logits), gradient(model, truth)) < 1e-12


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("index", [[0, 0, 1, 1], [1, 0, 1, 0]])
def test_rows_without_a_gap(index, route):
    """Every position predicts a token: nothing is picked, or all in another order."""
    model = keep_norm_dtype(causal_lm("llama_gqa", dtype=torch.float64))
    tokens = torch.arange(12).view(4, 3)
    data = {
        "prompts": [[5, 6, 7], [8, 9, 10]],
        "tokens": tokens,
        "mask": torch.ones_like(tokens, dtype=torch.bool),
        "group_index": torch.tensor(index),
    }
    logits, truth = response_logits(model, **data, route=route), one_by_one(model, **data)
    torch.testing.assert_close(logits, truth, atol=1e-11, rtol=0)
    assert relative_l2(gradient(model, logits), gradient(model, truth)) < 1e-12


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_head_make_the_logits(kind, route):
    model = keep_norm_dtype(causal_lm(kind, dtype=torch.float64))
    data = ragged()
    hidden, head = response_hidden(model, **data, route=route)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    truth = response_logits(model, **data, route=route)
    torch.testing.assert_close(logits, truth, atol=1e-12, rtol=0)
    assert relative_l2(gradient(model, logits), gradient(model, truth)) < 1e-12
    assert head.softcap is None
    assert not model.get_output_embeddings()._forward_pre_hooks


def small(config, model, **options):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return model(config(**sizes, **options)).eval()


def test_softcap_of_the_model_goes_with_the_head():
    model = small(Gemma2Config, Gemma2ForCausalLM, head_dim=16, final_logit_softcapping=0.5)
    data = ragged()
    hidden, head = response_hidden(model, **data, route="dense")
    logits = 0.5 * (hidden @ head.weight.t() / 0.5).tanh()
    assert head.softcap == 0.5
    torch.testing.assert_close(logits, response_logits(model, **data, route="dense"))


def test_bias_of_the_model_goes_with_the_head():
    model = small(PhiConfig, PhiForCausalLM)
    torch.nn.init.normal_(model.lm_head.bias)
    data = ragged()
    hidden, head = response_hidden(model, **data, route="dense")
    logits = hidden @ head.weight.t() + head.bias
    torch.testing.assert_close(logits, response_logits(model, **data, route="dense"))


def test_a_model_that_scales_its_logits_has_no_fused_head():
    model = small(CohereConfig, CohereForCausalLM, logit_scale=0.25)
    with pytest.raises(ValueError, match=r"Cohere.* does more to its logits.*head: logits"):
        response_hidden(model, **ragged(), route="dense")
    assert not model.get_output_embeddings()._forward_pre_hooks


class Louder(torch.nn.Linear):
    """A head that does more than its weight and bias say."""

    def forward(self, x):
        return 3 * super().forward(x)


def test_a_head_that_is_not_its_weight_is_refused():
    model = causal_lm("llama")
    data = ragged()
    head = model.lm_head
    hook = head.register_forward_hook(lambda layer, args, output: 4 * output)
    with pytest.raises(ValueError, match=r"does more to its logits.*head: logits"):
        response_hidden(model, **data)
    hook.remove()
    model.lm_head = Louder(head.in_features, head.out_features, bias=False)
    with pytest.raises(ValueError, match=r"does more to its logits"):
        response_hidden(model, **data)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    response_hidden(model, **data)  # nothing to see yet, so it is not taken for checked
    torch.nn.init.normal_(model.lm_head.weight)
    with pytest.raises(ValueError, match=r"does more to its logits"):
        response_hidden(model, **data)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"not finite"):
        response_hidden(model, **data)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_in_float32(kind, route, attention):
    model = causal_lm(kind, attention=attention)
    for data in (
        ragged(1),
        ragged(2, prompts=(1,), groups=(1,), longest=1),  # nothing but a token
        ragged(3, prompts=(1, 1), groups=(2, 3)),  # no prefix anywhere
        ragged(4, prompts=(40, 3), groups=(1, 6), longest=20),
    ):
        truth = gradient(model, one_by_one(model, **data))
        assert (
            relative_l2(gradient(model, response_logits(model, **data, route=route)), truth) < 2e-6
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_is_no_worse_than_dense(attention, how):
    errors = {route: 0.0 for route in ROUTES}
    for seed in range(6):
        model, data = causal_lm("llama_gqa", attention=attention, seed=seed), ragged(seed)
        truth = gradient(model, one_by_one(model, **data))
        if how == "weights":
            model = model.to(torch.bfloat16)
        for route in ROUTES:
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                logits = response_logits(model, **data, route=route)
            assert logits.dtype == torch.bfloat16
            errors[route] += relative_l2(gradient(model, logits.float()), truth) / 6
    assert 1e-4 < errors["packed"] <= 1.25 * errors["dense"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_padding_never_matters(kind, route):
    model, data = causal_lm(kind), ragged()
    logits = response_logits(model, **data, route=route)
    garbage = torch.where(data["mask"], data["tokens"], VOCAB + 10**6)
    wider = torch.nn.functional.pad(garbage, (0, 3), value=-1)
    mask = torch.nn.functional.pad(data["mask"], (0, 3))
    assert torch.equal(response_logits(model, **(data | {"tokens": garbage}), route=route), logits)
    more = data | {"tokens": wider, "mask": mask}
    assert torch.equal(response_logits(model, **more, route=route), logits)
    # the last token of a response is never an input
    last = data["mask"].cumsum(-1) == data["mask"].sum(-1, keepdim=True)
    other = data | {"tokens": torch.where(last, 0, data["tokens"])}
    assert torch.equal(response_logits(model, **other, route=route), logits)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_responses_do_not_see_each_other(route, attention):
    model, data = causal_lm("qwen3", attention=attention), ragged()
    owner = torch.arange(len(data["mask"]))[:, None].expand_as(data["mask"])[data["mask"]]
    place = torch.arange(data["mask"].shape[1]).expand_as(data["mask"])[data["mask"]]
    logits = response_logits(model, **data, route=route)
    for row in range(len(data["mask"])):
        changed = data["tokens"].clone()
        changed[row] = (changed[row] + 1) % VOCAB
        moved = response_logits(model, **(data | {"tokens": changed}), route=route) - logits
        assert torch.equal(moved[(owner != row) | (place == 0)].abs().max(), torch.tensor(0.0))
        later = moved[(owner == row) & (place > 0)]
        assert (later.abs().amax(-1) > 1e-3).all()  # and every later token sees the change


def test_routes_agree_whatever_the_order():
    model, data = causal_lm("qwen2"), ragged()
    order = torch.randperm(len(data["tokens"]), generator=torch.Generator().manual_seed(5))
    shuffled = {n: x if n == "prompts" else x[order] for n, x in data.items()}
    rows = torch.arange(len(order))[:, None].expand_as(data["mask"])
    back = torch.cat(
        [(rows[order][shuffled["mask"]] == r).nonzero()[:, 0] for r in range(len(order))]
    )
    for route in ROUTES:
        a = response_logits(model, **data, route=route)
        b = response_logits(model, **shuffled, route=route)
        torch.testing.assert_close(a, b[back], atol=1e-5, rtol=0)


def test_a_prompt_without_responses():
    model, data = causal_lm(), ragged()
    extra = [[3, 4, 5], *data["prompts"], [7]]
    with_extra = data | {"prompts": extra, "group_index": data["group_index"] + 1}
    for route in ROUTES:
        a, b = (response_logits(model, **d, route=route) for d in (data, with_extra))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_nothing():
    model, data = causal_lm(), ragged()
    plain = gradient(model, response_logits(model, **data))
    model.gradient_checkpointing_enable()
    model.train()
    assert relative_l2(gradient(model, response_logits(model, **data)), plain) < 1e-6


def test_bad_inputs_are_named():
    model, data = causal_lm(), ragged()
    holes = data["mask"].clone()
    holes[-1, 2] = False
    empty = data["mask"].clone()
    empty[4] = False
    for changes, reason in [
        ({"tokens": data["tokens"][:, :-1]}, r"tokens \[B, T\]"),
        ({"group_index": data["group_index"][:-1]}, r"group_index \[B\]"),
        ({"mask": data["mask"].long()}, "expected bool"),
        ({"mask": holes}, "row 9 is empty or has a gap"),
        ({"mask": empty}, "row 4 is empty or has a gap"),
        ({"prompts": [[], *data["prompts"][1:]]}, r"prompts\[0\]"),
        ({"group_index": data["group_index"] + 1}, r"\[0, 4\)"),
        ({"group_index": data["group_index"] - 1}, r"\[0, 4\)"),
        ({"tokens": torch.zeros(0, 0).long(), "mask": torch.zeros(0, 0).bool(),
          "group_index": torch.zeros(0).long()}, "at least one response"),
        ({"route": "pack"}, "expected packed or dense, got 'pack'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            response_logits(model, **(data | changes))


def test_attention_that_ignores_the_mask_is_refused():
    model, data = causal_lm(), ragged()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match="expected sdpa or eager attention, got 'flash_attention_2'"
    ):
        response_logits(model, **data)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
GEMMA = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8
)


@pytest.mark.parametrize(
    ("make", "reason"),
    {
        "rope": (lambda: causal_lm(rope_parameters=DYNAMIC), "rope type 'dynamic'"),
        "dropout": (lambda: causal_lm(attention_dropout=0.1).train(), "attention_dropout is 0.1"),
        "pdrop": (lambda: causal_lm("gpt2", attn_pdrop=0.1).train(), "attn_pdrop is 0.1"),
        "layers": (lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, sliding_window=4)),
                   "sliding_attention.*window of 4"),
        "window": (lambda: causal_lm(sliding_window=4), "sliding window of 4"),
        "alibi": (lambda: MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=1)),
                  "MptForCausalLM does not use"),
        "mamba": (lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1)),
                  "MambaForCausalLM does not use"),
    }.values(),
    ids=["rope", "dropout", "pdrop", "layers", "window", "alibi", "mamba"],
)  # fmt: skip
def test_models_that_sharing_would_change_are_refused(make, reason):
    model, data = make(), ragged()
    with pytest.raises(ValueError, match=reason):
        refuse_unsupported(model)
    with pytest.raises(ValueError, match=reason):
        response_logits(model, **data)


def test_rope_of_each_layer_type_is_looked_at():
    nested = {"full_attention": DYNAMIC, "sliding_attention": DYNAMIC | {"rope_type": "default"}}
    model = causal_lm()
    model.config.rope_parameters = nested  # the form of models with two kinds of layers
    with pytest.raises(ValueError, match="rope type 'dynamic'"):
        refuse_unsupported(model)


def test_accepted_models():
    for kind, attention in itertools.product(KINDS, ["sdpa", "eager"]):
        refuse_unsupported(causal_lm(kind, attention=attention))


# Edits to rl/responses.py that must turn this file red:
#   segment == segment of the row (of _additive_mask)  ->  segment >= segment of the column
#   position += range(prefix, prefix + length)         ->  range(start, start + length)
#   [prompts[group][-1], *response[:-1]]               ->  prompt whole in the prefix, response[:-1]
#   (segment == 0)                                     ->  nothing: no prefix is seen
#   refuse_unsupported(model) (of response_logits)     ->  not called
