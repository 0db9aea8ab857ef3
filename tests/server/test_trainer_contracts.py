"""The requests of prime-rl, SkyRL and AReaL get, word for word, the fields that they read."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from pte_vllm.server.adapters.upload import MAX_ADAPTER_BYTES
from pte_vllm.wire.client import RolloutClient
from tests.harness.engine import BLOCK
from tests.harness.models import random_tokens
from tests.harness.server import WINDOW, Server
from tests.server.under_way import IN_FLIGHT, TEMPERATURE, check, post, under_way, wait_folds

LENGTH = WINDOW + 5 * BLOCK + 7
EXAMPLE = Path(__file__).parents[2] / "examples" / "external_trainer.py"


@pytest.fixture(scope="module")
def steps(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> list[Path]:
    """Make what a trainer saved after each step."""
    return [adapters(tiny("qwen3"), rank=8, rule="paper", seed=10 + i) for i in range(3)]


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server]) -> Server:
    return shared("open")


def _ok(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


def _generate(
    server: Server, model: str, prompt: list[int], length: int = LENGTH, **fields: Any
) -> dict[str, Any]:
    """Send `/inference/v1/generate` as verifiers (prime-rl) and SkyRL do."""
    sampling = {
        "temperature": TEMPERATURE,
        "top_p": 1.0,
        "top_k": -1,
        "max_tokens": length,
        "logprobs": 0,
        "ignore_eos": True,
    }
    body = {"model": model, "token_ids": prompt, "sampling_params": sampling, **fields}
    headers = {"X-Session-ID": "trajectory-1"}
    (choice,) = _ok(post(server, "/inference/v1/generate", body, headers=headers))["choices"]
    return choice


def _check_generated(
    server: Server, adapter: Path, prompt: list[int], choice: dict[str, Any], version: int
) -> None:
    assert choice["finish_reason"] == "length"
    logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    check(server, adapter, prompt, choice["token_ids"], logprobs)
    span = {"version": str(version), "start": 0, "end": len(choice["token_ids"])}
    assert choice["weight_versions"] == [span]


def test_prime_rl(server: Server, steps: list[Path], tmp_path: Path) -> None:
    """The same name from a new directory each step, without a pause; a salt for each step."""
    prompt = random_tokens(3 * BLOCK + 5, 500, 1)
    directory = tmp_path / "broadcasts" / "lora"

    def broadcast(step: int) -> dict[str, Any]:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(steps[step], directory)
        (directory / "STABLE").touch()
        body = {"lora_name": "r8-run", "lora_path": directory.as_posix()}
        return _ok(post(server, "/load_lora_adapter", body))

    missing = {"lora_name": "r8-run", "lora_path": (tmp_path / "late").as_posix()}
    answer = post(server, "/load_lora_adapter", missing)
    assert answer.status_code == 404  # prime-rl tries again: files may lag behind
    assert "lora_path has no adapter_config.json" in answer.text
    huge = tmp_path / "huge"
    shutil.copytree(steps[0], huge)
    os.truncate(huge / "adapter_model.safetensors", MAX_ADAPTER_BYTES)  # sparse
    answer = post(server, "/load_lora_adapter", {"lora_name": "huge", "lora_path": str(huge)})
    assert answer.status_code == 400 and f"more than {MAX_ADAPTER_BYTES}" in answer.text
    assert broadcast(0)["version"] == 1
    with under_way(lambda: _generate(server, "r8-run", prompt, IN_FLIGHT, cache_salt="0")) as early:
        wait_folds(server, 1)
        assert broadcast(1)["version"] == 2
        assert broadcast(1) == {"status": "ok", "name": "r8-run", "version": 2}  # a retry
    late = _generate(server, "r8-run", prompt, cache_salt="1")
    same_salt = _generate(server, "r8-run", prompt, cache_salt="0")  # no stale prefix either way
    _check_generated(server, steps[0], prompt, early[0], 1)
    _check_generated(server, steps[1], prompt, late, 2)
    _check_generated(server, steps[1], prompt, same_salt, 2)
    pause = {"mode": "keep", "clear_cache": "false"}
    assert _ok(post(server, "/pause", params=pause)) == {"status": "paused"}
    assert _ok(post(server, "/resume")) == {"status": "resumed"}
    broadcaster = {"host": "h", "port": 1, "rank_offset": 0, "inference_world_size": 1}
    for path, body in (
        ("/update_weights", {"weight_dir": directory.as_posix()}),
        ("/update_weights", {"weight_dir": None}),
        ("/init_broadcaster", broadcaster),
    ):
        answer = post(server, path, body)
        assert answer.status_code == 400 and "PUT /pte/v1/adapters" in answer.text


def test_skyrl(server: Server, steps: list[Path]) -> None:
    """External server mode, `lora.sync_mode=disk`; its client reads every error as JSON."""
    prompt = random_tokens(30, 500, 2)
    answer = httpx.request("GET", f"{server.url}/get_world_size", json={})
    assert _ok(answer)["world_size"] == 1
    load = {"lora_name": "skyrl-lora", "lora_path": str(steps[1])}
    _ok(post(server, "/skyrl/v1/load_lora_adapter", load))
    with under_way(lambda: _generate(server, "skyrl-lora", prompt, IN_FLIGHT)) as kept:
        wait_folds(server, 1)
        pause = {"mode": "keep", "clear_cache": "false"}
        assert _ok(post(server, "/pause", params=pause))["status"] == "paused"
        load["lora_path"] = str(steps[2])
        _ok(post(server, "/skyrl/v1/load_lora_adapter", load))
        assert _ok(post(server, "/resume"))["status"] == "resumed"
    _check_generated(server, steps[1], prompt, kept[0], 1)
    _check_generated(server, steps[2], prompt, _generate(server, "skyrl-lora", prompt), 2)
    server.wait_idle()
    reset = {"reset_running_requests": False}
    assert _ok(post(server, "/reset_prefix_cache", reset)) == {"success": True}
    in_memory = {"lora_name": "skyrl-lora", "in_memory": True}
    refused = post(server, "/skyrl/v1/load_lora_adapter", in_memory)
    assert refused.status_code == 400
    assert "PUT /pte/v1/adapters" in refused.json()["error"]["message"]
    assert "skyrl-lora" in [model["id"] for model in server.get("/v1/models")["data"]]
    unload = post(server, "/v1/unload_lora_adapter", {"lora_name": "skyrl-lora"})
    assert unload.status_code == 200
    left = [model["id"] for model in server.get("/v1/models")["data"]]
    assert not any(name.startswith("skyrl-lora") for name in left)


def _areal(server: Server, model: str, prompt: list[int], room: int, **options: Any) -> dict:
    """Send AReaL's generation request, and return what it makes of the answer."""
    body = {
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": room,
        "temperature": TEMPERATURE,
        "stop_token_ids": [],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "return_tokens_as_token_ids": True,
        "logprobs": 0,
        "use_beam_search": False,
        "stream": False,
        "model": model,
        "prompt": prompt,
        **options,
    }
    choice = _ok(post(server, "/v1/completions", body))["choices"][0]
    return {
        "reason": choice["finish_reason"],
        "tokens": [int(token.split(":")[1]) for token in choice["logprobs"]["tokens"]],
        "logprobs": choice["logprobs"]["token_logprobs"],
    }


