"""The guard of the whole app: nobody reaches a route without the key that the table asks for."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.requests import HTTPConnection
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.serve import create_error_response

from pte_vllm.server.access.auth import Keys
from pte_vllm.server.access.table import Access, access_of

_NEEDED = {
    Access.USE: "this server needs its API key as a bearer token",
    Access.CHANGE: "this needs the server's admin key (--pte-admin-key)",
}


class Guard:
    """ASGI middleware that answers 401 to a request without the key of its route.

    vLLM's own check covers some prefixes and knows one kind of key. What the table does not name,
    and what no route answers, needs the API key.

    Args:
        app: what takes the request afterwards.
        only_below: the paths that are guarded; all of them by default.
    """

    def __init__(self, app: ASGIApp, *, only_below: str = "/") -> None:
        self.app = app
        self._only_below = only_below

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # As vLLM: a browser asks by OPTIONS, without keys, whether it may send them.
        if scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS":
            needed = self._refused(scope)
            if needed is not None and scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": _NEEDED[needed]})
                return
            if needed is not None:
                body = create_error_response(
                    _NEEDED[needed], "Unauthorized", HTTPStatus.UNAUTHORIZED
                )
                answer = JSONResponse(body.model_dump(), HTTPStatus.UNAUTHORIZED)
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refused(self, scope: Scope) -> Access | None:
        """Return what the caller lacks; None where nothing is lacking."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not path.startswith(self._only_below):
            return None
        app: FastAPI = scope["app"]
        keys: Keys | None = getattr(app.state, "pte_keys", None)
        if keys is None or not keys.any:
            return None
        access = _access(app, scope)
        if access is Access.OPEN:
            return None
        connection = HTTPConnection(scope)
        allowed = keys.allow_change if access is Access.CHANGE else keys.allow_use
        return None if allowed(connection) else access


def _access(app: FastAPI, scope: Scope) -> Access:
    # Routes are looked up anew: SageMaker's are added after every plugin's.
    for route in app.routes:
        if route.matches(scope)[0] == Match.FULL:
            template = getattr(route, "path", "")
            return access_of(scope.get("method", "GET"), template) or Access.USE
    return Access.USE
