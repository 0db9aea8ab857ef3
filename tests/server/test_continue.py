"""`pte_state_id`: requests that go on from an earlier one, or fork it, without reading it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest
import torch

from pte_vllm.method.plan import FoldPlan
from tests.harness.engine import BLOCK, drawn
from tests.harness.parity import TOLERANCE
from tests.harness.server import IGNORE_EOS, WINDOW, Server
from tests.server.thinking import PROMPT, complete, finished, replay


@pytest.fixture(scope="module")
def server(
    shared: Callable[..., Server], tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> Server:
    model = tiny("qwen3")
    served = {rule: adapters(model, rank=8, rule=rule) for rule in ("paper", "ridge")}
    served["delta"] = adapters(model, rank=8, rule="delta", features="squared")
    return shared("open", served)


def _continue(
    server: Server, model: str, prompt: list[int], n: int = 1, salt: str | None = None, **options
):
    return server.complete(
        model, prompt, 130, options=options, cache_salt=salt, n=n, logprobs=0, seed=5
    )


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("paper", {"pte_window": 2 * BLOCK}),
        ("ridge", {"pte_pin_tokens": 20, "pte_update": "sum"}),
        ("delta", {}),
        ("delta", {"pte_evict": "random", "pte_evict_seed": 3}),
        ("ridge", {"pte_keep": 2 * BLOCK}),
    ],
)
def test_continue_by_id(server: Server, model: str, options: dict) -> None:
    """The client needs no plan; what stands is not read again, and the tokens are the replay's."""
    first = complete(server, model, **options)
    prompt = [*PROMPT, *first.choices[0].token_ids, 7, 7, 7]
    continued = _continue(server, model, prompt, pte_state_id=first.id)
    cached = continued.usage.prompt_tokens_details.cached_tokens
    assert cached == (len(prompt) - 4) // BLOCK * BLOCK
    plan = FoldPlan(
        pin_tokens=options.get("pte_pin_tokens", 50),
        window_tokens=options.get("pte_window", WINDOW),
        block_size=BLOCK,
        **drawn(options),
    )
    choice = continued.choices[0]
    tokens = [*prompt, *choice.token_ids]
    expected = replay(server, model, tokens, plan, options.get("pte_update")).logprobs[0]
    found = torch.tensor(choice.logprobs.token_logprobs)
    assert (found - expected[len(prompt) :]).abs().max().item() <= TOLERANCE
    thoughts = finished(server, continued.id)
    assert thoughts["folds"] == len(thoughts["rho"]) > cached // BLOCK - 6
    assert thoughts["rule"] == options.get("pte_update", model)
    # Under another salt no block is shared: the same by replay.
    replayed = _continue(server, model, prompt, salt=f"mine{options}", pte_state_id=first.id)
    assert replayed.usage.prompt_tokens_details.cached_tokens == 0
    assert replayed.choices[0].token_ids == choice.token_ids
    assert finished(server, replayed.id)["rho"] == pytest.approx(thoughts["rho"], rel=1e-3)
    # And on from there, in three ways.
    forks = _continue(server, model, tokens, n=3, pte_state_id=continued.id)
    assert forks.usage.prompt_tokens_details.cached_tokens >= (len(tokens) - 1) // BLOCK * BLOCK
    assert len({tuple(fork.token_ids) for fork in forks.choices}) == 3


def test_continue_a_cancelled_request(server: Server) -> None:
    tokens = list(PROMPT)
    with server.client.completions.create(
        model="ridge", prompt=PROMPT, max_tokens=3000, stream=True, extra_body=IGNORE_EOS
    ) as stream:
        for chunk in stream:
            name = chunk.id
            tokens += chunk.choices[0].token_ids
            if len(tokens) > 300:
                break
    finished(server, name)
    continued = _continue(server, "ridge", tokens, pte_state_id=name)
    # The server may have been ahead of the client, so that a later state is all it kept.
    choice = continued.choices[0]
    plan = FoldPlan(pin_tokens=50, window_tokens=WINDOW, block_size=BLOCK)
    expected = replay(server, "ridge", [*tokens, *choice.token_ids], plan).logprobs[0]
    found = torch.tensor(choice.logprobs.token_logprobs)
    assert (found - expected[len(tokens) :]).abs().max().item() <= TOLERANCE


def test_what_contradicts_the_earlier_request_is_refused(server: Server) -> None:
    first = complete(server, "paper")
    prompt = [*PROMPT, *first.choices[0].token_ids]
    for model, tokens, options, message in (
        ("paper", prompt, {"pte_state_id": "cmpl-nothing"}, "send its pte_pin_tokens"),
        ("paper", prompt, {"pte_state_id": f"{first.id}-1"}, "no request"),
        ("paper", prompt, {"pte_state_id": 7}, "must be the id"),
        ("paper", prompt, {"pte_state_id": first.id, "pte_window": 64}, "ran with 128"),
        ("paper", prompt, {"pte_state_id": first.id, "pte_pin_tokens": 49}, "ran with 50"),
        ("paper", prompt, {"pte_state_id": first.id, "pte_update": "sum"}, "ran with paper"),
        ("paper", prompt, {"pte_state_id": first.id, "pte_evict": "random"}, "ran with oldest"),
        ("ridge", prompt, {"pte_state_id": first.id}, "ran with paper"),
        ("base", prompt, {"pte_state_id": first.id}, "ran with paper"),
        ("paper", prompt[1:], {"pte_state_id": first.id}, "must begin with the 50 tokens"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            _continue(server, model, tokens, **options)
    same = {"pte_window": WINDOW, "pte_pin_tokens": 50, "pte_update": "paper"}
    _continue(server, "paper", prompt, pte_state_id=first.id, **same)
    httpx.delete(f"{server.url}/pte/v1/thoughts/{first.id}", timeout=30).raise_for_status()
    with pytest.raises(openai.BadRequestError, match="forgotten"):
        _continue(server, "paper", prompt, pte_state_id=first.id)
