"""Clients of tokens in, tokens out find the routes and fields that they were written for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.engine import BLOCK
from tests.harness.models import random_tokens
from tests.harness.server import WINDOW, Server
from tests.server.under_way import TEMPERATURE, check, post, under_way, wait_folds

LENGTH = WINDOW + 3 * BLOCK
PROMPT = random_tokens(37, 500, 21)
MESSAGES = [{"role": "user", "content": "Count to three."}]


@pytest.fixture(scope="module")
def adapter(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> Path:
    return adapters(tiny("qwen3"), rank=8, rule="ridge", seed=21)


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server], adapter: Path) -> Server:
    return shared("open", {"thoughts": adapter})


def _ok(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


def _body(**changes: Any) -> dict[str, Any]:
    """Make a request as `renderers.client.generate` 0.1.12 does, which verifiers 0.4.0 calls."""
    sampling = {
        "temperature": TEMPERATURE,
        "max_tokens": LENGTH,
        "ignore_eos": True,
        "stop_token_ids": [1],
        "logprobs": 1,
        "skip_special_tokens": False,
        **changes.pop("sampling", {}),
    }
    fields = {"model": "thoughts", "token_ids": PROMPT, "sampling_params": sampling}
    return {**fields, "cache_salt": "step-3", **changes}


def _completion_logprobs(choice: dict[str, Any]) -> list[float]:
    """Read log-probs as strictly as that client does."""
    ids, content = choice["token_ids"], choice["logprobs"]["content"]
    assert isinstance(content, list) and len(content) == len(ids)
    for token_id, entry in zip(ids, content, strict=True):
        assert entry.get("token") == f"token_id:{token_id}"
        assert isinstance(entry["logprob"], int | float) and math.isfinite(entry["logprob"])
        assert entry["logprob"] != -9999.0
    return [float(entry["logprob"]) for entry in content]


def test_verifiers_train_client(server: Server, adapter: Path) -> None:
    (choice,) = _ok(post(server, "/inference/v1/generate", _body()))["choices"]
    check(server, adapter, PROMPT, choice["token_ids"], _completion_logprobs(choice))
    for entry in choice["logprobs"]["content"]:  # vLLM's own fields are there too
        for named in (entry, *entry["top_logprobs"]):
            assert named["token"] == f"token_id:{named['token_id']}" and named["rank"] >= 1


def _events(server: Server, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    url = f"{server.url}/inference/v1/generate"
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=120) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    yield from map(json.loads, lines)


def test_streams_name_tokens_too(server: Server, adapter: Path) -> None:
    body = _body(sampling={"logprobs": 3}, stream_options={"include_usage": True})
    *chunks, usage = _events(server, body)
    choices = [chunk["choices"][0] for chunk in chunks]
    found = [logprob for choice in choices for logprob in _completion_logprobs(choice)]
    ids = [token for choice in choices for token in choice["token_ids"]]
    # One in three samples meets the stop token of that client.
    assert usage["usage"]["completion_tokens"] == len(ids) and not usage["choices"]
    check(server, adapter, PROMPT, ids, found)
    tops = [top for c in choices for e in c["logprobs"]["content"] for top in e["top_logprobs"]]
    assert len(tops) == 3 * len(ids)
    assert all(top["token"] == f"token_id:{top['token_id']}" for top in tops)


def test_other_answers_stay_vllms(server: Server) -> None:
    (choice,) = _ok(post(server, "/inference/v1/generate", _body(output_mode="text")))["choices"]
    assert "token_id" not in choice["logprobs"]["content"][0]
    assert choice["logprobs"]["content"][0]["token"] in choice["text"]
    (choice,) = _ok(post(server, "/inference/v1/generate", _body(sampling={"logprobs": None})))[
        "choices"
    ]
    assert choice["logprobs"] is None
    for chunk in _events(server, _body(sampling={"logprobs": None, "max_tokens": 3})):
        assert chunk["choices"][0]["logprobs"] is None


def test_trl_generates_from_features(server: Server, adapter: Path) -> None:
    """TRL's own client, as installed: `parse_logprobs` reads `token` of every entry."""
    pytest.importorskip("trl")
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient(base_url=server.url, connection_timeout=30.0)
    client.model = "thoughts"
    prompts = [PROMPT, random_tokens(12, 500, 22)]
    options = {"ignore_eos": True, "extra_args": {"pte_window": 2 * BLOCK}}
    answer = client.generate(
        prompts,
        features=[None, None],
        n=2,
        temperature=TEMPERATURE,
        max_tokens=LENGTH,
        generation_kwargs=options,
    )
    assert answer["prompt_ids"] == prompts and len(answer["completion_ids"]) == 4
    for i, (ids, logprobs, token_ids) in enumerate(
        zip(answer["completion_ids"], answer["logprobs"], answer["logprob_token_ids"], strict=True)
    ):
        assert [entry[0] for entry in token_ids] == ids
        found = [entry[0] for entry in logprobs]
        check(server, adapter, prompts[i // 2], ids, found, window_tokens=2 * BLOCK)


# -- render, derender and abort are open with generate --------------------------------------------


def test_render_generate_derender(server: Server) -> None:
    """The three steps give the chat's own answer, options and log-probs included."""
    chat = {
        "model": "thoughts",
        "messages": MESSAGES,
        "max_tokens": 200,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 2,
        "vllm_xargs": {"pte_window": 2 * BLOCK},
    }
    whole = _ok(post(server, "/v1/chat/completions", chat))["choices"][0]
    rendered = _ok(post(server, "/v1/chat/completions/render", chat))
    assert rendered["sampling_params"]["extra_args"] == {"pte_window": 2 * BLOCK}
    generated = _ok(post(server, "/inference/v1/generate", rendered))
    derender = {
        "model": "thoughts",
        "generate_response": generated,
        "prompt_token_ids": rendered["token_ids"],
        "chat_request": chat,
    }
    again = _ok(post(server, "/v1/chat/completions/derender", derender))["choices"][0]
    assert again["message"]["content"] == whole["message"]["content"]
    assert again["logprobs"] == whole["logprobs"]


def test_render_and_derender_of_completions(server: Server) -> None:
    body = {"model": "thoughts", "prompt": PROMPT, "max_tokens": 20, "temperature": 0.0}
    whole = _ok(post(server, "/v1/completions", body))["choices"][0]["text"]
    (rendered,) = _ok(post(server, "/v1/completions/render", body))
    assert rendered["token_ids"] == PROMPT
    generated = _ok(post(server, "/inference/v1/generate", rendered))
    derender = {"model": "thoughts", "generate_responses": [generated], "completion_request": body}
    answer = _ok(post(server, "/v1/completions/derender", derender))
    assert answer["choices"][0]["text"] == whole


def test_abort_beside_generate(server: Server) -> None:
    # without the stop token: a sampled one would end the answer before it is aborted
    body = _body(request_id="mine", sampling={"max_tokens": 4000, "stop_token_ids": []})
    with under_way(lambda: _ok(post(server, "/inference/v1/generate", body))) as results:
        wait_folds(server, 1)
        ids = {"request_ids": ["generate-tokens-mine"]}
        assert post(server, "/inference/v1/abort_requests", ids).status_code == 200
    assert results[0]["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(server: Server, include: bool) -> None:
    """They end the same answers, streamed or not; without text there can be none."""
    sampling = {"temperature": 0.0, "logprobs": None, "max_tokens": 40}
    (free,) = _ok(
        post(server, "/inference/v1/generate", _body(sampling=sampling, output_mode="text"))
    )["choices"]
    stop = free["text"][12:14]
    sampling |= {"stop": [stop], "include_stop_str_in_output": include}
    body = _body(sampling=sampling, output_mode="text")
    (choice,) = _ok(post(server, "/inference/v1/generate", body))["choices"]
    end = free["text"].index(stop) + len(stop) * include
    assert choice["text"] == free["text"][:end]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == stop
    chunks = [chunk["choices"][0] for chunk in _events(server, body)]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    assert chunks[-1]["stop_reason"] == stop
    assert [t for chunk in chunks for t in chunk["token_ids"]] == choice["token_ids"]
    body["sampling_params"]["detokenize"] = False
    refused = post(server, "/inference/v1/generate", body)
    assert refused.status_code == 400 and "detokenize" in refused.text


# -- what is refused says why ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/sleep", "POST /pause"),
        ("/sleep?level=2&mode=keep", "POST /pause"),
        ("/wake_up?tags=weights", "does not sleep"),
        ("/release_kv_cache_memory", "thoughts would be lost"),
        ("/collective_rpc", "VLLM_SERVER_DEV_MODE=1"),
        ("/init_weight_transfer_engine", "PUT /pte/v1/adapters/{name}"),
        ("/shutdown_weight_transfer_engine", "/v1/load_lora_adapter"),
        ("/start_draft_weight_update", "base model of this server does not change"),
    ],
)
def test_refusals_name_what_to_do(server: Server, path: str, message: str) -> None:
    answer = post(server, path, {})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text
    assert server.get("/is_sleeping") == {"is_sleeping": False}


# -- options in headers ---------------------------------------------------------------------------


def _folds(server: Server, headers: dict[str, str], **body: Any) -> dict[str, Any]:
    """Return what the server reports of a completion that was sent with these headers."""
    sent = {"model": "thoughts", "prompt": PROMPT, "max_tokens": LENGTH, "ignore_eos": True, **body}
    answer = post(server, "/v1/completions", sent, headers=headers)
    name = _ok(answer)["id"]
    return server.get(f"/pte/v1/thoughts/{name}")


def test_options_in_headers(server: Server) -> None:
    """Clients that cannot change the body say there what is pinned, and what the window is."""
    sent = {"X-PTE-Pin-Tokens": "5", "X-PTE-Window": str(2 * BLOCK)}
    found = _folds(server, sent | {"X-PTE-Evict": "random", "X-PTE-Evict-Seed": "7"})
    assert (found["pin_tokens"], found["window_tokens"]) == (5, 2 * BLOCK)
    assert (found["evict"], found["evict_seed"]) == ("random", 7)
    found = _folds(server, sent, vllm_xargs={"pte_pin_tokens": 7})  # the body goes first
    assert (found["pin_tokens"], found["window_tokens"]) == (7, 2 * BLOCK)
    found = _folds(server, {})
    assert (found["pin_tokens"], found["window_tokens"]) == (len(PROMPT), WINDOW)
    streamed = {**_body(sampling={"max_tokens": 8}), "stream": True, "request_id": "in-a-header"}
    post(server, "/inference/v1/generate", streamed, headers=sent)
    found = server.get("/pte/v1/thoughts/generate-tokens-in-a-header")
    assert (found["pin_tokens"], found["window_tokens"]) == (5, 2 * BLOCK)


@pytest.mark.parametrize(
    ("header", "value", "message"),
    [
        ("X-PTE-Pins", "5", "unknown option 'pte_pins'"),
        ("X-PTE-Pin-Tokens", "all", "pte_pin_tokens must be an integer"),
        ("X-PTE-Pin-Tokens", "999", "beyond the prompt"),
        ("X-PTE-Window", "33", "multiple"),
        ("X-PTE-State-Id", "nobody", "no request nobody"),
    ],
)
def test_wrong_headers_are_refused(server: Server, header: str, value: str, message: str) -> None:
    body = {"model": "thoughts", "prompt": PROMPT, "max_tokens": 2}
    answer = post(server, "/v1/completions", body, headers={header: value})
    assert answer.status_code == 400 and message in answer.text, answer.text


def test_continuing_goes_before_headers(server: Server) -> None:
    """An earlier request's plan is not contradicted by a header that every request carries."""
    headers = {"X-PTE-Pin-Tokens": "5"}
    body = {"model": "thoughts", "prompt": PROMPT, "max_tokens": 40, "return_token_ids": True}
    first = _ok(post(server, "/v1/completions", {**body, "ignore_eos": True}))
    more = {"prompt": [*PROMPT, *first["choices"][0]["token_ids"]]}
    options = {"vllm_xargs": {"pte_state_id": first["id"]}}
    found = _folds(server, headers, **more, **options)
    assert found["pin_tokens"] == len(PROMPT)
