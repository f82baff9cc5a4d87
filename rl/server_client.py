"""JSON over HTTP to one server: each failure is one error that names it; none waits for ever."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, TypeVar
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

_BUSY = (429, 503)
_T = TypeVar("_T")


class ServerFailed(ValueError):
    """A server that is busy, not well, or has other weights; asked again later it may do."""


class Server:
    """A client of one server; connects directly, whatever proxies the environment names.

    Args:
        url: `http://host:port` or https, with a path if it stands behind one.
        timeout: seconds for an answer, > 0.
        key: sent with each request as a bearer token; part of no error. Empty: none is sent.
        option: name of the url's option, for errors.

    Raises:
        ValueError: the url is none, or the timeout not positive.
    """

    def __init__(self, url: str, timeout: float, *, key: str = "", option: str = "servers") -> None:
        if not timeout > 0:
            raise ValueError(f"server_timeout: expected seconds > 0, got {timeout}")
        self.url, self.timeout, self._key = url.rstrip("/"), timeout, key
        try:
            parts = urlsplit(self.url)
            self._host, self._port, self._path = parts.hostname, parts.port, parts.path
        except ValueError as error:
            raise ValueError(f"{option}: {url!r}: {error}") from error
        if "@" in parts.netloc:  # said without it
            raise ValueError(f"{option}: expected an address without a name or password in it")
        if parts.scheme not in ("http", "https") or not self._host or parts.query:
            raise ValueError(f"{option}: expected addresses like http://host:8000, got {url!r}")
        secure = parts.scheme == "https"
        self._connection = http.client.HTTPSConnection if secure else http.client.HTTPConnection

    def call(
        self, path: str, body: Any = None, *, missing_ok: bool = False, once: bool = False
    ) -> Any:
        """The server's answer; asked once more, after a second, if it is busy or was cut off.

        Args:
            path: of the endpoint.
            body: posted as JSON; None gets.
            missing_ok: None instead of an error if there is no such endpoint.
            once: not asked once more.

        Returns:
            The answer's JSON object, {} for an empty one.

        Raises:
            ConnectionError: no connection, or no whole answer in time.
            ServerFailed: HTTP 429 or 500 and above.
            ValueError: the server refuses, or its answer is no JSON object.
        """
        where = f"{self.url}{path}"
        for last in (True,) if once else (False, True):
            try:
                status, text, _ = self.exchange(path, body)
            except TimeoutError as error:  # not asked again: it would only be longer
                raise ConnectionError(f"{where}: no answer within {self.timeout:g} s") from error
            except (OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}: {error}"
                if last:
                    raise ConnectionError(f"{where}: no connection ({why})") from error
            else:
                if status not in _BUSY or last:
                    break
                why = f"HTTP {status}"
            logger.warning("%s: %s; asking once more", where, why)
            time.sleep(1.0)
        if status == 404 and missing_ok:
            return None
        if status != 200:
            kind = ServerFailed if status >= 500 or status in _BUSY else ValueError
            raise kind(f"{where}: expected HTTP 200, got {status}: {text[:500]}")
        try:
            answer = json.loads(text or "{}")
        except ValueError as error:
            raise ValueError(f"{where}: expected JSON, got {text[:200]!r} ({error})") from error
        if not isinstance(answer, dict):
            raise ValueError(f"{where}: expected a JSON object, got {text[:200]!r}")
        return answer

    def hidden(self, text: str) -> str:
        """A text that may be shown: a server may repeat the key."""
        return text.replace(self._key, "(the key)") if self._key else text

    def exchange(self, path: str, body: Any = None) -> tuple[int, str, str | None]:
        """Asks once.

        Args:
            path: of the endpoint.
            body: posted as JSON; None gets.

        Returns:
            The status, the text, and what the header Retry-After says.

        Raises:
            OSError, HTTPException: no connection, or no whole answer in time.
        """
        # a socket's timeout is for one read, which a slow server passes
        deadline = time.monotonic() + self.timeout
        connection = self._connection(self._host, self._port, timeout=self.timeout)
        try:
            method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
            headers = {"Content-Type": "application/json"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            connection.request(method, self._path + path, data, headers)
            response = connection.getresponse()
            parts = []
            while part := response.read1(1 << 20):
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError
            if response.length:  # read1 does not say that the connection was cut
                raise http.client.IncompleteRead(b"".join(parts), response.length)
            text = b"".join(parts).decode("utf-8", "replace")
            return response.status, text, response.getheader("Retry-After")
        finally:
            connection.close()


def by_threads(call: Callable[..., _T], jobs: Iterable[tuple[Any, ...]], count: int) -> list[_T]:
    """call(*job) of each, in order; the first error at once, whatever the others wait for.

    Not a pool: the interpreter waits for its threads before it ends, also after Ctrl-C.

    Args:
        call: may be called by several threads at a time.
        jobs: arguments of each call.
        count: of threads.

    Returns:
        What the calls returned.
    """
    todo = deque((Future(), job) for job in jobs)
    futures = [future for future, _ in todo]

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                future, job = todo.popleft()
                try:
                    future.set_result(call(*job))
                except BaseException as error:
                    future.set_exception(error)

    for _ in range(count):
        threading.Thread(target=work, daemon=True).start()
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future.done():
                future.result()
        return [future.result() for future in futures]
    finally:
        todo.clear()
