import logging

import pytest
import torch
from prefix_cases import (
    LENGTHS,
    MEMORY,
    OTHERS,
    dense_gradient,
    dense_loss,
    gradient,
    group_of_responses,
    loss_of,
    model_of,
    relative_l2,
    shared_gradient,
)
from tiny_models import KINDS, VOCAB, causal_lm
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from trimtab.rl import prefix_metrics, prefix_phases
from trimtab.rl.prefix import PrefixGroup, SharedPrefix, Wave
from trimtab.triton_kernels._launch import runs_kernel

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
@pytest.mark.parametrize("kind", OTHERS)
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


@pytest.mark.parametrize("head", ["logits", "fused"])
def test_float32_with_the_kernels(head, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runs_kernel(torch.zeros(1))
    prompt, responses, weights = group_of_responses(40, (5, 9))
    _, truth = dense_gradient(model_of("llama_gqa"), prompt, responses, weights)
    model = model_of("llama_gqa", torch.float32)
    _, dense = dense_gradient(model, prompt, responses, weights)
    step = SharedPrefix(model, min_bound=0, verify="never", head=head)
    _, grad = shared_gradient(step, prompt, responses, weights)
    assert relative_l2(grad, truth) < max(2e-6, 1.5 * relative_l2(dense, truth))


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
        (torch.bfloat16, torch.float64, torch.float64),
    ):
        step = SharedPrefix(model_of("llama", dtype), accum_dtype=accum, min_bound=0)
        with step.group([1, 2, 3]) as g:
            g.accumulate([[4], [5]], lambda out, _: out.logp.sum())
            (segment, *_) = g.store.segments.values()
            assert segment.grad_key.dtype == segment.grad_value.dtype == expected


def test_accumulators_of_transposed_keys_have_strides_of_their_own():
    store = prefix_phases.PrefixStore(torch.float32)
    key = torch.randn(2, 5, 8).transpose(0, 1)
    store.add(0, key, key)
    assert store.segments[0].key.data_ptr() == key.data_ptr()
    assert store.segments[0].grad_key.is_contiguous()


def test_keys_are_freed_before_the_prefix_runs_again(monkeypatch):
    sizes, run = [], PrefixGroup._prefix_pass

    def watched(group):
        sizes.append([segment.key.numel() for segment in group.store.segments.values()])
        return run(group)

    monkeypatch.setattr(PrefixGroup, "_prefix_pass", watched)
    step = SharedPrefix(model_of("llama"), min_bound=0, verify="never")
    assert route(step, [1, 2, 3], [[4], [5]])
    assert sizes == [[], [0, 0]]


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


@pytest.mark.parametrize("joint", [False, True])
def test_parameters_of_the_loss_itself(joint):
    """A temperature, a value head: their gradients are taken, and undone, with the model's."""
    model = model_of("llama_gqa")
    prompt, responses, weights = group_of_responses()
    factor = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    total, truth = dense_gradient(model, prompt, responses, weights)
    memory = []

    def loss(out, wave):
        if memory and not memory.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return factor * loss_of(weights)(out, wave)

    for fits in ([], [False, True]):  # from the last: the first wave has gone backward already
        memory[:] = fits
        model.zero_grad()
        factor.grad = torch.tensor(7.0, dtype=torch.float64)
        step = SharedPrefix(model, wave_tokens=16, min_bound=0, verify="always")
        with step.group(prompt) as g:
            g.accumulate(responses, loss, joint=joint)
        assert factor.grad.item() == pytest.approx(7.0 + total, abs=1e-10)
        assert relative_l2(gradient(model), 2 * truth) < 1e-12
    with pytest.raises(ZeroDivisionError), step.group(prompt) as g:
        for wave in g.waves(responses):
            g.backward(factor * loss_of(weights)(g.forward(wave), wave))
        raise ZeroDivisionError
    assert factor.grad.item() == pytest.approx(7.0 + total, abs=1e-10)


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


