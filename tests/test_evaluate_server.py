"""`trimtab-rl eval --server`, against a server with our engine (tests/completion_server.py)."""

import json
import logging
import re
import socket

import pytest
from completion_server import OpenAIServer, serving
from tiny_run import run_here, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.rl.cli import main
from trimtab.rl.engine import TransformersEngine
from trimtab.rl.rollout import Request, Sampling
from trimtab.rl.server_client import ServerFailed
from trimtab.rl.text_server import ServerRefused, TextServer

KEY = "sk-0123secret"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a finished run, `out`."""
    folder = tmp_path_factory.mktemp("served")
    changes = {"updates": 1, "rollout.dtype": "float32", "update.pruning": None}
    write_recipe(folder, changes | {"update.lr": 1e-4})
    run_here(["--config", "recipe.yaml", "--run_dir", "out"], folder)
    return folder


@pytest.fixture
def make(folder):
    """A server of the run's policy with these options."""
    path = folder / "out" / "policy"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    return lambda **options: OpenAIServer(model, tokenizer, **options)


def evaluated(folder, *arguments, where="out"):
    for path in (folder / where).glob("eval-*.json"):
        path.unlink()
    output = run_here(["eval", *arguments], folder)
    [path] = (folder / where).glob("eval-*.json")
    assert output.splitlines()[-1] == str(path)
    return output, json.loads(path.read_text())


@pytest.mark.parametrize("chat", [[], ["--chat"]], ids=["completions", "chat"])
def test_it_is_the_evaluation_of_the_policy_that_is_served(folder, make, chat):
    options = ["--samples", "4", "--problems", "5"]
    _, here = evaluated(folder, "out", *options)
    with serving(make()) as server:
        url = f"{server.url}/v1"
        output, found = evaluated(folder, "out", *options, "--server", url, "--model=tiny", *chat)
        assert [("messages" in body) for body in server.bodies] == [bool(chat)] * 5
    for part in ("results", "per_problem", "by_difficulty", "lost"):
        assert found[part] == here[part], part
    assert found["results"]["mean length (tokens)"]["value"] > 1
    assert (found["policy"], found["update"]) == (f"tiny at {url}", None)
    asked = found["server"]
    assert (asked["max_tokens"], asked["temperature"], asked["stop"]) == (24, 1.0, ";")
    assert f"heldout, tiny at {url}" in " ".join(output.split())
    assert f"{found['cut']} answers were cut at 24 tokens" in output
    [page] = [p for p in run_here(["report", "out"], folder).splitlines() if p.endswith(".html")]
    assert f"trimtab-rl eval: heldout, tiny at {url}" in (folder / page).read_text()


def test_a_recipe_will_do_and_so_will_the_only_model(folder, make):
    with serving(make(names=("a/b",), tells=False)) as server:
        arguments = ["--config", "recipe.yaml", "--server", server.url, "--samples", "3"]
        arguments += ["--temperature", "0", "--max_tokens", "2", "--seed", "3", "--split", "train"]
        _, found = evaluated(folder, *arguments, where=".")
        assert {body["model"] for body in server.bodies} == {"a/b"}
        assert {(body["max_tokens"], body["temperature"]) for body in server.bodies} == {(2, 0.0)}
    assert len(found["per_problem"]) == 4  # as the recipe says
    assert all(problem["different_answers"] <= 1 for problem in found["per_problem"])
    length = found["results"]["mean length (tokens)"]
    assert length == {"value": None, "standard_error": None, "problems": 0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ""),
        ({"at_once": 1}, ""),
        ({"at_once": 2}, ""),
        ({"unknown": ("n",)}, "n"),
        ({"unknown": ("top_p", "n")}, "n, top_p"),
        ({"unknown": ("stop",)}, "stop"),
        ({"unknown": ("max_tokens",)}, "max_tokens"),
        (
            {"unknown": ("seed", "n", "stop", "top_p", "max_tokens")},
            "max_tokens, n, seed, stop, top_p",
        ),
    ],
)
def test_what_a_server_does_not_know_is_made_up_for(make, caplog, options, said):
    server = make(**options)
    unknown = options.get("unknown", ())
    local = TransformersEngine(server.engine.model, dtype=server.engine.model.dtype)
    tokenizer = server.tokenizer
    ends = {tokenizer.eos_token_id}
    if "stop" not in unknown:
        ends |= set(tokenizer.encode(";", add_special_tokens=False))
    expected = []
    while len(expected) < 5:
        n = min(5 - len(expected), options.get("at_once", 1 if "n" in unknown else 5))
        seed = 0 if "seed" in unknown else 7 + len(expected)
        sampling = Sampling(n=n, max_tokens=20, seed=seed, stop_token_ids=tuple(ends))
        expected += local.generate([Request(tokenizer.encode("1ab2c"), sampling)])[0]
    tokens = sum(len(sample.token_ids) for sample in expected)
    ends = [sample.finish_reason == "stop" for sample in expected]
    ids = [s.token_ids[:-1] if end else s.token_ids for s, end in zip(expected, ends)]
    texts = [tokenizer.decode(own) for own in ids]
    cut = sum(not end and ";" not in text for end, text in zip(ends, texts))
    with serving(server), caplog.at_level(logging.WARNING):
        client = TextServer(server.url)
        client.choose("tiny")
        for _ in range(2):  # what it refuses is said and tried once
            found = client.answers("1ab2c", n=5, max_tokens=20, temperature=1.0, stop=";", seed=7)
    assert found.texts == [text.partition(";")[0] for text in texts]
    assert (found.tokens, found.cut) == (tokens, cut)
    assert sum("goes on without" in record.message for record in caplog.records) == bool(said)
    assert not said or f"goes on without {said}, refused" in caplog.text


