"""Where questions come from: data sets by name (`data.tables`), files of questions, generators."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pte_vllm.train.data.generators import GymSource, LedgerSource, MemorySource
from pte_vllm.train.data.questions import (
    ListSource,
    Problem,
    QuestionSource,
    QuestionStream,
    ask,
    is_count,
    reward_of,
)
from pte_vllm.train.data.tables import TABLES, open_table
from pte_vllm.train.options.runs import DataOptions


def open_stream(
    options: DataOptions, *, keep: Callable[[Problem], bool] | None = None
) -> QuestionStream:
    """Open the stream of a run; see `QuestionStream` for `keep` and `open_source` for errors."""
    return QuestionStream(open_source(options), seed=options.seed, keep=keep)


def open_source(options: DataOptions) -> QuestionSource:
    """Load or set up what `data.source` names.

    Raises:
        ValueError: naming the flag, if the data do not have the expected form.
        OSError: if they cannot be read or downloaded.
    """
    if options.source == "jsonl":
        return _read_jsonl(options)
    if options.source == "reasoning-gym":
        return GymSource(options)
    if options.source == "memory":
        return MemorySource(options)
    if options.source == "ledger":
        return LedgerSource(options)
    return open_table(options, TABLES[options.source])


# A file of questions


def _read_jsonl(options: DataOptions) -> QuestionSource:
    assert options.path is not None  # DataOptions sees to it
    rows = []
    with open(options.path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_check_row(line, f"--data.path: {options.path}:{number}"))
    return ListSource(rows, partial(_from_jsonl, options))


def _check_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or "prompt" not in row or "answer" not in row:
        raise ValueError(f"{where} must be an object with prompt and answer")
    prompt, answer = row["prompt"], row["answer"]
    if not (isinstance(prompt, str) or _all(prompt, _is_message) or _all(prompt, is_count)):
        raise ValueError(f"{where}: prompt must be text, messages or token ids")
    if not (isinstance(answer, str | int | float) or _all(answer, is_count)):
        raise ValueError(f"{where}: answer must be text, a number or token ids")
    if row.get("pin_tokens") is not None and not is_count(row["pin_tokens"]):
        raise ValueError(f"{where}: pin_tokens must be a count, got {row['pin_tokens']!r}")
    return row


def _all(values: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and bool(values) and all(map(test, values))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()


def _from_jsonl(options: DataOptions, index: int, row: Mapping[str, Any]) -> Problem:
    prompt, answer = row["prompt"], row["answer"]
    return Problem(
        key=f"jsonl/{index}",
        prompt=ask(options, prompt, "{prompt}") if isinstance(prompt, str) else prompt,
        answer=answer if isinstance(answer, list) else str(answer),
        reward=reward_of(options, "exact" if isinstance(answer, list) else "math"),
        pin_tokens=row.get("pin_tokens"),
        meta={k: v for k, v in row.items() if k not in ("prompt", "answer", "pin_tokens")},
    )
