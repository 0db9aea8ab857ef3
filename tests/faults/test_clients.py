"""Clients that send garbage, stall or leave: others are served, what was held is given back."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.faults.churn import check_answers, churn
from tests.faults.conftest import Held
from tests.harness.engine import BLOCK
from tests.harness.kinds import LARGE_BODY_BYTES
from tests.harness.models import random_tokens
from tests.harness.server import NUM_BLOCKS, Server
from tests.server.under_way import TEMPERATURE, check, post

JSON_HEADERS = {"Content-Type": "application/json"}
HUGE, DEEP = "9" * 5000, "[" * 100_000
ROLLOUT = '{"token_ids": [[5, 6]], "sampling": {"max_tokens": 2}, "adapter": null, %s}'


@pytest.fixture(scope="module")
def server(
    tiny: Callable[[str], Path], adapters: Callable[..., Path], shared: Callable[..., Server]
) -> Server:
    model = tiny("qwen3")
    served = {rule: adapters(model, rank=8, rule=rule) for rule in ("ridge", "paper")}
    server = shared("loaded", served)
    churn(server, 40, at_once=16, seed=0)  # so that pools and threads are there
    return server


@pytest.fixture
def held(server: Server) -> Iterator[None]:
    """Files, sockets and blocks are given back after the test, and answers are exact."""
    server.wait_idle()
    before = Held.by(server)
    yield
    report = server.wait_idle()
    assert report["free_blocks"] == report["usable_blocks"] == NUM_BLOCKS
    for _ in range(100):
        after = Held.by(server)
        if after.files <= before.files + 2:  # a connection of the test's own may stay open
            break
        time.sleep(0.1)
    assert after.files <= before.files + 2 and after.threads <= before.threads + 5, (before, after)
    serves(server)


def serves(server: Server) -> None:
    prompt = random_tokens(40, 500, 9)
    answer = server.complete(
        "ridge", prompt, 200, options={}, temperature=TEMPERATURE, logprobs=0, seed=3
    ).choices[0]
    logprobs = answer.logprobs.token_logprobs
    check(server, server.adapters["ridge"], prompt, answer.token_ids, logprobs)


@contextmanager
def memory_limit(server: Server, num_bytes: int) -> Iterator[None]:
    """Bound what the API server may allocate, so that no request takes the machine."""
    process = psutil.Process(server.pid)
    before = process.rlimit(psutil.RLIMIT_AS)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + num_bytes, before[1]))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_AS, before)


def bodies() -> list[tuple[str, bytes]]:
    """List paths and bodies, each of which is refused."""
    rollouts = [
        ROLLOUT % field
        for field in (
            '"n": 1000000000',
            f'"n": {HUGE}',
            '"n": NaN',
            '"n": 1e400',
            f'"window_tokens": {2**70}',
            '"window_tokens": 1e308',
            f'"min_weight_version": {2**70}',
            '"group_id": "\\ud800"',
            '"update": "\\u0000"',
            '"samples": [[1000000000000]]',
        )
    ]
    rollouts += [
        f'{{"token_ids": [[{2**70}]]}}',
        '{"token_ids": [[1.5]]}',
        '{"prompts": ["\\ud800"]}',
        '{"token_ids": [[5]], "sampling": {"temperature": Infinity}}',
        f'{{"token_ids": [[5]], "sampling": {{"max_tokens": {2**70}}}}}',
        DEEP,
        '{"token_ids": ' + DEEP,
        *("", "null", "[]", '"x"', '{"token_ids": [[1,'),
    ]
    completion = '{"model": "base", "prompt": [5, 6], "max_tokens": 2, "vllm_xargs": %s}'
    options = [
        f'{{"pte_window": {2**70}}}',
        '{"pte_pin_tokens": 1e308}',
        '{"pte_state_id": ["x"]}',
        '{"pte_state_id": "\\ud800"}',
        json.dumps({"pte_state_id": "cmpl-" + "-1" * 50_000}),
        '{"pte_update": "\\u0000"}',
        f'{{"other": {2**70}}}',
    ]
    return [
        *(("/pte/v1/rollouts", body.encode()) for body in rollouts),
        *(("/v1/completions", (completion % option).encode()) for option in options),
        ("/pte/v1/rollouts", b'{"token_ids": [[1, 2]], "adapter": "\xff\xfe"}'),
        ("/pte/v1/score", b'{"token_ids": [[5, 6, 7]], "prompt_tokens": [NaN]}'),
        ("/reset_prefix_cache", b"\xff"),
        ("/abort_requests", b'{"request_ids": [1]}'),
        ("/load_lora_adapter", b'{"lora_name": "x", "lora_path": "\\u0000"}'),
        ("/load_lora_adapter", b'{"lora_name": "\\ud800", "lora_path": "/"}'),
    ]


def test_garbage_in_bodies(server: Server, held: None) -> None:
    with memory_limit(server, 2 << 30), httpx.Client(base_url=server.url, timeout=60) as client:
        for path, body in bodies():
            answer = client.post(path, content=body, headers=JSON_HEADERS)
            assert 400 <= answer.status_code < 500, (path, body[:200], answer.text[:500])
            assert len(answer.text) < 2 * len(body) + 10_000
    assert server.healthy()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def head(path: str, *headers: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]
    return "\r\n".join(lines).encode()


RAW = [
    b"\x00\xff\xfe garbage\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\n\r\n",
    head("/pte/v1/rollouts", "X: " + "y" * 200_000),
    head("/pte/v1/rollouts", "Content-Length: -5"),
    head("/pte/v1/rollouts", "Content-Length: " + "9" * 30),
    head("/pte/v1/rollouts", "Transfer-Encoding: chunked") + b"zz\r\nnonsense",
    head("/pte/v1/adapters/x", "Content-Type: multipart/form-data", method="PUT"),
    head("/pte/v1/adapters/x", "Content-Length: 99999999999999", method="PUT"),
]


def test_garbage_on_the_wire(server: Server, held: None) -> None:
    for raw in RAW:
        with connect(server) as client:
            try:
                client.sendall(raw)
                status = client.recv(200)
            except ConnectionError:  # closed on the first bytes
                status = b""
            assert not status or status.startswith(b"HTTP/1.1 4"), (raw[:100], status)


def test_clients_that_stall(server: Server, held: None) -> None:
    """Clients send headers without an end, half a body, a byte now and then, or do not read."""
    length = "Content-Length: 5000"
    kind = "Content-Type: application/json"
    stream = b'{"model": "base", "prompt": [5, 6], "max_tokens": 3000, "stream": true, %s}'
    stream %= b'"ignore_eos": true'
    rollout = (
        b'{"token_ids": [[5, 6]], "n": 4, "sampling": {"max_tokens": 3000, "ignore_eos": true}}'
    )
    unread = [("/v1/completions", stream), ("/pte/v1/rollouts", rollout)]
    multipart = "Content-Type: multipart/form-data; boundary=b"
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(60)]
        for i, client in enumerate(clients):
            match i % 6:
                case 0:
                    client.sendall(head("/pte/v1/rollouts", kind)[:-2])
                case 1:
                    client.sendall(head("/v1/completions", kind, length) + b'{"model": ')
                case 2:
                    client.sendall(head("/pte/v1/adapters/x", multipart, length, method="PUT"))
                    client.sendall(
                        b'--b\r\nContent-Disposition: form-data; name="sha256"\r\n\r\nab'
                    )
                case 3:
                    path, body = unread[i % 2]
                    if i < 12:  # two of them run for as long as they are not left
                        client.sendall(head(path, kind, f"Content-Length: {len(body)}") + body)
                case 4:
                    client.sendall(head("/pte/v1/rollouts", kind, "Transfer-Encoding: chunked"))
                    client.sendall(b"1\r\n{\r\n")
        for _ in range(3):
            for client in clients[4::6]:
                client.sendall(b"1\r\n \r\n")
            began = time.monotonic()
            serves(server)
            assert time.monotonic() - began < 60


@pytest.mark.parametrize("path", ["/pte/v1/rollouts", "/pte/v1/score"])
def test_bodies_without_an_end(server: Server, held: None, path: str) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with connect(server) as client:
        client.sendall(head(path, "Content-Type: application/json", "Transfer-Encoding: chunked"))
        sent = 0
        try:
            while sent < 64 * LARGE_BODY_BYTES:
                client.sendall(chunk)
                sent += 0x10000
        except ConnectionError:  # it was answered, and closed
            pass
    assert sent < 32 * LARGE_BODY_BYTES
    body = b'{"token_ids": [[5]]' + b" " * LARGE_BODY_BYTES
    assert post(server, path, content=body, headers=JSON_HEADERS).status_code == 413


def test_short_requests_and_clients_that_leave(server: Server, held: None) -> None:
    """This is `test_churn.py` in small."""
    outcome = churn(server, 300, at_once=32, seed=2, keep=8)
    assert outcome.counts["left"] > 30 and len(outcome.answers) == 8
    check_answers(server, outcome)
    assert any(answer.window_tokens == 2 * BLOCK for answer in outcome.answers)
