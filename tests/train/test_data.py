"""Questions: their sources and the stream."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pte_vllm.train.data.questions import Problem, QuestionStream, at_most, prompt_ids
from pte_vllm.train.data.sources import open_source, open_stream
from pte_vllm.train.options.runs import DataOptions
from pte_vllm.train.rewards.functions import score

GSM8K = [
    {"question": "6 times 7?", "answer": "6*7 = <<6*7=42>>42\n#### 42"},
    {"question": "A thousand and one?", "answer": "#### 1,001"},
]
MATH = [
    {
        "problem": "Simplify $\\frac{2}{4}$.",
        "level": "Level 1",
        "type": "Algebra",
        "solution": "We get \\boxed{3}, no, $\\boxed{\\frac{1}{2}}$.",
    }
]
DAPO = [
    {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"Solve {n}. End with Answer: $Answer."}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(n), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{n}"},
    }
    for n in (3, 1, 3, 2, 1, 3)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def options(source: str, **given: Any) -> DataOptions:
    return DataOptions.model_validate({"source": source, **given})


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Data sets


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv"])
def test_gsm8k_from_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"test-copy.{suffix}"
    rows = Dataset.from_list(GSM8K)
    write = {"parquet": rows.to_parquet, "csv": rows.to_csv}.get(suffix, rows.to_json)
    write(path)
    source = open_source(options("gsm8k", path=str(path)))
    assert source.size == 2
    first, second = source.problem(0), source.problem(1)
    assert (first.answer, second.answer) == ("42", "1001")
    assert isinstance(first.prompt, list)
    assert first.prompt[0]["content"].startswith("6 times 7?")
    assert "\\boxed{}" in first.prompt[0]["content"]
    assert score(second, "so \\boxed{1001}", []) == 1.0


def test_a_directory_is_read_by_split(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k" / "main"
    folder.mkdir(parents=True)
    Dataset.from_list(GSM8K).to_parquet(folder / "train-00000-of-00001.parquet")
    Dataset.from_list(GSM8K[1:]).to_parquet(folder / "test-00000-of-00001.parquet")
    path = str(tmp_path / "gsm8k")
    assert open_source(options("gsm8k", path=path)).size == 2
    source = open_source(options("gsm8k", path=path, split="test"))
    assert [source.size, source.problem(0).key] == [1, "gsm8k/test/0"]
    with pytest.raises(ValueError, match=r"--data\.split validation: .*" + path):
        open_source(options("gsm8k", path=path, split="validation"))


def test_subjects_of_math(tmp_path: Path) -> None:
    """A copy of the repository: a directory for each subject, named by the card."""
    card = ["---", "configs:"]
    for subject in ("algebra", "geometry"):
        (tmp_path / subject).mkdir()
        Dataset.from_list(MATH).to_parquet(tmp_path / subject / "train-00000-of-00001.parquet")
        card += [f"- config_name: {subject}", "  data_files:", "  - split: train"]
        card += [f"    path: {subject}/train-*"]
    (tmp_path / "README.md").write_text("\n".join([*card, "---", ""]))
    source = open_source(options("math", path=str(tmp_path)))
    assert source.size == 2
    problem = source.problem(0)
    assert problem.answer == "\\frac{1}{2}"
    assert problem.meta == {"level": "Level 1", "type": "Algebra"}
    assert open_source(options("math", path=str(tmp_path), task="geometry")).size == 1
    with pytest.raises(ValueError, match=r"--data\.task precalculus: .* holds only algebra"):
        open_source(options("math", path=str(tmp_path), task="precalculus"))
    with pytest.raises(ValueError, match=r"--data\.task of math must be one of algebra.*'logic'"):
        open_source(options("math", path=str(tmp_path), task="logic"))


def test_dapo_holds_each_question_once(tmp_path: Path) -> None:
    path = tmp_path / "dapo.parquet"
    Dataset.from_list(DAPO).to_parquet(path)
    source = open_source(options("dapo-math-17k", path=str(path)))
    assert source.size == 3
    problems = [source.problem(i) for i in range(3)]
    assert [p.answer for p in problems] == ["3", "1", "2"]
    assert problems[0].prompt == DAPO[0]["prompt"], "its own wording is kept"
    assert score(problems[0], "Thus\n\nAnswer: $3$", []) == 1.0
    plain = open_source(options("dapo-math-17k", path=str(path), chat=False)).problem(0)
    assert plain.prompt == "Solve 3. End with Answer: $Answer."
    system = open_source(options("dapo-math-17k", path=str(path), system="Be brief.")).problem(0)
    assert system.prompt == [{"role": "system", "content": "Be brief."}, *DAPO[0]["prompt"]]


def test_data_of_another_form_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"question": "q", "text": "t"}\n')
    with pytest.raises(ValueError, match=r"--data\.path: column answer of gsm8k is missing"):
        open_source(options("gsm8k", path=str(path)))
    path.write_text('{"question": "q", "answer": "42"}\n')
    with pytest.raises(ValueError, match=r"--data\.path: an answer without ####: '42'"):
        open_source(options("gsm8k", path=str(path))).problem(0)
    with pytest.raises(ValueError, match=r"--data\.path must end in .*, got '.*\.txt'"):
        (tmp_path / "a.txt").write_text("")
        open_source(options("gsm8k", path=str(tmp_path / "a.txt")))
    with pytest.raises(FileNotFoundError, match=r"--data\.path: .*nowhere does not exist"):
        open_source(options("gsm8k", path=str(tmp_path / "nowhere")))
    path.write_text("not json\n")
    with pytest.raises(OSError, match=r"--data\.source: cannot load .*other\.jsonl"):
        open_source(options("gsm8k", path=str(path)))


def test_without_the_hub_a_local_copy_is_asked_for() -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(OSError, match=r"cannot load openai/gsm8k.*given by --data\.path"):
        open_source(options("gsm8k"))


# A file of questions


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: Any) -> str:
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
        return str(path)

    return write


def test_jsonl_holds_text_messages_or_token_ids(jsonl: Callable[..., str]) -> None:
    path = jsonl(
        {"prompt": "What is {1} + 1?", "answer": 2, "level": "easy"},
        "",
        {"prompt": user("Hello"), "answer": "x"},
        {"prompt": [5, 6, 7], "answer": [8, 9], "pin_tokens": 2},
    )
    source = open_source(options("jsonl", path=path, prompt_template="Q: {prompt} A:"))
    text, messages, ids = (source.problem(i) for i in range(3))
    assert text.prompt == user("Q: What is {1} + 1? A:")
    assert (text.answer, text.reward, text.meta) == ("2", "math", {"level": "easy"})
    assert messages.prompt == user("Hello")
    assert (ids.prompt, ids.answer, ids.pin_tokens) == ([5, 6, 7], [8, 9], 2)
    assert ids.reward == "exact"
    assert open_source(options("jsonl", path=path, reward="memory")).problem(2).reward == "memory"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"questions\.jsonl:2 is not JSON"),
        ({"prompt": "q"}, r":2 must be an object with prompt and answer"),
        ([1], r":2 must be an object"),
        ({"prompt": [], "answer": "a"}, r":2: prompt must be text, messages or token ids"),
        ({"prompt": [1, "x"], "answer": "a"}, r":2: prompt must be"),
        ({"prompt": [{"role": "user"}], "answer": "a"}, r":2: prompt must be"),
        ({"prompt": "q", "answer": None}, r":2: answer must be text, a number or token ids"),
        ({"prompt": "q", "answer": "a", "pin_tokens": -1}, r":2: pin_tokens must be a count"),
    ],
)
def test_a_broken_line_is_named(jsonl: Callable[..., str], row: Any, message: str) -> None:
    path = jsonl({"prompt": "q", "answer": "a"}, row)
    with pytest.raises(ValueError, match=r"--data\.path: .*" + message):
        open_source(options("jsonl", path=path))


# Generators


def test_reasoning_gym_is_endless_and_the_same_everywhere() -> None:
    given = options("reasoning-gym", task="chain_sum", task_options={"max_terms": 3}, seed=4)
    source = open_source(given)
    assert source.size is None
    there = [source.problem(i) for i in (0, 499, 500, 1234)]
    again = open_source(given)
    assert [again.problem(i) for i in (1234, 500, 499, 0)] == there[::-1], "in any order"
    assert len({p.key for p in there}) == len({str(p.prompt) for p in there}) == 4
    for problem in there:
        assert score(problem, f"<answer>{problem.answer}</answer>", []) == 1.0
    other = open_source(given.model_copy(update={"seed": 5})).problem(0)
    test = open_source(given.model_copy(update={"split": "test"})).problem(0)
    assert len({str(p.prompt) for p in (there[0], other, test)}) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "chain_summ"}, r"--data\.task: .*'chain_summ'; did you mean .*chain_sum"),
        (
            {"task": "chain_sum", "task_options": {"nope": 1}},
            r"--data\.task_options {'nope': 1} do not suit chain_sum",
        ),
        (
            {"task": "chain_sum", "task_options": {"min_terms": 0}},
            r"--data\.task_options .* do not suit chain_sum",
        ),
        ({"task": "chain_sum", "task_options": {"seed": 1}}, r"seed is set by the trainer"),
    ],
)
def test_wrong_tasks_of_reasoning_gym(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(options("reasoning-gym", **given))


def test_memory_tasks_are_token_ids() -> None:
    pytest.importorskip("pte_vllm.train.data.memory_tasks")
    given = options("memory", task="recall", task_options={"gap_tokens": [10, 20], "facts": 3})
    source = open_source(given)
    problems = [source.problem(i) for i in range(8)]
    assert problems == [open_source(given).problem(i) for i in range(8)]
    assert {p.meta["gap_tokens"] for p in problems} <= set(range(10, 21))
    assert len({p.meta["gap_tokens"] for p in problems}) > 1
    for problem in problems:
        assert problem.pin_tokens is not None and 0 < problem.pin_tokens < len(problem.prompt)
        assert prompt_ids(problem, None) == problem.prompt
        assert isinstance(problem.answer, list)
        assert score(problem, "", problem.answer) == 1.0
    for wrong in ({"gap": 3}, {"gap_tokens": [20, 10]}, {"facts": "x"}):
        with pytest.raises(ValueError, match=r"--data\.task_options"):
            open_source(options("memory", task="recall", task_options=wrong))
    with pytest.raises(ValueError, match=r"--data\.task must be one of .*'nope'"):
        open_source(options("memory", task="nope"))


# The stream


class Numbers:
    """Questions that are their own number."""

    def __init__(self, size: int | None) -> None:
        self.size = size

    def problem(self, index: int) -> Problem:
        assert self.size is None or index < self.size
        return Problem(key=str(index), prompt=[index], answer=[index], reward="exact")


def keys(problems: list[Problem]) -> list[int]:
    return [int(problem.key) for problem in problems]


def test_each_epoch_holds_every_question_once_in_another_order() -> None:
    stream = QuestionStream(Numbers(50), seed=1)
    first, second = keys(stream.take(50)), keys(stream.take(50))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != list(range(50))
    assert stream.epoch == 2
    assert keys(QuestionStream(Numbers(50), seed=1).take(50)) == first
    assert keys(QuestionStream(Numbers(50), seed=2).take(50)) != first


def test_the_order_is_the_same_in_another_process() -> None:
    code = """
