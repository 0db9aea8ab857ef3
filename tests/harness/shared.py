"""Servers that modules of tests use one after another; `kinds.py` says which there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.harness.kinds import ADMIN_KEY, CHAT_TEMPLATE, KINDS, Kind
from tests.harness.models import write_probes
from tests.harness.server import Server
from tests.harness.zygote import Zygote


class SharedServers:
    """Keeps a server of each kind that was asked for, until it is closed.

    Args:
        model: what they serve.
        make_directory: makes a directory for the files of one server.
        zygote: starts them, where it is not to be done by command.
    """

    def __init__(
        self, model: Callable[[], Path], make_directory: Callable[[], Path], zygote: Zygote | None
    ) -> None:
        self._model, self._make_directory, self._zygote = model, make_directory, zygote
        self._running: dict[str, Server] = {}
        self._exit = ExitStack()

    def get(self, name: str, adapters: Mapping[str, Path]) -> Server:
        """Return the server of a kind, with these adapters, no others, and an empty cache."""
        server = self._running.get(name)
        if server is None or not server.is_running():
            server = self._running[name] = self._start(KINDS[name])
        server.reset(adapters)
        return server

    def close(self) -> None:
        """End all of them."""
        self._exit.close()

    def _start(self, kind: Kind) -> Server:
        directory = self._make_directory()
        (directory / "admin-key").write_text(f"{ADMIN_KEY}\n")
        (directory / "adapters").mkdir()
        (directory / "template.jinja").write_text(CHAT_TEMPLATE)
        write_probes(directory / "probes.safetensors")
        # In memory where there is such a place: a version is synced before it is served, which
        # takes seconds on a busy disk, and some samples that it should meet last no longer.
        in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        spool = Path(self._exit.enter_context(TemporaryDirectory(dir=in_memory)), "spool")
        flags = [flag.format(directory=directory) for flag in kind.flags]
        server = Server(
            self._model(),
            {},
            log=directory / "log",
            flags=["--pte-spool", str(spool), *flags],
            env={name: value.format(directory=directory) for name, value in kind.env.items()},
            key=kind.key,
            zygote=None if kind.by_command else self._zygote,
        )
        self._exit.enter_context(server).wait_ready()
        return server
