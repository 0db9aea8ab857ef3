"""Chats over many turns: the first and the newest question stay, on every route."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.probes import Probes
from pte_vllm.method.keep_marks import marks_of
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import log_probs
from pte_vllm.wire.client import RolloutClient
from pte_vllm.wire.episode import join_turns
from pte_vllm.wire.rollout import Rollout
from tests.harness.engine import BLOCK
from tests.harness.models import TINY_LAYERS, byte_tokenizer, random_tokens
from tests.harness.parity import TOLERANCE, load_model
from tests.harness.server import IGNORE_EOS, WINDOW, Server


@pytest.fixture(scope="module")
def server(
    shared: Callable[..., Server], tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> Server:
    return shared("chat", {"ridge": adapters(tiny("qwen3"), rank=8, rule="ridge")})


def _post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=300)


def _held(server: Server, name: str) -> int:
    known = server.get("/pte/v1/requests")
    (record,) = (r for r in [*known["running"], *known["finished"]] if name in r["request_id"])
    return int(record["peak_blocks"])


def _prompt(history: list[int], question: str) -> list[int]:
    """Tokens of a user's message and the header of its answer; bytes come after two specials."""
    return [*history, *_text(f"<s>user\n{question}</s>\n<s>assistant\n")]


def _text(text: str) -> list[int]:
    return byte_tokenizer().encode(text, add_special_tokens=False)


