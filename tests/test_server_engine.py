"""The client of vLLM servers, against one whose engine is ours (tests/completion_server.py)."""

import contextlib
import logging
import math
import multiprocessing
import re
import socket
import threading

import pytest
import torch
from completion_server import CompletionServer, serving
from safetensors.torch import load_file
from test_ddp import SHARDED, two_ranks
from tiny_models import VOCAB, causal_lm
from tiny_run import metrics_of, run_here, write_recipe
from transformers import AutoModelForCausalLM

from trimtab.rl.cli import main
from trimtab.rl.engine import TransformersEngine
from trimtab.rl.rollout import Request, Sampling
from trimtab.rl.server_engine import VLLMServerEngine, _layers, check_servers

HOT = Sampling(n=3, max_tokens=12, temperature=1.3, min_p=0.02, stop_token_ids=(7, 9))
PROMPTS = [[5, 17, 3], [8], [2, 2, 59, 31], [40, 7], [1, 3, 5, 7]]


def requests(**changes):
    return [
        Request(prompt, Sampling(**(vars(HOT) | {"seed": 10 + i} | changes)))
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture
def servers():
    """Two of the same model."""
    with contextlib.ExitStack() as stack:
        model = causal_lm("llama")
        yield [stack.enter_context(serving(CompletionServer(model))) for _ in range(2)]


def engine_of(servers, folder, **options):
    options = {"dtype": torch.float32, "timeout": 30.0} | options
    return VLLMServerEngine(causal_lm("llama"), [s.url for s in servers], folder, **options)


def perturbed(seed):
    torch.manual_seed(seed)
    model = causal_lm("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def test_it_gives_what_its_servers_sample_in_order(servers, tmp_path):
    engine = engine_of(servers, tmp_path / "weights", max_rows=4)
    local = TransformersEngine(causal_lm("llama"), dtype=torch.float32)
    for asked in (requests(), requests(temperature=0.0, min_p=0.0, n=1), requests(top_k=3)):
        expected = [local.generate([request])[0] for request in asked]
        assert engine.generate(asked) == expected
        assert [len(group) for group in expected] == [asked[0].sampling.n] * 5
    reasons = {sample.finish_reason for group in engine.generate(requests()) for sample in group}
    assert reasons == {"stop", "length"}
    assert engine.generate([]) == []
    first, second = (server.asked.count("/v1/completions") for server in servers)
    assert (first, second) == (1 + 4 * 3, 1 + 4 * 2)  # one to look, then five prompts in turn


def test_new_weights_reach_every_server(servers, tmp_path):
    engine = engine_of(servers, tmp_path / "weights")
    before = engine.generate(requests())
    for version in (4, 5):
        model = perturbed(version)
        engine.update_weights(model.named_parameters(), version)
        local = TransformersEngine(model, dtype=torch.float32)
        local.version = version
        expected = [local.generate([request])[0] for request in requests()]
        assert engine.generate(requests()) == expected != before
        assert not any(server.paused for server in servers)
        [written] = (tmp_path / "weights").iterdir()  # the old ones are gone
        assert {server.weight_version for server in servers} == {written.name}
        assert (written / "config.json").is_file()
        before = expected
    for server in servers:
        order = [path for path in server.asked if "weight_info" not in path]
        reload = ["/pause?mode=wait&clear_cache=true", "/collective_rpc", "/update_weight_version"]
        at = order.index(reload[0])
        assert order[at : at + 4] == [*reload, "/resume"]
    engine.close()
    assert not (tmp_path / "weights").exists()


def test_weights_are_written_in_the_dtype_of_the_engine(servers, tmp_path):
    engine = engine_of(servers[:1], tmp_path / "weights", dtype=torch.bfloat16)
    model = perturbed(1)
    engine.update_weights(model.named_parameters(), 1)
    [path] = (tmp_path / "weights").glob("*/model.safetensors")
    for name, weight in load_file(path).items():
        assert weight.equal(model.get_parameter(name).bfloat16()), name


def test_buffers_of_a_checkpoint_go_along(servers, tmp_path):
    engine = engine_of(servers[:1], tmp_path, dtype=torch.bfloat16)
    gate = engine.model.model.layers[1]
    gate.register_buffer("bias", torch.randn(4))
    gate.register_buffer("table", torch.randn(4), persistent=False)
    servers[0].engine.update_weights = lambda weights, version: None
    engine.update_weights(engine.model.named_parameters(), 1)
    [path] = tmp_path.glob("*/model.safetensors")
    written = load_file(path)
    assert written.keys() == engine.model.state_dict().keys()
    assert written["model.layers.1.bias"].equal(gate.bias)


@pytest.mark.parametrize("k", [1, 2, 32])
def test_tied_logits_are_not_taken_for_raw_log_probs(servers, tmp_path, monkeypatch, k):
    """In bf16 two largest logits may be equal, and top_k=1 keeps both."""
    monkeypatch.setattr(servers[0], "_logprobs", lambda _, s: [-math.log(k)] * len(s.token_ids))
    engine_of(servers[:1], tmp_path)


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        ("500", ValueError, "expected HTTP 200, got 500: the engine is not well"),
        ("truncated", ValueError, "expected JSON"),
        ("text", ValueError, "expected JSON, got '<html>"),
        ("trickle", ConnectionError, "no answer within 1 s"),
        ("cut", ConnectionError, "no connection"),
        ("half", ConnectionError, "no connection .*IncompleteRead"),
        ("list", ValueError, "expected a JSON object"),
        ("other vocabulary", ValueError, f"token ids below {VOCAB}"),
        ("other prompt", ValueError, "expected 3 completions of the prompt"),
        ("one too few", ValueError, "expected 3 completions of the prompt"),
        ("ended early", ValueError, "which is no stop token"),
    ],
)
def test_a_server_that_fails_is_named(servers, tmp_path, caplog, failure, error, message):
    engine = engine_of(servers[:1], tmp_path)
    engine.servers[0].timeout = 1.0 if failure == "trickle" else 30.0
    servers[0].failures = [failure, failure]
    with pytest.raises(error, match=message) as raised:
        engine.generate(requests(stop_token_ids=())[:1])
    assert str(raised.value).startswith(servers[0].url)
    assert len(caplog.records) == (failure in ("cut", "half"))


