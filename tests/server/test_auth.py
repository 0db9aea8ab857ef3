"""Which key opens which route under `/pte/v1`."""

from __future__ import annotations

from argparse import Namespace

import pytest
from fastapi import Request

from pte_vllm.server.auth import ADMIN_KEY, Keys


def _request(key: str | None) -> Request:
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    return Request({"type": "http", "headers": headers})


@pytest.mark.parametrize(
    ("api", "admin", "use", "change"),
    [
        ([], None, {None, "x"}, {None, "x"}),
        (["a", "b"], None, {"a", "b"}, {"a", "b"}),
        ([], "root", {None, "x", "root"}, {"root"}),
        (["a"], "root", {"a", "root"}, {"root"}),
    ],
)
def test_keys(
    monkeypatch: pytest.MonkeyPatch,
    api: list[str],
    admin: str | None,
    use: set[str | None],
    change: set[str | None],
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv(ADMIN_KEY, raising=False)
    if admin is not None:
        monkeypatch.setenv(ADMIN_KEY, admin)
    keys = Keys(Namespace(api_key=api or None))
    for key in (None, "x", *api, *([admin] if admin else [])):
        assert keys.allow_use(_request(key)) == (key in use), key
        assert keys.allow_change(_request(key)) == (key in change), key
