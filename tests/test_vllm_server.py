"""Rollouts by a real vLLM server: `make test-vllm` installs vLLM into a folder of its own."""

import json

import pytest
import torch
import vllm_cases as cases
from tiny_run import metrics_of, run_here, write_recipe
from transformers import AutoTokenizer
from vllm_server import PYTHON, make_policy, serve

from trimtab.rl.rollout import Request, Sampling
from trimtab.rl.server_engine import VLLMServerEngine
from trimtab.rl.text_server import ServerRefused, TextServer

pytestmark = pytest.mark.skipif(PYTHON is None, reason="TRIMTAB_VLLM is not set: make test-vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    make_policy(folder / "policy")
    return folder


@pytest.fixture(scope="module")
def url(folder):
    options = ["--dtype", "float32", "--logprobs-mode", "processed_logprobs"]
    options += ["--chat-template", "{{ messages[0]['content'] }}"]
    with serve(folder / "policy", *options, log=folder / "log") as url:
        yield url


@pytest.fixture
def policy(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32).eval()


@pytest.fixture
def engine(url, folder, policy):
    """With the policy's weights, whatever the server had before."""
    engine = VLLMServerEngine(policy, [url], folder / "weights", dtype=torch.float32, timeout=300)
    engine.update_weights(policy.named_parameters(), 0)
    yield engine
    engine.close()


@pytest.mark.parametrize(("changes", "options"), cases.DISTRIBUTIONS)
def test_log_probs_are_the_trainers(engine, policy, changes, options):
    cases.check_log_probs_are_the_trainers(engine, policy, changes, options)


def test_min_p_leaves_out_what_it_should(engine, policy):
    cases.check_min_p_leaves_out_what_it_should(engine, policy)


def test_greedy_is_that_of_our_engine(engine, policy):
    cases.check_greedy_is_that_of_our_engine(engine, policy)


def test_new_weights_are_sampled_from_and_no_cache_is_left(engine, policy):
    cases.check_new_weights_are_sampled_from_and_no_cache_is_left(engine, policy)


def test_trimtab_rl_trains_on_it(url, folder):
    recipe = write_recipe(
        folder,
        {
            "policy.path": str(folder / "policy"),
            "updates": 2,
            "rollout.dtype": "float32",
            "rollout.temperature": 0.8,
            "update.pruning": {"rho": 0.05},
        },
    )
    run_here(["--config", recipe, "--run_dir", "run", f"--rollout.servers=[{url}]"], folder)
    rows = metrics_of(folder / "run")
    assert [row["update"] for row in rows] == [1, 2]
    for row in rows:
        assert row["mismatch/abs_dlogp_mean"] < 1e-4
        assert row["skipped_updates"] == 0 and row["grad_norm"] > 0


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_it_answers_an_evaluation_in_text(engine, url, folder, chat):
    recipe = write_recipe(folder, {"policy.path": str(folder / "policy")})
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    client = TextServer(f"{url}/v1", chat=chat, timeout=300)
    client.choose(None)
    assert client.model == str(folder / "policy")
    stops = (tokenizer.eos_token_id, *tokenizer.encode(";", add_special_tokens=False))
    options = dict(n=6, max_tokens=20, temperature=1.3, seed=2**62)
    found = client.answers("1ab2c", stop=";", **options)
    sampling = Sampling(stop_token_ids=stops, **options)
    # the template of the chat has no token that begins a text
    prompt = tokenizer.encode("1ab2c", add_special_tokens=not chat)
    [group] = engine.generate([Request(prompt, sampling)])
    ends = [sample.finish_reason == "stop" for sample in group]
    texts = [
        tokenizer.decode(s.token_ids[:-1] if end else s.token_ids, skip_special_tokens=True)
        for s, end in zip(group, ends, strict=True)
    ]
    assert found.texts == texts and len(set(texts)) > 1
    assert found.tokens == sum(len(sample.token_ids) for sample in group)
    assert found.cut == 6 - sum(ends)
    for path in folder.glob("eval-*.json"):
        path.unlink()
    arguments = ["eval", "--config", recipe, "--server", url, "--samples", "4"]
    run_here(arguments + ["--chat"] * chat, folder)
    [path] = folder.glob("eval-*.json")
    stored = json.loads(path.read_text())
    assert stored["lost"] == 0 and len(stored["per_problem"]) == 4
    assert stored["policy"] == f"{folder / 'policy'} at {url}/v1"
    assert max(problem["different_answers"] for problem in stored["per_problem"]) > 1
    with pytest.raises(ServerRefused, match=f"does not serve 'x'; it serves: {folder / 'policy'}"):
        client.choose("x")


def test_bad_requests_and_a_server_with_raw_log_probs_are_refused(engine, folder, policy):
    with pytest.raises(ValueError, match=r"/v1/completions: expected HTTP 200, got 400: .*256"):
        engine.generate(cases.requests(max_tokens=400))
    with pytest.raises(ValueError, match="out of vocabulary"):
        engine.generate([Request([32], Sampling())])
    with serve(folder / "policy", "--dtype", "float32", log=folder / "raw-log") as raw:
        with pytest.raises(ValueError, match=f"{raw}: expected .*, found raw ones; start it by"):
            VLLMServerEngine(policy, [raw], folder / "weights", timeout=300)


# Edits that must turn this file red:
# * server_engine.py: without min_p, or temperature, in the body
# * server_engine.py: without /pause (the prefix cache of the old weights stays)
# * server_engine.py: ignore_eos False (with eos among no stop tokens: it ends early and is refused)
# * server_engine.py: without /collective_rpc
# * server_engine.py: the probe passes
# * text_server.py: without seed, or with max_tokens + 1, in the body
