"""Running samples meet a new version of their adapter, and a server that has too many."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from pte_vllm.wire.client import RolloutClient, ServerError
from pte_vllm.wire.rollout import Rollout
from tests.harness.engine import BLOCK
from tests.harness.kinds import MAX_ROLLOUTS
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE, replayed
from tests.harness.server import NUM_BLOCKS, Server

TEMPERATURE = 0.8
KEPT_VERSIONS = 3
EARLY, LENGTH = 200, 1600
"""How long samples are that a new version should meet: it has seconds to arrive."""


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def weights(model: Path, adapters: Callable[..., Path]) -> list[Path]:
    """Make the two adapters of which versions are pushed: version v is `weights[v % 2]`."""
    return [adapters(model, rank=8, rule=rule, seed=i) for i, rule in enumerate(("ridge", "paper"))]


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server]) -> Server:
    return shared("loaded")


@pytest.fixture
def client(server: Server) -> Iterator[RolloutClient]:
    with RolloutClient(server.url) as client:
        yield client


def _sampling(max_tokens: int) -> dict[str, Any]:
    return {"max_tokens": max_tokens, "temperature": TEMPERATURE, "seed": 7, "ignore_eos": True}


def _check(
    server: Server, weights: list[Path], record: Rollout, probes: Path | None = None
) -> None:
    """Compare every span of a record with the replay of its version."""
    for span in record.weight_versions:
        tokens = list(record.token_ids[: len(record.prompt_ids) + span.end])
        expected = replayed(
            server.model,
            weights[span.version % 2],
            tokens,
            record.plan,
            temperature=TEMPERATURE,
            probes=probes,
            record=record.kept or (),
        )[len(record.prompt_ids) - 1 :][span.start : span.end]
        found = torch.tensor(record.logprobs[span.start : span.end])
        worst = (found - expected).abs().max().item()
        print(f"version {span.version}, [{span.start}, {span.end}): max |Δ log p| {worst:.1e}")
        assert worst <= TOLERANCE


@pytest.mark.parametrize(
    ("options", "versions", "reason"),
    [
        ({"in_flight": "switch_rebuild"}, [1, 2], "length"),
        ({"in_flight": "pin"}, [1], "length"),
        ({"max_staleness": 1}, [1], "length"),
        ({"max_staleness": 0}, [1], "abort"),
    ],
)
def test_new_version_while_sampling(
    server: Server, weights: list[Path], options: dict, versions: list[int], reason: str
) -> None:
    name = f"policy-{'-'.join(map(str, options.values()))}"
    body = {
        "token_ids": [random_tokens(40, 500, 1)],
        "n": 2,
        "adapter": name,
        "sampling": _sampling(LENGTH),
        **options,
    }
    with RolloutClient(server.url) as pusher, ThreadPoolExecutor(1) as pool:
        pusher.push(weights[1], name)
        answer = pool.submit(httpx.post, f"{server.url}/pte/v1/rollouts", json=body, timeout=300)
        server.wait_running(2)
        server.pace(EARLY)
        assert pusher.push(weights[0], name) == 2
        records = [Rollout.from_json(line) for line in answer.result().text.split("\n") if line]
    assert len(records) == 2
    for record in records:
        assert [span.version for span in record.weight_versions] == versions
        assert record.finish_reason == reason
        if reason == "length":
            assert len(record.completion_ids) == LENGTH and len(record.fold_events) > 20
        else:
            assert EARLY < len(record.completion_ids) < LENGTH
        assert record.adapter == f"{name}@{versions[-1]}"
        _check(server, weights, record)
    httpx.delete(f"{server.url}/pte/v1/adapters/{name}").raise_for_status()


def test_versions_come_faster_than_samples_catch_up(
    server: Server, weights: list[Path], probes: Path
) -> None:
    """A part that is stopped before it samples has folded less often than the one before it."""
    body = {
        "token_ids": [random_tokens(40, 500, 1)],
        "n": 4,
        "adapter": "hasty",
        "sampling": _sampling(LENGTH),
        "window_tokens": 2 * BLOCK,
        "keep_tokens": 2 * BLOCK,
        "keep_score": "random",
        "evict_seed": 5,
        "in_flight": "switch_rebuild",
    }
    with RolloutClient(server.url) as pusher, ThreadPoolExecutor(1) as pool:
        pusher.push(weights[1], "hasty")
        answer = pool.submit(httpx.post, f"{server.url}/pte/v1/rollouts", json=body, timeout=300)
        server.wait_running(4)
        server.pace(EARLY)
        for number in range(2, 6):
            assert pusher.push(weights[number % 2], "hasty") == number
        records = [Rollout.from_json(line) for line in answer.result().text.split("\n") if line]
    assert len(records) == 4
    for record in records:
        assert record.finish_reason == "length" and len(record.completion_ids) == LENGTH
        assert record.weight_versions[-1].version == 5
        assert sum(marks is not None for marks in record.kept or ()) > 40
        _check(server, weights, record, probes)
    httpx.delete(f"{server.url}/pte/v1/adapters/hasty").raise_for_status()


def test_staleness_and_policy_are_checked(
    server: Server, client: RolloutClient, weights: list[Path]
) -> None:
    for number in (1, 2):
        client.push(weights[number % 2], "checked")
    body = {"token_ids": [[5, 6]], "sampling": {"max_tokens": 2}, "adapter": "checked@1"}
    url = f"{server.url}/pte/v1/rollouts"
    answer = httpx.post(url, json={**body, "max_staleness": 0})
    assert answer.status_code == 409 and "1 versions old" in answer.text
    assert httpx.post(url, json={**body, "max_staleness": 1}).status_code == 200
    answer = httpx.post(url, json={**body, "in_flight": "switch_rebuild"})
    assert answer.status_code == 400 and "without @version" in answer.text
    answer = httpx.post(url, json={**body, "in_flight": "drift"})
    assert answer.status_code == 400 and "in_flight" in answer.text


def test_too_many_samples_get_429(server: Server, client: RolloutClient) -> None:
    """A request that comes alone is served whatever its size; the client waits for its turn."""
    # All of them run at once, and leave room for the request that keeps the time.
    body = {
        "token_ids": [[5, 6]],
        "n": MAX_ROLLOUTS + 5,
        "sampling": _sampling(400),
        "window_tokens": 2 * BLOCK,
    }
    url = f"{server.url}/pte/v1/rollouts"
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(httpx.post, url, json=body, timeout=300)
        server.wait_running(1)
        server.pace(150)
        answer = httpx.post(url, json={**body, "n": 1})
        assert answer.status_code == 429 and f"--pte-max-rollouts {MAX_ROLLOUTS}" in answer.text
        assert int(answer.headers["Retry-After"]) > 0
        score = {"token_ids": [[5, 6, 7]], "prompt_tokens": [1]}
        assert httpx.post(f"{server.url}/pte/v1/score", json=score).status_code == 429
        (record,) = client.rollouts([[5, 6]], sampling=_sampling(2))  # retried until there is room
        assert whole.result().text.count('"finish_reason":"length"') == MAX_ROLLOUTS + 5
    assert len(record.completion_ids) == 2


def _resident_mib(pid: int) -> float:
    """Return the memory of a process and its descendants."""
    import psutil

    root = psutil.Process(pid)
    return sum(p.memory_info().rss for p in (root, *root.children(recursive=True))) / 2**20


@pytest.mark.parametrize("pushes", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_pushes_under_load(server: Server, weights: list[Path], pushes: int) -> None:
    """Sixteen streams go on; none is dropped or mixes versions; nothing grows."""
    stop, finished = threading.Event(), threading.Semaphore(0)
    records, failures = [], []
    name = f"loaded-{pushes}"

    def sample(stream: int) -> None:
        length = 180 + 10 * stream  # so that samples end one by one
        with RolloutClient(server.url) as mine:
            while not stop.is_set():
                try:
                    (record,) = mine.rollouts(
                        [random_tokens(20 + stream, 500, stream)],
                        adapter=name,
                        sampling=_sampling(length),
                    )
                    assert len(record.completion_ids) == length
                    records.append(record)
                    finished.release()
                except (ServerError, OSError, AssertionError) as error:
                    failures.append(error)
                    return

    with RolloutClient(server.url) as pusher:
        pusher.push(weights[1], name)
        threads = [threading.Thread(target=sample, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        pid, memory, seconds = server._process.pid, [], []
        for number in range(2, pushes + 2):
            assert finished.acquire(timeout=300)  # streams use versions as they come
            began = time.monotonic()
            assert pusher.push(weights[number % 2], name) == number
            (first,) = pusher.rollouts(
                [[number]], adapter=name, min_weight_version=number, sampling=_sampling(1)
            )
            seconds.append(time.monotonic() - began)
            assert first.weight_versions[0].version == number
            if number > pushes // 4:  # caches are warm
                memory.append(_resident_mib(pid))
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert len(records) >= pushes
    assert all(len(r.weight_versions) == 1 for r in records)
    checked = {r.weight_versions[0].version: r for r in records}
    assert len(checked) > pushes // 4
    for record in list(checked.values())[:: max(1, len(checked) // 8)]:
        _check(server, weights, record)
    report = server.wait_idle()
    assert report["free_blocks"] == report["usable_blocks"] == NUM_BLOCKS
    for _ in range(60):  # what has just been retired keeps its files for ten seconds
        kept = [entry for entry in os.listdir(server.spool) if entry.startswith(f"{name}@")]
        if len(kept) == KEPT_VERSIONS:
            break
        time.sleep(0.5)
    with RolloutClient(server.url) as pusher:
        assert len(pusher.adapters()[name]["versions"]) == len(kept) == KEPT_VERSIONS
    # One version a training step, for weeks: what names those that left must leave too.
    served = {entry.rpartition("-")[0] for entry in kept}
    assert set(re.findall(rf"{name}@\d+", httpx.get(f"{server.url}/metrics").text)) <= served
    growth = max(memory[-5:]) - max(memory[:5])
    seconds.sort()
    print(
        f"{pushes} pushes, {len(records)} samples on {len(checked)} versions; push to first token "
        f"{seconds[len(seconds) // 2]:.2f} s median, {seconds[-1]:.2f} s most; memory "
        f"{memory[0]:.0f} to {memory[-1]:.0f} MiB"
    )
    assert growth < 24, memory
