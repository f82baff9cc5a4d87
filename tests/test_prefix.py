import copy
import logging

import pytest
import torch
from prefix_cases import (
    LENGTHS,
    dense_gradient,
    dense_loss,
    gradient,
    group_of_responses,
    loss_of,
    relative_l2,
)
from tiny_models import KINDS, VOCAB, causal_lm, keep_norm_dtype
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    Qwen3MoeConfig,
    RobertaConfig,
    RobertaForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from trimtab.rl import prefix_phases
from trimtab.rl.prefix import SharedPrefix, Wave

MEMORY = ["keep", "recompute", "offload"]
_SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
_OTHERS = {
    "mistral": lambda: MistralConfig(**_SMALL, sliding_window=26),  # the longest sequence
    "gemma": lambda: GemmaConfig(**_SMALL),
    "gemma3": lambda: Gemma3TextConfig(
        **_SMALL, layer_types=["sliding_attention", "full_attention"], sliding_window=26
    ),
    "gemma3n": lambda: Gemma3nTextConfig(
        **_SMALL | {"num_hidden_layers": 4, "intermediate_size": [40] * 4},
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=512,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=None,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SMALL, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
}


def model_of(kind, dtype=torch.float64, attention="sdpa", **changes):
    if kind not in _OTHERS:
        model = causal_lm(kind, dtype=dtype, attention=attention, **changes)
    else:
        config = _OTHERS[kind]()
        for name, value in changes.items():
            setattr(config, name, value)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            for p in model.parameters():
                if p.ndim > 1:
                    torch.nn.init.normal_(p, std=0.3)
        model = model.to(dtype).eval()
    model.config._experts_implementation = "eager"
    return keep_norm_dtype(model) if dtype == torch.float64 and "gemma" not in kind else model


def shared_gradient(step, prompt, responses, weights, **options):
    step.host.model.zero_grad()
    with step.group(prompt) as g:
        total = g.accumulate(responses, loss_of(weights), **options)
        assert g.shared
    found = gradient(step.host.model)
    step.host.model.zero_grad()
    return total, found


# ---------------------------------------------------------------------- the definition


@pytest.mark.parametrize("checkpointing", [None, "non-reentrant", "reentrant"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_trajectories_in_float64(kind, memory, checkpointing):
    model = model_of(kind)
    if checkpointing:
        options = {"use_reentrant": checkpointing == "reentrant"}
        model.activation_checkpointing_enable(options)
        model.train()
    prompt, responses, weights = group_of_responses()
    total, truth = dense_gradient(model, prompt, responses, weights)
    for wave_tokens in (8, 100):  # several waves, one of a single response longer than that; one
        step = SharedPrefix(
            model, prefix_memory=memory, wave_tokens=wave_tokens, min_bound=0, verify="never"
        )
        found, grad = shared_gradient(step, prompt, responses, weights)
        assert found == pytest.approx(total, abs=1e-10)
        assert relative_l2(grad, truth) < 1e-12


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", _OTHERS)
def test_other_architectures(kind, memory):
    model = model_of(kind)
    prompt, responses, weights = group_of_responses()
    total, truth = dense_gradient(model, prompt, responses, weights)
    step = SharedPrefix(model, prefix_memory=memory, wave_tokens=8, min_bound=0)
    found, grad = shared_gradient(step, prompt, responses, weights)
    # Gemma's norms compute in fp32 whatever comes in
    assert found == pytest.approx(total, abs=1e-4 if "gemma" in kind else 1e-7)
    # .. and so does a router's softmax
    bound = {"gemma": 2e-6, "gemma3": 2e-6, "gemma3n": 5e-6, "qwen3_moe": 1e-7}.get(kind, 1e-12)
    assert relative_l2(grad, truth) < bound


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("head", ["logits", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind, head, attention):
    prompt, responses, weights = group_of_responses(40)
    _, truth = dense_gradient(model_of(kind), prompt, responses, weights, temperature=0.7)
    model = model_of(kind, torch.float32, attention)
    _, dense = dense_gradient(model, prompt, responses, weights, temperature=0.7)
    step = SharedPrefix(model, wave_tokens=16, min_bound=0, head=head, temperature=0.7)
    _, grad = shared_gradient(step, prompt, responses, weights)
    assert relative_l2(grad, truth) < max(2e-6, 1.5 * relative_l2(dense, truth))
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("how", ["autocast", "weights"])
@pytest.mark.parametrize("memory", MEMORY)
def test_bfloat16_is_no_worse_than_dense(how, memory):
    errors = {"shared": 0.0, "dense": 0.0}
    for seed in range(6):
        model = causal_lm("llama_gqa", seed=seed)
        group = group_of_responses(24, seed=seed)
        _, truth = dense_gradient(model, *group)
        if how == "weights":
            model = model.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            _, dense = dense_gradient(model, *group)
            step = SharedPrefix(model, prefix_memory=memory, wave_tokens=12, min_bound=0)
            _, shared = shared_gradient(step, *group)
        errors["dense"] += relative_l2(dense, truth) / 6
        errors["shared"] += relative_l2(shared, truth) / 6
    assert 1e-4 < errors["shared"] <= 1.25 * errors["dense"]


def test_autocast_around_the_waves_alone_reaches_phase_c():
    model = causal_lm("llama_gqa")
    prompt, responses, weights = group_of_responses()
    grads = []
    for around in (True, False):
        step = SharedPrefix(model, min_bound=0)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=around), step.group(prompt) as g:
            with torch.autocast("cpu", torch.bfloat16):
                g.accumulate(responses, loss_of(weights))
        grads.append(gradient(model))
    assert torch.equal(*grads)


def test_gradients_of_many_responses_add_up_in_fp32():
    model = causal_lm("llama_gqa").to(torch.bfloat16)
    prompt, _, _ = group_of_responses(12)
    step = SharedPrefix(model, wave_tokens=2, min_bound=0, verify="never")
    g = torch.Generator().manual_seed(3)
    responses = torch.randint(VOCAB, (256, 2), generator=g).tolist()
    weights = [torch.ones(2, dtype=torch.float64)] * 256
    with step.group(prompt) as group:
        for wave in group.waves(responses):
            group.backward(loss_of(weights)(group.forward(wave), wave))
        buffers = [s.grad_key.clone() for s in group.store.segments.values()]
    one = SharedPrefix(model, wave_tokens=10**6, min_bound=0, verify="never")
    with one.group(prompt) as group:
        group.accumulate(responses, loss_of(weights))
        at_once = [s.grad_key.clone() for s in group.store.segments.values()]
    assert all(b.dtype == torch.float32 for b in buffers)
    # each wave's own products are rounded to bf16 by attention's backward; their sum is not
    assert max(relative_l2(a, b) for a, b in zip(buffers, at_once)) < 4e-3


def test_accumulator_takes_the_wider_dtype():
    for dtype, accum, expected in (
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ):
        if (dtype, accum) == (torch.float32, torch.float64):
            continue
        step = SharedPrefix(model_of("llama", dtype), accum_dtype=accum, min_bound=0)
        with step.group([1, 2, 3]) as g:
            g.accumulate([[4], [5]], lambda out, _: out.logp.sum())
            (segment, *_) = g.store.segments.values()
            assert segment.grad_key.dtype == segment.grad_value.dtype == expected


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_log_probabilities_without_gradients(kind):
    model = model_of(kind)
    prompt, responses, _ = group_of_responses()
    step = SharedPrefix(model, wave_tokens=8, min_bound=0)
    with torch.no_grad(), step.group(prompt) as g:
        found = g.statistics(responses)
        assert g.shared and g.store.segments[next(iter(g.store.segments))].grad_key is None
    assert found.logp.shape == (6, 9) and not found.logp.requires_grad
    for row, response in enumerate(responses):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(found.logp[row, : len(response)], logp, atol=1e-12, rtol=0)
        assert (found.logp[row, len(response) :] == 0).all()
    assert all(p.grad is None for p in model.parameters())


def test_gradients_add_to_those_from_before():
    model = model_of("llama_gqa")
    first, second = group_of_responses(), group_of_responses(9, seed=1)
    truth = sum(dense_gradient(model, *group)[1] for group in (first, second))
    step = SharedPrefix(model, min_bound=0)
    model.zero_grad()
    for prompt, responses, weights in (first, second):
        with step.group(prompt) as g:
            g.accumulate(responses, loss_of(weights))
    assert relative_l2(gradient(model), truth) < 1e-12


def test_loss_over_the_whole_group():
    """A baseline over the group: no wave's loss is its own."""
    model = model_of("llama_gqa")
    prompt, responses, weights = group_of_responses()

    def coupled(out, wave):
        own = torch.nn.utils.rnn.pad_sequence([weights[i] for i in wave.rows], batch_first=True)
        score = (out.logp * own).sum(-1)
        return (score - score.mean()).square().sum() + loss_of(weights)(out, wave)

    grads = []
    for wave_tokens in (8, 100):
        step = SharedPrefix(model, wave_tokens=wave_tokens, min_bound=0, verify="always")
        model.zero_grad()
        with step.group(prompt) as g:
            total = g.accumulate(responses, coupled, joint=True)
        grads.append((total, gradient(model)))
    assert grads[0][0] == pytest.approx(grads[1][0], abs=1e-10)
    assert relative_l2(grads[0][1], grads[1][1]) < 1e-12


def test_adapter_of_peft():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        model_of("llama_gqa"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    model = model.double()
    prompt, responses, weights = group_of_responses()
    _, truth = dense_gradient(model, prompt, responses, weights)
    for memory in MEMORY:
        step = SharedPrefix(model, prefix_memory=memory, min_bound=0)
        _, grad = shared_gradient(step, prompt, responses, weights)
        assert relative_l2(grad, truth) < 1e-12


TRAINED = {
    "head": "lm_head",
    "final norm": "model.norm",
    "last q": "layers.1.self_attn.q_proj",
    "last v": "layers.1.self_attn.v_proj",
    "last mlp": "layers.1.mlp",
    "first k": "layers.0.self_attn.k_proj",
    "all but embeddings": "layers",
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("part", TRAINED)
def test_partly_frozen_models(part, checkpointing):
    model = model_of("llama")
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    for name, p in model.named_parameters():
        p.requires_grad_(TRAINED[part] in name)
    prompt, responses, weights = group_of_responses()
    _, truth = dense_gradient(model, prompt, responses, weights)
    for memory in MEMORY:
        step = SharedPrefix(model, prefix_memory=memory, min_bound=0, verify="always")
        _, grad = shared_gradient(step, prompt, responses, weights)
        assert relative_l2(grad, truth) < 1e-12


# ---------------------------------------------------------------------- branches


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_a_tree_of_rollouts(kind, memory):
    model = model_of(kind)
    g0 = torch.Generator().manual_seed(2)

    def node(n, *children):
        tokens = torch.randint(VOCAB, (n,), generator=g0).tolist()
        return tokens, torch.randn(n, generator=g0, dtype=torch.float64), children

    tree = node(30, node(8, node(5), node(6, node(4), node(3))), node(7), node(1, node(9), node(2)))

    def definition(context, branch):
        tokens, weights, children = branch
        own = dense_loss(model, context, tokens, weights) if context else 0.0
        return own + sum(definition(context + tokens, child) for child in children)

    model.zero_grad()
    total = definition([], tree)
    total.backward()
    truth = gradient(model)
    model.zero_grad()
    step = SharedPrefix(model, prefix_memory=memory, wave_tokens=6, min_bound=10, verify="always")

    def visit(branch, parent):
        tokens, weights, children = branch
        with step.group(tokens, parent=parent) as g:
            if parent is not None:
                g.backward(loss_of([weights])(g.own, Wave(torch.tensor([0]), None, None, None)))
            for child in children:
                if child[2]:
                    visit(child, g)
            leaves = [child for child in children if not child[2]]
            if leaves:
                g.accumulate([leaf[0] for leaf in leaves], loss_of([leaf[1] for leaf in leaves]))

    visit(tree, None)
    assert relative_l2(gradient(model), truth) < 1e-12
    tokens = step.metrics()["prefix/unique_tokens"]
    assert tokens == 29 + 8 + 6 + 1 + (5 + 4 + 3 + 7 + 9 + 2)


def test_an_error_in_a_branch_reaches_its_root():
    model = model_of("llama_gqa")
    step = SharedPrefix(model, min_bound=0)
    with pytest.raises(RuntimeError, match="a branch of this group failed"):
        with step.group([1, 2, 3, 4]) as g:
            with pytest.raises(ZeroDivisionError), step.group([5, 6], parent=g) as branch:
                branch.accumulate([[7]], lambda out, _: out.logp.sum())
                raise ZeroDivisionError
    assert all(p.grad is None for p in model.parameters()) and step._open is None


# ---------------------------------------------------------------------- experts


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("min_bound", [0.0, 100.0])
def test_router_loss_counts_the_prefix_for_each_trajectory(memory, min_bound):
    model = model_of("qwen3_moe")
    prompt, responses, weights = group_of_responses()
    scale = torch.linspace(0.5, 2, len(responses), dtype=torch.float64)
    logits = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: logits.append(out[0]))
        for layer in model.model.layers
    ]
    model.zero_grad()
    values = []
    for i, (response, w) in enumerate(zip(responses, weights, strict=True)):
        logits.clear()
        loss = dense_loss(model, prompt, response[:-1] + response[-1:], w)
        # without the last token, which is never an input
        kept = tuple(x[:-1] for x in logits)
        router = load_balancing_loss_func(kept, 4, 2)
        values.append(float(router))
        (loss + scale[i] * router).backward()
    truth = gradient(model)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    step = SharedPrefix(
        model, prefix_memory=memory, wave_tokens=9, min_bound=min_bound, router_loss=True,
        verify="always",
    )  # fmt: skip
    seen = {}

    def loss(out, wave):
        seen.update(zip(wave.rows.tolist(), out.router_loss.tolist(), strict=True))
        return loss_of(weights)(out, wave) + (scale[wave.rows] * out.router_loss).sum()

    with step.group(prompt) as g:
        g.accumulate(responses, loss)
        assert g.shared == (min_bound == 0)
    assert [seen[i] for i in range(6)] == pytest.approx(values, rel=1e-5)
    # transformers adds up the counts in fp32
    assert relative_l2(gradient(model), truth) < 1e-6
    assert not any(layer.mlp.gate._forward_hooks for layer in model.model.layers)


def test_router_loss_in_a_branch():
    model = model_of("qwen3_moe")
    (a, b, c), _ = [[1, 5, 9, 2, 7], [3, 8], [4, 4, 6]], None
    with torch.no_grad():
        whole = SharedPrefix(model, min_bound=0, router_loss=True)
        with whole.group(a + b) as g:
            expected = g.statistics([c]).router_loss
        with whole.group(a) as g, whole.group(b, parent=g) as branch:
            found = branch.statistics([c]).router_loss
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


# ---------------------------------------------------------------------- gate, report, verification


def test_a_group_that_gains_little_runs_densely_and_says_so_once(caplog):
    model = model_of("llama_gqa")
    prompt, responses, weights = group_of_responses(5)
    total, truth = dense_gradient(model, prompt, responses, weights)
    step = SharedPrefix(model, min_bound=3.0, wave_tokens=20)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model.zero_grad()
            with step.group(prompt) as g:
                assert g.accumulate(responses, loss_of(weights)) == pytest.approx(total, abs=1e-10)
                assert g.shared is False
    assert relative_l2(gradient(model), truth) < 1e-12
    said = [r.getMessage() for r in caplog.records if "run densely" in r.getMessage()]
    assert len(said) == 1 and "less than min_bound 3.00" in said[0] and "4 tokens" in said[0]
    metrics = step.metrics()
    assert metrics["prefix/shared"] == 0 and metrics["prefix/saved_tokens"] == 0
    assert metrics["prefix/logical_tokens"] == 2 * (6 * 4 + sum(LENGTHS))


def test_metrics():
    model = model_of("llama", torch.float32)
    prompt, responses, weights = group_of_responses()
    step = SharedPrefix(model, min_bound=1.2)
    for _ in range(2):
        with step.group(prompt) as g:
            g.accumulate(responses, loss_of(weights))
    found = step.metrics()
    # two layers of 4 x 32 x 32 and 3 x 32 x 48 entries, a head of 61 x 32, 4 heads of width 8
    token, pair, head = 2 * 2 * (4 * 32 * 32 + 3 * 32 * 48), 4 * 32 * 2, 2 * VOCAB * 32

    def layers(n, before):
        return token * n + pair * (n * before + n * (n + 1) / 2)

    own = sum(layers(n, 16) + head * n for n in LENGTHS)
    dense = 3 * (6 * layers(16, 0) + own)
    assert found["prefix/bound"] == pytest.approx(dense / (4 * layers(16, 0) + 3 * own))
    assert found["prefix/shared"] == 1
    assert found["prefix/logical_tokens"] == 2 * (6 * 16 + 32)
    assert found["prefix/unique_tokens"] == 2 * (16 + 32)
    assert found["prefix/saved_tokens"] == 2 * 5 * 16
    assert found["prefix/hot_bytes"] == 2 * 2 * 16 * 32 * (4 + 4)  # layers, K and V, both fp32
    for phase in ("prefix_forward", "waves", "prefix_backward"):
        assert found[f"prefix/seconds_{phase}"] > 0
    assert found["prefix/speedup"] > 0
    assert step.metrics() == {}


def drop_values(self, layer, query, key, value, scale):
    """Phase.attend without the gradient that the suffixes left for values."""
    if self.own is not None:
        self.own.add(layer, key, value)
        if torch.is_grad_enabled():
            key = prefix_phases._AddGradient.apply(key, self.own, layer, "grad_key")
    prefixes = [store.segments[layer] for store in self.path]
    return prefix_phases.prefix_attention(query, key, value, prefixes, self.packing, scale=scale)


def test_verification_refuses_a_wrong_gradient(monkeypatch):
    model = model_of("llama_gqa", torch.float32)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    prompt, responses, weights = group_of_responses()
    before = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        p.grad = before[n].clone()
    monkeypatch.setattr(prefix_phases.Phase, "attend", drop_values)
    step = SharedPrefix(model, min_bound=0)
    for _ in range(2):  # it stays refused
        with pytest.raises(RuntimeError, match=r"verify: .* not that of its trajectories.* cosine"):
            with step.group(prompt) as g:
                g.accumulate(responses, loss_of(weights))
        assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())
    unchecked = SharedPrefix(model, min_bound=0, verify="never")
    with unchecked.group(prompt) as g:
        g.accumulate(responses, loss_of(weights))


def test_verification_runs_once_and_waits_for_a_gradient(monkeypatch):
    model = model_of("llama_gqa")
    prompt, responses, weights = group_of_responses()
    step = SharedPrefix(model, min_bound=0)
    calls = []
    dense = step.host.dense
    monkeypatch.setattr(step.host, "dense", lambda *a: calls.append(a) or dense(*a))
    for factor, expected in ((0.0, 6), (1.0, 12), (1.0, 12)):
        with step.group(prompt) as g:
            g.accumulate(responses, lambda out, wave, f=factor: f * loss_of(weights)(out, wave))
        assert len(calls) == expected


def test_a_loss_that_is_not_finite_is_for_the_loop_to_skip():
    model = model_of("llama_gqa")
    step = SharedPrefix(model, min_bound=0)
    with step.group([1, 2, 3, 4]) as g:
        g.accumulate([[5], [6]], lambda out, _: out.logp.sum() * float("nan"))
    assert gradient(model).isnan().any() and not step._verified


def test_a_loss_with_a_term_beside_the_output_is_named():
    model = model_of("llama_gqa")
    step = SharedPrefix(model, min_bound=0)
    with pytest.raises(RuntimeError, match="a term beside the waves' output"):
        with step.group([1, 2, 3, 4]) as g:
            penalty = model.lm_head.weight.square().sum()
            g.accumulate([[5], [6]], lambda out, _: out.logp.sum() + penalty)


def test_the_gate_counts_the_second_pass_of_a_joint_loss():
    model = model_of("llama_gqa")
    prompt, responses, weights = group_of_responses()
    shared = []
    for joint in (False, True):
        step = SharedPrefix(model, wave_tokens=8, min_bound=1.9, verify="never")
        with step.group(prompt) as g:
            g.accumulate(responses, loss_of(weights), joint=joint)
            shared.append(g.shared)
    assert shared == [True, False]


# ---------------------------------------------------------------------- errors


def snapshot(model):
    return {
        "grads": [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "attention": model.config._attn_implementation,
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("graded", [False, True])
def test_an_exception_leaves_everything_as_it_was(graded, memory, attention):
    model = model_of("llama_gqa", torch.float32, attention)
    prompt, responses, weights = group_of_responses()
    if graded:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    before = snapshot(model)
    step = SharedPrefix(model, prefix_memory=memory, wave_tokens=8, min_bound=0)
    with pytest.raises(ZeroDivisionError), step.group(prompt) as g:
        for i, wave in enumerate(g.waves(responses)):
            g.backward(loss_of(weights)(g.forward(wave), wave))
            if i == 1:
                raise ZeroDivisionError
    after = snapshot(model)
    assert after["hooks"] == before["hooks"] and after["attention"] == before["attention"]
    for a, b in zip(after["grads"], before["grads"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert not g.store.segments and step._open is None
    with pytest.raises(RuntimeError, match="it is closed"):
        g.forward(wave)
    with step.group(prompt) as g:  # and the next group works
        g.accumulate(responses, loss_of(weights))


def test_a_wave_too_large_for_the_memory_is_split(caplog):
    model = model_of("llama_gqa")
    prompt, responses, weights = group_of_responses()
    total, truth = dense_gradient(model, prompt, responses, weights)
    step = SharedPrefix(model, wave_tokens=1000, min_bound=0, verify="always")

    def small_memory(out, wave):
        loss = loss_of(weights)(out, wave)
        if wave.mask.sum() > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    model.zero_grad()
    with caplog.at_level(logging.WARNING), step.group(prompt) as g:
        assert g.accumulate(responses, small_memory) == pytest.approx(total, abs=1e-10)
    assert relative_l2(gradient(model), truth) < 1e-12
    assert "waves of 16 tokens" in caplog.text
    assert step.metrics()["prefix/unique_tokens"] == 16 + 32

    def in_backward(out, wave):
        """Parameters of the head have a gradient already when memory runs out."""
        full.append(wave.mask.sum() > 20)
        return loss_of(weights)(out, wave)

    def raise_if_full(*_):
        if full.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        full.append(False)

    full = []
    hook = model.model.layers[0].register_full_backward_hook(raise_if_full)
    step = SharedPrefix(model, wave_tokens=1000, min_bound=0)
    model.zero_grad()
    with step.group(prompt) as g:
        g.accumulate(responses, in_backward)
    hook.remove()
    assert relative_l2(gradient(model), truth) < 1e-12


def test_one_response_that_does_not_fit_is_an_error():
    step = SharedPrefix(model_of("llama_gqa"), min_bound=0)

    def never(_out, _wave):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError), step.group([1, 2, 3]) as g:
        g.accumulate([[4, 5], [6]], never)


def test_a_wave_that_is_not_taken_backward_is_an_error():
    """What happens in Lightning's automatic optimisation: the loss is returned, not taken."""
    model = model_of("llama_gqa")
    prompt, responses, weights = group_of_responses()
    step = SharedPrefix(model, min_bound=0)
    with pytest.raises(RuntimeError, match="a wave was not taken backward before its group ended"):
        with step.group(prompt) as g:
            for wave in g.waves(responses):
                loss_of(weights)(g.forward(wave), wave)
    assert all(p.grad is None for p in model.parameters())
    with step.group(prompt) as g:
        for wave in g.waves(responses):
            loss_of(weights)(g.forward(wave), wave).backward()  # without g.backward: as good
    assert all(p.grad is not None for p in model.parameters())


def test_prompts_and_responses_that_are_none():
    step = SharedPrefix(model_of("llama_gqa"))
    prompt = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9, 4]])
    for bad, options, reason in [
        (prompt, {}, r"row 2 first differs at token 2: 9, not 3"),
        ([], {}, r"prompt_ids: expected at least one token id"),
        ([0.5, 1.0], {}, r"prompt_ids: expected integers, got torch.float32"),
        ([1, VOCAB], {}, rf"prompt_ids: expected ids in \[0, {VOCAB}\), got {VOCAB}"),
        (prompt[0], {"attention_mask": torch.tensor([0, 1, 1, 1])}, "left-padded prompt"),
        (prompt[0], {"attention_mask": torch.tensor([1, 1, 1, 0])}, "prompt_ids: padded prompt"),
        (prompt[0], {"attention_mask": torch.ones(3)}, r"attention_mask: expected \(4,\)"),
    ]:
        with pytest.raises(ValueError, match=reason):
            step.group(bad, **options)
    assert step.group(prompt[:2]).tokens == [1, 2, 3, 4]
    for responses, reason in [
        (torch.tensor([[1, 2], [3, 0]]), r"responses: expected a list of unpadded ones"),
        (["ab"], r"responses\[0\]: expected token ids"),
        ([[1], []], r"responses\[1\]: expected at least one token id"),
        ([], r"responses: expected at least one, got none"),
        ([[1, -1]], rf"responses\[0\]: expected ids in \[0, {VOCAB}\), got -1"),
    ]:
        with pytest.raises(ValueError, match=reason), step.group([1, 2]) as g:
            g.waves(responses)
    with pytest.raises(ValueError, match="loss: expected a scalar tensor with a graph"):
        with step.group([1, 2]) as g:
            g.backward(torch.tensor(1.0))


def test_groups_are_used_in_their_order():
    model = model_of("llama_gqa")
    step = SharedPrefix(model, min_bound=0)
    wave = Wave(torch.tensor([0]), torch.tensor([[1]]), torch.tensor([[True]]), [[1]])
    with pytest.raises(RuntimeError, match=r"expected an open one .* it is new"):
        step.group([1, 2]).forward(wave)
    with step.group([1, 2]) as g:
        with pytest.raises(RuntimeError, match="it has no waves yet"):
            g.forward(wave)
        with pytest.raises(RuntimeError, match="another group is open"), step.group([1, 2]):
            pass
        with step.group([3], parent=g) as branch, pytest.raises(RuntimeError, match="branch of it"):
            g.waves([[1]])
        with pytest.raises(RuntimeError, match="entered before"), branch:
            pass
        with pytest.raises(RuntimeError, match=r"a branch under torch.no_grad"):
            with torch.no_grad(), step.group([3], parent=g):
                pass
    with pytest.raises(RuntimeError, match=r"opened under torch.no_grad"):
        with torch.no_grad(), step.group([1, 2, 3]) as g:
            (wave,) = g.waves([[4]])
            with torch.enable_grad():
                g.forward(wave)
    assert step._open is None


def test_options_that_are_none():
    model = model_of("llama")
    for options, reason in [
        ({"prefix_memory": "gpu"}, "prefix_memory: expected keep or recompute or offload"),
        ({"wave_tokens": 0}, "wave_tokens: expected an int >= 1, got 0"),
        ({"accum_dtype": torch.bfloat16}, "accum_dtype: expected torch.float32 or torch.float64"),
        ({"min_bound": -1}, "min_bound: expected a number >= 0"),
        ({"verify": "last"}, "verify: expected first or never or always"),
        ({"temperature": 0.0}, "temperature: expected a finite number"),
        ({"prune": 2.0}, "prune: expected a finite number"),
        ({"head": "big"}, "head: expected logits or fused"),
        ({"router_loss": True}, "router_loss: .* has no routers"),
    ]:
        with pytest.raises(ValueError, match=reason):
            SharedPrefix(model, **options)
    with pytest.raises(ValueError, match="model: expected a transformers causal LM, got Linear"):
        SharedPrefix(torch.nn.Linear(2, 2))


def refused_models():
    yield "window", lambda: model_of("mistral", sliding_window=25), "sliding window of 25"
    yield "gemma3", lambda: model_of("gemma3", sliding_window=25), "sliding_attention.*25 tokens"
    yield (
        "rope",
        lambda: model_of(
            "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        "rope type 'dynamic'",
    )
    yield (
        "longrope",
        lambda: model_of(
            "llama",
            rope_parameters={
                "rope_type": "longrope",
                "factor": 2.0,
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 8,
            },
        ),
        "rope type 'longrope'",
    )
    yield (
        "dropout",
        lambda: model_of("gpt2", resid_pdrop=0.1).train(),
        r"dropout of 0.1 at transformer\.h",
    )
    yield (
        "attention_dropout",
        lambda: model_of("llama", attention_dropout=0.1).train(),
        "attention_dropout is 0.1",
    )
    yield (
        "jitter",
        lambda: model_of("qwen3_moe", router_jitter_noise=0.1).train(),
        "router_jitter_noise",
    )
    yield "capacity", lambda: model_of("qwen3_moe", expert_capacity=2), "limited capacity"
    yield "choice", lambda: model_of("qwen3_moe", router_type="expert_choice"), "expert choice"
    yield "softcap", lambda: model_of("gemma3", attn_logit_softcapping=5.0), "scores capped at 5.0"


@pytest.mark.parametrize(
    ("make", "reason"), [r[1:] for r in refused_models()], ids=[r[0] for r in refused_models()]
)
def test_models_that_sharing_would_change_are_refused(make, reason):
    prompt, responses, _ = group_of_responses()
    with pytest.raises(ValueError, match=reason):
        step = SharedPrefix(make(), min_bound=0)
        with step.group(prompt) as g:
            g.waves(responses)


def test_a_layer_without_attention_is_refused():
    config = Lfm2Config(**_SMALL, layer_types=["conv", "full_attention"])
    model = Lfm2ForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"expected full attention in every layer, got .*conv"):
        SharedPrefix(model)


class Mixer(torch.nn.Module):
    """Mixes tokens without attention: a running mean."""

    def forward(self, hidden_states, **_):
        counts = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return hidden_states.cumsum(1) / counts, None


def test_a_layer_that_does_not_attend_is_refused():
    model = model_of("llama")
    model.model.layers[1].self_attn = Mixer()
    with pytest.raises(ValueError, match="2 layers, but 1 of them called transformers' attention"):
        with SharedPrefix(model, min_bound=0).group([1, 2, 3]) as g:
            g.waves([[4], [5]])


def test_a_layer_that_attends_twice_is_refused():
    sizes = {k: v for k, v in _SMALL.items() if k != "head_dim"}
    model = DiffLlamaForCausalLM(DiffLlamaConfig(**sizes)).eval()
    with pytest.raises(ValueError, match="a layer calls attention twice"):
        with SharedPrefix(model, min_bound=0).group([1, 2, 3]) as g:
            g.waves([[4], [5]])


def test_a_mask_of_the_models_own_is_refused():
    class Masking(type(model_of("llama").model.layers[0].self_attn)):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            n = hidden_states.shape[1]
            own = torch.zeros(1, 1, n, n, dtype=hidden_states.dtype)
            return super().forward(hidden_states, attention_mask=own, **kwargs)

    model = model_of("llama")
    model.model.layers[1].self_attn.__class__ = Masking
    with pytest.raises(ValueError, match="Masking makes an attention mask of its own"):
        with SharedPrefix(model, min_bound=0).group([1, 2, 3]) as g:
            g.waves([[4], [5]])


def test_positions_that_do_not_start_at_zero_are_refused():
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config = RobertaConfig(**sizes, num_attention_heads=4, is_decoder=True, pad_token_id=1)
    with pytest.raises(ValueError, match=r"positions of .*position_embeddings start at 2"):
        SharedPrefix(RobertaForCausalLM(config).eval())


def test_layers_that_read_the_keys_of_others():
    model = model_of("gemma3n", torch.float32)
    prompt, responses, weights = group_of_responses()
    _, truth = dense_gradient(model, prompt, responses, weights)
    for memory in MEMORY:
        step = SharedPrefix(model, prefix_memory=memory, min_bound=0, verify="always")
        _, grad = shared_gradient(step, prompt, responses, weights)
        assert relative_l2(grad, truth) < 1e-5
    model.config.num_kv_shared_layers = 0  # a model that does not say so
    with pytest.raises(RuntimeError, match="phase C did not reach the keys or values of"):
        shared_gradient(SharedPrefix(model, min_bound=0), prompt, responses, weights)


def test_wrappers_that_the_phases_would_break_are_refused():
    model = model_of("llama", torch.float32)
    with pytest.raises(ValueError, match=r"torch.compile of the whole model"):
        SharedPrefix(torch.compile(model))
    handle = model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"lm_head.weight has a post-accumulate-grad hook"):
        SharedPrefix(model)
    handle.remove()
    SharedPrefix(model)


def test_router_loss_under_reentrant_checkpointing_is_refused():
    model = model_of("qwen3_moe", torch.float32)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.train()
    step = SharedPrefix(model, router_loss=True, min_bound=0, verify="never")
    with pytest.raises(ValueError, match="reentrant gradient checkpointing hides them"):
        with step.group([1, 2, 3]) as g:
            g.accumulate([[4], [5]], lambda out, _: out.logp.sum() + out.router_loss.sum())


def test_other_calls_of_the_model_go_on_as_before():
    model = model_of("llama_gqa")
    ids = torch.tensor([[0, 0, 3, 4, 5], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        before = copy.deepcopy(model)(ids, attention_mask=mask).logits
        with SharedPrefix(model, min_bound=0).group([1, 2, 3]) as g:
            g.statistics([[4, 5], [6]])
            inside = model(ids, attention_mask=mask).logits
    assert torch.equal(before, inside) and torch.equal(
        before, model(ids, attention_mask=mask).logits
    )


def test_offload_moves_each_tensor_once_and_leaves_parameters():
    model = model_of("llama", torch.float32)
    store = prefix_phases.PrefixStore(torch.float32)
    weight, x = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    hooks = prefix_phases.Offload([weight, *model.parameters()], store)
    with hooks:
        y = (x * 2).exp()
        z = y * y + y.sin() + y @ weight  # y is saved four times
    moved = hooks.bytes
    assert moved == y.numel() * 4
    z.sum().backward()
    expected = torch.autograd.grad(
        ((x * 2).exp().square() + (x * 2).exp().sin() + (x * 2).exp() @ weight).sum(), x
    )
    torch.testing.assert_close(x.grad, expected[0], atol=1e-4, rtol=1e-4)


# Edits that must turn this file red:
#   prefix.py: _finish without _phase_c                              (no gradient of the prefix)
#   prefix.py: ids = (last, *response[:-1])  ->  response            (boundary token dropped)
#   prefix.py: positions start + t           ->  t                   (rope starts anew)
#   prefix_phases.py: torch.zeros(x.shape)   ->  torch.zeros_like(x) of a transposed view is fine,
#                     dtype=dtype            ->  key.dtype           (bf16 accumulator)
#   prefix_phases.py: the segment of `add` replaced when a layer runs again (checkpoint replay)
#   prefix_router.py: sums + above           ->  sums                (prefix not counted)
