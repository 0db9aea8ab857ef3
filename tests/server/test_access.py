"""Every route of the app, vLLM's and ours, is in the table of who may call it, and is guarded."""

from __future__ import annotations

import asyncio
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.tasks import SupportedTask
from vllm.utils.argparse_utils import FlexibleArgumentParser

from pte_vllm.engine.headers import SENT
from pte_vllm.method.options import EngineConfig
from pte_vllm.serve import parse_vllm_args
from pte_vllm.server.access.auth import Keys
from pte_vllm.server.access.option_headers import OptionHeaders
from pte_vllm.server.access.table import (
    BASE_WEIGHT_ROUTES,
    CHANGE,
    OPEN,
    SLEEP_ROUTES,
    USE,
    Access,
    access_of,
)
from tests.harness.engine import BLOCK

API, ADMIN = "key-of-users", "key-of-admins"
RENDERING = ("render", "derender")
TASKS: tuple[SupportedTask, ...] = ("generate", "render")


def _app(monkeypatch: pytest.MonkeyPatch, *, development: bool, pte: bool = True) -> FastAPI:
    """Build vLLM's app as a server does, with what makes it attach all that it has."""
    monkeypatch.setenv("VLLM_PLUGINS", "pte")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", str(int(development)))
    words = ["--model", "any", "--api-key", API, "--enable-tokenizer-info-endpoint"]
    words += [
        "--enable-scale-out",
        "--enable-fault-tolerance",
        "--profiler-config.profiler",
        "torch",
    ]
    words += ["--profiler-config.torch_profiler_dir", "/tmp"]
    if pte:
        words += ["--additional-config", '{"pte": {"window_tokens": 128}}']
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    monkeypatch.setenv("PTE_ADMIN_KEY", ADMIN)
    app = build_app(args, TASKS)
    app.state.pte_keys = Keys(Namespace(api_key=[API]))
    return app


def _routes(app: FastAPI) -> set[tuple[str, str]]:
    found = set()
    for route in app.routes:
        for method in getattr(route, "methods", None) or {"GET"}:
            found.add((method, getattr(route, "path", "")))
    return found


@pytest.fixture(params=[False, True], ids=["production", "development"])
def app(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    return _app(monkeypatch, development=request.param)


def test_every_route_is_in_the_table(app: FastAPI) -> None:
    unknown = [route for route in _routes(app) if access_of(*route) is None]
    assert not unknown, f"say in server/access/table.py who may call {sorted(unknown)}"
    assert not CHANGE & USE and not {path for _, path in map(str.split, CHANGE | USE)} & OPEN


def test_no_route_opens_without_its_key(app: FastAPI) -> None:
    client = TestClient(app, raise_server_exceptions=False)
    checked = 0
    for method, template in sorted(_routes(app)):
        access, path = access_of(method, template), re.sub(r"\{\w+\}", "x", template)
        for key in (None, "wrong", API):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            if access is Access.OPEN or (access is Access.USE and key == API):
                continue
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 401, (method, path, key, answer.text)
            checked += 1
    assert checked > 150


@pytest.mark.parametrize("path", ["/nothing", "/adapters/", "/tokenize/", "/pte/v1"])
def test_what_nobody_answers_needs_a_key(app: FastAPI, path: str) -> None:
    client = TestClient(app, follow_redirects=False)
    assert client.get(path).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/pte", "/metrics", "/metrics/"])
def test_what_is_open_is_not_refused(app: FastAPI, path: str) -> None:
    client = TestClient(app, raise_server_exceptions=False)
    assert client.get(path).status_code != 401  # without an engine, /health has no answer


def test_plain_vllm_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(
        _app(monkeypatch, development=False, pte=False), raise_server_exceptions=False
    )
    assert client.post("/tokenize", json={}).status_code != 401
    assert client.get("/pte/v1/info").status_code == 401


@pytest.mark.parametrize("development", [False, True])
def test_every_route_is_there_once(monkeypatch: pytest.MonkeyPatch, development: bool) -> None:
    """Our routes work beside vLLM's own, where the operator switched those on."""
    from vllm.entrypoints.rl.factories import register_rl_api_routers
    from vllm.entrypoints.scale_out.factories import register_scale_out_api_routers
    from vllm.entrypoints.serve import register_vllm_dev_api_routers
    from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins

    monkeypatch.setenv("VLLM_PLUGINS", "pte")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", str(int(development)))
    app = FastAPI()
    app.state.args = Namespace(
        additional_config={"pte": {}},
        api_key=None,
        enable_scale_out=True,  # as pte-vllm serve starts it
        tokens_only=False,
    )
    if development:
        register_vllm_dev_api_routers(app)
        register_rl_api_routers(app)
    register_scale_out_api_routers(app, ("generate",))
    attach_endpoint_plugins(app, ("generate",))
    counts = Counter(
        (route.path, method)
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    )
    assert counts["/pause", "POST"] == counts["/inference/v1/generate", "POST"] == 1
    assert counts["/update_weights", "POST"] == 1
    assert max(counts.values()) == 1
    endpoints = {route.path: route.endpoint for route in app.routes if isinstance(route, APIRoute)}
    for path in (*SLEEP_ROUTES, "/collective_rpc"):  # vLLM's in its development mode, else refused
        assert endpoints[path].__module__.startswith("vllm.") == development, path
    for path in BASE_WEIGHT_ROUTES:  # no weight transfer can be configured
        assert endpoints[path].__module__.startswith("pte_vllm."), path
    tokens = {f"/v1/{kind}completions/{name}" for kind in ("", "chat/") for name in RENDERING}
    tokens |= {"/inference/v1/generate", "/inference/v1/abort_requests"}
    assert tokens | {"/pause"} <= app.openapi()["paths"].keys()


@pytest.mark.parametrize("flag", [None, "--enable-scale-out", "--no-enable-scale-out"])
def test_routes_of_tokens_are_open_unless_the_operator_says_no(
    tiny: Callable[[str], Path], flag: str | None
) -> None:
    flags = ["--block-size", str(BLOCK), *([flag] if flag else [])]
    args, _ = parse_vllm_args(str(tiny("qwen3")), EngineConfig(window_tokens=4 * BLOCK), flags)
    assert args.enable_scale_out == (flag != "--no-enable-scale-out")


def test_headers_of_options_let_all_else_pass() -> None:
    """What starts and ends an app goes through the same middleware, and has no path."""
    seen: list[dict] = []

    async def app(scope: dict, receive: object, send: object) -> None:
        seen.append({**scope, "sent": SENT.get()})

    async def run() -> None:
        for scope in (
            {"type": "lifespan"},
            {"type": "websocket", "path": "/", "headers": [(b"x-pte-window", b"64")]},
            {"type": "http", "path": "/v1/x", "headers": [(b"X-PTE-Window", b" 64")]},
            {"type": "http", "path": "/pte/v1/x", "headers": [(b"x-pte-window", b"64")]},
        ):
            await OptionHeaders(app)(scope, None, None)

    asyncio.run(run())
    assert [scope["sent"] for scope in seen] == [None, None, {"pte_window": "64"}, None]
