"""Servers on loopback: one speaks the JSON of vLLM, as far as `VLLMServerEngine` uses it, the other
that of OpenAI's API, in text.

Behind them samples a real engine, `TransformersEngine`: what comes back can be compared with what
the engine gives directly. `tests/test_vllm_server.py` is the same clients with vLLM itself.
"""

from __future__ import annotations

import email.utils
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trimtab.rl.engine import TransformersEngine
from trimtab.rl.rollout import Request, Sampling


class CompletionServer:
    """State of a server, and the ways it can fail.

    Args:
        model: copied, in float32.
        raw: log-probs of the plain softmax.
        dev: the endpoints of vLLM's dev mode exist.
    """

    def __init__(self, model: Any, *, raw: bool = False, dev: bool = True) -> None:
        self.engine = TransformersEngine(model, dtype=torch.float32)
        self.raw, self.dev = raw, dev
        self.weight_version, self.paused = "default", False
        self.asked: list[str] = []  # endpoints
        self.failures: list[str] = []  # of the next completions, one each
        self.hung = threading.Event()  # ends the failure "hang"
        self.dies: Callable[[], object] = lambda: None  # of the failure "dies"
        self.url, self.room = "", 64  # tokens of a prompt and its answer
        self.checks = True  # it can hash its weights
        self._one_at_a_time = threading.Lock()

    def authorize(self, headers: Any) -> None:
        """Raises Refusal where a request may not be answered."""

    def answer(self, path: str, body: Any) -> Any:
        self.asked.append(path)
        if path == "/v1/completions":
            assert not self.paused
            with self._one_at_a_time:
                return self._completions(body)
        if path == "/v1/models":
            return {"data": [{"id": "tiny", "max_model_len": self.room}]}
        if not self.dev:
            return None
        if path == "/pause?mode=wait&clear_cache=true":
            self.paused = True
        elif path == "/resume":
            self.paused = False
        elif path == "/collective_rpc":
            assert self.paused and body["method"] == "reload_weights"
            weights = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
            self.engine.update_weights(weights.items(), 0)
        elif path == "/update_weight_version":
            self.weight_version = body["new_version"]
        elif path == "/weight_info":
            return {"weight_version": self.weight_version}
        elif path == "/weight_checker":
            assert body == {"action": "checksum"}
            if not self.checks:
                raise ValueError("Duplicate weight checksum keys")
            names = (name for name, _ in self.engine.model.named_parameters())
            return {"checksums": {f"dp0:pp0:pcp0:tp0:{name}": "" for name in names}}
        else:
            return None
        return {}

    def _completions(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["ignore_eos"] and body["logprobs"] == 0 and body["return_token_ids"]
        names = ("n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
        stops = tuple(body["stop_token_ids"])
        sampling = Sampling(**{name: body[name] for name in names}, stop_token_ids=stops)
        [group] = self.engine.generate([Request(body["prompt"], sampling)])
        choices = [
            {
                "index": i,
                "text": "",
                "logprobs": {"token_logprobs": self._logprobs(body["prompt"], sample)},
                "finish_reason": sample.finish_reason,
                "prompt_token_ids": body["prompt"],
                "token_ids": sample.token_ids,
            }
            for i, sample in enumerate(group)
        ]
        return {"choices": choices[::-1]}  # by their index, not by their place

    @torch.no_grad()
    def _logprobs(self, prompt: list[int], sample: Any) -> list[float]:
        if not self.raw:
            return sample.logprobs
        model = TransformersEngine(self.engine.model, dtype=torch.float32).model
        model.set_attn_implementation("eager")
        ids = torch.tensor([prompt + sample.token_ids])
        logp = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logp.gather(-1, torch.tensor(sample.token_ids)[:, None]).squeeze(-1).tolist()


class Refusal(Exception):
    """An answer with another status than 200."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class OpenAIServer(CompletionServer):
    """Text in, text out.

    Args:
        model: copied, in float32.
        tokenizer: of the model.
        key: wanted of every request, and repeated in the refusal; empty: none.
        unknown: parameters that it refuses: `n`, `seed`, `stop`, `top_p`, `max_tokens`.
        at_once: most answers to a request, whatever its n.
        names: of the models; None: it keeps no list.
        tells: how many tokens it sampled.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        key: str = "",
        unknown: tuple[str, ...] = (),
        at_once: int = 1000,
        names: tuple[str, ...] | None = ("tiny",),
        tells: bool = True,
    ) -> None:
        super().__init__(model)
        self.tokenizer, self.key, self.unknown = tokenizer, key, unknown
        self.at_once, self.names, self.tells = at_once, names, tells
        self.bodies: list[dict[str, Any]] = []
        self.open_at = 0.0  # nobody who was told to wait may ask before
        self.busy: list[str] = []  # Retry-After of the next refusals

    def authorize(self, headers: Any) -> None:
        found = headers.get("Authorization")
        if self.key and found != f"Bearer {self.key}":
            message = json.dumps({"error": {"message": f"Incorrect API key provided: {found}"}})
            raise Refusal(401, message)

    def answer(self, path: str, body: Any) -> Any:
        if path == "/v1/models" and self.names is not None:
            return {"object": "list", "data": [{"id": name} for name in self.names]}
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return None
        self.bodies.append(body)
        if time.time() < self.open_at:
            raise Refusal(400, "asked too early")
        if self.busy:
            after = self.busy.pop(0)
            self.open_at = time.time() + 0.9 * float(after)
            if after == "2":  # the same, as a date, which has no fractions
                due = int(time.time()) + 2
                self.open_at, after = due - 0.1, email.utils.formatdate(due, usegmt=True)
            raise Refusal(429, "slow down", **{"Retry-After": after})
        for name in self.unknown:
            if name in body:
                better = "; use 'max_completion_tokens'" if name == "max_tokens" else ""
                error = {"message": f"Unsupported parameter: '{name}'{better}"}
                raise Refusal(400, json.dumps({"error": error}))
        chat = path == "/v1/chat/completions"
        with self._one_at_a_time:
            return self._texts(body, chat)

    def _texts(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        assert body["model"] in (self.names or ("tiny",))
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        stops = {self.tokenizer.eos_token_id}
        stops |= {self.tokenizer.encode(s, add_special_tokens=False)[0] for s in self._stops(body)}
        sampling = Sampling(
            n=min(body.get("n", 1), self.at_once),
            max_tokens=body.get("max_tokens") or body["max_completion_tokens"],
            temperature=body["temperature"],
            top_p=body.get("top_p", 1.0),
            seed=body.get("seed", 0),
            stop_token_ids=tuple(stops),
        )
        [group] = self.engine.generate([Request(self.tokenizer.encode(prompt), sampling)])
        choices = []
        for i, sample in enumerate(group):
            ends = sample.finish_reason == "stop"
            text = self.tokenizer.decode(sample.token_ids[:-1] if ends else sample.token_ids)
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append({"index": i, "finish_reason": sample.finish_reason, **said})
        usage = {"completion_tokens": sum(len(sample.token_ids) for sample in group)}
        return {"choices": choices} | ({"usage": usage} if self.tells else {})

    def _stops(self, body: dict[str, Any]) -> list[str]:
        return body.get("stop", [])


@contextmanager
def serving(server: Any, port: int = 0) -> Iterator[Any]:
    """Answers at `server.url` until the block ends; at a free port, or at this one again."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: Any) -> None:
            completion = self.path.endswith("/completions")
            failure = server.failures.pop(0) if completion and server.failures else ""
            if failure == "cut":
                return self.connection.close()
            if failure == "dies":
                server.dies()
                return self.connection.close()
            if failure == "restarts":
                server.dies()
            if failure == "hang":
                server.hung.wait(20)
            if failure.isdigit():
                return self.send(int(failure), b"the engine is not well")
            try:
                server.authorize(self.headers)
                answer = server.answer(self.path, body)
            except Refusal as refusal:
                return self.send(refusal.status, str(refusal).encode(), **refusal.headers)
            except ValueError as error:
                return self.send(500, str(error).encode())
            text = json.dumps(answer).encode()
            if failure == "truncated":
                text = text[: len(text) // 2]
            elif failure == "other vocabulary":
                answer["choices"][0]["token_ids"][0] = 10_000
                text = json.dumps(answer).encode()
            elif failure == "one too few":
                text = json.dumps({"choices": answer["choices"][1:]}).encode()
            elif failure == "other prompt":
                answer["choices"][0]["prompt_token_ids"] = [2, 3]
                text = json.dumps(answer).encode()
            elif failure == "ended early":
                choice = answer["choices"][0]
                choice["token_ids"].pop()
                choice["logprobs"]["token_logprobs"].pop()
                text = json.dumps(answer).encode()
            elif failure == "no text":
                del answer["choices"][0]["text"]
                text = json.dumps(answer).encode()
            elif failure == "text":
                text = b"<html>It works!</html>"
            elif failure == "list":
                text = json.dumps(answer["choices"]).encode()
            elif failure == "trickle":
                return self.trickle(text)
            elif failure == "half":
                self.send(200, text[: len(text) // 2], promised=len(text))
                return self.connection.close()
            return self.send(404 if answer is None else 200, text)

        def send(
            self, status: int, text: bytes, promised: int | None = None, **headers: str
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(promised or len(text)))
            self.end_headers()
            self.wfile.write(text)

        def trickle(self, text: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            try:
                for byte in text:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.02)
            except OSError:
                pass  # the client has left

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        http.shutdown()
        thread.join()
