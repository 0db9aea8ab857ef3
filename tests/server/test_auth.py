"""These tests try which key opens which of our routes, and what none of them takes."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import Request

from pte_vllm.cli.main import main
from pte_vllm.server.access.auth import ADMIN_KEY as ADMIN_VARIABLE
from pte_vllm.server.access.auth import Keys, admit_admin
from pte_vllm.server.options import ServiceConfig
from tests.harness.kinds import ADMIN_KEY as ADMIN
from tests.harness.kinds import API_KEY as API
from tests.harness.kinds import SMALL_BODY_BYTES as MAX_BYTES
from tests.harness.server import Server


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
    monkeypatch.delenv(ADMIN_VARIABLE, raising=False)
    if admin is not None:
        monkeypatch.setenv(ADMIN_VARIABLE, admin)
    _check(Namespace(api_key=api or None), {*api, admin}, use, change)
    # The flag, where it is given, goes before the environment.
    if admin is not None:
        monkeypatch.setenv(ADMIN_VARIABLE, "stale")
        options = ServiceConfig(admin_key=admin)
        _check(Namespace(api_key=api or None, pte_service=options), {*api, admin}, use, change)
        assert not Keys(Namespace(api_key=None, pte_service=options)).allow_change(
            _request("stale")
        )


def _check(args: Namespace, known: set, use: set[str | None], change: set[str | None]) -> None:
    given = list(args.api_key or [])
    admit_admin(args)  # as the server does; must not open anything
    assert args.api_key is None or set(given) <= set(args.api_key) <= known
    keys = Keys(args)
    for key in {None, "x", *known}:
        assert keys.allow_use(_request(key)) == (key in use), key
        assert keys.allow_change(_request(key)) == (key in change), key


def test_the_admin_key_is_not_shown() -> None:
    assert ADMIN not in repr(ServiceConfig(admin_key=ADMIN))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pte-admin-key", " "], "--pte-admin-key is empty"),
        (["--pte-admin-key-file", "{tmp}/none"], "--pte-admin-key-file .* cannot be read"),
        (["--pte-admin-key-file", "{tmp}/empty"], "--pte-admin-key-file .* is empty"),
        (["--pte-max-body-bytes", "0"], "--pte-max-body-bytes must be positive"),
    ],
)
def test_wrong_flags_are_named(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("\n")
    assert main(["serve", "model", *(flag.format(tmp=tmp_path) for flag in flags)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture(scope="module")
def server(
    shared: Callable[..., Server], tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> Server:
    return shared("keys", {"paper": adapters(tiny("qwen3"), rank=8, rule="paper")})


def test_log_says_what_speeds_up_a_cpu(server: Server) -> None:
    log = server.log.read_text()
    assert "LoRA on CPU: compiled code" in log


def _call(server: Server, method: str, path: str, key: str | None, **options) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    return httpx.request(method, server.url + path, headers=headers, timeout=60, **options)


def _routes(server: Server) -> list[tuple[str, str]]:
    """Return our routes as `(method, path)`, as the server's own description lists them."""
    paths = _call(server, "GET", "/openapi.json", API).json()["paths"]
    ours = [
        (method.upper(), path.replace("{name}", "policy").replace("{request_id}", "cmpl-1"))
        for path, methods in paths.items()
        for method, about in methods.items()
        if {"pte", "control", "trainers"} & set(about.get("tags", ()))
    ]
    assert ("POST", "/pte/v1/rollouts") in ours and ("DELETE", "/pte/v1/adapters/policy") in ours
    return ours


LORA_ROUTES = [("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter")]


def test_every_route_needs_a_key(server: Server) -> None:
    for method, path in [*_routes(server), *LORA_ROUTES]:
        for key in (None, "wrong", API[:-1], f"{API}x"):
            answer = _call(server, method, path, key, json={})
            assert answer.status_code == 401, (method, path, key, answer.text)
            assert API not in answer.text and ADMIN not in answer.text
    for key in (API, ADMIN):
        assert _call(server, "GET", "/pte/v1/info", key).status_code == 200


def test_changes_need_the_admin_key(server: Server) -> None:
    changes = [
        *(("PUT", "/pte/v1/adapters/policy"), ("DELETE", "/pte/v1/adapters/policy")),
        *LORA_ROUTES,
    ]
    for method, path in changes:
        answer = _call(server, method, path, API, json={"lora_name": "paper"})
        assert answer.status_code == 401 and "--pte-admin-key" in answer.text, (path, answer.text)
        nowhere = {"lora_name": "none", "lora_path": str(server.log.parent / "none")}
        answer = _call(server, method, path, ADMIN, json=nowhere)
        assert answer.status_code in (400, 404), (path, answer.text)
    listed = _call(server, "GET", "/v1/models", API).json()["data"]
    assert [model["id"] for model in listed] == ["base", "paper"]


def test_keys_are_in_no_log_and_no_reply(server: Server) -> None:
    for query in ("", "?config_format=json"):
        answer = _call(server, "GET", f"/server_info{query}", ADMIN)
        assert answer.status_code == 200 and "vllm_config" in answer.json()
        assert ADMIN not in answer.text and API not in answer.text
    log = server.log.read_text()
    assert "Resolved architecture" in log  # vLLM logs at length
    assert ADMIN not in log and API not in log


def test_large_bodies_are_refused(server: Server) -> None:
    body = b'{"token_ids": [[' + b"1," * MAX_BYTES + b"1]]}"
    headers = {"Authorization": f"Bearer {ADMIN}", "Content-Type": "application/json"}

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    for path in ("/pte/v1/rollouts", "/pte/v1/score", *(path for _, path in LORA_ROUTES)):
        for content in (body, chunks()):  # with a declared length, and without
            answer = httpx.post(server.url + path, content=content, headers=headers, timeout=60)
            assert answer.status_code == 413, answer.text
            assert f"--pte-max-body-bytes, {MAX_BYTES}" in answer.text
    # vLLM's own routes take what they took, and a small body is fine in chunks too.
    prompt = {"model": "base", "prompt": "a" * MAX_BYTES, "max_tokens": 1}
    answer = _call(server, "POST", "/v1/completions", API, json=prompt)
    assert answer.status_code == 400 and "context length" in answer.text
    small = b'{"token_ids": [[5, 6]], "sampling": {"max_tokens": 2}}'
    answer = httpx.post(
        f"{server.url}/pte/v1/rollouts", content=iter([small]), headers=headers, timeout=60
    )
    assert answer.status_code == 200 and len(answer.json()["completion_ids"]) == 2


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", "...", "%2e%2e", "..%2f..%2fescaped", "a%2f..%2f..%2fescaped", "a/../../b"),
        *("..\\escaped", "a b", "a%00b", "%c3%bc", "a@1", "a" * 65, "~", "$HOME", "a%0a"),
    ],
)
def test_names_never_leave_the_spool(server: Server, name: str) -> None:

    def found() -> dict[Path, int]:
        roots = (server.log.parent, server.spool.parent)
        paths = [path for root in roots for path in root.rglob("*") if path != server.log]
        return {path: path.stat().st_size for path in paths}

    before = found()
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    url = httpx.URL(f"{server.url}/", raw_path=f"/pte/v1/adapters/{name}".encode())
    for method, options in (("PUT", {"files": files, "data": {"sha256": "0"}}), ("DELETE", {})):
        answer = httpx.request(
            method, url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60, **options
        )
        assert 400 <= answer.status_code < 500, (name, answer.status_code, answer.text)
    assert found() == before