def test_messages_are_for_a_chat(make):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1ab"}]
    with serving(make()) as server:
        client = client_of(server, chat=True)
        assert client.answers(messages, **ASKED) == client.answers("1ab", **ASKED)
        assert [len(body["messages"]) for body in server.bodies] == [2, 1]
        with pytest.raises(ServerRefused, match="--chat: expected for a prompt that is messages"):
            client_of(server).answers(messages, **ASKED)


# ---------------------------------------------------------------- servers that fail


def client_of(server, **options):
    client = TextServer(f"{server.url}/v1", **options)
    client.choose("tiny")
    return client


ASKED = dict(n=2, max_tokens=8, temperature=1.0, stop=";", seed=1)


@pytest.mark.parametrize("failure", ["500", "503", "429", "cut", "half"])
def test_what_passes_is_asked_again(make, caplog, failure):
    with serving(make()) as server, caplog.at_level(logging.WARNING):
        expected = client_of(server).answers("1a", **ASKED)
        server.failures = [failure, failure]
        assert client_of(server, retries=2).answers("1a", **ASKED) == expected
        again = [r.message for r in caplog.records if "asking again in" in r.message]
        assert len(again) == 2
        server.failures = [failure, failure]
        kind = ServerFailed if failure.isdigit() else ConnectionError
        with pytest.raises(kind, match=rf"^{server.url}/v1/completions: "):
            client_of(server, retries=1).answers("1a", **ASKED)


@pytest.mark.parametrize("after", ["1", "2"], ids=["seconds", "date"])
def test_retry_after_is_kept(make, after):
    """The server refuses for good whoever comes back before."""
    with serving(make()) as server:
        client = client_of(server, retries=1)
        server.busy = [after]
        assert len(client.answers("1a", **ASKED).texts) == 2
        server.busy = ["3600"]
        server.open_at = 0.0
        with pytest.raises(ServerFailed, match="HTTP 429, to be asked again in 3600 s: slow down"):
            client.answers("1a", **ASKED)


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        ("trickle", ConnectionError, r"no answer within 1 s \(--timeout\)"),
        ("truncated", ServerRefused, "expected JSON"),
        ("text", ServerRefused, "expected JSON, got '<html>"),
        ("list", ServerRefused, "expected JSON"),
        ("no text", ServerRefused, "expected choices with a text each, got .*KeyError"),
        ("one too few", ServerRefused, "expected choices with a text each, got .*no choice"),
        ("400", ServerRefused, "expected HTTP 200, got 400: the engine is not well$"),
        ("404", ServerRefused, "got 404: .*; try with --chat, or another address"),
    ],
)
def test_what_does_not_pass_is_one_line(make, failure, error, message):
    with serving(make()) as server:
        client = client_of(server, timeout=1.0 if failure == "trickle" else 30.0)
        server.failures = [failure]
        with pytest.raises(error, match=message) as raised:
            client.answers("1a", **ASKED | {"n": 1})
        assert str(raised.value).startswith(server.url)


def test_a_server_that_fails_on_the_way_ends_it_with_a_line(folder, make, capsys):
    with serving(make()) as server:
        server.failures = ["", "", "500", "500"]
        arguments = ["eval", "out", "--server", server.url, "--retries=0", "--parallel=1"]
        with pytest.raises(SystemExit) as stop:
            run_here(arguments, folder)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 3
    assert line.startswith(
        f"trimtab-rl: stopped: {server.url}/v1/completions: HTTP 500: the engine"
    )


# ---------------------------------------------------------------- keys


def test_the_key_is_sent_and_neither_shown_nor_stored(folder, make, monkeypatch, capsys):
    monkeypatch.setenv("SOME_KEY", f"{KEY}\n")
    monkeypatch.setenv("OTHER_KEY", f"{KEY}-other")
    monkeypatch.setenv("BAD_KEY", f"{KEY} two\nlines")
    with serving(make(key=KEY)) as server:
        common = ["out", "--server", server.url, "--samples", "1"]
        output, found = evaluated(folder, *common, "--api_key_env", "SOME_KEY")
        assert found["server"]["api_key_env"] == "SOME_KEY"
        assert KEY not in output + json.dumps(found)
        monkeypatch.chdir(folder)
        for more, message in (
            ([], "got 401: Incorrect API key .*; name the environment variable that holds the key"),
            (["--api_key_env=OTHER_KEY"], r"got 401: .*\(the key\); is the key in the variable"),
            (["--api_key_env=BAD_KEY"], "--api_key_env: expected a key without spaces"),
            (["--api_key_env=NO_SUCH"], "--api_key_env: expected the name of an environment"),
            ([f"--api_key_env={KEY}"], "--api_key_env: expected the name of an environment"),
        ):
            line = refused(capsys, *common, *more)
            assert re.search(message, line) and KEY not in line, line
    line = refused(capsys, "out", "--server", f"http://user:{KEY}@127.0.0.1:1/v1")
    assert line == "--server: expected an address without a name or password in it"


