"""An adapter whose numbers overflow is refused, or fails its own requests with its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from pte_vllm.wire.client import RolloutClient
from pte_vllm.wire.transport import ServerError
from tests.harness.models import enlarge, random_tokens
from tests.harness.server import Server
from tests.server.under_way import post

PROMPT = random_tokens(40, 500, 81)


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server]) -> Server:
    return shared("open")


@pytest.fixture(scope="module")
def sources(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> dict[str, Path]:
    model = tiny("qwen3")
    return {"plain": adapters(model, plain=True, rank=8), "pte": adapters(model, rank=8)}


@pytest.mark.parametrize("kind", ["plain", "pte"])
def test_what_must_overflow_is_refused_by_every_load(
    kind: str, server: Server, sources: dict[str, Path], tmp_path: Path
) -> None:
    path = enlarge(sources[kind], tmp_path / "large", 1e25)
    with RolloutClient(server.url) as client, pytest.raises(ServerError) as refusal:
        client.push(path, "large")
    messages = [str(refusal.value)]
    for route, body in (
        ("/v1/load_lora_adapter", {"lora_name": "large", "lora_path": str(path)}),
        ("/adapters", {"name": "large", "src": str(path)}),
    ):
        answer = post(server, route, body)
        assert answer.status_code == 400, answer.text
        messages.append(answer.text)
    for message in messages:
        assert "layers.0.mlp.down_proj: lora_A and lora_B are too large together" in message
    assert "large" not in {model["id"] for model in server.get("/v1/models")["data"]}


def _failed(answer: httpx.Response) -> list[dict[str, Any]]:
    """Return the errors of a plain answer, of a stream, or of lines of rollouts."""
    lines = (line.removeprefix("data: ") for line in answer.text.split("\n"))
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [body["error"] for body in found if "error" in body]


@pytest.mark.parametrize("kind", ["plain", "pte"])
def test_what_overflows_later_fails_alone(
    kind: str, server: Server, sources: dict[str, Path], tmp_path: Path
) -> None:
    name, path = f"bad-{kind}", enlarge(sources[kind], tmp_path / "bad", 1e18)
    with RolloutClient(server.url) as client:
        client.push(path, name)
    completion = {"model": name, "prompt": PROMPT, "max_tokens": 30, "logprobs": 1}
    chat = {"model": name, "messages": [{"role": "user", "content": "Hm?"}], "max_tokens": 9}
    rollouts = {"adapter": name, "token_ids": [PROMPT], "n": 2, "sampling": {"max_tokens": 9}}
    score = {"adapter": name, "token_ids": [PROMPT], "prompt_tokens": [20]}
    tokens = {"model": name, "token_ids": PROMPT, "sampling_params": {"max_tokens": 9}}
    base = {"model": "base", "prompt": PROMPT, "max_tokens": 30, "logprobs": 1, "temperature": 0}
    before = post(server, "/v1/completions", base).json()
    for route, body, status in (
        ("/v1/completions", completion, 422),
        ("/v1/completions", {**completion, "stream": True}, 200),
        ("/v1/chat/completions", chat, 422),
        ("/v1/chat/completions", {**chat, "stream": True}, 200),
        ("/inference/v1/generate", tokens, 422),
        ("/pte/v1/rollouts", rollouts, 200),
        ("/pte/v1/score", score, 200),
    ):
        answer = post(server, route, body)
        assert answer.status_code == status, (route, answer.text)
        (error,) = _failed(answer)
        assert error["code"] == 422 and f"adapter {name}@1 is not finite" in error["message"], error
        assert "NaN" not in answer.text
        after = post(server, "/v1/completions", base)
        assert after.status_code == 200, after.text
        assert after.json()["choices"] == before["choices"]
