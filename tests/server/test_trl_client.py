"""TRL's own clients, as installed, get what its trainers need from our server."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.engine import BLOCK
from tests.harness.models import random_tokens
from tests.harness.server import WINDOW, Server
from tests.server.under_way import IN_FLIGHT, TEMPERATURE, check, post, under_way, wait_folds

LENGTH = WINDOW + 5 * BLOCK + 7
pytestmark = pytest.mark.filterwarnings(
    "ignore:TRL currently supports vLLM", "ignore:You are importing from 'trl.experimental'"
)


@pytest.fixture(scope="module")
def versions(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> list[Path]:
    """Make adapters of successive steps, by version; 0 is served from the start."""
    return [adapters(tiny("qwen3"), rank=8, rule="paper", seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server], versions: list[Path]) -> Server:
    return shared("open", {"thoughts": versions[0]})


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    """Make TRL's client of GRPOTrainer's server mode, as its constructor does."""
    pytest.importorskip("trl")
    from trl.generation.vllm_client import VLLMClient

    return VLLMClient(base_url=server.url, connection_timeout=30.0)


def test_generation_with_token_prompts(
    server: Server, client: Any, versions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.model == "base"  # of /v1/models, the first
    monkeypatch.setattr(client, "model", "thoughts")
    prompts = [random_tokens(50, 500, 1), random_tokens(9, 500, 2)]
    answer = client.generate(
        prompts,
        n=2,
        temperature=TEMPERATURE,
        max_tokens=LENGTH,
        generation_kwargs={"ignore_eos": True, "vllm_xargs": {"pte_window": 2 * BLOCK}},
    )
    assert answer["prompt_ids"] == prompts
    assert len(answer["completion_ids"]) == 4
    for i, (ids, logprobs, token_ids) in enumerate(
        zip(answer["completion_ids"], answer["logprobs"], answer["logprob_token_ids"], strict=True)
    ):
        assert [entry[0] for entry in token_ids] == ids
        found = [entry[0] for entry in logprobs]
        check(server, versions[0], prompts[i // 2], ids, found, window_tokens=2 * BLOCK)


def test_chat(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "model", "thoughts")
    answer = client.chat([[{"role": "user", "content": "Count."}]], n=2, max_tokens=40)
    assert len(answer["completion_ids"]) == 2
    assert [len(p) for p in answer["logprobs"]] == [len(ids) for ids in answer["completion_ids"]]


def test_control_calls(client: Any) -> None:
    assert client.get_world_size() == 1
    client.reset_prefix_cache()
    info = client.get_server_info()
    assert info["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert info["lora_config"]["max_loras"] == 4
    assert info["parallel_config"]["data_parallel_size"] == 1
    with pytest.raises(RuntimeError, match="no weight-transfer engine"):
        client.init_communicator()  # merged weights cannot hold a delta that depends on the text
    with pytest.raises(Exception, match="400, .*PUT /pte/v1/adapters"):
        client._start_weight_update()
    with pytest.raises(Exception, match="400, .*POST /v1/load_lora_adapter"):
        client._post(f"{client.base_url}/init_weight_transfer_engine", json={"init_info": {}})


def test_adapters_of_the_asynchronous_trainer(
    server: Server, versions: list[Path], tmp_path: Path
) -> None:
    """Versions `trl-policy-vN` come and go by their directories while others generate."""
    pytest.importorskip("trl")
    from accelerate import PartialState
    from trl.experimental.async_grpo.vllm_client import VLLMClient

    PartialState(cpu=True)  # the client's logger asks for it; in a trainer it is there
    client = VLLMClient(server.url, server_timeout=30.0)
    client.wait_for_server_ready()
    assert client.get_max_model_len() == 4096 and client.get_dtype() == "torch.float32"
    with pytest.raises(Exception, match="400, .*is no directory"):  # a 404 would hide the reason
        client.load_lora_adapter("trl-policy-v0", str(tmp_path / "trl-policy-v0"))
    prompt = random_tokens(40, 500, 3)

    def push(version: int) -> None:
        directory = tmp_path / f"trl-policy-v{version}"
        client.pause()
        shutil.copytree(versions[version], directory)
        client.load_lora_adapter(directory.name, str(directory))
        client.resume()
        if version > 1:
            client.unload_lora_adapter(f"trl-policy-v{version - 1}")
        if version > 2:
            shutil.rmtree(tmp_path / f"trl-policy-v{version - 2}")

    def generate(version: int) -> dict[str, Any]:
        body = {
            "model": f"trl-policy-v{version}",
            "prompt": prompt,
            "max_tokens": IN_FLIGHT,
            "temperature": TEMPERATURE,
            "top_p": 1.0,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "n": 1,
            "return_token_ids": True,
            "logprobs": 0,
            "seed": version,
            "ignore_eos": True,
        }
        answer = post(server, "/v1/completions", body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    push(1)
    with under_way(lambda: generate(1)) as first:
        wait_folds(server, 1)
        push(2)  # replays what runs, and unloads the version that it runs on
        with under_way(lambda: generate(2)) as second:
            wait_folds(server, 1)
            push(3)
            third = [generate(3)]
    for version, choice in zip(itertools.count(1), [*first, *second, *third], strict=False):
        assert choice["finish_reason"] == "length"
        logprobs = choice["logprobs"]["token_logprobs"]
        check(server, versions[version], prompt, choice["token_ids"], logprobs)
    served = [model["id"] for model in server.get("/v1/models")["data"]]
    assert "trl-policy-v3" in served and "trl-policy-v2" not in served
