"""Servers of a module's own, and a browser; tests/conftest.py has servers that modules share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.harness.server import Server
from tests.harness.zygote import Zygote

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def serve(
    tmp_path_factory: pytest.TempPathFactory, zygote: Zygote | None
) -> Iterator[Callable[..., Server]]:
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
            log = directory / "log"
            server = Server(model, adapters or {}, log=log, flags=flags, env=env, zygote=zygote)
            servers.enter_context(server).wait_ready()
            started.append(server)
            return server

        yield start
        for server in started:
            server.wait_idle()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without its sandbox, which does not start for root.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
