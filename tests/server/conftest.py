"""Servers of the tests: of a module's own, or shared by modules that need no flags of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from pte_vllm.server.access.auth import ADMIN_KEY
from tests.harness.server import Server

SHARED_KEEP_THOUGHTS = 12
"""`--pte-keep-thoughts` of shared servers."""


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts a server that is ready; after the module it must become idle, and ends."""
    started: list[Server] = []
    with ExitStack() as servers:

        def start(
            model: Path,
            adapters: Mapping[str, Path] | None = None,
            *,
            flags: Sequence[str] = (),
            env: Mapping[str, str] | None = None,
        ) -> Server:
            directory = tmp_path_factory.mktemp("server")
            flags = ["--pte-spool", str(directory / "spool"), *flags]
            server = Server(model, adapters or {}, log=directory / "log", flags=flags, env=env)
            servers.enter_context(server).wait_ready()
            started.append(server)
            return server

        yield start
        for server in started:
            server.wait_idle()


@pytest.fixture(scope="session")
def _running() -> Iterator[tuple[dict[str | None, Server], ExitStack]]:
    """Keep shared servers, by their admin key, until the tests end."""
    with ExitStack() as servers:
        yield {}, servers


@pytest.fixture(scope="module")
def shared(
    _running: tuple[dict[str | None, Server], ExitStack],
    tiny: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Server]]:
    """Gives a server that modules use one after another, with adapters and an empty cache.

    A start costs half a minute of a CPU. One process of pytest-xdist runs all modules that use
    it (`SHARE_A_SERVER`); after each the server must become idle.
    """
    running, servers = _running
    given: list[Server] = []

    def get(adapters: Mapping[str, Path] | None = None, *, admin_key: str | None = None) -> Server:
        if admin_key not in running:
            directory = tmp_path_factory.mktemp("shared")
            flags = [
                *("--pte-spool", str(directory / "spool"), "--enable-prompt-tokens-details"),
                *("--pte-keep-thoughts", str(SHARED_KEEP_THOUGHTS)),
            ]
            env = {} if admin_key is None else {ADMIN_KEY: admin_key}
            server = Server(tiny("qwen3"), {}, log=directory / "log", flags=flags, env=env)
            servers.enter_context(server).wait_ready()
            running[admin_key] = server
        server = running[admin_key]
        server.reset(adapters or {}, admin_key=admin_key)
        given.append(server)
        return server

    yield get
    for server in given:
        server.wait_idle()
