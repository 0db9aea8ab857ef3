"""The demo: what it asks, what it shows, and that the processes it starts never outlive it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from pte_vllm.demo import notes, run, serving, view
from pte_vllm.demo.answers import Answer, Arm, Asked, Sample, arms, find_record
from pte_vllm.launch import LaunchError, ProcessGroup, Server, log_tail

QUESTION = notes.Question(
    facts=("Anna has a cat.", "Ben was born in Rome.", "Leo is late."),
    other_text="It rained.",
    question="Where was Ben born?",
    asked=1,
    answer="Rome",
)


def record(request_id: str, **changes: object) -> dict:
    return {
        "request_id": request_id,
        "num_tokens": 400,
        "held_blocks": 7,
        "peak_blocks": 8,
    } | changes


def report(*, running: list[dict] = (), finished: list[dict] = ()) -> dict:
    return {"running": list(running), "finished": list(finished)}


def answer(text: str = "", **changes: object) -> Answer:
    values = {"arm": Arm(name="window 64", options={}), "question": QUESTION, "done": True}
    return Answer(**(values | {"text": text} | changes))


def test_questions_are_the_same_for_one_seed_and_cannot_be_guessed_from_the_text():
    questions = notes.draw(50, "any")
    assert questions[:5] == notes.draw(5, "any") != notes.draw(5, "other")
    text = " ".join([*notes.OTHER_TEXT, notes.INTRO, notes.SYSTEM])
    for kind in notes.KINDS:
        for value in kind.values.split():
            assert not re.search(rf"\b{value}\b", text, re.IGNORECASE), value
    for question in questions:
        assert question.prompt.count(question.answer) == 1
        assert question.answer in question.facts[question.asked]
        assert question.prompt.endswith(question.since_fact + question.question)


@pytest.mark.parametrize(
    ("text", "right"),
    [("In Rome", True), ("rome, I think", True), ("In Romeo", False), ("", False)],
)
def test_what_is_right(text, right):
    assert answer(text).right is right
    assert view.mark(answer(text)).plain == ("right" if right else "wrong")
    assert view.mark(answer(text, done=False)).plain == "..."


def test_a_response_is_found_by_its_prefix_running_or_finished():
    both = report(running=[record("chatcmpl-aa-1f")], finished=[record("chatcmpl-bb-2e")])
    assert find_record(both, "chatcmpl-aa")["request_id"] == "chatcmpl-aa-1f"
    assert find_record(both, "chatcmpl-bb")["request_id"] == "chatcmpl-bb-2e"
    assert find_record(both, "chatcmpl-cc") is None


def test_samples_of_one_answer():
    one = answer(request_id="x")
    one.take_sample(report(running=[record("chatcmpl-y-1")]))
    assert one.samples == [] and one.peak_blocks == 0
    for held, tokens in ((2, 40), (2, 40), (7, 400)):
        row = record("chatcmpl-x-1", num_tokens=tokens, held_blocks=held)
        one.take_sample(report(running=[row]))
    one.take_sample(report(finished=[record("chatcmpl-x-1", held_blocks=0, peak_blocks=9)]))
    assert one.samples == [Sample(40, 2), Sample(400, 7)]
    assert one.peak_blocks == 9


def test_the_window_without_memory_holds_as_much():
    full, window, ours = (arm.options for arm in arms(window=96, keep=32, keep_score="random"))
    assert full["pte_window"] == 0
    assert window["pte_window"] == ours["pte_window"] + ours["pte_keep"] == 128
    assert window["pte_keep"] == 0 and ours["pte_keep_score"] == "random"


def test_block_bytes_of_a_grouped_query_model():
    config = {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
        "num_hidden_layers": 30,
    }
    assert serving.block_bytes(config, 2) == 2 * 30 * (3 * 64) * 2 * 32
    assert serving.block_bytes(config | {"head_dim": 128}, 4) == 2 * 30 * (3 * 128) * 4 * 32


@pytest.mark.parametrize(
    "argv",
    [
        ["--window", "100"],
        ["--window", "32"],
        ["--keep", "0"],
        ["--questions", "0"],
        ["--probes", "no"],
    ],
)
def test_impossible_options_name_the_flag(argv, capsys):
    with pytest.raises(SystemExit):
        run.parse(argv)
    assert argv[0] in capsys.readouterr().err


def test_a_model_with_few_positions_is_refused(tmp_path):
    config = {"num_attention_heads": 2, "hidden_size": 64, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    args = serving.serve_args(run.parse(["--keep", "32"]), tmp_path)
    assert args[0] == str(tmp_path) and args[args.index("--pte-keep") + 1] == "32"
    assert "--pte-probes" not in args
    file = tmp_path / "probes"
    file.touch()
    args = serving.serve_args(run.parse(["--probes", str(file)]), tmp_path)
    assert args[args.index("--pte-probes") + 1] == str(file)
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    with pytest.raises(LaunchError, match="knows 1024 positions only"):
        serving.serve_args(run.parse([]), tmp_path)


def test_tables_lines_and_plot(tmp_path):
    answers = (
        answer("In Rome", peak_blocks=15, samples=[Sample(40, 2), Sample(400, 13)]),
        answer("In Oslo", peak_blocks=6, samples=[Sample(40, 2)]),
        answer("", done=False),
    )
    asked = [Asked(question=QUESTION, tokens_back=412, answers=answers)]
    screen = Console(width=120, record=True, file=(tmp_path / "screen").open("w"))
    screen.print(view.question_lines(asked[0], 1, 3))
    screen.print(view.answer_lines(asked[0]))
    screen.print(view.answers_table(asked[0], 120))
    screen.print(view.summary_table(asked))
    shown = screen.export_text()
    assert "question 1 of 3: Where was Ben born?" in shown
    assert '412 tokens back the text says "Ben was born in Rome."' in shown
    assert "window 64: right, 15 KV blocks: In Rome" in shown
    assert "wrong, 6 blocks" in shown
    assert view.summary_line(asked).startswith(
        "window 64: 1 of 1 right, 15 KV blocks; window 64: 0"
    )
    view.save_plot(asked, tmp_path / "answers.png")
    assert (tmp_path / "answers.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_shows_what_is_forgotten_and_what_is_remembered(smollm2, tmp_path, capsys):
    """The whole demo: on the real model, with the probes that the package brings."""
    count, seed = 6, "trial"
    options = ["--model", str(smollm2), "--out", str(tmp_path), "--questions", str(count)]
    # With room to spare: which questions are answered depends on rounding, and so on the CPU.
    options += ["--keep", "192", "--seed", seed]
    assert run.main(options) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "answers.json").read_text())
    assert [one["question"] for one in found["questions"]] == [
        question.question for question in notes.draw(count, seed)
    ]
    remembered = 0
    for one in found["questions"]:
        assert one["question"] in shown
        assert one["tokens_back"] > found["window_tokens"] + found["keep_tokens"]
        marks = [one["answer"].lower() in a["text"].lower() for a in one["answers"]]
        assert [a["right"] for a in one["answers"]] == marks
        for a in one["answers"]:
            mark = "right" if a["right"] else "wrong"
            text = " ".join(a["text"].split())
            assert f"{a['arm']}: {mark}, {a['peak_blocks']} KV blocks: {text}" in shown
        remembered += marks[2] and not marks[1]
        full, window, ours = (a["peak_blocks"] for a in one["answers"])
        assert ours == window < full
    assert 3 * remembered >= 2 * count, found["arms"]
    assert found["arms"][0]["right"] >= count - 2
    assert (tmp_path / "answers.png").exists()
    assert "sampling" not in (tmp_path / "server.log").read_text()


# -- processes -------------------------------------------------------------------------------------

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
print(child.pid, flush=True)
time.sleep(60)
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("child", ["import time; time.sleep(60)", STUBBORN])
def test_children_end_with_their_group(tmp_path, child):
    log = tmp_path / "log"
    command = [sys.executable, "-c", PARENT.format(child=child)]
    with pytest.raises(KeyboardInterrupt), ProcessGroup(command, log=log, grace_s=1.0) as process:
        process.wait_until(lambda: bool(log_tail(log, 1)), timeout_s=30)
        pid = int(log_tail(log, 1))
        assert alive(pid)
        time.sleep(0.5)  # the child sets its signal handler
        raise KeyboardInterrupt
    assert not alive(pid)


def test_a_process_that_dies_is_reported_with_its_log(tmp_path):
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with (
        pytest.raises(LaunchError, match=r"(?s)ended with status 3.*no such model"),
        ProcessGroup(command, log=tmp_path / "log") as process,
    ):
        process.wait_until(lambda: False, timeout_s=30)


def test_a_process_that_hangs_is_given_up(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        pytest.raises(LaunchError, match="not ready after 0 s"),
        ProcessGroup(command, log=tmp_path / "log") as process,
    ):
        process.wait_until(lambda: False, timeout_s=0.3)


def test_stop_gives_signals_back(tmp_path):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with ProcessGroup([sys.executable, "-c", ""], log=tmp_path / "log") as process:
        process.wait_exit(timeout_s=30)
    process.stop()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert os.getpgid(0) == os.getpgrp()


def test_a_taken_port_is_refused_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = Server(["model"], port=port, log=tmp_path / "log")
        with pytest.raises(LaunchError, match=f"port {port} is taken"), server:
            pass
    assert not (tmp_path / "log").exists()
