"""Mistakes of clients are answered with what is wrong, and are no failures in the log."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from pte_vllm.server.text_only import ROUTES
from tests.harness.models import random_tokens
from tests.harness.server import IGNORE_EOS, Server
from tests.server.under_way import post

LIMIT = 4096
"""`--max-model-len` of every test server."""


@pytest.fixture(scope="module")
def server(
    shared: Callable[..., Server], tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> Server:
    return shared("open", {"paper": adapters(tiny("qwen3"), rank=8, rule="paper")})


def _error(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_prompt_that_fills_the_context(server: Server) -> None:
    full = random_tokens(LIMIT, 500, 1)
    text = "a" * (LIMIT - len("user: \n"))  # a token for each byte
    says = rf"the prompt has {LIMIT} tokens, .* no room for an answer. Send at most {LIMIT - 1}"
    for path, body in (
        ("/v1/completions", {"prompt": full}),
        ("/v1/completions", {"prompt": [[5, 6], full], "max_tokens": 9}),
        ("/v1/completions", {"prompt": full, "stream": True}),
        ("/v1/completions", {"prompt": full, "echo": True}),
        ("/v1/chat/completions", {"messages": _chat(text)}),
        ("/v1/chat/completions", {"messages": _chat(text), "max_completion_tokens": 9}),
        ("/v1/responses", {"input": _chat(text)}),
        ("/v1/messages", {"messages": _chat(text), "max_tokens": 9}),
    ):
        answer = post(server, path, {"model": "base", **body})
        assert re.search(says, _error(answer)), (path, answer.text)
    # What vLLM says of these is to the point.
    body = {"model": "base", "prompt": full, "echo": True, "max_tokens": 0}
    assert "plus the number of requested output tokens" in _error(
        post(server, "/v1/completions", body)
    )
    body = {"model": "base", "prompt": [5, 6], "max_tokens": 0}
    assert "max_tokens must be at least 1" in _error(post(server, "/v1/completions", body))
    body = {"model": "base", "prompt": full[1:], "max_tokens": 9, **IGNORE_EOS}
    body["vllm_xargs"] = {"pte_pin_tokens": 50}
    assert post(server, "/v1/completions", body).json()["usage"]["completion_tokens"] == 1


def test_allowed_tokens_of_which_nothing_is_left(server: Server) -> None:
    def ask(**options: Any) -> httpx.Response:
        body = {"model": "base", "prompt": [5, 6, 7], "max_tokens": 3, **options}
        return post(server, "/v1/completions", body)

    word = post(server, "/tokenize", {"model": "base", "prompt": "a", "add_special_tokens": False})
    (token,) = word.json()["tokens"]
    for options, says in (
        ({"allowed_token_ids": []}, "empty"),
        ({"allowed_token_ids": [10**6]}, "out-of-vocab"),
        ({"allowed_token_ids": [-1]}, "out-of-vocab"),
        ({"allowed_token_ids": [token], "bad_words": ["a"]}, "nothing is left of them after bad_w"),
        (
            {"allowed_token_ids": [9], "stop_token_ids": [9], "min_tokens": 2},
            "nothing is left of them after min_tokens",
        ),
    ):
        assert says in _error(ask(**options)), options
    left = ask(allowed_token_ids=[token, 9], bad_words=["a"], return_token_ids=True)
    assert left.json()["choices"][0]["token_ids"] == [9, 9, 9]


def test_routes_that_are_not_there(server: Server) -> None:
    for path in ROUTES:
        message = _error(post(server, path, {"model": "base", "input": "a"}), 404)
        assert "this server generates text only" in message and path in message
    assert "/pte/v1/score" in _error(post(server, "/v1/score", {}), 404)


def test_no_traceback_for_a_mistake_of_a_client(server: Server) -> None:
    before = len(server.log.read_text())
    body = {"model": "base", "max_tokens": 5, "messages": _chat("a")}
    for wrong in ({"temperature": 1.5, "top_p": 7.0}, {"max_tokens": 10**6}, {"model": "nobody"}):
        answer = post(server, "/v1/messages", body | wrong)
        assert answer.status_code in (400, 404), answer.text
        answer = post(server, "/cohere/v2/chat", body | wrong)
        assert answer.status_code in (400, 404, 422, 501), answer.text
    assert post(server, "/v1/messages", body).status_code == 200
    assert "Traceback" not in server.log.read_text()[before:]


@pytest.fixture
def looked_up(server: Server) -> Path:
    return server.log.parent / "adapters"  # VLLM_LORA_RESOLVER_CACHE_DIR


def test_an_adapter_that_is_found_and_refused(
    server: Server, adapters: Callable[..., Path], looked_up: Path
) -> None:
    good = adapters(server.model, rank=8, rule="paper")

    def ask(name: str) -> httpx.Response:
        body = {"model": name, "prompt": [5, 6], "max_tokens": 2}
        return post(server, "/v1/completions", body)

    def put(name: str, source: Path = good, **changes: object) -> str:
        directory = looked_up / name
        shutil.copytree(source, directory)
        file = directory / "adapter_config.json"
        config = {**json.loads(file.read_text()), "base_model_name_or_path": str(server.model)}
        file.write_text(json.dumps(config | changes))
        return name

    for name, says in (
        (put("elsewhere", base_model_name_or_path="other/model"), "'other/model', and this server"),
        (put("kind", peft_type="IA3"), "peft_type in adapter_config.json must be LORA"),
        (put("rule", pte={"rule": "median"}), "rule must be one of"),
        (put("large", adapters(server.model, rank=16, rule="paper")), "--max-lora-rank 8"),
    ):
        message = _error(ask(name))
        assert f"adapter {name} is refused" in message and says in message, message
        assert str(looked_up) not in message
    (looked_up / "empty").mkdir()
    assert "adapter_config.json cannot be read" in _error(ask("empty"))
    assert "does not exist" in _error(ask("nobody"), 404)
    assert ask(put("fine")).status_code == 200
    unload = {"lora_name": "fine"}
    assert post(server, "/v1/unload_lora_adapter", unload).status_code == 200


def test_pinned_tokens_of_scored_prompts(server: Server) -> None:
    """With `echo` a whole prompt is pinned, and the response says so."""
    tokens = random_tokens(400, 500, 2)

    def echo(model: str, **options: object) -> Any:
        body = {"model": model, "prompt": tokens, "max_tokens": 1, "echo": True, "logprobs": 0}
        answer = post(server, "/v1/completions", {**body, **IGNORE_EOS, "vllm_xargs": options})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def score() -> list[float]:
        body = {"token_ids": [tokens], "prompt_tokens": [50], "adapter": "paper"}
        return json.loads(post(server, "/pte/v1/score", body).text.strip())["logprobs"]

    whole, question = echo("paper"), echo("paper", pte_pin_tokens=50)
    assert whole["kv_transfer_params"]["pte"] == {"pin_tokens": 400, "folds": 0, "folded_tokens": 0}
    told = question["kv_transfer_params"]["pte"]
    assert told["pin_tokens"] == 50 and told["folds"] > 0
    logprobs = question["choices"][0]["logprobs"]["token_logprobs"][50:400]
    assert max(abs(a - b) for a, b in zip(logprobs, score(), strict=True)) < 1e-3
    body = {"model": "paper", "messages": _chat("Hello"), "max_tokens": 2, "prompt_logprobs": 0}
    chat = post(server, "/v1/chat/completions", body).json()
    assert chat["kv_transfer_params"]["pte"]["pin_tokens"] == chat["usage"]["prompt_tokens"]


def test_examples_of_the_documentation_fit_a_short_context(server: Server) -> None:
    """They work on a server with 4,096 tokens."""
    root = Path(__file__).parents[2]
    asked = 0
    for page in ("README.md", "docs/api.md"):
        for found in re.finditer(
            r'"?max(?:_completion)?_tokens"?[=:] ?(\d+)', (root / page).read_text()
        ):
            asked += 1
            body = {"model": "base", "messages": _chat("a"), "max_completion_tokens": int(found[1])}
            with httpx.stream(
                "POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True}
            ) as answer:
                assert answer.status_code == 200, (page, found[0])
    assert asked > 2
