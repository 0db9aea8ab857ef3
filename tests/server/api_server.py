"""Talks to one of several API servers that share a port: the system chooses, a connection stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import psutil

from tests.harness.server import Server

_TRIES = 60


def api_servers(server: Server) -> list[psutil.Process]:
    """Return the processes that answer HTTP, by their number."""
    found = {}
    for process in server.processes():
        title = " ".join(process.cmdline())
        if "APIServer" in title:
            found[title] = process
    return [found[title] for title in sorted(found)]


@contextmanager
def connected(server: Server, process: psutil.Process) -> Iterator[httpx.Client]:
    """Give a client whose one connection leads to that API server, for the length of the block."""
    port = httpx.URL(server.url).port
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)
    with ExitStack() as others:  # open connections have the system choose another process
        for _ in range(_TRIES):
            client = httpx.Client(base_url=server.url, timeout=300, limits=limits)
            with ExitStack() as mine:
                mine.enter_context(client)
                with client.stream("GET", "/health") as answer:
                    ours = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
                    answer.read()
                links = process.net_connections(kind="tcp")
                if any(link.raddr and link.raddr.port == ours for link in links):
                    others.close()
                    yield client
                    return
                others.push(mine.pop_all())
        raise AssertionError(f"no connection to {process} on port {port} in {_TRIES} tries")
