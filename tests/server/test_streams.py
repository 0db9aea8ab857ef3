"""Streams are refused before they begin, and go on as vLLM's do once they have begun."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.engine import BLOCK
from tests.harness.models import random_tokens
from tests.harness.server import IGNORE_EOS, Server
from tests.server.under_way import post

PROMPT = random_tokens(60, 500, 4)
CHAT = [{"role": "user", "content": "Hello"}]
WINDOW = {"pte_window": 2 * BLOCK}
"""A window of two blocks, of which a fold takes one."""

COMPLETIONS = {"prompt": PROMPT, "max_tokens": 9}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": COMPLETIONS,
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 9},
    "/v1/responses": {"input": CHAT, "max_output_tokens": 9},
    "/v1/messages": {"messages": CHAT, "max_tokens": 9},
    "/inference/v1/generate": {"token_ids": PROMPT, "sampling_params": {"max_tokens": 9}},
}
"""Routes that stream, with a body that each of them takes."""
SEVERAL = ("/v1/completions", "/v1/chat/completions", "/inference/v1/generate")
"""Routes that know `n`."""
ENDS = ("[DONE]", "response.completed", "message_stop")
"""What a stream that is whole ends with."""


@pytest.fixture(scope="module")
def server(
    shared: Callable[..., Server], tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> Server:
    return shared("open", {"paper": adapters(tiny("qwen3"), rank=8, rule="paper")})


def _body(route: str, options: dict[str, Any], *, n: int = 1, **more: Any) -> dict[str, Any]:
    """A body for a stream on this route, with options of ours and a number of choices."""
    body = {"model": "paper", "stream": True, **BODIES[route]}
    if route == "/inference/v1/generate":
        params = {**body["sampling_params"], "extra_args": options, "n": n, **more}
        return body | {"sampling_params": params}
    return body | {"vllm_xargs": options} | ({"n": n} if n > 1 else {}) | more


def _message(answer: httpx.Response) -> str:
    assert answer.status_code == 400, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/json"
    return str(answer.json()["error"]["message"])


@pytest.mark.parametrize("route", BODIES)
def test_options_that_are_refused(server: Server, route: str) -> None:
    for options, says in (
        ({"pte_windw": 64}, "unknown option 'pte_windw'"),
        ({"pte_window": 33}, "pte_window"),
        ({"pte_pin_tokens": 10**6}, "pte_pin_tokens is 1000000, beyond the prompt"),
        ({"pte_pin_tokens": 1, "pte_pin_spans": [5, 4]}, "pte_pin_spans: [5, 4) is empty"),
        ({"pte_pin": "first_and_last_user"}, "pte_pin is first_and_last_user"),
        ({"pte_state_id": "cmpl-nobody"}, "there is no request cmpl-nobody here"),
        ({"pte_keep": 33}, "pte_keep"),
        ({"pte_evict": "random", "pte_window": 0}, "pte_evict random needs a window"),
    ):
        for n in (1, 3) if route in SEVERAL else (1,):
            answer = post(server, route, _body(route, options, n=n))
            assert says in _message(answer), (options, n, answer.text)
            whole = post(server, route, _body(route, options, n=n) | {"stream": False})
            assert _message(whole) == _message(answer), (options, n)
    for name, value in (("X-PTE-Window", "33"), ("X-PTE-Pin-Tokens", "x")):
        answer = post(server, route, _body(route, {}), headers={name: value})
        assert name.removeprefix("X-").lower().replace("-", "_") in _message(answer)


def test_what_vllm_refuses(server: Server) -> None:
    """Its own checks are made at the same time."""
    for route, wrong in (
        ("/v1/completions", {"allowed_token_ids": [10**6]}),
        ("/v1/completions", {"stop_token_ids": [7], "allowed_token_ids": [7], "min_tokens": 2}),
        ("/v1/chat/completions", {"allowed_token_ids": [10**6]}),
        ("/inference/v1/generate", {"allowed_token_ids": [10**6]}),
    ):
        answer = post(server, route, _body(route, {}, **wrong))
        assert "allowed_token_ids" in _message(answer)


def test_one_of_several_prompts_is_refused(server: Server) -> None:
    prompts = [PROMPT, PROMPT[:20], PROMPT]
    for n in (1, 2):
        body = _body("/v1/completions", {"pte_pin_tokens": 50}, n=n, prompt=prompts)
        assert "beyond the prompt of 20 tokens" in _message(post(server, "/v1/completions", body))


def test_no_traceback_for_what_is_refused(server: Server) -> None:
    before = len(server.log.read_text())
    for route in BODIES:
        _message(post(server, route, _body(route, {"pte_window": 33})))
    assert "Traceback" not in server.log.read_text()[before:]


def test_a_refused_request_is_not_remembered(server: Server) -> None:
    """What is only checked cannot be continued."""
    body = _body("/v1/completions", {"pte_state_id": "pte-validation"})
    assert "there is no request pte-validation" in _message(post(server, "/v1/completions", body))


@pytest.mark.parametrize("route", BODIES)
def test_headers_do_not_wait_for_the_model(server: Server, route: str) -> None:
    """They come while nothing is computed; a client that leaves then has its request aborted."""
    post(server, "/pause?mode=keep&clear_cache=false").raise_for_status()
    try:
        for leaves in (True, False):
            # Nothing is sampled before /resume: headers that waited for it would never come.
            with httpx.stream(
                "POST", server.url + route, json=_body(route, WINDOW), timeout=300
            ) as answer:
                assert answer.status_code == 200
                assert answer.headers["content-type"].startswith("text/event-stream")
                if leaves:
                    continue
                post(server, "/resume").raise_for_status()
                text = "".join(answer.iter_text())
                assert any(end in text for end in ENDS) and '"error":{' not in text, text
    finally:
        post(server, "/resume").raise_for_status()
    server.wait_idle()


def test_a_stream_that_its_client_leaves_is_aborted(server: Server) -> None:
    for n in (1, 3):
        body = _body("/v1/completions", WINDOW, n=n, max_tokens=3000, **IGNORE_EOS)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
            first = json.loads(next(lines).removeprefix("data: "))
        server.wait_idle()
        found = [
            record
            for record in server.get("/pte/v1/requests")["finished"]
            if first["id"] in record["request_id"]
        ]
        assert len(found) == n and all(record["num_tokens"] < 3000 for record in found)


def _told(server: Server, route: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What the events of a stream tell, and an event after which nothing else is told."""
    answer = post(server, route, body)
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        return [answer.json()]
    lines = (line.removeprefix("data: ") for line in answer.text.split("\n"))
    return [event for event in (json.loads(line) for line in lines if line.startswith("{"))]


