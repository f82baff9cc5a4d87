"""vLLM in the trainer's process: `make test-vllm` runs this in vLLM's environment.

One vLLM for all tests but those of the command line, which have processes of their own.
"""

import importlib.util
import json
import random
import re
import sys

import numpy as np
import pytest
import torch
import vllm_cases as cases
from tiny_run import metrics_of, start, write_recipe
from vllm_server import make_policy

from trimtab.rl import VLLMConfig, VLLMEngine
from trimtab.rl.rollout import Request, Sampling, Tree

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not here: make test-vllm"
)
SMALL = {"gpu_memory_utilization": 0.05, "max_model_len": 256, "enforce_eager": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    make_policy(folder / "policy")
    return folder


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32).eval()


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.fixture(scope="module")
def started(folder):
    before = random_states()
    engine = VLLMEngine(
        load(folder), folder / "model", dtype=torch.float32, options=VLLMConfig(**SMALL)
    )
    assert random_states() == before, "vLLM has seeded the trainer"
    assert not list((folder / "model").glob("*.safetensors"))
    with pytest.raises(ValueError, match="vllm: expected weights before rollouts, got none"):
        engine.generate(cases.requests())
    yield engine
    engine.close()
    engine.close()
    assert not (folder / "model").exists()
    assert not torch.distributed.is_initialized()


@pytest.fixture
def policy(folder):
    return load(folder)


@pytest.fixture
def engine(started, policy):
    """With the policy's weights, whatever it had before."""
    started.update_weights(policy.named_parameters(), 0)
    return started


@pytest.mark.parametrize(("changes", "options"), cases.DISTRIBUTIONS)
def test_log_probs_are_the_trainers(engine, policy, changes, options):
    cases.check_log_probs_are_the_trainers(engine, policy, changes, options)


def test_min_p_leaves_out_what_it_should(engine, policy):
    cases.check_min_p_leaves_out_what_it_should(engine, policy)


def test_greedy_is_that_of_our_engine(engine, policy):
    cases.check_greedy_is_that_of_our_engine(engine, policy)


def test_new_weights_are_sampled_from_and_no_cache_is_left(engine, policy):
    cases.check_new_weights_are_sampled_from_and_no_cache_is_left(engine, policy)


def test_a_requests_rollouts_have_seeds_that_follow_each_other(engine):
    [group] = engine.generate([Request([5, 17], Sampling(n=3, max_tokens=8, seed=2**62))])
    alone = [
        engine.generate([Request([5, 17], Sampling(max_tokens=8, seed=2**62 + i))])[0][0]
        for i in range(3)
    ]
    assert group == alone


def test_a_trainers_autocast_does_not_reach_it(engine):
    expected = engine.generate(cases.requests())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert engine.generate(cases.requests()) == expected
    assert engine.generate([]) == []


def test_weights_that_do_not_fit_change_nothing(engine, policy):
    expected = engine.generate(cases.requests())
    good = dict(policy.named_parameters())
    name, weight = "model.norm.weight", good["model.norm.weight"]
    rest = {n: w for n, w in good.items() if n != name}
    for wrong, message in (
        (rest, rf"named_tensors: {name}: expected \(64,\), got none"),
        (good | {"nope": weight}, "named_tensors: nope: expected no such weight"),
        (good | {name: weight[:3]}, rf"named_tensors: {name}: expected \(64,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.update_weights(wrong.items(), 7)
    assert engine.generate(cases.requests()) == expected and engine.version == 0


def test_what_vllm_would_take_another_way_is_refused(engine):
    for prompt, sampling, message in (
        ([], Sampling(), "expected a prompt of at least one token"),
        ([32], Sampling(), r"expected token ids in \[0, 32\), got 32 to 32"),
        ([-1], Sampling(), r"expected token ids in \[0, 32\), got -1 to -1"),
        ([3] * 200, Sampling(), "at most 256 tokens .*max_model_len.*, got 200 and 64"),
        ([3], Sampling(temperature=0.001), "expected a temperature of 0 or in"),
        ([3], Sampling(temperature=2.5), "expected a temperature of 0 or in"),
        ([3], Sampling(tree=Tree()), "expected no tree"),
    ):
        with pytest.raises(ValueError, match=rf"requests\[1\]: .*{message}"):
            engine.generate([Request([3], Sampling(max_tokens=2)), Request(prompt, sampling)])
    with pytest.raises(ValueError, match="max_rows: expected a count >= 1, got 0"):
        VLLMEngine(engine.model, engine.folder, max_rows=0)


def test_processes_that_share_the_model_get_its_weights(policy, folder):
    options = VLLMConfig(**SMALL, tensor_parallel_size=2)
    engine = VLLMEngine(policy, folder / "shared", dtype=torch.float32, options=options)
    engine.update_weights(policy.named_parameters(), 0)
    cases.check_new_weights_are_sampled_from_and_no_cache_is_left(engine, policy)
    engine.close()


# ---------------------------------------------------------------- the command line


def finished(folder, *arguments, code=0):
    process = start(arguments, folder)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def recipe(folder):
    return write_recipe(
        folder,
        {
            "policy.path": str(folder / "policy"),
            "updates": 2,
            "rollout.engine": "vllm",
            "rollout.vllm": SMALL,
            "rollout.dtype": "float32",
            "rollout.temperature": 0.8,
            "update.pruning": {"rho": 0.05},
        },
    )


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "asynchronous"])
def test_trimtab_rl_trains_with_it(folder, recipe, ahead):
    run = folder / f"run-{ahead}"
    more = ["--rollout.asynchronous=true", "--update.loss=ppo_clip"] if ahead else []
    output = finished(folder, "--config", recipe, "--run_dir", run, *more)
    rows = metrics_of(run)
    assert [row["update"] for row in rows] == [1, 2], output
    for row in rows[: 1 if ahead else 2]:  # then by the policy of one update before
        assert row["mismatch/abs_dlogp_mean"] < 1e-4
        assert row["skipped_updates"] == 0 and row["grad_norm"] > 0
    assert not (run / "rollout-model").exists()
    assert (run / "policy" / "model.safetensors").is_file()
    if not ahead:
        finished(folder, "eval", run, "--samples", "2")
        [found] = run.glob("eval-*.json")
        after = json.loads((run / "summary.json").read_text())["after"]
        reward = json.loads(found.read_text())["results"]["mean reward"]["value"]
        assert reward == pytest.approx(after["sampled"], abs=1e-9)


def test_a_vllm_that_does_not_start_ends_the_run_in_one_line(folder, recipe):
    # a lot more than the machine has
    arguments = ["--config", recipe, "--run_dir", "small", "--rollout.vllm.max_model_len=100000"]
    output = finished(folder, *arguments, code=3)
    stopped = [line for line in output.splitlines() if line.startswith("trimtab-rl: stopped:")]
    assert len(stopped) == 1 and "rollout.engine: vLLM does not start" in stopped[0], output
    assert re.search("max_model_len", stopped[0]) and "Traceback" not in output, sys.executable


# Edits that must turn this file red:
# * vllm_engine.py: no logprobs_mode
# * vllm_engine.py: without reset_prefix_cache
# * vllm_engine.py: ignore_eos False with eos among no stop tokens; min_p or temperature left out
# * vllm_engine.py: without _check_names
# * vllm_engine.py: without the room's check
# * vllm_engine.py: without _random_state_kept
# * vllm_engine.py: without torch.autocast(enabled=False)
