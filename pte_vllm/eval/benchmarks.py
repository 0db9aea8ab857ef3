"""Benchmarks by name: which problems they hold, how these are asked, and how answers are judged.

Problems, prompts and judges are those of the trainer (`train.data`, `train.rewards`): a model is
measured as it is trained. Data sets come from the hub or from a local copy.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pte_vllm.train.data.questions import Problem
from pte_vllm.train.data.sources import open_source
from pte_vllm.train.data.tables import BOXED
from pte_vllm.train.options.runs import DataOptions

_ENDLESS = 200
"""Problems of a generator, where nobody says how many."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark: where its problems come from, and what is asked of the model."""

    source: str
    """As `data.source` of the trainer."""
    split: str = "test"
    task: str | None = None
    """The task of a generator."""
    template: str | None = None
    """Text around the question, which stands for {prompt}; None: what fits the source."""
    reward: str = "auto"
    """Who judges answers, as `data.reward` of the trainer."""
    path: str | None = None
    """Local copy of the data set, or the file of a jsonl."""
    task_options: dict[str, Any] = field(default_factory=dict)


BENCHMARKS = {
    "math-500": Benchmark(source="math-500"),
    "aime-2024": Benchmark(source="aime-2024", split="train"),  # its only split has this name
    "aime-2025": Benchmark(source="aime-2025"),
    "amc-2023": Benchmark(source="amc-2023"),
    "olympiadbench": Benchmark(source="olympiadbench"),
    "minerva": Benchmark(source="minerva"),
    "gsm8k": Benchmark(source="gsm8k"),
    # Its answers are numbers, which small models put into a box more readily than between tags.
    "gsm_symbolic": Benchmark(
        source="reasoning-gym", task="gsm_symbolic", template=BOXED, reward="math"
    ),
    # Events take some 45 tokens each: answers of about 1,000, 2,000 and 4,000 tokens.
    **{
        f"ledger-{events}": Benchmark(
            source="ledger", task="ledger", task_options={"events": events}
        )
        for events in (24, 48, 96)
    },
}
"""By name. Beside these there are all tasks of reasoning-gym, and files that end in .jsonl."""


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of a name: one of `BENCHMARKS`, a task of reasoning-gym, or a file.

    Raises:
        ValueError: if there is none, with the names that look like it.
        OSError: if the file does not exist.
    """
    if name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"--benchmark: {name} does not exist")
        return Benchmark(source="jsonl", path=name)
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    from reasoning_gym.factory import DATASETS

    if name in DATASETS:
        return Benchmark(source="reasoning-gym", task=name)
    close = difflib.get_close_matches(name, [*BENCHMARKS, *DATASETS], n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(BENCHMARKS)},"
    raise ValueError(
        f"--benchmark: there is no {name!r}; {hint} "
        f"{'' if close else 'tasks of reasoning-gym, and files that end in .jsonl'}".rstrip()
    )


def load_problems(
    name: str,
    *,
    limit: int | None = None,
    data: str | None = None,
    seed: int = 0,
    template: str | None = None,
    judge: str = "auto",
    system: str | None = None,
) -> list[Problem]:
    """Load the problems of a benchmark, the same ones in the same order for the same arguments.

    Args:
        name: the benchmark, as `find_benchmark` takes it.
        limit: how many problems are taken from the start; None: all, or 200 of a generator.
        data: directory that holds local copies, `DATA/{benchmark}` or `DATA/{benchmark}.jsonl`
            (or .parquet, .json, .csv); None: the hub.
        seed: of generated problems.
        template: text around the question in place of the benchmark's own.
        judge: who judges answers in place of the benchmark's own judge; auto: that one.
        system: a system message.

    Raises:
        ValueError: naming the flag, if there is no such benchmark, or it has no such problems.
        OSError: if the data cannot be read or downloaded.
    """
    found = find_benchmark(name)
    if judge == "reasoning-gym" and found.source != "reasoning-gym":
        raise ValueError(f"--judge reasoning-gym: {name} is no task of reasoning-gym")
    options = DataOptions(
        source=found.source,  # type: ignore[arg-type]  # checked when the options are made
        path=found.path or (local_copy(data, name) if found.task is None else None),
        split=found.split,
        task=found.task,
        task_options=found.task_options,
        reward=found.reward if judge == "auto" else judge,  # type: ignore[arg-type]
        seed=seed,
        prompt_template=template or found.template,
        system=system,
    )
    try:
        source = open_source(options)
    except ValueError as error:
        raise ValueError(str(error).replace("--data.path", f"--benchmark {name}")) from error
    if source.size == 0:
        raise ValueError(f"--benchmark: {name} holds no problems")
    size = (limit or _ENDLESS) if source.size is None else min(limit or source.size, source.size)
    problems = [source.problem(index) for index in range(size)]
    for problem in problems:
        if not _is_chat(problem.prompt):
            raise ValueError(
                f"--benchmark: {name} asks in token ids, but chats are what is measured here"
            )
    return problems


def local_copy(data: str | None, name: str) -> str | None:
    """Return the local copy of a data set below `--data`; None without `--data`.

    Raises:
        FileNotFoundError: if there is no copy, with the names that were looked for.
    """
    if data is None:
        return None
    tried = [Path(data) / f"{name}{end}" for end in ("", ".jsonl", ".parquet", ".json", ".csv")]
    for path in tried:
        if path.exists():
            return str(path)
    raise FileNotFoundError(f"--data: there is neither of {', '.join(map(str, tried))}")


def _is_chat(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], dict)
