"""One server over several machines, as docs/deploy.md says: here processes of one machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from pte_vllm.launch import HOST, ProcessGroup, free_port, pte_command
from pte_vllm.wire.client import RolloutClient
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE
from tests.harness.server import Server
from tests.server.pushed import difference

pytestmark = pytest.mark.slow
SAMPLING = {"max_tokens": 300, "temperature": 0.8, "seed": 7, "ignore_eos": True}


@pytest.mark.parametrize("kind", ["ranks", "engines"])
def test_two_machines(
    kind: str, tiny: Callable[[str], Path], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny("qwen3")
    port = str(free_port())
    if kind == "ranks":
        common = ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", HOST]
        common += ["--master-port", port]
        first, second = ["--node-rank", "0"], ["--node-rank", "1"]
    else:
        common = ["--data-parallel-size", "2", "--data-parallel-size-local", "1"]
        common += ["--data-parallel-address", HOST, "--data-parallel-rpc-port", port]
        first, second = [], ["--data-parallel-start-rank", "1"]
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    flags = ["--pte-spool", str(tmp_path / "spool"), *common]
    server = Server(model, {}, log=tmp_path / "first.log", flags=[*flags, *first], env=env)
    at = server.command.index("serve") + 1
    command = pte_command("serve", *server.command[at:], *second, "--headless")
    path = adapters(model, rank=8, rule="ridge", seed=3)
    with (
        server,
        ProcessGroup(command, log=tmp_path / "second.log", env=server.env),
        RolloutClient(server.url) as client,
    ):
        server.wait_ready()
        assert client.push(path, "policy") == 1
        prompts = [random_tokens(20, 500, i) for i in range(2)]
        for record in client.rollouts(prompts, n=2, adapter="policy", sampling=SAMPLING):
            made = {"policy@1": path}
            assert difference(server, made, record, temperature=0.8) <= TOLERANCE
            assert record.fold_events
        report = server.wait_idle()
        ran = {line["engine"] for line in report["finished"]}
        assert ran == set(range(len(report["engines"])))
        assert len(report["engines"]) == (2 if kind == "engines" else 1)
        assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
