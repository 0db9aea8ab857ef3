"""Which questions of a chat are pinned, as rollouts, scores and sweeps say and count it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pte_vllm.cli.eval import main as eval_command
from pte_vllm.method.plan import FoldPlan
from pte_vllm.wire.client import RolloutClient
from tests.harness.engine import BLOCK
from tests.harness.models import byte_tokenizer, random_tokens
from tests.harness.server import WINDOW, Server
from tests.server.under_way import post

TURNS = [("system", "s" * 20), ("user", "first " * 5), ("assistant", "a" * 200)]
MESSAGES = [{"role": r, "content": text} for r, text in (*TURNS, ("user", "second " * 9))]


@pytest.fixture(scope="module")
def server(
    shared: Callable[..., Server], tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> Server:
    return shared("chat", {"ridge": adapters(tiny("qwen3"), rank=8, rule="ridge")})


def _text(text: str) -> list[int]:
    return byte_tokenizer().encode(text, add_special_tokens=False)


def _rendered(messages: list[dict[str, str]], *, answered: bool | None = None) -> str:
    text = "".join(f"<s>{m['role']}\n{m['content']}</s>\n" for m in messages)
    ask = messages[-1]["role"] == "user" if answered is None else answered
    return text + "<s>assistant\n" * ask


def _pinned() -> tuple[int, tuple[int, int]]:
    """Where the first question of the chat ends, and where the other one lies."""
    first = len(_text(_rendered(MESSAGES[:2], answered=True)))
    return first, (len(_text(_rendered(MESSAGES[:3]))), len(_text(_rendered(MESSAGES))))


def test_rollouts_and_scores_pin_in_words(server: Server) -> None:
    """What `pin` says becomes the numbers that a chat route would pin."""
    text = _rendered(MESSAGES)
    prompt, (pinned, span) = _text(text), _pinned()
    greedy: dict[str, Any] = {"adapter": "ridge", "sampling": {"max_tokens": 40, "temperature": 0}}
    with RolloutClient(server.url) as client:
        (numbers,) = client.rollouts([prompt], pin_tokens=pinned, pin_spans=[(span,)], **greedy)
        (words,) = client.rollouts([prompt], pin="first_and_last_user", **greedy)
        (whole,) = client.rollouts([prompt], pin="prompt", **greedy)
        (of_text,) = client.rollouts([text], pin="first_and_last_user", **greedy)
        (scored,) = client.score(
            [words.token_ids], [len(prompt)], adapter="ridge", pin="first_and_last_user"
        )
    assert words.plan == numbers.plan == scored.plan and words.plan.pin_spans == (span,)
    assert words.completion_ids == numbers.completion_ids and of_text.plan.pin_spans
    assert (whole.plan.pin_tokens, whole.plan.pin_spans) == (len(prompt), ())
    plain, words_of = random_tokens(50, 500, 2), {"pin": "first_and_last_user"}
    for tokens, pins, says in (
        (prompt, {"pin": "all"}, "pin"),
        (prompt, {"pin": "prompt", "pin_tokens": 5}, "pin prompt says what is pinned, and so does"),
        (prompt, {**words_of, "pin_spans": [[]]}, "and so does pin_spans: leave one of them out"),
        (prompt, {**words_of, "evict": "random"}, "pin is first_and_last_user, and evict random"),
        (plain, words_of, "send pin_tokens and pin_spans"),
    ):
        for route, more in (("rollouts", {}), ("score", {"prompt_tokens": [len(tokens) - 1]})):
            answer = post(server, f"/pte/v1/{route}", {"token_ids": [tokens], **pins, **more})
            assert answer.status_code == 400 and says in answer.text, answer.text
            assert "pte_pin" not in answer.text


def test_a_sweep_counts_what_is_pinned(server: Server, tmp_path: Path) -> None:
    """Of a chat of several turns that is its first and its newest question, in every arm."""
    chats = (MESSAGES, [{"role": "user", "content": "first " * 5}])
    lines = [json.dumps({"prompt": chat, "answer": "no"}) + "\n" for chat in chats]
    length, window = 150, WINDOW
    arguments = ["run", "--url", server.url, "--judge", "exact", "--window", str(window)]
    arguments += ["--max-tokens", str(length), "--sinks", "--evict", "oldest,random"]
    arguments += ["--keep", str(BLOCK), "--adapter", "ridge"]
    found = {}
    for number, line in enumerate(lines):
        problems = tmp_path / f"chats-{number}.jsonl"
        problems.write_text(line)
        out = tmp_path / f"out-{number}"
        eval_command([*arguments, "--benchmark", str(problems), "--out", str(out)])
        rows = json.loads((out / "results.json").read_text())["rows"]
        found[number] = {row["arm"]: row for row in rows}
    pinned, span = _pinned()
    for number, (arm, row) in ((n, pair) for n, rows in found.items() for pair in rows.items()):
        assert row["error"] is None, (arm, row["error"])
        prompt = len(_text(_rendered(chats[number])))
        assert row["prompt_tokens"] == prompt
        pins: dict[str, Any] = {"pin_tokens": prompt}
        if number == 0 and "random" not in arm:
            pins = {"pin_tokens": pinned, "pin_spans": (span,)}
        plan = FoldPlan(window_tokens=window, block_size=BLOCK, **pins)
        total = prompt + round(row["answer_tokens"])
        held = max(map(plan.held_blocks, range(total)))
        if arm == "full":
            held = -(-total // BLOCK)
        elif "keep" in arm:
            assert held * BLOCK < row["kv_tokens"] <= (held + 1) * BLOCK
            continue
        elif "sinks" in arm:
            assert row["kv_tokens"] <= held * BLOCK
            continue
        assert row["kv_tokens"] == held * BLOCK, (number, arm)
    less, whole = (found[0][arm]["kv_tokens"] for arm in ("w128", "w128-random"))
    assert less < whole