def test_a_branchs_own_tokens_in_the_loss_of_each_wave():
    """One number of the whole path: the branch's log-probability is in every wave's loss."""
    model = model_of("llama_gqa")
    prompt, (own, *responses), _ = group_of_responses()

    def loss(own_logp, logp):
        return ((own_logp + logp) / 40).exp()

    model.zero_grad()
    total = 0.0
    for response in responses:
        logits = model(torch.tensor([[*prompt, *own, *response]])).logits[0, len(prompt) - 1 : -1]
        labels = torch.tensor([*own, *response])
        logp = (
            logits.log_softmax(-1)
            .gather(-1, labels[:, None])[:, 0]
            .split([len(own), len(response)])
        )
        total = total + loss(*(x.sum() for x in logp))
    total.backward()
    truth = gradient(model)
    for wave_tokens in (6, 100):
        step = SharedPrefix(model, wave_tokens=wave_tokens, min_bound=0, verify="always")
        model.zero_grad()
        with step.group(prompt) as g, step.group(own, parent=g) as branch:
            found = branch.accumulate(
                responses, lambda out, _, b=branch: loss(b.own.logp.sum(), out.logp.sum(-1)).sum()
            )
        assert found == pytest.approx(float(total.detach()), abs=1e-10)
        assert relative_l2(gradient(model), truth) < 1e-12


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


@pytest.mark.parametrize("router_loss", [False, True])
def test_a_model_that_returns_router_logits(router_loss, caplog):
    """Its own loss of the routers would be of the phases' rows, which are no batch."""
    prompt, responses, weights = group_of_responses()
    grads = []
    for own in (False, True):
        model = model_of("qwen3_moe", output_router_logits=own)
        step = SharedPrefix(model, min_bound=0, router_loss=router_loss, wave_tokens=8)
        grads.append(shared_gradient(step, prompt, responses, weights)[1])
    assert torch.equal(*grads)
    assert ("compute no loss of the routers" in caplog.text) != router_loss


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
    step = SharedPrefix(model, min_bound=0)
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
    # a call counts as 4e7 FLOPs a layer and 60 tokens: 3 passes of a wave, 4 of the prefix
    call = 2 * 4e7 + 60 * token
    expected = (dense + 3 * call) / (4 * layers(16, 0) + 3 * own + 7 * call)
    assert found["prefix/expected"] == pytest.approx(expected)
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


def test_verification_knows_that_bf16_is_computed_in():
    """Adapters in fp32 on a base in bf16, as PEFT makes them. FSDP2: test_prefix_distributed.py."""
    peft = pytest.importorskip("peft")
    for seed in range(3):
        base = causal_lm("llama_gqa", seed=seed, num_hidden_layers=6, initializer_range=0.1)
        adapter = peft.LoraConfig(r=4, target_modules="all-linear")
        model = peft.get_peft_model(base.to(torch.bfloat16), adapter)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        prompt, responses, weights = group_of_responses(60, (20,) * 8, seed=seed)
        with SharedPrefix(model, min_bound=0, verify="always").group(prompt) as g:
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("equal", [8, 7])
def test_verification_of_gradients_that_cancel(equal, dtype):
    """Equal responses whose rewards differ: only rounding is left of their gradients."""
    for seed in range(3):
        model = causal_lm("llama_gqa", seed=seed, num_hidden_layers=6, initializer_range=0.1)
        prompt, (one, other), _ = group_of_responses(40, (24, 2), seed=seed)
        responses = [one] * equal + [[*one[:-2], *other]] * (8 - equal)
        weights = [torch.full((24,), (-1.0) ** i, dtype=torch.float64) for i in range(8)]
        step = SharedPrefix(model.to(dtype), min_bound=0, verify="always")
        with step.group(prompt) as g:
            g.accumulate(responses, loss_of_logp(weights))


def loss_of_logp(weights):
    def loss(out, wave):
        return (torch.stack([weights[i] for i in wave.rows]).to(out.logp) * out.logp).sum()

    return loss


def test_verification_still_refuses_where_gradients_cancel(monkeypatch):
    monkeypatch.setattr(prefix_phases.Phase, "attend", drop_values)
    prompt, (one, two), _ = group_of_responses(40, (24, 24))
    weights = [torch.full((24,), (-1.0) ** i, dtype=torch.float64) for i in range(4)]
    model = causal_lm("llama_gqa")
    model.activation_checkpointing_enable({"use_reentrant": False})
    step = SharedPrefix(model.train(), min_bound=0)
    with pytest.raises(RuntimeError, match="not that of its trajectories"):
        with step.group(prompt) as g:
            g.accumulate([one, one, one, two], loss_of_logp(weights))


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