def _complete(server: Server, prompt: list[int], length: int, **options: Any) -> Any:
    body = {
        "model": "ridge",
        "prompt": prompt,
        "max_tokens": length,
        "temperature": 0.8,
        "seed": len(prompt),
        "logprobs": 0,
        "vllm_xargs": options,
        **IGNORE_EOS,
    }
    answer = _post(server, "/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_stateless_and_continued_turns_say_the_same(server: Server) -> None:
    """By tokens, so that a history is what was said; eight turns, with and without the state."""
    histories: dict[str, list[int]] = {"stateless": [], "continued": []}
    spans: list[tuple[int, int]] = []
    before: str | None = None
    for turn in range(8):
        question = "".join(chr(97 + token % 26) for token in random_tokens(20 + 17 * turn % 60))
        answers = {}
        for kind, history in histories.items():
            prompt = _prompt(history, question)
            options = {} if kind == "stateless" or before is None else {"pte_state_id": before}
            answers[kind] = _complete(server, prompt, 60 + 25 * turn % 90, **options)
        spans.append((len(histories["stateless"]), len(prompt)))
        tokens = {kind: a["choices"][0]["token_ids"] for kind, a in answers.items()}
        assert tokens["stateless"] == tokens["continued"]
        told = answers["continued"]["kv_transfer_params"]
        if turn:
            assert told["pte"]["pin_tokens"] == spans[0][1]
            assert [tuple(span) for span in told["pte"]["pin_spans"]] == spans[1:]
        before = answers["continued"]["id"]
        for kind in histories:
            histories[kind] = prompt + tokens[kind]
        assert 3 < _held(server, before) <= 2 + 4 + 1 + WINDOW // BLOCK + 1
    plan = FoldPlan(
        pin_tokens=spans[0][1],
        window_tokens=WINDOW,
        block_size=BLOCK,
        pin_spans=tuple(spans[1:]),
    )
    assert plan.folds(len(prompt)) >= 10
    kept = server.get(f"/pte/v1/thoughts/{before}/kept")
    assert kept["keep_tokens"] == BLOCK and kept["positions"]
    # The strip of the page: what is pinned, in the window and kept is what is held.
    asked = (spans[-1][0] // BLOCK * BLOCK, -(-spans[-1][1] // BLOCK) * BLOCK)
    assert kept["questions"] == [list(asked)]
    lists = [kept["pinned"], *kept["questions"], *kept["window"]]
    held = BLOCK + sum(end - first for first, end in lists)
    assert held == BLOCK * (replace(plan, keep_tokens=BLOCK).held_blocks(kept["at"]) - 1)


def test_scores_and_rollouts_of_conversations_are_the_replay(server: Server) -> None:
    tokens, spans = random_tokens(420, 500, 3), ((150, 190), (300, 330))
    plan = FoldPlan(pin_tokens=60, window_tokens=WINDOW, block_size=BLOCK, pin_spans=spans)
    attached = PTEModel(load_model(server.model), Adapter.load(server.adapters["ridge"]))
    options: dict[str, Any] = {
        "adapter": "ridge",
        "keep_tokens": 0,
        "pin_tokens": [60],
        "pin_spans": [spans],
    }
    with RolloutClient(server.url) as client:
        (scored,) = client.score([tokens], [330], **options)
        sampling = {"max_tokens": 100, "ignore_eos": True}
        samples = list(client.rollouts([tokens[:330]], n=2, sampling=sampling, **options))
    assert scored.plan == plan and [sample.plan for sample in samples] == [plan] * 2
    try:
        for record in (scored, *samples):
            ids = [*record.prompt_ids, *record.completion_ids]
            expected = log_probs(attached, ids, plan).logprobs[0, 330 : len(ids)]
            assert (torch.tensor(record.logprobs) - expected).abs().max().item() <= TOLERANCE
            again = type(record).from_json(record.to_line().decode())
            assert again == record and again.plan.pin_spans == spans
    finally:
        attached.detach()


def test_an_episode_of_turns_is_one_record(server: Server) -> None:
    """Each turn goes on from the tokens of the one before; one replay says all log-probs."""
    turns: list[Rollout] = []
    spans: list[tuple[int, int]] = []
    history: list[int] = []
    options: dict[str, Any] = {"adapter": "ridge", "keep_tokens": BLOCK}
    with RolloutClient(server.url) as client:
        for turn in range(5):
            question = random_tokens(30 + 8 * turn, 500, 40 + turn)
            spans.append((len(history), len(history) + len(question)))
            (record,) = client.rollouts(
                [history + question],
                sampling={"max_tokens": 50 + 20 * turn, "ignore_eos": True, "seed": turn},
                pin_tokens=spans[0][1],
                pin_spans=[tuple(spans[1:])],
                **options,
            )
            turns.append(record)
            history = list(record.token_ids)
    episode = join_turns(turns)
    assert list(episode.token_ids) == history and episode.plan == turns[-1].plan
    assert episode.plan.pin_spans == tuple(spans[1:])
    assert sum(episode.mask) == sum(len(turn.completion_ids) for turn in turns)
    assert Rollout.from_json(episode.to_line()) == episode
    with RolloutClient(server.url) as client:  # spans past the first question, as in the record
        (scored,) = client.score(
            [history],
            [len(episode.prompt_ids)],
            pin_tokens=spans[0][1],
            pin_spans=[tuple(spans[1:])],
            kept=[episode.kept],
            **options,
        )
    assert scored.plan == episode.plan and scored.kept == episode.kept
    model = PTEModel(load_model(server.model), Adapter.load(server.adapters["ridge"]))
    try:
        assert episode.kept is not None
        marks = marks_of(episode.kept, episode.plan, TINY_LAYERS, 2)
        keeper = Keeper(model, Probes.load(server.probes))
        found = log_probs(model, history, episode.plan, keeper=keeper, marks=[marks]).logprobs[0]
    finally:
        model.detach()
    said = torch.tensor(episode.logprobs)
    sampled = torch.tensor(episode.mask, dtype=torch.bool)
    expected = found[len(episode.prompt_ids) : len(history)]
    for found in (expected, torch.tensor(scored.logprobs)):
        assert (said - found)[sampled].abs().max().item() <= TOLERANCE
    for wrong, message in (
        (turns[1:] + turns[:1], "turn 0 has another plan"),
        ([replace(turns[0], adapter=None), *turns[1:]], "turn 0 ran with no adapter"),
        ([turns[1], *turns[1:]], "turn 1 does not begin with the"),
        ([turns[0], *turns[2:]], None),  # a turn left out is what the environment said
        ([], "at least one turn"),
    ):
        if message is None:
            assert len(join_turns(wrong).token_ids) == len(history)
            continue
        with pytest.raises(ValueError, match=message):
            join_turns(wrong)


def test_chat_pins_its_first_and_newest_question(server: Server) -> None:
    """Results of tools, and what else lies between, are thoughts; `prompt` is as it was."""
    messages = [
        {"role": "system", "content": "s" * 20},
        {"role": "user", "content": "first " * 5},
        {"role": "assistant", "content": "a" * 100},
        {"role": "tool", "content": "r" * 90},
        {"role": "assistant", "content": "b" * 100},
        {"role": "user", "content": "second " * 4},
    ]
    for route, body in (
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 5}),
        ("/v1/completions", {"prompt": _rendered(messages), "max_tokens": 5}),
    ):
        answer = _post(server, route, {"model": "ridge", **body}).json()
        told = answer["kv_transfer_params"]["pte"]
        first = len(_text(_rendered(messages[:2], answered=True)))
        newest = len(_text(_rendered(messages[:5])))
        total = answer["usage"]["prompt_tokens"]
        assert (told["pin_tokens"], told["pin_spans"]) == (first, [[newest, total]])
        assert told["folds"] > 0
        whole = _post(
            server, route, {"model": "ridge", **body, "vllm_xargs": {"pte_pin": "prompt"}}
        )
        assert whole.json()["kv_transfer_params"]["pte"]["pin_tokens"] == total
    full = {"messages": messages, "max_tokens": 5, "vllm_xargs": {"pte_window": 0}}
    answer = _post(server, "/v1/chat/completions", {"model": "ridge", **full}).json()
    assert answer["kv_transfer_params"]["pte"]["folds"] == 0


