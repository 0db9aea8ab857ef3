"""The keys of a server, and whether a request has one."""

from __future__ import annotations

import os
from argparse import Namespace

from starlette.requests import HTTPConnection
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

ADMIN_KEY = "PTE_ADMIN_KEY"


class Keys:
    """Knows the bearer tokens: the server's API keys, and the key of those who may change it.

    Args:
        args: the server's arguments; `--api-key` goes before VLLM_API_KEY, as in vLLM, and
            `--pte-admin-key` or its file before PTE_ADMIN_KEY.
    """

    def __init__(self, args: Namespace) -> None:
        api, admin = _api_keys(args), _admin_keys(args)
        # Compared in constant time, by vLLM's code. The admin key opens everything.
        self._api = AuthenticationMiddleware(None, [*api, *admin]) if api else None
        self._admin = AuthenticationMiddleware(None, admin or api) if admin or api else None

    @property
    def any(self) -> bool:
        """Whether there is a key at all."""
        return self._admin is not None

    def allow_use(self, request: HTTPConnection) -> bool:
        """Return whether a request has a key of the server, where it needs one."""
        return self._api is None or self._api.verify_token(request.headers)

    def allow_change(self, request: HTTPConnection) -> bool:
        """Return whether a request may change what others get."""
        return self._admin is None or self._admin.verify_token(request.headers)


def admit_admin(args: Namespace) -> None:
    """Make vLLM's check of `/v1` let the admin key through to the guard."""
    if api := _api_keys(args):
        args.api_key = list(dict.fromkeys([*api, *_admin_keys(args)]))


def _api_keys(args: Namespace) -> list[str]:
    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


def _admin_keys(args: Namespace) -> list[str]:
    options = getattr(args, "pte_service", None)
    given = options.admin_key if options is not None else None
    return [key for key in (given or os.environ.get(ADMIN_KEY),) if key]