def route(step, prompt, responses, **options):
    with step.group(prompt) as g:
        g.accumulate(responses, lambda out, _: out.logp.sum(), **options)
        return g.shared


def without_calls(step):
    """The gate by FLOPs alone."""
    step.cost = step.cost._replace(call=0.0)
    return step


@pytest.mark.parametrize(("wave_tokens", "times"), [(1000, 1.0), (20, 4 / 3)])
def test_the_gate_counts_the_second_pass_of_a_joint_loss(wave_tokens, times):
    """On both routes, if they have several waves."""
    prompt, responses, _ = group_of_responses()
    step = SharedPrefix(model_of("llama_gqa"), wave_tokens=wave_tokens, min_bound=0)
    route(step, prompt, responses, joint=True)
    dense, own = step.cost.group(16, LENGTHS, True)
    expected = times * dense / (times * own + 4 * step.cost.layers(16))
    assert step.metrics()["prefix/bound"] == pytest.approx(expected)


def test_the_gate_counts_what_calls_cost(caplog):
    """A small group: half the FLOPs, but three calls of the model instead of one."""
    model = model_of("llama_gqa", torch.float32)
    prompt, responses = list(range(32)), [[1, 2, 3]] * 3
    step = SharedPrefix(model, verify="never")
    with caplog.at_level(logging.WARNING):
        assert not route(step, prompt, responses)
    assert step.metrics()["prefix/bound"] > 1.5
    assert "expected to be 0." in caplog.text and "by FLOPs alone" in caplog.text
    assert route(without_calls(SharedPrefix(model, verify="never")), prompt, responses)
    # the dense route would call it 6 times
    assert route(SharedPrefix(model, wave_tokens=80, verify="never"), prompt * 2, responses * 2)


def test_waves_are_no_larger_than_a_trajectory():
    step = SharedPrefix(model_of("llama"), min_bound=0, verify="never")
    for prefix, lengths, expected in ((20, [30], 384), (512, [64, 3], 384), (600, [60], 440)):
        assert step.tokens_of_waves(prefix, lengths) == expected
    assert step.tokens_of_waves(2048, [128]) == 512
    with torch.no_grad(), step.group(list(range(60)) * 11) as g:  # 2 / 3 of 750 tokens
        waves = list(g.waves([[1] * 90] * 7))
    assert [len(wave.rows) for wave in waves] == [5, 2]
    assert SharedPrefix(model_of("llama"), wave_tokens=7).tokens_of_waves(600, [60]) == 7


def test_speedup_is_that_over_the_dense_route(monkeypatch):
    """Not of passes of single trajectories: calls have their cost, and there are fewer."""
    model = model_of("llama_gqa", torch.float32)
    now = [0.0]
    model.register_forward_pre_hook(lambda *_: now.append(now[-1] + 1))  # a second a call
    monkeypatch.setattr(prefix_metrics.time, "perf_counter", lambda: now[-1])
    step = SharedPrefix(model, min_bound=0)
    for _ in range(2):
        route(step, list(range(32)), [[1, 2, 3]] * 3)
        found = step.metrics()
    dense, _ = step.cost.group(31, [3] * 3, True)
    rate = 3 / (dense + step.cost.calls(3, True))  # the verification's three trajectories
    expected = rate * (dense + step.cost.calls(1, True)) / 3  # the prompt twice, one wave
    assert found["prefix/speedup"] == pytest.approx(expected)
    assert found["prefix/speedup"] < 1 < found["prefix/bound"]


# Edits that must turn this file red:
#   prefix.py: _finish without _phase_c                              (no gradient of the prefix)
#   prefix.py: ids = (last, *response[:-1])  ->  response            (boundary token dropped)
#   prefix.py: positions start + t           ->  t                   (rope starts anew)
#   prefix_phases.py: torch.zeros(x.shape)   ->  torch.zeros_like(x)  (strides of a view)
#                     dtype=dtype            ->  key.dtype           (bf16 accumulator)
#   prefix_phases.py: drop_keys does nothing                         (keys alive in phase C)
#   prefix.py: _leaves_of yields nothing                             (the loss's own parameters)
#   prefix_verify.py: _precision of the trained parameters alone     (refuses adapters on bf16)
#   prefix_phases.py: the segment of `add` replaced when a layer runs again (checkpoint replay)
#   prefix_router.py: sums + above           ->  sums                (prefix not counted)
