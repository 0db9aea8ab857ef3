"""Who may call the routes under `/pte/v1`; vLLM's own check covers its own prefixes only."""

from __future__ import annotations

import os
from argparse import Namespace

from fastapi import HTTPException, Request
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

ADMIN_KEY = "PTE_ADMIN_KEY"


class Keys:
    """Bearer tokens: the server's API keys, and the key of those who may change adapters.

    Args:
        args: of the server; `--api-key` goes before VLLM_API_KEY, as in vLLM.
    """

    def __init__(self, args: Namespace) -> None:
        api = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
        admin = [key for key in (os.environ.get(ADMIN_KEY),) if key]
        # Compared in constant time, by vLLM's code. The admin key opens everything.
        self._api = AuthenticationMiddleware(None, [*api, *admin]) if api else None
        self._admin = AuthenticationMiddleware(None, admin or api) if admin or api else None

    def allow_use(self, request: Request) -> bool:
        return self._api is None or self._api.verify_token(request.headers)

    def allow_change(self, request: Request) -> bool:
        return self._admin is None or self._admin.verify_token(request.headers)


async def may_use(request: Request) -> None:
    """Dependency of every route: 401 without a key of the server."""
    keys: Keys | None = getattr(request.app.state, "pte_keys", None)
    if keys is not None and not keys.allow_use(request):
        raise HTTPException(401, "this server needs its API key as a bearer token")


async def may_change(request: Request) -> None:
    """Dependency of routes that change adapters: 401 without the admin key, where one is set."""
    keys: Keys | None = getattr(request.app.state, "pte_keys", None)
    if keys is not None and not keys.allow_change(request):
        raise HTTPException(401, f"changing adapters needs the {ADMIN_KEY} of this server")