# ---------------------------------------------------------------- refusals


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["eval", *arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and len(err.splitlines()) == 1, err
    return err.removeprefix("trimtab-rl: error: ").rstrip()


def test_what_cannot_be_asked_is_one_line(folder, make, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, and nobody listens
        line = refused(capsys, "out", "--server", down, "--model", "tiny")
        assert line.startswith(f"{down}/v1/models: no connection (ConnectionRefusedError")
    names = ("tiny-a", "tiny-b")
    with serving(make(names=names)) as server:
        url = server.url
        line = refused(capsys, "out", "--server", url, "--model=tiny_a")
        end = "does not serve 'tiny_a', nearest: 'tiny-a'; it serves: tiny-a, tiny-b"
        assert line == f"--model: {url}/v1 {end}"
        line = refused(capsys, "out", "--server", url)
        assert line == f"--model: expected a name, got none; {url}/v1 serves: tiny-a, tiny-b"
        line = refused(capsys, "out", "--server", f"{url}/v2", "--model=x", "--config=recipe.yaml")
        assert line == "eval: expected a run folder or --config RECIPE with --server, got both"
        line = refused(capsys, "--server", url)
        assert line == "eval: expected a run folder or --config RECIPE with --server, got neither"
        line = refused(capsys, "out", "--server", url, "--checkpoint=x")
        assert line.startswith("--checkpoint: expected none with --server")
        for option, expected in (
            ("--timeout=0", "seconds > 0, got 0.0"),
            ("--retries=-1", "a count >= 0, got -1"),
            ("--parallel=0", "a count >= 1, got 0"),
            ("--max_tokens=0", "a count >= 1, got 0"),
            ("--temperature=-1", "a number >= 0, got -1.0"),
        ):
            line = refused(capsys, "out", "--server", url, option)
            assert line == f"{option.partition('=')[0]}: expected {expected}"
    with serving(make(names=None)) as server:
        line = refused(capsys, "out", "--server", server.url)
        assert line == f"--model: expected a name, got none; {server.url}/v1 keeps no list"
    for url in ("127.0.0.1:80", "ftp://a:1", "http://a:b"):
        assert refused(capsys, "out", "--server", url).startswith("--server: ")
    for option in ("--model=x", "--chat", "--api_key_env=X", "--config=recipe.yaml", "--retries=1"):
        name = option.partition("=")[0]
        assert refused(capsys, "out", option) == f"{name}: expected with --server only"


def test_rewards_that_read_token_ids_are_lost_and_tools_are_refused(
    make, tmp_path, monkeypatch, capsys
):
    recipe = write_recipe(tmp_path, {"task.init_args.reward": "reward_functions:tokens"})
    with serving(make()) as server:
        output, found = evaluated(
            tmp_path, "--config", recipe, "--server", server.url, "--samples=2", where="."
        )
        assert found["lost"] == 8 and "8 answers without a reward are left out" in output
        assert "a reward is lost" in output and "NoneType" in output
        monkeypatch.chdir(tmp_path)
        changes = {"update.token_baseline": {"alignment": "model_token"}}
        changes |= {"task.init_args.tool": {"start": "<", "end": ">"}}
        recipe = write_recipe(tmp_path, changes)
        line = refused(capsys, "--config", str(recipe), "--server", server.url)
        assert line == "eval: expected a task without tool or environment with --server"


def test_it_trains_nobody(folder, make, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with serving(make()) as server:
        with pytest.raises(SystemExit, match="2"):
            main(["--config", "recipe.yaml", f"--rollout.servers=[{server.url}]", "--run_dir=no"])
        [line] = capsys.readouterr().err.splitlines()
        assert f"{server.url}: expected vLLM 0.32 or later in dev mode" in line
        assert "(without, a server can answer `trimtab-rl eval --server`, not train)" in line
        assert not (folder / "no").exists()


# Edits that must turn this file red:
# * text_server.py: seed for every request, not seed + len(texts)
# * text_server.py: texts not cut at the stop
# * text_server.py: without wait = asked (Retry-After)
# * text_server.py: without self._server.hidden in _shown
# * text_server.py: retries for a server that has never answered
# * evaluate_server.py: stable_seed without the split
# * evaluate_server.py: the key among what is stored
# * server_client.py: without the header Authorization