@pytest.mark.parametrize("new_weights", [False, True])
def test_areal_resubmits_what_was_aborted(
    server: Server, steps: list[Path], new_weights: bool
) -> None:
    """Question + partial answer as one prompt: with the question pinned, the folds are the same."""
    question, room = random_tokens(45, 500, 3), 4000
    names = [f"actor{int(new_weights)}-v{n}" for n in range(2)]
    load = {"lora_path": str(steps[0]), "lora_name": names[0]}
    assert post(server, "/v1/load_lora_adapter", load).status_code == 200
    with under_way(lambda: _areal(server, names[0], question, room)) as results:
        server.pace(WINDOW + 6 * BLOCK)
        _ok(post(server, "/areal_pause_generation", {}))
        load = {"lora_path": str(steps[1]), "lora_name": names[1]}
        assert post(server, "/v1/load_lora_adapter", load).status_code == 200
        _ok(post(server, "/areal_continue_generation", {}))
    partial = results[0]
    assert partial["reason"] == "abort" and WINDOW + 2 * BLOCK < len(partial["tokens"]) < room
    check(server, steps[0], question, partial["tokens"], partial["logprobs"])
    rest_tokens = min(600, room - len(partial["tokens"]))
    rest = _areal(
        server,
        names[new_weights],
        [*question, *partial["tokens"]],
        rest_tokens,
        vllm_xargs={"pte_pin_tokens": len(question)},
    )
    answer = [*partial["tokens"], *rest["tokens"]]
    assert rest["reason"] == "length" and len(rest["tokens"]) == rest_tokens
    # The rest is what the adapter of the second request says of one unbroken sequence: its state
    # was made of all that was evicted, whoever had sampled it.
    adapter, start = steps[new_weights], len(partial["tokens"])
    check(server, adapter, question, answer, rest["logprobs"], start=start)
    done = server.get("/pte/v1/requests")["finished"][-1]
    assert done["pinned_blocks"] == 2 and done["folds"] > 15


