"""A real server pauses, aborts, resets and takes tokens, without its development mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from pte_vllm.wire.client import RolloutClient
from tests.harness.engine import BLOCK
from tests.harness.kinds import ADMIN_KEY
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE
from tests.harness.server import WINDOW, Server
from tests.server.under_way import IN_FLIGHT, TEMPERATURE, check, post, under_way, wait_folds

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
LONG = 3000
"""How many tokens a request samples that is still running when it is interfered with."""


@pytest.fixture(scope="module")
def versions(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> dict[int, Path]:
    model = tiny("qwen3")
    return {n: adapters(model, rank=8, rule="paper", seed=n) for n in (1, 2)}


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server], versions: dict[int, Path]) -> Server:
    server = shared("admin")
    with RolloutClient(server.url, admin_key=ADMIN_KEY) as client:
        for path in versions.values():
            client.push(path, "policy")
    return server


@pytest.mark.parametrize(
    ("interfere", "preempted"),
    [
        (("/pause?mode=keep&clear_cache=true", None), 1),
        pytest.param(("/pause?mode=keep&clear_cache=false", None), 0, marks=pytest.mark.slow),
        (("/reset_prefix_cache", {"reset_running_requests": True}), 1),
    ],
)
def test_lost_cache_replays_the_folds(
    server: Server, versions: dict[int, Path], interfere: tuple[str, dict | None], preempted: int
) -> None:
    """S goes with the KV blocks: a request comes back through preemption, or goes on untouched."""
    prompts = [random_tokens(40 + 9 * i, 500, i) for i in range(3)]
    sampling = {"max_tokens": IN_FLIGHT, "temperature": TEMPERATURE, "ignore_eos": True}

    def roll_out() -> list:
        with RolloutClient(server.url) as client:
            return list(client.rollouts(prompts, adapter="policy", sampling=sampling))

    with under_way(roll_out) as results:
        wait_folds(server, 2, count=3)
        answer = post(server, interfere[0], interfere[1], headers=ADMIN)
        assert answer.status_code == 200, answer.text
        if interfere[0].startswith("/pause"):
            assert server.get("/is_paused") == {"is_paused": True}
            before = server.get("/pte/v1/requests")["running"]
            assert server.get("/pte/v1/requests")["running"] == before
            assert len(before) == 3 and all(r["num_tokens"] < IN_FLIGHT for r in before)
            assert post(server, "/resume", headers=ADMIN).json() == {"status": "resumed"}
        else:
            assert answer.json() == {"success": True}
    for record in results[0]:
        assert record.num_preempted == preempted
        assert len(record.fold_events) > 10
        check(
            server,
            versions[2],
            list(record.prompt_ids),
            list(record.completion_ids),
            list(record.logprobs),
        )
    assert server.get("/is_paused") == {"is_paused": False}


@pytest.mark.parametrize("path", ["/pause?mode=abort", "/abort_requests"])
def test_aborts_give_what_there_is(server: Server, path: str) -> None:
    """Clients of every route get their tokens so far, and the reason."""
    prompt = random_tokens(30, 500, 7)
    options = {"model": "policy@1", "max_tokens": LONG, "ignore_eos": True}
    completion = {**options, "prompt": prompt, "logprobs": 0, "return_token_ids": True}
    chat = {**options, "messages": [{"role": "user", "content": "Count."}], "logprobs": True}
    sampling = {"max_tokens": LONG, "ignore_eos": True, "logprobs": 0}
    generate = {"model": "policy@1", "token_ids": prompt, "sampling_params": sampling}

    def roll_out() -> list:
        sampling = {"max_tokens": LONG, "ignore_eos": True}
        with RolloutClient(server.url) as client:
            return list(client.rollouts([prompt], n=2, adapter="policy@1", sampling=sampling))

    def stream() -> list[dict]:
        body = {**completion, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line)["choices"][0] for line in lines[:-1]]

    with under_way(
        lambda: post(server, "/v1/completions", completion).json()["choices"][0],
        lambda: post(server, "/v1/chat/completions", chat).json()["choices"][0],
        lambda: post(server, "/inference/v1/generate", generate).json()["choices"][0],
        stream,
        roll_out,
    ) as results:
        wait_folds(server, 1, count=6)
        answer = post(server, path, {}, headers=ADMIN)
        assert answer.status_code == 200, answer.text
    completed, chatted, generated, chunks, records = results
    tokens = sum(len(chunk["token_ids"]) for chunk in chunks)
    for reason, found, logprobs in (
        (completed["finish_reason"], len(completed["token_ids"]), completed["logprobs"]["tokens"]),
        (chatted["finish_reason"], BLOCK, chatted["logprobs"]["content"][:BLOCK]),
        (generated["finish_reason"], len(generated["token_ids"]), generated["logprobs"]["content"]),
        (chunks[-1]["finish_reason"], tokens, range(tokens)),
        *((r.finish_reason, len(r.completion_ids), r.logprobs) for r in records),
    ):
        assert reason == "abort" and WINDOW < found < LONG or found == BLOCK
        assert len(logprobs) == found
    assert generated["weight_versions"] == [
        {"version": "1", "start": 0, "end": len(generated["token_ids"])}
    ]
    assert post(server, "/resume", headers=ADMIN).status_code == 200


def test_aborted_scores_are_asked_again(server: Server) -> None:
    sequences = [random_tokens(3500, 500, 20 + i) for i in range(6)]

    def score() -> list[tuple[float, ...]]:
        with RolloutClient(server.url) as client:
            records = client.score(sequences, [40] * 6, adapter="policy")
        return [record.logprobs for record in records]

    with under_way(score) as results:
        wait_folds(server, 1)
        assert post(server, "/abort_requests", {}, headers=ADMIN).json()["aborted"] > 0
    for found, again in zip(results[0], score(), strict=True):
        assert max(abs(a - b) for a, b in zip(found, again, strict=True)) <= TOLERANCE


def test_abort_by_request_id(server: Server) -> None:
    """An id ends its own request only."""

    def generate(name: str, length: int) -> dict:
        sampling = {"max_tokens": length, "ignore_eos": True}
        body = {"token_ids": random_tokens(30), "sampling_params": sampling, "request_id": name}
        return post(server, "/inference/v1/generate", body).json()

    with under_way(lambda: generate("mine", LONG), lambda: generate("other", IN_FLIGHT)) as results:
        wait_folds(server, 1, count=2)
        body = {"request_ids": ["generate-tokens-mine"]}
        answer = post(server, "/abort_requests", body, headers=ADMIN)
        assert answer.json() == {"status": "aborted", "aborted": 1}
    mine, other = (result["choices"][0] for result in results)
    assert results[0]["request_id"] == "generate-tokens-mine"
    assert mine["finish_reason"] == "abort" and len(mine["token_ids"]) < LONG
    assert other["finish_reason"] == "length" and len(other["token_ids"]) == IN_FLIGHT


def test_tokens_in_tokens_out(server: Server, versions: dict[int, Path]) -> None:
    prompt = random_tokens(50, 500, 3)
    sampling = {
        "max_tokens": 300,
        "temperature": TEMPERATURE,
        "logprobs": 0,
        "seed": 5,
        "ignore_eos": True,
        "extra_args": {"pte_window": 2 * BLOCK, "pte_pin_tokens": 20},
    }
    body = {"token_ids": prompt, "sampling_params": sampling, "cache_salt": "step-1"}
    for model, version in (("policy", 2), ("policy@2", 2), ("policy@1", 1), ("base", None)):
        answer = post(server, "/inference/v1/generate", {**body, "model": model})
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        check(
            server,
            versions.get(version),
            prompt,
            choice["token_ids"],
            [entry["logprob"] for entry in choice["logprobs"]["content"]],
            pin_tokens=20,
            window_tokens=2 * BLOCK,
        )
        label = "default" if version is None else str(version)  # of the base weights: vLLM's
        assert choice["weight_versions"] == [{"version": label, "start": 0, "end": 300}]
    streamed = {**body, "model": "policy", "stream": True}
    with httpx.stream(
        "POST", f"{server.url}/inference/v1/generate", json=streamed, timeout=60
    ) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    last = json.loads(lines[-2])["choices"][0]
    assert last["weight_versions"] == [{"version": "2", "start": 0, "end": 300}]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "nobody"}, 404, "nobody"),
        ({"model": "policy@9"}, 404, "policy@9"),
        ({"sampling_params": {"extra_args": {"pte_windo": 32}}}, 400, "pte_windo"),
        ({"sampling_params": {"extra_args": {"pte_window": 33}}}, 400, "multiple"),
        ({"token_ids": []}, 400, "token_ids"),
    ],
)
def test_bad_token_requests(server: Server, change: dict, status: int, message: str) -> None:
    body = {"model": "policy", "token_ids": [5, 6], "sampling_params": {"max_tokens": 2}, **change}
    answer = post(server, "/inference/v1/generate", body)
    assert answer.status_code == status and message in answer.text, answer.text


def test_info_routes(server: Server) -> None:
    info = server.get("/server_info?config_format=json")
    assert info["pte"] == server.get("/pte/v1/info")
    assert info["pte"]["adapters"] == {"policy": 2}
    assert info["vllm_config"]["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert isinstance(server.get("/server_info")["vllm_config"], str)
    assert server.get("/get_world_size") == {"world_size": 1}
    assert server.get("/weight_info") == {"weight_version": "default"}
    assert server.get("/is_paused") == {"is_paused": False}


def test_resets_and_what_they_refuse(server: Server) -> None:
    server.wait_idle()
    for query, body in (("", None), ("?reset_external=true", None), ("", {"reset_external": True})):
        answer = post(server, f"/reset_prefix_cache{query}", body, headers=ADMIN)
        assert answer.json() == {"success": True}
    for path, body, message in (
        ("/reset_prefix_cache", {"reset_runing_requests": True}, "reset_runing_requests"),
        ("/reset_prefix_cache?reset_external=perhaps", None, "reset_external"),
        ("/pause?mode=later", None, "mode"),
        ("/abort_requests", None, "body"),
        ("/abort_requests", {"request_ids": "mine"}, "request_ids"),
        ("/abort_requests", {"request_idz": ["mine"]}, "request_idz"),
    ):
        answer = post(server, path, body, headers=ADMIN)
        assert answer.status_code == 400 and message in answer.text, answer.text


def test_changes_need_the_admin_key(server: Server) -> None:
    control = ["pause", "resume", "abort_requests", "reset_prefix_cache", "areal_pause_generation"]
    loads = ["load_lora_adapter", "v1/load_lora_adapter", "skyrl/v1/load_lora_adapter"]
    for path in (*control, *loads, "v1/unload_lora_adapter", "update_weights"):
        answer = post(server, f"/{path}", {"lora_name": "x", "lora_path": "/x"})
        assert answer.status_code == 401, (path, answer.text)
    assert server.get("/is_paused") == {"is_paused": False}
