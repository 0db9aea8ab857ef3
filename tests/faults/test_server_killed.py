"""A server is killed at any moment: its spool stays whole, its processes end, clients go on."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from pte_vllm.adapter.hashes import CONFIG_FILE, LORA_FILE, content_hash, file_hashes
from pte_vllm.engine.orphans import GRACE_S, POLL_S
from pte_vllm.server.adapters.spool import Spool
from pte_vllm.wire.client import RolloutClient, ServerError
from tests.faults.killing import run_killed
from tests.faults.spooling import KEPT, content, push_versions
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE, replayed
from tests.harness.server import Server

PUSHES = 3
SAMPLING = {"max_tokens": 1200, "temperature": 0.8, "seed": 7, "ignore_eos": True}


def test_spool_is_whole_whenever_it_dies(tmp_path: Path) -> None:
    """Killed before each step of its file work: a version is there or not, and none that was
    acknowledged is lost."""
    for step in itertools.count(1):
        root, told = tmp_path / str(step) / "spool", tmp_path / str(step) / "told"
        told.mkdir(parents=True)
        taken = run_killed(step, root, push_versions, root, PUSHES, told)
        acknowledged = max((int(path.name) for path in told.iterdir()), default=0)
        spool = Spool(root)
        found = spool.versions()
        numbers = [version.number for version in found]
        newest = max(numbers, default=0)
        assert numbers == list(range(newest + 1 - len(numbers), newest + 1))
        assert len(numbers) <= KEPT + 1 and acknowledged <= newest <= acknowledged + 1
        for version in found:
            assert content_hash(file_hashes(version.path)) == version.sha256
            assert (Path(version.path) / LORA_FILE).read_bytes() == content(version.number)
            assert (Path(version.path) / CONFIG_FILE).read_bytes() == b"{}"
        if root.exists():
            assert list((root / "incoming").iterdir()) == []
            there = {"incoming", "lock", *(Path(version.path).name for version in found)}
            assert {path.name for path in root.iterdir()} == there
        if taken is not None:
            break
    assert step > 10 * PUSHES and numbers[-1] == PUSHES


def tree(server: Server) -> list[psutil.Process]:
    """Return the API server and all that it started."""
    root = psutil.Process(server.pid)
    return [root, *root.children(recursive=True)]


def kill_alone(server: Server) -> None:
    """The API server alone is killed, as when memory runs out; the engine must end by itself."""
    everyone = tree(server)
    assert any("EngineCore" in " ".join(process.cmdline()) for process in everyone)
    os.kill(everyone[0].pid, signal.SIGKILL)
    assert server._process is not None
    server._process.wait()
    server._process = None
    patience_s = POLL_S + GRACE_S + 60.0  # to end is work too, on a busy machine
    _, alive = psutil.wait_procs(everyone[1:], timeout=patience_s)
    assert not alive, alive


@pytest.mark.slow
def test_api_server_killed_alone(
    tiny: Callable[[str], Path], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    """Kill it as `test_rollouts.py` does, with all of its processes."""
    model = tiny("llama")
    paths = {
        f"{rule}@{number}": adapters(model, rank=8, rule=rule, seed=number)
        for rule in ("ridge", "paper")
        for number in (1, 2)
    }
    flags = ["--pte-spool", str(tmp_path / "spool")]
    prompts = [random_tokens(20 + 9 * i, 500, i) for i in range(4)]
    server = Server(model, {}, log=tmp_path / "log", flags=flags)
    with server, RolloutClient(server.url) as client:
        server.wait_ready()
        for name, path in paths.items():
            client.push(path, name.partition("@")[0])
        before = client.adapters()
        # More samples than run at once: some still wait when the first are there.
        stream = client.rollouts(prompts, n=12, adapter="ridge", sampling=SAMPLING)
        received = [next(stream)]
        body = {"model": "base", "prompt": [5, 6], "max_tokens": 3500, "ignore_eos": True}
        with (
            ThreadPoolExecutor(1) as pool,
            RolloutClient(server.url, retry_s=2.0) as impatient,
            httpx.stream(
                "POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=120
            ) as answer,
        ):
            long = {**SAMPLING, "max_tokens": 3500}
            refused = pool.submit(lambda: list(impatient.rollouts(prompts, sampling=long)))
            lines = answer.iter_lines()
            next(lines)
            kill_alone(server)
            with pytest.raises(httpx.TransportError):
                list(lines)
            with pytest.raises(ServerError, match="RemoteProtocolError|ReadError|ConnectError"):
                refused.result(timeout=120)
        server.__enter__()  # the same port, the same spool
        server.wait_ready()
        received += stream
        assert {(r.group_id, r.index) for r in received} == set(
            itertools.product("0123", range(12))
        )
        assert len(received) == 48
        assert client.adapters() == before
        for record in (received[0], received[9], received[-1]):
            check(server, paths, record)
        assert client.push(paths["paper@1"], "paper") == 3
        server.wait_idle()


def check(server: Server, paths: dict[str, Path], record) -> None:
    expected = replayed(
        server.model, paths[record.adapter], list(record.token_ids), record.plan, temperature=0.8
    )[len(record.prompt_ids) - 1 :]
    worst = (torch.tensor(record.logprobs) - expected).abs().max().item()
    print(f"{record.adapter}: {len(record.fold_events)} folds, max |Δ log p| {worst:.1e}")
    assert worst <= TOLERANCE


@pytest.mark.slow
def test_killed_while_pushes_come(
    tiny: Callable[[str], Path], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    """Whoever pushes goes on after the restart; no number is lost or means two things."""
    model, spool = tiny("llama"), tmp_path / "spool"
    weights = [adapters(model, rank=8, rule=rule, seed=5) for rule in ("ridge", "paper")]
    digests = [content_hash(file_hashes(path)) for path in weights]
    acknowledged: list[int] = []
    stop = threading.Event()

    def push() -> None:
        with RolloutClient(server.url, retry_s=900.0) as client:
            while not stop.is_set():
                acknowledged.append(client.push(weights[(len(acknowledged) + 1) % 2], "policy"))

    rng = random.Random(3)
    server = Server(model, {}, log=tmp_path / "log", flags=["--pte-spool", str(spool)])
    with server:
        server.wait_ready()
        pusher = threading.Thread(target=push)
        pusher.start()
        for kills in range(4):
            while len(acknowledged) < 6 * (kills + 1):
                assert pusher.is_alive()
                time.sleep(0.05)
            time.sleep(rng.uniform(0.0, 0.3))
            server.kill()
            torn = spool / "incoming" / "torn"  # as if a large file had been on its way
            shutil.copytree(weights[0], torn)
            os.truncate(torn / LORA_FILE, 100)
            server.__enter__()
            server.wait_ready()
            assert not torn.exists()
            told = acknowledged[-1]
            assert server.get("/pte/v1/adapters/policy")["newest"] >= told
        stop.set()
        pusher.join(timeout=120)
        listed = server.get("/pte/v1/adapters/policy")
        assert acknowledged == list(range(1, len(acknowledged) + 1))
        assert listed["newest"] == acknowledged[-1]
        for version in listed["versions"]:
            assert version["sha256"] == digests[version["version"] % 2]
        paths = {f"policy@{n}": weights[n % 2] for n in acknowledged}
        with RolloutClient(server.url) as client:
            (record,) = client.rollouts(
                [random_tokens(40)], adapter="policy", sampling={**SAMPLING, "max_tokens": 300}
            )
        check(server, paths, record)
        server.wait_idle()
