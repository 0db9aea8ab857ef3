"""Benchmarks by name: from local copies of their data sets, from reasoning-gym, from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pte_vllm.eval.benchmarks import BENCHMARKS, find_benchmark, load_problems
from pte_vllm.train.rewards.functions import score

ROWS: dict[str, dict[str, Any]] = {
    "math-500": {"problem": "What is $1+1$?", "answer": "2", "level": 1},
    "aime-2024": {"problem": "Find $n$.", "answer": "204"},
    "aime-2025": {"problem": "Find $m$.", "answer": 70},
    "amc-2023": {"question": "How far?", "answer": 27.0},
    "olympiadbench": {"question": "Solve.", "final_answer": ["1", "2"]},
    "minerva": {"question": "What is $e$?", "answer": "e"},
    "gsm8k": {"question": "How many?", "answer": "1 + 1 = 2\n#### 1,000"},
}
RIGHT = {
    "math-500": "2",
    "aime-2024": "204",
    "aime-2025": "70",
    "amc-2023": "27",
    "olympiadbench": "1, 2",
    "minerva": "e",
    "gsm8k": "1000",
}


@pytest.mark.parametrize("name", ROWS)
def test_local_copies(name: str, tmp_path: Path) -> None:
    lines = [json.dumps(ROWS[name])] * 3
    (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    problems = load_problems(name, limit=2, data=str(tmp_path))
    assert len(problems) == 2 and len({p.key for p in problems}) == 2
    (message,) = problems[0].prompt
    assert message["role"] == "user" and "\\boxed" in message["content"]
    assert score(problems[0], f"So it is \\boxed{{{RIGHT[name]}}}.", ()) == 1.0
    assert score(problems[0], "So it is \\boxed{12345}.", ()) == 0.0


def test_every_name_has_a_test() -> None:
    generated = {name for name, about in BENCHMARKS.items() if about.task is not None}
    assert set(ROWS) | generated == set(BENCHMARKS)


def test_generated_problems() -> None:
    first, again = (load_problems("gsm_symbolic", limit=3, seed=7) for _ in range(2))
    other = load_problems("gsm_symbolic", limit=3, seed=8)
    assert [p.prompt for p in first] == [p.prompt for p in again] != [p.prompt for p in other]
    assert score(first[0], f"\\boxed{{{first[0].answer}}}", ()) == 1.0
    # Other tasks are judged by their own scorer, between tags.
    (task,) = load_problems("chain_sum", limit=1)
    assert "<answer>" in task.prompt[0]["content"]
    assert score(task, f"<answer>{task.answer}</answer>", ()) == 1.0


def test_template_system_and_judge(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "Say it.", "answer": "yes"}\n')
    (problem,) = load_problems(
        str(path), template="Q: {prompt} A:", system="Be brief.", judge="exact"
    )
    assert [m["content"] for m in problem.prompt] == ["Be brief.", "Q: Say it. A:"]
    assert score(problem, " yes ", ()) == 1.0 and score(problem, "\\boxed{yes}", ()) == 0.0


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean math-500"):
        find_benchmark("math500")
    with pytest.raises(FileNotFoundError, match="--data: there is neither of .*gsm8k.jsonl"):
        load_problems("gsm8k", data=str(tmp_path))
    (tmp_path / "ids.jsonl").write_text('{"prompt": [1, 2], "answer": [3]}\n')
    with pytest.raises(ValueError, match="asks in token ids"):
        load_problems(str(tmp_path / "ids.jsonl"))
