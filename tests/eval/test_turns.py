"""`pte-vllm eval turns`: the conversations, what is held and said, and what is made of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pte_vllm.cli.eval import main as eval_command
from pte_vllm.eval import turns_report
from pte_vllm.eval.talks import draw_talk
from tests.harness.engine import BLOCK
from tests.harness.kinds import CHAT_TEMPLATE
from tests.harness.server import Server

DISTANCES = (1, 2, 4, 4, 8, 8, 16, 16, 24, 24, 40, 40)


def test_facts_are_told_before_they_are_asked_for() -> None:
    for seed in range(20):
        talk = draw_talk(str(seed), turns=50, distances=DISTANCES)
        assert talk == draw_talk(str(seed), turns=50, distances=DISTANCES) and len(talk) == 50
        asked = [(t, turn) for t, turn in enumerate(talk) if turn.wanted is not None]
        assert sorted(turn.distance or 0 for _, turn in asked) == list(DISTANCES)
        for number, turn in asked:
            assert turn.wanted is not None and turn.distance is not None
            told = talk[number - turn.distance].text
            assert number > turn.distance  # not in the first turn, which stays for ever
            assert told.startswith("Please remember") and told.endswith(f" {turn.wanted}.")
            others = [other.text for other in talk if other.text != told]
            assert not any(re.search(rf"\b{turn.wanted}\b", text) for text in others)
            assert turn.is_right(f"It is {turn.wanted.lower()}, I think.")
            assert not turn.is_right(f"It is {turn.wanted}s.")
    assert not talk[0].is_right("Yes.")


def test_no_room() -> None:
    for turns, distances, message in (
        (50, range(1, 14), "13 facts, and there are 12 kinds"),
        (10, [9], "no room for"),
        (10, [0], "no room for"),
        (1, [], "--turns"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_talk("0", turns=turns, distances=list(distances))


def _record(title: str, seed: int, *, right: bool, blocks: int | None) -> dict[str, Any]:
    asked = {"wanted": "Rome", "distance": 2, "right": right}
    other = {"wanted": None, "distance": None, "right": False}
    turns = [
        {**kind, "question": "?", "answer": "!", "prompt_tokens": 10 * turn, "blocks": blocks}
        for turn, kind in enumerate([other, other, other, asked, asked | {"distance": 3}], 1)
    ]
    return {"arm": title, "title": title, "seed": seed, "settings": {"turns": 5}, "turns": turns}


def test_report(tmp_path: Path) -> None:
    records = [
        _record("full cache", 0, right=True, blocks=None),
        _record("window 64, keeping 32", 0, right=True, blocks=5),
        _record("full cache", 1, right=True, blocks=None),
        _record("window 64, keeping 32", 1, right=False, blocks=7),
    ]
    text = turns_report.write(records, 32, tmp_path)
    assert "2 conversations of 5 turns" in text and "| memory | 2 (n = 2) | 3 (n = 2) |" in text
    assert "| window 64, keeping 32 | 0.50 | 0.50 | 0.500 [0.150, 0.850] |" in text
    assert "| window 64, keeping 32 | 7 | 7 | 7 |" in text and "| full cache | – | – | – |" in text
    found = json.loads((tmp_path / "turns.json").read_text())["arms"]
    assert found["full cache"]["tokens_by_turn"] == [10, 20, 30, 40, 50]
    assert (tmp_path / "turns.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --model"),
        (["--url", "http://a", "--talks", "0"], "--talks must be at least 1"),
        (["--url", "http://a", "--probes", "nowhere"], "--probes: there is no file nowhere"),
        (["--url", "http://a", "--server-flags=--dtype auto"], "for a server that is started"),
        (["--url", "http://a", "--keep-score", "luck"], "--keep-score must be among"),
        (["--url", "http://a", "--turns", "5"], "5 turns have no room"),
        (["--model", "./nowhere"], "--model: the model directory ./nowhere does not exist"),
    ],
)
def test_mistakes_name_the_flag(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        eval_command(["turns", *words, "--out", str(tmp_path)])


@pytest.mark.slow
def test_blocks_stay_flat_and_talks_are_kept(
    tiny: Callable[[str], Path],
    probes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(CHAT_TEMPLATE)
    flags = ["--chat-template", str(file), "--pte-probes", str(probes)]
    log, spool = tmp_path / "server.log", ["--pte-spool", str(tmp_path / "spool")]
    with Server(tiny("qwen3"), {}, log=log, flags=[*flags, *spool]) as server:
        server.wait_ready()
        _check_talks(server, tmp_path, capsys)
        server.wait_idle()


def _check_talks(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["turns", "--url", server.url, "--turns", "12", "--talks", "2", "--distances", "1,6"]
    words += ["--window", str(2 * BLOCK), "--keep", str(BLOCK), "--max-tokens", "20"]
    words += ["--out", str(tmp_path / "out")]
    assert eval_command(words) == 0
    arms = json.loads((tmp_path / "out" / "turns.json").read_text())["arms"]
    window = f"window {2 * BLOCK}"
    assert list(arms) == [
        *("full cache", f"{window}, no memory", f"{window}, keeping {BLOCK}"),
        *(f"{window}, keeping {BLOCK} at random", f"window {3 * BLOCK}, no memory"),
    ]
    full = arms["full cache"]["blocks_by_turn"]
    assert full == sorted(full) and full[-1] > 2 * full[3]
    for title, arm in arms.items():
        if title != "full cache":
            assert max(arm["blocks_by_turn"][6:]) <= max(arm["blocks_by_turn"][:6]) + 1
        assert arm["right"]["count"] == 4 and list(arm["by_distance"]) == ["1", "6"]
    assert "blocks at turn 12" in " ".join(capsys.readouterr().out.split())
    talks = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "talks").iterdir()}
    assert len(talks) == 10
    assert eval_command(words) == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in talks} == talks
    assert "10 conversations, 0 turns to go" in capsys.readouterr().err
    # An interrupted conversation goes on with its next turn, and says what it would have said.
    file = tmp_path / "out" / "talks" / f"w{2 * BLOCK}-keep{BLOCK}-1.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"turns": whole["turns"][:7]}))
    assert eval_command(words) == 0
    assert "10 conversations, 5 turns to go" in capsys.readouterr().err
    again = json.loads(file.read_text())
    assert [t["answer"] for t in again["turns"]] == [t["answer"] for t in whole["turns"]]