def _folds(found: dict[str, Any]) -> dict[str, int]:
    return {name: found[name] for name in ("folds", "folded_tokens")}


@pytest.mark.parametrize("route", BODIES)
def test_the_end_of_a_stream_tells_what_was_folded(server: Server, route: str) -> None:
    """In the words of an answer that is sent whole."""
    length = {"max_output_tokens": 150} if route == "/v1/responses" else {"max_tokens": 150}
    if route in SEVERAL:
        length |= {"ignore_eos": True}
    events = _told(server, route, _body(route, WINDOW, **length))
    telling = [event for event in events if "kv_transfer_params" in json.dumps(event)]
    if route == "/v1/responses":
        (end,) = (event for event in telling if event["response"]["kv_transfer_params"])
        assert end["type"] == "response.completed"
        name, told = end["response"]["id"], end["response"]["kv_transfer_params"]["pte"]
    else:
        (end,) = telling
        told = end["kv_transfer_params"]["pte"]
        first = events[0]
        name = first.get("id") or first.get("request_id") or first["message"]["id"]
        if route == "/v1/messages":
            assert end["type"] == "message_delta"
        else:
            assert end["choices"][0]["finish_reason"] == "length"
    server.wait_idle()
    found = server.get(f"/pte/v1/thoughts/{name}")
    assert told == {"pin_tokens": found["pin_tokens"], **_folds(found)}
    if route in SEVERAL:
        assert told["folds"] > 0
    plain = _told(server, route, _body(route, {}, **length))
    assert not any((event.get("response") or event).get("kv_transfer_params") for event in plain)


@pytest.mark.parametrize("route", SEVERAL)
@pytest.mark.parametrize("stream", [True, False])
def test_several_choices_tell_what_each_folded(server: Server, route: str, stream: bool) -> None:
    length = {"max_tokens": 300, "temperature": 1.0, "seed": 3}
    if route != "/inference/v1/generate":
        length |= {"stop": ["a", "e"]}  # choices of different lengths
    body = _body(route, WINDOW, n=3, **length) | {"stream": stream}
    answers = _told(server, route, body)
    (told,) = (found["pte"] for a in answers if (found := a.get("kv_transfer_params")))
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
    assert all(choice["folded_tokens"] == choice["folds"] * BLOCK for choice in told["choices"])
    name = answers[0].get("id") or answers[0]["request_id"]
    server.wait_idle()
    for choice in told["choices"]:
        found = server.get(f"/pte/v1/thoughts/{name}-{choice['index']}")
        assert told["pin_tokens"] == found["pin_tokens"]
        # The engine may have been a token ahead when a stop string ended the answer.
        assert found["folds"] - 1 <= choice["folds"] <= found["folds"]
    if stream:
        last = [a for a in answers if any(c.get("finish_reason") for c in a["choices"])][-1]
        assert last["kv_transfer_params"]["pte"] == told


def test_each_of_several_prompts_tells_its_folds(server: Server) -> None:
    for n in (1, 2):
        body = _body(
            "/v1/completions",
            WINDOW,
            n=n,
            prompt=[PROMPT, PROMPT[:20], [*PROMPT, *PROMPT]],
            max_tokens=130,
            **IGNORE_EOS,
        )
        events = _told(server, "/v1/completions", body)
        told = {
            event["choices"][0]["index"] // n: event["kv_transfer_params"]["pte"]
            for event in events
            if event.get("kv_transfer_params")
        }
        assert {number: found["pin_tokens"] for number, found in told.items()} == {
            0: 60,
            1: 20,
            2: 120,
        }
        assert all(("choices" in found) == (n > 1) for found in told.values())