@pytest.mark.parametrize("failure", ["503", "429", "cut", "half"])
def test_a_busy_server_is_asked_once_more(servers, tmp_path, caplog, failure):
    engine = engine_of(servers[:1], tmp_path)
    servers[0].failures = [failure]
    with caplog.at_level(logging.WARNING):
        assert engine.generate(requests()[:1])[0]
    assert [servers[0].url in r.message for r in caplog.records] == [True], caplog.records
    servers[0].failures = [failure, failure]
    with pytest.raises((ConnectionError, ValueError), match=servers[0].url):
        engine.generate(requests()[:1])


def test_an_error_does_not_wait_for_a_server_that_hangs(servers, tmp_path):
    engine = engine_of(servers, tmp_path, timeout=600.0)
    before = threading.enumerate()
    servers[0].failures, servers[1].failures = ["hang"], ["500"]
    try:
        with pytest.raises(ValueError, match=f"{servers[1].url}.*got 500"):
            engine.generate(requests())
        left = set(threading.enumerate()) - set(before)
        assert left and all(thread.daemon for thread in left)  # the end of a process waits for none
    finally:
        servers[0].hung.set()


def test_a_server_with_other_weights_is_refused(servers, tmp_path):
    engine = engine_of(servers, tmp_path)
    engine.update_weights(perturbed(0).named_parameters(), 1)
    engine.generate(requests())
    servers[1].weight_version = "default"  # restarted
    with pytest.raises(ValueError, match=f"{servers[1].url}: expected the weights '1-.*'default'"):
        engine.generate(requests())


def test_a_reload_that_fails_leaves_no_server_paused(servers, tmp_path):
    engine = engine_of(servers, tmp_path)
    with pytest.raises(ValueError, match=r"/collective_rpc: .*no.such.weight.*; does it see /"):
        engine.update_weights([("no.such.weight", torch.ones(2))], 1)
    assert not any(server.paused for server in servers)
    with pytest.raises(ValueError, match=r"expected the weights '1-.*' of this trainer, found"):
        engine.generate(requests())