def _rendered(messages: list[dict[str, str]], *, answered: bool | None = None) -> str:
    text = "".join(f"<s>{m['role']}\n{m['content']}</s>\n" for m in messages)
    ask = messages[-1]["role"] == "user" if answered is None else answered
    return text + "<s>assistant\n" * ask


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pte_pin_tokens": 50, "pte_pin_spans": [100, 120, 110, 130]}, "begins before token 120"),
        ({"pte_pin_tokens": 50, "pte_pin_spans": [120, 130, 60, 70]}, "begins before token 130"),
        ({"pte_pin_tokens": 50, "pte_pin_spans": [40, 70]}, "where pte_pin_tokens ends"),
        ({"pte_pin_spans": [40, 70]}, "without pte_pin_tokens the whole prompt"),
        ({"pte_pin_tokens": 50, "pte_pin_spans": [100, 201]}, "beyond the prompt of 200 tokens"),
        ({"pte_pin_tokens": 50, "pte_pin_spans": [100, 100]}, "[100, 100) is empty"),
        ({"pte_pin_tokens": 50, "pte_pin_spans": [100]}, "got 1 numbers"),
        ({"pte_pin_tokens": 50, "pte_pin_spans": "100-x"}, "must be an integer, got 'x'"),
        ({"pte_pin_tokens": 50, "pte_pin_spans": "100-120", "pte_evict": "random"}, "evict oldest"),
        ({"pte_pin": "prompt", "pte_pin_tokens": 5}, "leave one of them out"),
        (
            {"pte_evict": "random", "pte_pin_tokens": 5, "pte_pin_spans": [9, 12]},
            "pte_pin_spans: pin spans need evict oldest",
        ),
        ({"pte_pin": "all"}, "pte_pin must be one of prompt, first_and_last_user"),
        ({"pte_pin": "first_and_last_user"}, "no user message is found"),
    ],
)
def test_bad_pins_are_refused(server: Server, options: dict[str, Any], message: str) -> None:
    body = {"model": "base", "prompt": random_tokens(200, 500, 9), "max_tokens": 3}
    answer = _post(server, "/v1/completions", {**body, "vllm_xargs": options})
    assert answer.status_code == 400
    assert message in json.dumps(answer.json())
    assert _post(server, "/v1/completions", body).status_code == 200
