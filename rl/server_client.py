"""JSON over HTTP to one server: each failure is one error that names it; none waits for ever."""

from __future__ import annotations

import http.client
import json
import logging
import time
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

_BUSY = (429, 503)


class ServerFailed(ValueError):
    """A server that is busy, not well, or has other weights; asked again later it may do."""


class Server:
    """A client of one server; connects directly, whatever proxies the environment names.

    Args:
        url: `http://host:port` or https, with a path if it stands behind one.
        timeout: seconds for an answer, > 0.

    Raises:
        ValueError: the url is none, or the timeout not positive.
    """

    def __init__(self, url: str, timeout: float) -> None:
        if not timeout > 0:
            raise ValueError(f"server_timeout: expected seconds > 0, got {timeout}")
        self.url, self.timeout = url.rstrip("/"), timeout
        try:
            parts = urlsplit(self.url)
            self._host, self._port, self._path = parts.hostname, parts.port, parts.path
        except ValueError as error:
            raise ValueError(f"servers: {url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not self._host or parts.query:
            raise ValueError(f"servers: expected addresses like http://host:8000, got {url!r}")
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
                status, text = self._exchange(path, body)
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

    def _exchange(self, path: str, body: Any) -> tuple[int, str]:
        """Status and text. A socket's timeout is for one read, which a slow server passes."""
        deadline = time.monotonic() + self.timeout
        connection = self._connection(self._host, self._port, timeout=self.timeout)
        try:
            method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
            connection.request(
                method, self._path + path, data, {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            parts = []
            while part := response.read1(1 << 20):
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError
            if response.length:  # read1 does not say that the connection was cut
                raise http.client.IncompleteRead(b"".join(parts), response.length)
            return response.status, b"".join(parts).decode("utf-8", "replace")
        finally:
            connection.close()
