"""Some failures of HTTP are tried again; all others are one clear error at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import httpx
import tenacity

T = TypeVar("T")

RETRIED_STATUS = (429, 502, 503, 504)
UNKNOWN = 404
"""The HTTP status of a request for what is not there."""
CONFLICT = 409
"""The HTTP status of a request that contradicts versions that are there."""
_MAX_WAIT_S = 15.0


class ServerError(RuntimeError):
    """The server refused, failed, or stayed away for longer than the retries last."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """The HTTP status; None where there was no answer."""


class Unavailable(ServerError):
    """The failure is worth another try, not before `wait_s`; see `Transport.retrying`."""

    def __init__(self, message: str, status: int | None = None, wait_s: float = 0.0) -> None:
        super().__init__(message, status)
        self.wait_s = wait_s


class Transport:
    """Sends requests to one server.

    Args:
        base_url: where the server is, such as `http://localhost:8000`.
        key: the bearer token of every request that brings no other.
        timeout_s: the longest silence on an open connection.
        retry_s: how long one call goes on trying.
    """

    def __init__(self, base_url: str, *, key: str | None, timeout_s: float, retry_s: float) -> None:
        self.retry_s = retry_s
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s, headers=bearer(key))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def retrying(self, call: Callable[[], T]) -> T:
        """Return `call()`, tried again with exponential back-off while it raises Unavailable.

        Raises:
            ServerError: the last failure, once another try would exceed `retry_s`.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            wait=_wait_s,
            stop=tenacity.stop_before_delay(self.retry_s),
            reraise=True,
        )
        return retrying(call)

    def json(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        """Send a request, with retries, and return its answer, a JSON object."""

        def call() -> dict[str, Any]:
            try:
                response = self._http.request(method, path, **kwargs)
            except httpx.TransportError as error:
                raise Unavailable(f"{method} {path}: {_describe(error)}") from error
            if not response.is_success:
                raise _failure(response)
            values = response.json()
            if not isinstance(values, dict):
                raise ServerError(f"{method} {path}: the answer is not a JSON object")
            return values

        return self.retrying(call)

    def lines(self, path: str, body: Mapping[str, Any], stack: ExitStack) -> Iterator[str]:
        """Yield the lines of the answer to a POST, blank ones left out. It is not retried.

        Args:
            path: the route, such as `/pte/v1/rollouts`.
            body: what is sent, as JSON.
            stack: what closes the connection when it is closed itself.

        Raises:
            Unavailable: here or while iterating, if the connection fails.
            ServerError: if the server refuses.
        """
        try:
            response = stack.enter_context(self._http.stream("POST", path, json=body))
            if not response.is_success:
                response.read()
                raise _failure(response)
            for line in response.iter_lines():
                if line.strip():
                    yield line
        except httpx.TransportError as error:
            raise Unavailable(f"POST {path}: {_describe(error)}") from error

    def wait_healthy(self, timeout_s: float) -> None:
        """Wait until `GET /health` answers 200.

        Raises:
            ServerError: if it does not within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                status = self._http.get("/health", timeout=5.0).status_code
                if status == 200:
                    return
                reason = f"GET /health answers {status}"
            except httpx.TransportError as error:
                reason = _describe(error)
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self._http.base_url} is not ready after {timeout_s:.0f} s: {reason}"
                )
            time.sleep(0.5)


def bearer(key: str | None) -> dict[str, str]:
    """Make the headers that present a key; there are none without one."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def error_of(what: str, error: Mapping[str, Any], retry_after: str | None = None) -> ServerError:
    """Make the exception for an error object of the server, `{"code": ..., "message": ...}`."""
    status, message = error.get("code"), f"{what}: {error.get('code')} {error.get('message')}"
    if status in RETRIED_STATUS:
        seconds = float(retry_after) if retry_after and retry_after.isdecimal() else 0.0
        return Unavailable(message, status, seconds)
    return ServerError(message, status)


def _failure(response: httpx.Response) -> ServerError:
    """Make the exception for an answer that is not a success; its body was read before."""
    what = f"{response.request.method} {response.request.url.path}"
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = response.text[:500]
    if not isinstance(error, dict):
        error = {"message": str(error)}
    retry_after = response.headers.get("Retry-After")
    return error_of(what, {**error, "code": response.status_code}, retry_after)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


_backoff = tenacity.wait_exponential_jitter(initial=0.2, max=_MAX_WAIT_S, jitter=0.2)


def _wait_s(state: tenacity.RetryCallState) -> float:
    """Return the exponential wait, or what the server asked for where that is more."""
    assert state.outcome is not None
    error = state.outcome.exception()
    asked = error.wait_s if isinstance(error, Unavailable) else 0.0
    return max(asked, _backoff(state))
