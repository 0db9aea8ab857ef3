"""Two servers behind vllm-router: what docs/deploy.md says about several servers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from pte_vllm.launch import ProcessGroup, free_port
from pte_vllm.wire.client import RolloutClient, ServerError
from tests.docker.files import ROOT
from tests.harness.models import random_tokens
from tests.harness.server import WINDOW, Server

REQUIREMENT = "vllm-router==0.1.17"
VENV = ROOT / ".cache/vllm-router"
PROMPT = random_tokens(40)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def router_command() -> str:
    """vllm-router in a venv of its own, made once."""
    command = VENV / "bin/vllm-router"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        pip = [VENV / "bin/python", "-m", "pip", "install", "-q", "--only-binary", ":all:"]
        subprocess.run([*pip, REQUIREMENT], check=True)
    return str(command)


@pytest.fixture(scope="module")
def servers(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        found = [
            stack.enter_context(
                Server(
                    tiny("llama"),
                    {},
                    log=folder / f"server-{i}.log",
                    flags=["--pte-spool", str(folder / f"spool-{i}")],
                )
            )
            for i in range(2)
        ]
        for server in found:
            server.wait_ready()
        yield found


@pytest.fixture(scope="module")
def router(
    router_command: str, servers: list[Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    port, urls = free_port(), [server.url for server in servers]
    command = [router_command, "--policy", "consistent_hash", "--worker-urls", *urls]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    command += ["--worker-startup-check-interval", "1"]
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/v1/models").is_success
        except httpx.TransportError:
            return False

    with ProcessGroup(command, log=tmp_path_factory.mktemp("router") / "log") as process:
        process.wait_until(ready, timeout_s=120)
        yield url


def complete(url: str, prompt: list[int], *, session: str, **options: object) -> httpx.Response:
    body = {
        "model": "base",
        "prompt": prompt,
        "max_tokens": 2 * WINDOW,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": {"pte_window": WINDOW, **options},
    }
    headers = {"X-Session-ID": session}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=300)


def test_a_session_stays_on_its_server(servers: list[Server], router: str) -> None:
    owners = set()
    for i in range(64):  # ports differ from run to run, and some split sessions unevenly
        if len(owners) == 2 and i >= 4:
            break
        session = f"session-{i}"
        reply = complete(router, PROMPT, session=session).raise_for_status().json()
        prompt = [*PROMPT, *reply["choices"][0]["token_ids"], 7]
        more = complete(router, prompt, session=session, pte_state_id=reply["id"])
        assert more.is_success, more.text
        path = f"/pte/v1/thoughts/{reply['id']}"
        (owner,) = [s for s in servers if httpx.get(s.url + path).is_success]
        (other,) = [s for s in servers if s is not owner]
        owners.add(owner.url)
        lost = complete(other.url, prompt, session=session, pte_state_id=reply["id"])
        assert lost.status_code == 400 and "pte_state_id" in lost.text
        again = complete(other.url, prompt, session=session, pte_pin_tokens=len(PROMPT))
        assert again.is_success, again.text
    assert len(owners) == 2, "all sessions went to one server"


def test_adapters_are_pushed_to_each(
    servers: list[Server], router: str, adapters: Callable[..., Path], tiny: Callable[[str], Path]
) -> None:
    adapter = adapters(tiny("llama"), rank=8)
    with (
        RolloutClient(router, retry_s=0.0) as client,
        pytest.raises(ServerError, match="PUT /pte/v1/adapters/policy: 400 Invalid JSON"),
    ):
        client.push(adapter, "policy", version=7)  # the router takes it for one of its own requests
    with RolloutClient(servers[0].url) as client:
        assert client.push(adapter, "policy", version=7) == 7
    body = {"token_ids": [PROMPT], "adapter": "policy", "min_weight_version": 7}
    behind = httpx.post(f"{servers[1].url}/pte/v1/rollouts", json=body, timeout=60)
    assert behind.status_code == 404, behind.text
    for _ in range(2):  # again, for those of a push that was cut off
        for server in servers:
            with RolloutClient(server.url) as client:
                assert client.push(adapter, "policy", version=7) == 7
    for i in range(4):
        headers = {"X-Session-ID": f"session-{i}"}
        body = {"model": "policy@7", "prompt": PROMPT, "max_tokens": 4}
        reply = httpx.post(f"{router}/v1/completions", json=body, headers=headers, timeout=60)
        assert reply.raise_for_status().json()["model"] == "policy@7"
