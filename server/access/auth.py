"""Who may call our routes; vLLM's own check covers its own prefixes (`/v1`, ...) only."""

from __future__ import annotations

import os
from argparse import Namespace

from fastapi import HTTPException, Request
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

ADMIN_KEY = "PTE_ADMIN_KEY"


class Keys:
    """Bearer tokens: the server's API keys, and the key of those who may change it.

    Args:
        args: of the server; `--api-key` goes before VLLM_API_KEY, as in vLLM, and
            `--pte-admin-key` or its file before PTE_ADMIN_KEY.
    """

    def __init__(self, args: Namespace) -> None:
        api, admin = _api_keys(args), _admin_keys(args)
        # Compared in constant time, by vLLM's code. The admin key opens everything.
        self._api = AuthenticationMiddleware(None, [*api, *admin]) if api else None
        self._admin = AuthenticationMiddleware(None, admin or api) if admin or api else None

    def allow_use(self, request: Request) -> bool:
        return self._api is None or self._api.verify_token(request.headers)

    def allow_change(self, request: Request) -> bool:
        return self._admin is None or self._admin.verify_token(request.headers)


def admit_admin(args: Namespace) -> None:
    """Make vLLM's check of `/v1` let the admin key through to the check of our routes there."""
    if api := _api_keys(args):
        args.api_key = list(dict.fromkeys([*api, *_admin_keys(args)]))


def _api_keys(args: Namespace) -> list[str]:
    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


def _admin_keys(args: Namespace) -> list[str]:
    options = getattr(args, "pte_service", None)
    given = options.admin_key if options is not None else None
    return [key for key in (given or os.environ.get(ADMIN_KEY),) if key]


async def may_use(request: Request) -> None:
    """Dependency of every route: 401 without a key of the server."""
    keys: Keys | None = getattr(request.app.state, "pte_keys", None)
    if keys is not None and not keys.allow_use(request):
        raise HTTPException(401, "this server needs its API key as a bearer token")


async def may_change(request: Request) -> None:
    """Dependency of routes that change what others get (adapters, pause, abort): 401 without the
    admin key, where one is set."""
    keys: Keys | None = getattr(request.app.state, "pte_keys", None)
    if keys is not None and not keys.allow_change(request):
        raise HTTPException(401, "this needs the server's admin key (--pte-admin-key)")
