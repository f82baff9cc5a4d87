"""What is refused or fails in shared-prefix training, and what is left then: as it was before."""

import copy
import logging
from typing import ClassVar

import numpy as np
import pytest
import torch
from prefix_cases import (
    MEMORY,
    SMALL,
    dense_gradient,
    gradient,
    group_of_responses,
    loss_of,
    model_of,
    relative_l2,
    shared_gradient,
)
from tiny_models import VOCAB, causal_lm
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from trimtab.rl import prefix_phases
from trimtab.rl.prefix import SharedPrefix, Wave


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


@pytest.mark.parametrize("min_bound", [0, 1e9])
def test_a_gradient_through_a_wave_outside_of_backward_is_an_error(min_bound):
    """It would add to the prefix's gradient: a logged gradient norm, a loss's own backward."""
    model = model_of("llama_gqa")
    prompt, responses, weights = group_of_responses()
    _, truth = dense_gradient(model, prompt, responses, weights)
    step = SharedPrefix(model, min_bound=min_bound, verify="never")
    weight = model.model.layers[0].self_attn.q_proj.weight
    for take in (
        lambda x: torch.autograd.grad(x, weight, retain_graph=True),
        torch.Tensor.backward,
    ):
        with pytest.raises(RuntimeError, match=r"taken outside of group.backward\(loss\)"):
            with step.group(prompt) as g:
                for wave in g.waves(responses):
                    take(loss_of(weights)(g.forward(wave), wave))
        assert all(p.grad is None for p in model.parameters())
    with step.group(prompt) as g:  # but of the loss alone, it is one's own
        for wave in g.waves(responses):
            out = g.forward(wave)
            loss = loss_of(weights)(out, wave)
            (grad,) = torch.autograd.grad(loss, out.logp, retain_graph=True)
            assert grad.shape == wave.mask.shape
            g.backward(loss)
    assert relative_l2(gradient(model), truth) < 1e-12


def test_prompts_and_responses_that_are_none():
    step = SharedPrefix(model_of("llama_gqa"))
    prompt = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9, 4]])
    for bad, options, reason in [
        (prompt, {}, r"row 2 first differs at token 2: 9, not 3"),
        ([[1, 2, 3], [1, 2, 3, 4]], {}, "row 1 first differs at token 3: 4, not no token"),
        ([prompt[0], prompt[2]], {}, "row 1 first differs at token 2: 9, not 3"),
        ([[1, 2], []], {}, r"prompt_ids\[1\]: expected at least one token id"),
        ([], {}, r"prompt_ids: expected at least one token id"),
        (None, {}, r"prompt_ids: expected token ids"),
        ([0.5, 1.0], {}, r"prompt_ids: expected integers, got torch.float32"),
        ([1, VOCAB], {}, rf"prompt_ids: expected ids in \[0, {VOCAB}\), got {VOCAB}"),
        (prompt[0], {"attention_mask": torch.tensor([0, 1, 1, 1])}, "left-padded prompt"),
        (prompt[0], {"attention_mask": torch.tensor([1, 1, 1, 0])}, "prompt_ids: padded prompt"),
        (prompt[0], {"attention_mask": torch.ones(3)}, r"attention_mask: expected \(4,\)"),
    ]:
        with pytest.raises(ValueError, match=reason):
            step.group(bad, **options)
    for good in (prompt[:2], list(prompt[:2]), prompt[:2].tolist(), prompt[0].numpy()):
        assert step.group(good).tokens == [1, 2, 3, 4]
    assert step.group(np.array([1, 2], dtype=np.uint16)).tokens == [1, 2]  # as token files are
    with pytest.raises(ValueError, match=r"prompt_ids: expected at least one token id, got shape"):
        step.group(np.array(3))
    ones = torch.ones(2, 4)
    assert step.group(prompt[:2], attention_mask=ones).tokens == [1, 2, 3, 4]
    for responses, reason in [
        (torch.tensor([[1, 2], [3, 0]]), r"responses: expected a list of unpadded ones"),
        (["ab"], r"responses\[0\]: expected token ids"),
        (None, r"responses: expected a list of each one's token ids, got NoneType"),
        (iter([[1]]), r"responses: expected a list of each one's token ids, got list_iterator"),
        ([[1], []], r"responses\[1\]: expected at least one token id"),
        ([], r"responses: expected at least one, got none"),
        ([[1, -1]], rf"responses\[0\]: expected ids in \[0, {VOCAB}\), got -1"),
    ]:
        with pytest.raises(ValueError, match=reason), step.group([1, 2]) as g:
            g.waves(responses)
    with pytest.raises(ValueError, match="loss: expected a scalar tensor with a graph"):
        with step.group([1, 2]) as g:
            g.backward(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"wave: expected one of group\.waves"):
        with step.group([1, 2]) as g:
            g.forward([[1]])


