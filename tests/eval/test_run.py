"""`pte-vllm eval run` on a real server: its numbers, its resumption, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from pte_vllm.cli.eval import main as eval_command
from pte_vllm.eval import serving
from pte_vllm.launch import free_port, pte_command
from tests.harness.engine import BLOCK
from tests.harness.server import Server

PROBLEMS = 4
LENGTH = 90
"""Tokens of an answer; two folds of a window of two blocks."""


@pytest.fixture(scope="module")
def narrow(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> Path:
    """An adapter that cannot fold by ridge."""
    return adapters(tiny("qwen3"), rank=8, global_tokens=4, rule="paper", seed=3)


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server], narrow: Path) -> Server:
    return shared("open", {"narrow": narrow})


@pytest.fixture(scope="module")
def problems(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of which the base model under full attention gets all right but the last."""
    path = tmp_path_factory.mktemp("problems") / "said.jsonl"
    lines = []
    for i in range(PROBLEMS):
        prompt = f"What is {i}?"
        answer = server.client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": prompt}],
            max_completion_tokens=LENGTH,
            temperature=0,
            extra_body={"vllm_xargs": {"pte_window": 0}},
        )
        said = answer.choices[0].message.content
        lines.append({"prompt": prompt, "answer": said if i < PROBLEMS - 1 else "something else"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _arguments(server: Server, problems: Path, out: Path, *more: str) -> list[str]:
    arguments = ["run", "--url", server.url, "--benchmark", str(problems), "--judge", "exact"]
    arguments += ["--window", str(2 * BLOCK), "--max-tokens", str(LENGTH), "--out", str(out)]
    return [*arguments, *more]


def _asked(server: Server) -> int:
    """Return how many requests the server has answered."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).raise_for_status().text
    found = re.findall(r"^vllm:request_success_total\{.*\} (\S+)$", text, re.MULTILINE)
    return int(sum(map(float, found)))


def _rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in json.loads((out / "results.json").read_text())["rows"]}


def test_a_sweep(server: Server, problems: Path, tmp_path: Path) -> None:
    more = ("--adapter", "narrow", "--rule", "ridge", "--sinks")
    before = _asked(server)
    assert eval_command(_arguments(server, problems, tmp_path, *more)) == 1  # one arm must fail
    rows = _rows(tmp_path)
    assert set(rows) == {"full", "w64", "w64-sinks", "w64-narrow", "w64-narrow-ridge"}
    assert rows["full"]["accuracy"]["value"] == 0.75
    assert 0 <= rows["w64"]["accuracy"]["value"] <= 0.75
    assert rows["w64"]["difference"]["value"] == rows["w64"]["accuracy"]["value"] - 0.75
    # An arm that the server refuses says why, and harms no other.
    failed = rows["w64-narrow-ridge"]
    assert failed["accuracy"] is None and failed["error"].startswith("rule ridge needs")
    assert _asked(server) - before == 4 * PROBLEMS
    # The cache of a sequence: its question and answer, or a window less than that.
    assert rows["w64"]["kv_tokens"] < rows["full"]["kv_tokens"]
    assert rows["full"]["bytes"] == rows["full"]["kv_tokens"] * _info(server, "kv_bytes_per_token")
    assert "failed" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "bytes.png").stat().st_size and (tmp_path / "tokens.png").stat().st_size
    _same_as_the_library(tmp_path, rows)
    # Nothing is asked twice; the arm that failed is tried again.
    assert eval_command(_arguments(server, problems, tmp_path, *more)) == 1
    assert _asked(server) - before == 4 * PROBLEMS and _rows(tmp_path) == rows


def _info(server: Server, name: str) -> Any:
    return server.get("/pte/v1/info")[name]


def _same_as_the_library(out: Path, rows: dict[str, dict[str, Any]]) -> None:
    from inspect_ai.log import list_eval_logs, read_eval_log

    seen = 0
    for info in list_eval_logs(str(out / "logs")):
        log = read_eval_log(info)
        if log.status != "success":
            continue
        name = log.eval.task.split("/")[1]
        (scores,) = log.results.scores
        for ours, theirs in (("value", "accuracy"), ("stderr", "stderr")):
            assert rows[name]["accuracy"][ours] == pytest.approx(scores.metrics[theirs].value)
        seen += 1
    assert seen == len(rows) - 1


@pytest.mark.slow
def test_a_killed_sweep_goes_on(server: Server, problems: Path, tmp_path: Path) -> None:
    from inspect_ai.log import list_eval_logs, read_eval_log_sample_summaries

    def answered() -> int:
        logs = list_eval_logs(str(tmp_path / "logs")) if (tmp_path / "logs").exists() else []
        count = 0
        for info in logs:
            try:
                count += len(read_eval_log_sample_summaries(info))
            except (OSError, ValueError, KeyError):
                continue  # it is being written
        return count

    before = _asked(server)
    more = ("--concurrency", "1", "--temperature", "1", "--epochs", "3", "--pass-at", "1,3")

    def end(sign: signal.Signals, *, answers: int) -> int:
        """Run until there are so many answers, then end it; return its exit status."""
        command = pte_command("eval", *_arguments(server, problems, tmp_path, *more))
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        while answered() < answers:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        os.kill(process.pid, sign)
        return process.wait()

    # An interrupted run says so, and what it has.
    assert end(signal.SIGINT, answers=2) == 130
    rows = _rows(tmp_path)
    assert set(rows) == {"full", "w64"}
    assert all(row["error"] == "interrupted" for row in rows.values())
    assert "the same command goes on" in (tmp_path / "log").read_text()
    assert end(signal.SIGKILL, answers=4) == -signal.SIGKILL
    assert answered() < 6 * PROBLEMS
    assert eval_command(_arguments(server, problems, tmp_path, *more)) == 0
    # What was answered when it was killed, and not yet written, is asked once more.
    assert _asked(server) - before <= 6 * PROBLEMS + 4
    rows = _rows(tmp_path)
    assert {row["answers"] for row in rows.values()} == {3 * PROBLEMS}
    assert rows["full"]["pass_at"]["1"] == pytest.approx(rows["full"]["accuracy"]["value"])
    assert rows["full"]["pass_at"]["3"] >= rows["full"]["pass_at"]["1"]


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_dead_server(monkeypatch: pytest.MonkeyPatch, handler: Any) -> None:
    """Also in the background of a shell, where SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, handler)
    monkeypatch.setattr(serving, "GIVE_UP_S", 2.0)
    url = f"http://127.0.0.1:{free_port()}"
    try:
        with serving.Watch(url) as watch, pytest.raises(KeyboardInterrupt):
            for _ in range(600):
                time.sleep(0.1)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert watch.found is not None and "nothing has answered" in watch.found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--benchmark", "gsm_simbolic"], "did you mean gsm_symbolic"),
        (["--benchmark", "none.jsonl"], "none.jsonl does not exist"),
        (["--window", "70"], "--window 70 must be a multiple"),
        (["--adapter", "missing"], "has no 'missing'"),
        (["--rule", "ridge"], "--rule needs an --adapter"),
        (["--pass-at", "4"], "--pass-at 4 needs --epochs 4"),
        (["--epochs", "2"], "greedy answers are all alike"),
        (["--equal-bytes", "--adapter", "narrow"], "--equal-bytes needs --adapter NAME=DIR"),
        (["--template", "no place"], "must contain {prompt}"),
        (["--model", "x"], "either --model"),
        (["--max-tokens", "0"], "--max-tokens must be positive"),
        (["--max-tokens", "4096"], "--max-tokens 4096 leaves no room"),
        (["--top-p", "2"], "--top-p must lie in"),
        (["--judge", "reasoning-gym"], "is no task of reasoning-gym"),
    ],
)
def test_mistakes(
    server: Server, problems: Path, tmp_path: Path, wrong: list[str], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        eval_command(_arguments(server, problems, tmp_path, *wrong))