def test_areal_weights_over_nccl_are_refused(server: Server) -> None:
    for path in (
        "/areal_update_weights",
        "/areal_init_weights_update_group",
        "/areal_set_update_weight_meta",
        "/areal_set_update_weight_meta_lora",
        "/areal_update_weights_xccl",
        "/areal_update_weights_lora_xccl",
    ):
        answer = post(server, path, {"model_path": "/checkpoints/1"})
        assert answer.status_code == 400 and "PUT /pte/v1/adapters" in answer.text, path


def test_bad_loads_change_nothing(server: Server, steps: list[Path], tmp_path: Path) -> None:
    broken = shutil.copytree(steps[0], tmp_path / "broken")
    config = json.loads((broken / "adapter_config.json").read_text())
    config["pte"]["rule"] = "median"
    (broken / "adapter_config.json").write_text(json.dumps(config))
    models = [model["id"] for model in server.get("/v1/models")["data"]]
    for body, status, message in (
        ({"lora_name": "new", "lora_path": str(broken)}, 400, "rule must be one of"),
        ({"lora_name": "a/b", "lora_path": str(steps[0])}, 400, "a/b"),
        ({"lora_name": "base", "lora_path": str(steps[0])}, 400, "base"),
        ({"lora_name": "new", "lora_path": str(tmp_path)}, 404, "adapter_config.json"),
        ({"lora_name": "new"}, 400, "lora_path"),
        ({"lora_path": str(steps[0])}, 400, "lora_name"),
    ):
        answer = post(server, "/load_lora_adapter", body)
        assert answer.status_code == status and message in answer.text, answer.text
    assert [model["id"] for model in server.get("/v1/models")["data"]] == models


def test_external_trainer_example(
    server: Server, steps: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("external_trainer", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    arguments = ["--server", server.url, "--adapter", str(steps[0]), "--name", "example"]
    sizes = ["--rounds", "2", "--samples", "2", "--max-tokens", "200", "--step-size", "0.05"]
    example.main([*arguments, *sizes])
    printed = re.findall(
        r"version (\d): 4 rollouts, mean log-prob (-[\d.]+)", capsys.readouterr().out
    )
    assert [version for version, _ in printed] == ["1", "2"]
    assert server.get("/pte/v1/adapters/example")["newest"] == 2
    tokens = random_tokens(2 * BLOCK, 500, 1)
    with RolloutClient(server.url) as client:
        first, second = (
            client.score([tokens], [BLOCK], adapter=f"example@{version}")[0].logprobs
            for version in (1, 2)
        )
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 1e-3
