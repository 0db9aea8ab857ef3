"""Data sets by name: where each is, and how one of its rows becomes a question.

A data set is loaded by Hugging Face `datasets`, which shows its progress and keeps a cache. A local
copy is a file or directory of parquet, json, jsonl or csv with the columns of the original.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pte_vllm.train.data.answers import last_boxed
from pte_vllm.train.data.questions import (
    ListSource,
    Message,
    Problem,
    Prompt,
    QuestionSource,
    ask,
    reward_of,
)
from pte_vllm.train.options.runs import DataOptions

BOXED = "{prompt}\n\nReason step by step, and put the final answer within \\boxed{}."

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """One data set: where it is, and how a row becomes a question."""

    hub: str
    columns: tuple[str, ...]
    configs: tuple[str, ...]
    """Configurations to join; those of a copy without any are not looked for."""
    read: Callable[[DataOptions, Mapping[str, Any]], tuple[Prompt, str]]
    distinct: bool = False
    """Whether each question is repeated in the file and wanted once."""


def _read_dapo(options: DataOptions, row: Mapping[str, Any]) -> tuple[Prompt, str]:
    messages: list[Message] = row["prompt"]
    answer = str(row["reward_model"]["ground_truth"])
    if options.chat and options.system is None and options.prompt_template is None:
        return [Message(role=m["role"], content=m["content"]) for m in messages], answer
    return ask(options, messages[-1]["content"], "{prompt}"), answer


def _read_math(options: DataOptions, row: Mapping[str, Any]) -> tuple[Prompt, str]:
    answer = last_boxed(row["solution"])
    if answer is None:
        raise ValueError(f"--data.path: a solution without \\boxed{{}}: {row['solution'][-80:]!r}")
    return ask(options, row["problem"], BOXED), answer


def _read_gsm8k(options: DataOptions, row: Mapping[str, Any]) -> tuple[Prompt, str]:
    _, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError(f"--data.path: an answer without ####: {row['answer'][-80:]!r}")
    return ask(options, row["question"], BOXED), answer.strip().replace(",", "")


def _read_answer(question: str) -> Callable[[DataOptions, Mapping[str, Any]], tuple[Prompt, str]]:
    """Make a reader of rows that have the question in a column, and its answer in `answer`."""

    def read(options: DataOptions, row: Mapping[str, Any]) -> tuple[Prompt, str]:
        return ask(options, row[question], BOXED), str(row["answer"])

    return read


def _read_olympiad(options: DataOptions, row: Mapping[str, Any]) -> tuple[Prompt, str]:
    given = row["final_answer"]
    answers = given if isinstance(given, list) else [given]
    return ask(options, row["question"], BOXED), ", ".join(map(str, answers))


def _contest(hub: str, question: str = "problem") -> Table:
    """Describe a data set of one configuration, with the answers in a column of their own."""
    return Table(
        hub=hub,
        columns=(question, "answer"),
        configs=("default",),
        read=_read_answer(question),
    )


TABLES = {
    "dapo-math-17k": Table(
        hub="BytedTsinghua-SIA/DAPO-Math-17k",
        columns=("prompt", "reward_model"),
        configs=("default",),
        read=_read_dapo,
        distinct=True,  # the file holds each of its 17,000 questions about a hundred times
    ),
    "math": Table(
        hub="EleutherAI/hendrycks_math",
        columns=("problem", "solution"),
        configs=(
            "algebra",
            "counting_and_probability",
            "geometry",
            "intermediate_algebra",
            "number_theory",
            "prealgebra",
            "precalculus",
        ),
        read=_read_math,
    ),
    "gsm8k": Table(
        hub="openai/gsm8k",
        columns=("question", "answer"),
        configs=("main",),
        read=_read_gsm8k,
    ),
    "math-500": _contest("HuggingFaceH4/MATH-500"),
    "aime-2024": _contest("HuggingFaceH4/aime_2024"),
    "aime-2025": _contest("math-ai/aime25"),
    "amc-2023": _contest("math-ai/amc23", "question"),
    "minerva": _contest("math-ai/minervamath", "question"),
    "olympiadbench": Table(
        hub="math-ai/olympiadbench",
        columns=("question", "final_answer"),
        configs=("default",),
        read=_read_olympiad,
    ),
}
"""By `data.source`. Those below gsm8k are small benchmarks with one split: `test`, or `train` for
aime-2024."""


def open_table(options: DataOptions, table: Table) -> QuestionSource:
    if options.task is not None and options.task not in table.configs:
        raise ValueError(
            f"--data.task of {options.source} must be one of {', '.join(table.configs)}, "
            f"got {options.task!r}"
        )
    rows = _load_rows(options, table)
    missing = [name for name in table.columns if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"--data.path: column {missing[0]} of {options.source} is missing; there are "
            f"{', '.join(rows.column_names)}"
        )
    if table.distinct:
        rows = rows.select(_first_of_each(rows, table.columns[0]))

    def make(index: int, row: Mapping[str, Any]) -> Problem:
        prompt, answer = table.read(options, row)
        return Problem(
            key=f"{options.source}/{options.split}/{index}",
            prompt=prompt,
            answer=answer,
            reward=reward_of(options, "math"),
            meta={name: row[name] for name in ("level", "type", "extra_info") if name in row},
        )

    return ListSource(rows, make)


def _load_rows(options: DataOptions, table: Table) -> Any:
    """Load one split, all its configurations together, as a `datasets.Dataset`."""
    from datasets import concatenate_datasets, get_dataset_config_names, load_dataset
    from datasets.exceptions import DatasetGenerationError

    wanted = table.configs if options.task is None else (options.task,)
    place = table.hub if options.path is None else options.path
    try:
        if options.path is None:
            parts = [load_dataset(table.hub, name, split=options.split) for name in wanted]
        elif Path(options.path).is_file():
            suffix = Path(options.path).suffix
            if suffix not in _BUILDERS:
                raise ValueError(
                    f"--data.path must end in {', '.join(_BUILDERS)}, got {options.path!r}"
                )
            # One file is one split, whatever its name.
            parts = [load_dataset(_BUILDERS[suffix], data_files=options.path, split="train")]
        elif Path(options.path).is_dir():
            there = get_dataset_config_names(options.path)
            found = [name for name in wanted if name in there]
            if not found and options.task is not None:
                raise ValueError(
                    f"--data.task {options.task}: {options.path} holds only {', '.join(there)}"
                )
            parts = [
                load_dataset(options.path, name, split=options.split) for name in found or there[:1]
            ]
        else:
            raise FileNotFoundError(f"--data.path: {options.path} does not exist")
    except (DatasetGenerationError, ConnectionError) as error:
        reason = error.__cause__ or error
        advice = "" if options.path else "; a local copy is given by --data.path"
        raise OSError(f"--data.source: cannot load {place}: {reason}{advice}") from error
    except ValueError as error:
        if str(error).startswith("--data"):
            raise
        raise ValueError(
            f"--data.split {options.split}: cannot load it from {place}: {error}"
        ) from error
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _first_of_each(rows: Any, column: str) -> list[int]:
    """Return the indices of the first row with each distinct value, in order."""
    seen: set[str] = set()
    first = []
    start = 0
    for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        for index, value in enumerate(batch[column].to_pylist(), start):
            key = json.dumps(value)
            if key not in seen:
                seen.add(key)
                first.append(index)
        start += len(batch)
    return first