from tests.train.test_data import Numbers, QuestionStream, keys
print(keys(QuestionStream(Numbers(7), seed=3).take(20)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == keys(QuestionStream(Numbers(7), seed=3).take(20))


@pytest.mark.parametrize("size", [7, None])
@pytest.mark.parametrize("taken", [0, 5, 7, 23])
def test_a_restored_stream_goes_on_where_it_was(size: int | None, taken: int) -> None:
    def odd(problem: Problem) -> bool:
        return int(problem.key) % 2 == 1

    stream = QuestionStream(Numbers(size), seed=3, keep=odd)
    stream.take(taken)
    state = json.loads(json.dumps(stream.state()))
    expected = keys(stream.take(20))
    restored = QuestionStream(Numbers(size), seed=3, keep=odd)
    restored.take(2)
    restored.restore(state)
    assert keys(restored.take(20)) == expected


def test_a_position_in_other_data_is_refused() -> None:
    state = QuestionStream(Numbers(7), seed=3).state()
    with pytest.raises(ValueError, match=r"--data\.seed is 4, .* made with 3"):
        QuestionStream(Numbers(7), seed=4).restore(state)
    with pytest.raises(ValueError, match=r"--data\.source holds 8 questions, but held 7"):
        QuestionStream(Numbers(8), seed=3).restore(state)


def test_a_stream_without_questions_ends() -> None:
    with pytest.raises(ValueError, match="holds no questions"):
        QuestionStream(Numbers(0), seed=0)
    for size in (5, None):
        with pytest.raises(ValueError, match=r"--data\.max_prompt_tokens leaves out every"):
            QuestionStream(Numbers(size), seed=0, keep=lambda problem: False).next()


def test_prompts_as_tokens(tiny: Callable[[str], Path], jsonl: Callable[..., str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    path = jsonl(
        {"prompt": "ab", "answer": "1"},
        {"prompt": "abc" * 40, "answer": "1"},
        {"prompt": [4, 5], "answer": [6]},
    )
    given = options("jsonl", path=path)
    source = open_source(given)
    assert tokenizer.decode(prompt_ids(source.problem(0), tokenizer)) == "user: ab\n"
    assert prompt_ids(source.problem(2), tokenizer) == [4, 5]
    plain = open_source(given.model_copy(update={"chat": False})).problem(0)
    assert tokenizer.decode(prompt_ids(plain, tokenizer)) == "ab"
    stream = open_stream(given, keep=at_most(20, tokenizer))
    assert {problem.key for problem in stream.take(6)} == {"jsonl/0", "jsonl/2"}
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"--data\.chat: .*--data\.chat false"):
        prompt_ids(source.problem(0), tokenizer)


def test_questions_need_neither_vllm_nor_torch_until_they_are_loaded() -> None:
    code = """
import sys
import pte_vllm.train.data.sources, pte_vllm.train.rewards.functions
heavy = {"torch", "transformers", "vllm", "datasets", "sympy", "reasoning_gym"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
