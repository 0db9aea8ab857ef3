"""Pushes are cut, wrong or come at once; versions are whole, strictly rise, and are seen."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from pte_vllm.adapter.hashes import content_hash, file_hashes
from pte_vllm.server.adapters import spool as spool_module
from pte_vllm.server.adapters.spool import Spool
from pte_vllm.wire.client import RolloutClient, ServerError
from tests.faults.conftest import Held
from tests.faults.spooling import push
from tests.harness.server import Server

CLIENTS, PUSHES = 6, 5


def test_clock_that_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a version is shown, and decides nothing."""
    clock = itertools.count(1e9, -1e6)
    monkeypatch.setattr(spool_module.time, "time", lambda: next(clock))
    spool = Spool(tmp_path)
    made = [push(spool, "policy", number) for number in (9, 10, 11)]
    assert made[0].created_s > made[1].created_s > made[2].created_s
    assert spool.versions() == made


@pytest.fixture(scope="module")
def weights(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> list[Path]:
    return [adapters(tiny("llama"), rank=8, rule="paper", seed=seed) for seed in range(CLIENTS)]


@pytest.fixture(scope="module")
def server(tiny: Callable[[str], Path], serve: Callable[..., Server]) -> Server:
    return serve(tiny("llama"))


def incoming(server: Server) -> list[Path]:
    directory = server.spool / "incoming"
    return list(directory.iterdir()) if directory.exists() else []


def request(server: Server, path: Path, name: str, **fields: str) -> httpx.Request:
    files = {f.name: (f.name, f.read_bytes()) for f in path.iterdir()}
    data = {"sha256": content_hash(file_hashes(path)), **fields}
    url = f"{server.url}/pte/v1/adapters/{name}"
    made = httpx.Request("PUT", url, files=files, data=data)
    made.read()
    return made


@pytest.mark.slow
def test_pushes_that_are_cut(server: Server, weights: list[Path]) -> None:
    whole = request(server, weights[0], "cut")
    lines = [f"PUT {whole.url.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in whole.headers.items()]
    head, body = ("\r\n".join(lines) + "\r\n\r\n").encode(), whole.content
    with RolloutClient(server.url) as client:
        client.push(weights[1], "other")
        before, files = client.adapters(), Held.by(server).files
        for part in (0.0, 0.3, 0.6, 0.99, 0.9999):
            for reset in (False, True):
                with socket.create_connection(("127.0.0.1", server.port)) as connection:
                    connection.sendall(head + body[: int(part * len(body))])
                    time.sleep(0.1)
                    if reset:  # at once, whatever is under way
                        linger = struct.pack("ii", 1, 0)
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        changed = bytearray(body)
        changed[len(body) // 2] ^= 1
        answer = httpx.put(
            whole.url, content=bytes(changed), headers=dict(whole.headers), timeout=60
        )
        assert answer.status_code == 400 and "files that arrived" in answer.text
        wrong = request(server, weights[0], "cut", sha256="0" * 64)
        with httpx.Client(timeout=60) as sender:
            assert "files that arrived" in sender.send(wrong).text
            deadline = time.monotonic() + 30
            while incoming(server) or Held.by(server).files > files + 2:
                assert time.monotonic() < deadline, (incoming(server), Held.by(server), files)
                time.sleep(0.1)
            assert client.adapters() == before
            assert sender.send(whole).json()["engine_name"] == "cut@1"
            assert sender.send(whole).status_code == 201  # without a number: the next version
        for number, what in ((1, "has other files"), (2, "has other files")):
            with pytest.raises(ServerError, match=what) as conflict:
                client.push(weights[2], "cut", number)
            assert conflict.value.status == 409
        assert client.push(weights[2], "cut") == 3


@pytest.mark.slow
def test_many_push_at_once(server: Server, weights: list[Path]) -> None:
    """Everyone gets a number of its own, and then samples that version or a newer one."""
    pushed: list[tuple[int, int]] = []
    newest_seen: list[int] = []
    stop = threading.Event()

    def push_and_sample(number: int) -> None:
        with RolloutClient(server.url) as client:
            last = 0
            for _ in range(PUSHES):
                version = client.push(weights[number], "shared")
                pushed.append((version, number))
                assert version > last
                last = version
                (record,) = client.rollouts(
                    [[5, 6, number]],
                    adapter="shared",
                    min_weight_version=version,
                    sampling={"max_tokens": 2},
                )
                (span,) = record.weight_versions
                assert span.version >= version and record.adapter == f"shared@{span.version}"

    def watch() -> None:
        while not stop.is_set():
            answer = httpx.get(f"{server.url}/pte/v1/adapters/shared", timeout=60)
            if answer.status_code == 200:
                newest_seen.append(answer.json()["newest"])
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for done in [pool.submit(push_and_sample, number) for number in range(CLIENTS)]:
            done.result(timeout=600)
    stop.set()
    watcher.join()
    owner = dict(pushed)
    assert sorted(version for version, _ in pushed) == list(range(1, CLIENTS * PUSHES + 1))
    assert newest_seen == sorted(newest_seen) and newest_seen[-1] == CLIENTS * PUSHES
    for version in server.get("/pte/v1/adapters/shared")["versions"]:
        files = weights[owner[version["version"]]]
        assert version["sha256"] == content_hash(file_hashes(files))
