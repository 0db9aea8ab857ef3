"""Headers `X-PTE-...` of a request carry its options; see `pte_vllm.engine.headers`."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from pte_vllm.engine.headers import SENT, options_of

OURS = "/pte/"


class OptionHeaders:
    """ASGI middleware that hands the options in headers to the check of requests.

    Our own routes have fields for them, and records that depend on these.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = options_of(scope["headers"]) if scope["type"] == "http" else {}
        if not sent or scope["path"].removeprefix(scope.get("root_path", "")).startswith(OURS):
            await self.app(scope, receive, send)  # also what is no request, and has no path
            return
        token = SENT.set(sent)
        try:
            await self.app(scope, receive, send)
        finally:
            SENT.reset(token)
