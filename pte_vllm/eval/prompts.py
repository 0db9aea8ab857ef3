"""What a server makes of the chats that a sweep asks: their length, and what it pins of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import dropwhile
from typing import Any

import httpx

from pte_vllm.eval.arms import Pins
from pte_vllm.eval.serving import DeadServer, ServerFacts

Chat = Sequence[Mapping[str, str]]
"""Messages."""


def count_prompts(
    facts: ServerFacts, prompts: Mapping[str, Chat], *, api_key: str | None = None
) -> dict[str, int]:
    """Return how many tokens the server makes of each chat, by its key.

    Raises:
        ValueError: if the server refuses.
        DeadServer: if it does not answer.
    """
    with _client(facts, api_key) as client:
        return {
            key: int(_post(client, "/tokenize", "--sinks", facts, messages)["count"])
            for key, messages in prompts.items()
        }


def pins_of(
    facts: ServerFacts,
    prompts: Mapping[str, Chat],
    *,
    window_tokens: int,
    api_key: str | None = None,
) -> dict[str, Pins]:
    """Return what the server pins of those chats of which it may not pin all, by their keys.

    It is asked for a token after each chat of several turns, and its answer tells.

    Args:
        facts: the server.
        prompts: the chats.
        window_tokens: a window that it takes; under full attention it pins nothing.
        api_key: the server's.

    Raises:
        ValueError: if the server refuses.
        DeadServer: if it does not answer.
    """
    if facts.pin_tokens is not None:
        pins = Pins(pin_tokens=facts.pin_tokens, by_questions=False)
        return dict.fromkeys(prompts, pins)
    found = {}
    options = {"max_completion_tokens": 1, "vllm_xargs": {"pte_window": window_tokens}}
    with _client(facts, api_key) as client:
        for key, messages in prompts.items():
            if has_turns(messages):
                route = "/v1/chat/completions"
                answer = _post(client, route, "--benchmark", facts, messages, **options)
                told = answer["kv_transfer_params"]["pte"]
                found[key] = Pins(
                    pin_tokens=told["pin_tokens"], pin_spans=told.get("pin_spans") or ()
                )
    return found


def has_turns(messages: Chat) -> bool:
    """Return whether a chat goes on after its first question: such a chat is not one question."""
    from_question = dropwhile(lambda message: message["role"] != "user", messages)
    return any(message["role"] != "user" for message in from_question)


def _client(facts: ServerFacts, api_key: str | None) -> httpx.Client:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(base_url=facts.url, trust_env=False, timeout=600.0, headers=headers)


def _post(
    client: httpx.Client, route: str, flag: str, facts: ServerFacts, messages: Chat, **options: Any
) -> dict[str, Any]:
    body = {"model": facts.models[0], "messages": list(messages), **options}
    try:
        reply = client.post(route, json=body)
    except httpx.HTTPError as error:
        raise DeadServer(f"--url: {facts.url} does not answer: {error}") from error
    if reply.status_code != 200:
        raise ValueError(f"{flag}: {facts.url}{route} answers {reply.text[:200]}")
    found: dict[str, Any] = reply.json()
    return found