def test_what_cannot_sample_for_a_trainer_is_refused(servers, tmp_path, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, and nobody listens
        with pytest.raises(ConnectionError, match=rf"{down}/weight_info: no connection"):
            VLLMServerEngine(causal_lm("llama"), [servers[0].url, down], tmp_path)
    for options, message in (
        ({"raw": True}, "found raw ones; start it by `VLLM_SERVER_DEV_MODE=1 vllm serve"),
        ({"dev": False}, "dev mode, which can take new weights; start it by `VLLM_SERVER_DEV"),
    ):
        with serving(CompletionServer(causal_lm("llama"), **options)) as server:
            with pytest.raises(ValueError, match=f"{server.url}: expected .*{message}"):
                engine_of([server], tmp_path)
    for layers in (1, 3):
        with serving(CompletionServer(causal_lm("llama", num_hidden_layers=layers))) as server:
            with pytest.raises(ValueError, match=f"{server.url}: .* 2 layers, found {layers}"):
                engine_of([server], tmp_path)
    vision = {"model.visual.blocks.7.attn.qkv.weight": "", "model.layers.0.mlp.weight": ""}
    assert _layers(vision) == _layers(["layers.0.x"]) == {"0"}  # a tower is no layer of a policy
    for urls in ([], ["127.0.0.1:80"], ["ftp://a:1"], ["http://a:b"], [servers[0].url] * 2):
        with pytest.raises(ValueError, match=r"servers: "):
            VLLMServerEngine(causal_lm("llama"), urls, tmp_path)
    engine = engine_of(servers, tmp_path)
    addresses = [server.url for server in servers]
    servers[1].checks = False
    check_servers(addresses, engine.model, 30, layers=True)
    assert caplog.text.count("layers are not compared") == 1 and "Duplicate" in caplog.text
    servers[1].room = 20
    check_servers(addresses, engine.model, 30, layers=False, tokens=20)
    with pytest.raises(ValueError, match=f"{addresses[1]}: expected room .* 21 tokens, found 20"):
        check_servers(addresses, engine.model, 30, layers=False, tokens=21)
    with pytest.raises(ValueError, match=r"requests\[0\]: expected a temperature of 0 or >= 0.01"):
        engine.generate(requests(temperature=0.001))
    with pytest.raises(ValueError, match=r"requests\[0\]: expected a prompt"):
        engine.generate([Request([], HOT)])


def test_the_loop_on_servers_is_the_loop_in_process(tmp_path, capsys, monkeypatch):
    changes = {"updates": 2, "rollout.dtype": "float32", "record.checkpoint_every": 2}
    changes |= {"evaluation.problems": 2}
    recipe = write_recipe(tmp_path, changes | {"update.clip_norm": 0.0})
    run_here(["--config", recipe, "--run_dir", "here"], tmp_path)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-policy")
    with (
        serving(CompletionServer(policy)) as first,
        serving(CompletionServer(policy)) as second,
    ):
        urls = f"--rollout.servers=[{first.url},{second.url}]"
        run_here(["--config", recipe, "--run_dir", "servers", urls], tmp_path)
        common = ["--config", str(recipe), urls, "--run_dir"]
        two_ranks(tmp_path, [[*common, "fsdp2", *SHARDED]])  # each rank asks for its share
        for server in (first, second):
            assert server.asked.count("/v1/completions") > 15
            # of each run: before and after for the evaluation, and for two updates
            assert server.asked.count("/collective_rpc") == 2 * 4, "not the first process alone"
    here, *others = (tmp_path / name for name in ("here", "servers", "fsdp2"))
    for other in others:  # a prompt is asked for alone: other batches, other rounding
        for row, expected in zip(metrics_of(other), metrics_of(here), strict=True):
            for name in ("reward", "length", "length_std", "loss", "grad_norm"):
                assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), name
        found = load_file(other / "policy/model.safetensors")
        for name, weight in load_file(here / "policy/model.safetensors").items():
            torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-4)
    assert not list(tmp_path.glob("*/rollout-weights"))

    monkeypatch.chdir(tmp_path)
    for extra, message in (
        ([urls], f"{first.url}/weight_info: no connection"),
        ([urls, "--rollout.quantize_bits=8"], "rollout.quantize_bits: expected null with rollout"),
        ([urls, "--rollout.temperature=0.001"], "rollout.temperature: expected what vLLM takes"),
        ([urls, "--rollout.temperature=2.5"], "rollout.temperature: expected what vLLM takes"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            main(["--config", str(recipe), "--run_dir", "refused", *extra])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()


def test_a_run_whose_server_dies_leaves_nothing_behind_and_goes_on_with_another(tmp_path, capsys):
    changes = {"updates": 2, "evaluation.problems": 0, "record.checkpoint_every": 1}
    recipe = write_recipe(tmp_path, changes | {"rollout.dtype": "float32"})
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-policy")
    dying, other = CompletionServer(policy), CompletionServer(policy)
    dying.failures = [""] * 6 + ["500"]  # two probes, four prompts, and the first of an update
    with serving(dying), serving(other):
        servers = [f"--rollout.servers=[{server.url}]" for server in (dying, other)]
        once = "--rollout.server_retries=0"
        with pytest.raises(SystemExit, match="3"):
            run_here(["--config", recipe, "--run_dir", "run", once, servers[0]], tmp_path)
        assert re.search(f"stopped: {dying.url}.*got 500", capsys.readouterr().err)
        assert not (tmp_path / "run/rollout-weights").exists()
        assert not [p for p in multiprocessing.active_children() if p.name == "trimtab-reward"]
        run_here(["--resume", "run", servers[1]], tmp_path)
        run_here(["--config", recipe, "--run_dir", "whole", servers[1]], tmp_path)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


# Edits that must turn this file red:
# * server_engine.py: self.servers[0] for every request
# * server_engine.py: without sorting the choices by index
# * server_engine.py: _check_name passes
# * server_engine.py: _reload without resume after an error
# * server_engine.py: weights keep their own dtype
# * server_engine.py: return [error, ""]; room <= tokens
# * server_engine.py: without stored_buffers; without _check_layers
# * server_engine.py: min(sample.logprobs) < -1e-6 for raw log-probs
# * server_engine.py: a ThreadPoolExecutor for _by_threads
# * run.py: without teardown after an error
# * server_engine.py: every process hands weights over
# * server_client.py: no deadline in _exchange (trickle hangs for seconds and succeeds)
