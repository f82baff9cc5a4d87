"""`TextServer`: answers as text from any server that speaks OpenAI's API, for evaluation.

    /v1/completions         the problem's prompt as it is
    /v1/chat/completions    its messages, or the prompt as the one message of a user

Neither token ids nor log-probs are needed, so it can train nothing: it is no `RolloutEngine`. What
a server does not know of `n`, `seed`, `stop` and `top_p` is left out once it has said so: the
answers are then asked for one by one, each with a seed of its own, and cut at the stop text here.
"""

from __future__ import annotations

import difflib
import email.utils
import http.client
import json
import logging
import re
import threading
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from .server_client import Server, ServerFailed

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds, doubled from one try to the next
_LONGEST_ASKED = 600.0  # of a Retry-After
_CAN_BE_LEFT_OUT = ("seed", "stop", "top_p", "n")
_SHOWN = 20  # names of models in an error


class ServerRefused(ValueError):
    """What a server does not take however often it is asked."""


class Answers(NamedTuple):
    """Answers to a prompt.

    Args:
        texts: without the stop text.
        tokens: sampled for all of them; None where the server does not tell.
        cut: how many ended at the limit of tokens.
    """

    texts: list[str]
    tokens: int | None
    cut: int


class TextServer:
    """A server of one model; its methods may be called by several threads.

    Args:
        url: `http://host:port/v1`; without a path /v1 is meant.
        key: sent as a bearer token; in no error and no file. Empty: none is sent.
        chat: asks /chat/completions instead of /completions.
        timeout: seconds for one answer, > 0; a request that takes longer is not asked again.
        retries: times that a request is asked again after HTTP 429 or 5xx, or a connection that was
            lost, with a wait that doubles or is the server's Retry-After.

    Raises:
        ValueError: the url is none, the timeout not positive, or the key is no token.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        chat: bool = False,
        timeout: float = 120.0,
        retries: int = 5,
    ) -> None:
        if not re.fullmatch(r"[\x21-\x7e]*", key):  # http.client would show it
            raise ValueError("--api_key_env: expected a key without spaces or line ends in it")
        self._server = Server(url, timeout, key=key, option="--server")
        if not urlsplit(self._server.url).path:
            self._server = Server(f"{self._server.url}/v1", timeout, key=key, option="--server")
        self.url, self.chat, self.retries = self._server.url, chat, retries
        self.model = ""
        self._has_key, self._has_answered = bool(key), False
        self._left_out: frozenset[str] = frozenset()
        self._noting = threading.Lock()

    def choose(self, model: str | None) -> None:
        """Takes a model that is served.

        Args:
            model: its name; None takes the only one.

        Raises:
            ConnectionError, ServerFailed: the server does not answer, or is not well.
            ServerRefused: it wants another key, or serves no such model (with those it serves).
        """
        status, text = self._ask("/models")
        served: list[str] | None = None
        if status == 200:
            try:
                served = [str(entry["id"]) for entry in json.loads(text)["data"]]
            except (ValueError, KeyError, TypeError) as error:
                raise ServerRefused(
                    f"{self.url}/models: expected a list of models, got {self._shown(text)!r}; is "
                    "it the address of an OpenAI-compatible API?"
                ) from error
        elif status not in (404, 405, 501):  # a server need not have the list
            raise self._refused("/models", status, text)
        if model is None:
            if served is None or len(served) != 1:
                names = "keeps no list" if served is None else f"serves: {_listed(served)}"
                raise ServerRefused(f"--model: expected a name, got none; {self.url} {names}")
            [model] = served
        elif served is not None and model not in served:
            near = difflib.get_close_matches(model, served, n=1)
            raise ServerRefused(
                f"--model: {self.url} does not serve {model!r}"
                f"{f', nearest: {near[0]!r}' if near else ''}; it serves: {_listed(served)}"
            )
        self.model = model

    def answers(
        self,
        prompt: str | list[dict[str, str]],
        *,
        n: int,
        max_tokens: int,
        temperature: float,
        stop: str = "",
        seed: int = 0,
    ) -> Answers:
        """Answers to one prompt.

        Args:
            prompt: its text, or messages where the server is asked as a chat.
            n: how many, >= 1.
            max_tokens: most tokens of each.
            temperature: of sampling, >= 0.
            stop: text that ends an answer; empty: the server's end of sequence alone.
            seed: of the first one; the others have seed + 1, ... where the server takes seeds.

        Returns:
            Answers.

        Raises:
            ConnectionError, ServerFailed: no answer, and so did the retries.
            ServerRefused: the server does not take the request, or its answer is none.
        """
        if not self.chat and not isinstance(prompt, str):
            raise ServerRefused(
                f"--chat: expected for a prompt that is messages, got none: {prompt!r:.80}"
            )
        texts: list[str] = []
        tokens: int | None = 0
        cut = 0
        while len(texts) < n:  # a server may give fewer than it was asked for
            body = {
                "model": self.model,
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_p": 1.0,  # not what a checkpoint's generation_config says
                "n": n - len(texts),
                "seed": seed + len(texts),
                "stop": [stop],
            }
            if self.chat:
                text = isinstance(prompt, str)
                body["messages"] = [{"role": "user", "content": prompt}] if text else prompt
            else:
                body["prompt"] = prompt
            left_out = {"n"} if body["n"] == 1 else set()
            left_out |= set() if stop else {"stop"}
            answer = self._complete(body, left_out)
            choices = self._choices(answer)
            usage = answer.get("usage")
            used = usage.get("completion_tokens") if isinstance(usage, dict) else None
            whole = isinstance(used, int) and len(choices) <= body["n"]
            tokens = tokens + used if whole and tokens is not None else None
            for text, reason in choices[: body["n"]]:
                texts.append(text.partition(stop)[0] if stop else text)
                cut += reason == "length" and not (stop and stop in text)
        return Answers(texts, tokens, cut)

    def _complete(self, body: dict[str, Any], left_out: set[str]) -> dict[str, Any]:
        """The server's answer, to as much of the body as it takes."""
        path = "/chat/completions" if self.chat else "/completions"
        unknown = self._left_out
        while True:
            asked = {k: v for k, v in body.items() if k not in left_out | unknown}
            if "max_tokens" in unknown:
                asked["max_completion_tokens"] = body["max_tokens"]
            status, text = self._ask(path, asked)
            if status == 200:
                break
            name = _unknown_to_it(asked, text) if status in (400, 422) else None
            if name is None:
                raise self._refused(path, status, text)
            unknown |= {name}
        with self._noting:
            if new := unknown - self._left_out:
                logger.warning("%s: goes on without %s, refused", self.url, ", ".join(sorted(new)))
            self._left_out |= unknown
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ServerRefused(f"{self.url}{path}: expected JSON, got {self._shown(text)!r}")
        return answer

    def _choices(self, answer: dict[str, Any]) -> list[tuple[str, str | None]]:
        """Text and reason of each."""
        found = []
        try:
            for choice in answer["choices"]:
                text = choice["message"]["content"] if self.chat else choice["text"]
                if not isinstance(text, str | None):
                    raise TypeError(f"its text is a {type(text).__name__}")
                found.append((text or "", choice.get("finish_reason")))
            if not found:
                raise ValueError("no choice")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerRefused(
                f"{self.url}: expected choices with a text each, got {self._shown(str(answer))} "
                f"({type(error).__name__}: {error})"
            ) from error
        return found

    def _ask(self, path: str, body: Any = None) -> tuple[int, str]:
        """Status and text, below 500 and not 429; asked again as often as it takes and may."""
        where = f"{self.url}{path}"
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT)
            try:
                status, text, after = self._server.exchange(path, body)
            except TimeoutError as error:
                raise ConnectionError(
                    f"{where}: no answer within {self._server.timeout:g} s (--timeout)"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                why = f"no connection ({type(error).__name__}: {error})"
                if last or not self._has_answered:  # the address may be wrong
                    raise ConnectionError(f"{where}: {self._server.hidden(why)}") from error
            else:
                self._has_answered = True
                if status != 429 and status < 500:
                    return status, text
                if status == 501 and body is None:
                    return status, text
                why = f"HTTP {status}"
                if last:
                    raise ServerFailed(f"{where}: {why}: {self._shown(text)}")
                asked = _seconds(after)
                if asked is not None and asked > _LONGEST_ASKED:
                    raise ServerFailed(
                        f"{where}: {why}, to be asked again in {asked:.0f} s: {self._shown(text)}"
                    )
                wait = wait if asked is None else asked
            logger.warning("%s: %s; asking again in %.1f s", where, why, wait)
            time.sleep(wait)
        raise AssertionError

    def _refused(self, path: str, status: int, text: str) -> ServerRefused:
        hint = ""
        if status in (401, 403):
            hint = "; is the key in the variable of --api_key_env the right one?"
            if not self._has_key:
                hint = "; name the environment variable that holds the key: --api_key_env VAR"
        elif status in (404, 405):
            other = "without" if self.chat else "with"
            hint = f"; try {other} --chat, or another address (.../v1)"
        return ServerRefused(
            f"{self.url}{path}: expected HTTP 200, got {status}: {self._shown(text)}{hint}"
        )

    def _shown(self, text: str) -> str:
        """The message of an error as OpenAI's API writes it, or the text; short, without the key"""
        try:
            found = json.loads(text)
            found = found.get("error", found)
            message = found if isinstance(found, str) else found["message"]
        except (ValueError, KeyError, TypeError, AttributeError):
            message = text
        return self._server.hidden(str(message))[:300]


def _unknown_to_it(asked: dict[str, Any], text: str) -> str | None:
    """What of a request may be why it was refused."""
    if "max_tokens" in asked and "max_completion_tokens" in text:
        return "max_tokens"
    for name in _CAN_BE_LEFT_OUT:
        if name in asked and re.search(rf"(?<!\w){name}(?!\w)", text):
            return name
    return "n" if "n" in asked else None


def _seconds(after: str | None) -> float | None:
    """Of a Retry-After, which has seconds or a date."""
    if after is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", after.strip()):
        return float(after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    except ValueError:
        return None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + more
