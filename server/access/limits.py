"""The bodies of our routes are bounded before they are in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware that answers 413 to a body above the limit, declared or chunked.

    FastAPI reads a JSON body whole before any dependency of its route runs, so a dependency would
    come too late. What comes in chunks may have no end: then the connection is closed after a 413,
    while a declared body is read to its end and dropped, as its sender may not look at the answer
    before.

    Args:
        app: what takes the request afterwards.
        routes: the routes whose bodies are bounded.
        max_bytes: the largest body.
        exempt: endpoints that bound their bodies themselves.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Sequence[BaseRoute],
        max_bytes: int,
        exempt: Sequence[Callable[..., object]] = (),
    ) -> None:
        self.app = app
        self._routes, self._exempt = list(routes), tuple(exempt)
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            length, chunked = self._declared(scope)
            # Most requests are neither: the server reads no more than was declared.
            if (length > self._max_bytes or chunked) and (route := self._route(scope)) is not None:
                if getattr(route, "endpoint", None) not in self._exempt:
                    receive = self._bounded(scope, receive)
                if chunked:
                    send = _closing(send)
        await self.app(scope, receive, send)

    def _route(self, scope: Scope) -> BaseRoute | None:
        return next((r for r in self._routes if r.matches(scope)[0] == Match.FULL), None)

    @staticmethod
    def _declared(scope: Scope) -> tuple[int, bool]:
        """Return Content-Length, or 0, and whether the body comes in chunks instead."""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        return int(length) if length.isdecimal() else 0, "transfer-encoding" in headers

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        num_bytes, declared = 0, self._declared(scope)[0]

        async def bounded() -> Message:
            nonlocal num_bytes
            # Raised from within the route, so that vLLM's handler words the answer.
            if declared > self._max_bytes:
                raise self._too_large()
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> HTTPException:
        return HTTPException(
            413, f"the body exceeds this server's --pte-max-body-bytes, {self._max_bytes}"
        )


def _closing(send: Send) -> Send:
    """Make a `send` that also ends the connection of a client whose body is too large."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 413:
            headers = [*message.get("headers", ()), (b"connection", b"close")]
            message = {**message, "headers": headers}
        await send(message)

    return closing