def test_autocast_of_a_wave_that_is_not_its_prompts():
    step = SharedPrefix(causal_lm("llama_gqa"), min_bound=0)
    with pytest.raises(RuntimeError, match=r"autocast to torch.bfloat16, this wave under None"):
        with step.group([1, 2, 3]) as g:
            with torch.autocast("cpu", torch.bfloat16):
                (wave,) = g.waves([[4], [5]])
            g.forward(wave)


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
    yield (
        "another_jitter",
        lambda: model_of("qwen3_moe", input_jitter_noise=0.1).train(),
        "input_jitter_noise is 0.1",
    )
    yield (
        "jitter_of_a_part",
        lambda: model_of("qwen3_moe", ffn_config={"moe_jitter_eps": 0.01}).train(),
        "ffn_config.moe_jitter_eps is 0.01",
    )
    yield "dropout_by_function", lambda: model_of("opt").train(), "model: dropout is 0.1"
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


def test_training_mode_that_comes_later_is_refused():
    model = model_of("gpt2", resid_pdrop=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    step = SharedPrefix(model, min_bound=0)
    model.train()
    with pytest.raises(ValueError, match=r"dropout of 0.1 at"), step.group([1, 2, 3]) as g:
        g.waves([[4], [5]])


class Calls(type(model_of("llama").model.layers[0].self_attn)):
    """An attention layer that gives transformers' function more than the configuration says."""

    more: ClassVar[dict] = {}

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs, **self.more)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"softcap": 5.0}, "Calls computes attention with softcap"),
        ({"s_aux": torch.zeros(4)}, "Calls computes attention with s_aux"),
        ({"position_bias": torch.zeros(1)}, "Calls computes attention with position_bias"),
        ({"is_causal": False}, "Calls is not causal"),
        ({"sliding_window": 4}, "Calls has a sliding window of 4 tokens, shorter than .* of 5"),
    ],
)
def test_what_a_layer_adds_to_its_attention_is_refused(more, reason):
    """The model's configuration does not say it; its call of the attention function does."""
    model = model_of("llama")
    layer = model.model.layers[1].self_attn
    layer.__class__ = type("Calls", (Calls,), {"more": more})
    with pytest.raises(ValueError, match=reason):
        with SharedPrefix(model, min_bound=0, verify="never").group([1, 2, 3]) as g:
            g.accumulate([[4, 5], [6, 7]], lambda out, _: out.logp.sum())
    layer.more = {}
    layer.is_causal = False
    with pytest.raises(ValueError, match="Calls is not causal"):
        with SharedPrefix(model, min_bound=0).group([1, 2, 3]) as g:
            g.waves([[4], [5]])


def test_a_layer_without_attention_is_refused():
    config = Lfm2Config(**SMALL, layer_types=["conv", "full_attention"])
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
    sizes = {k: v for k, v in SMALL.items() if k != "head_dim"}
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
    compiled = model_of("llama", torch.float32)
    compiled.compile()
    with pytest.raises(ValueError, match=r"compiled as a whole .* compiled layers"):
        SharedPrefix(compiled)
    peft = pytest.importorskip("peft")
    tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="an adapter of prompt learning"):
        SharedPrefix(peft.get_peft_model(model_of("llama", torch.float32), tuning))
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
    store.add(0, y.detach()[:, None], x.detach()[:, None])
    hooks = prefix_phases.Offload([], store)
    with hooks:
        store.segments[0].key.requires_grad_() * store.segments[0].value.requires_grad_()
    assert hooks.bytes == 0, "keys and values of the prefix stay"
    z.sum().backward()
    expected = torch.autograd.grad(
        ((x * 2).exp().square() + (x * 2).exp().sin() + (x * 2).exp() @ weight).sum(), x
    )
    torch.testing.assert_close(x.grad, expected[0], atol=1e-4, rtol=1e-4)


# Edits that must turn this file red:
#   prefix_host.py: _refuse_call without its window, its causal check, or its arguments
#   prefix_support.py: refuse_unsupported without _refuse_dropout
#   prefix_phases.py: Offload._pack without `hot`
#   prefix.py: _WaveOutput.backward without its check;  _restart without zero gradients
