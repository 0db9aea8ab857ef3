"""Samples answers to distil on: the base model's own, by a server under full attention."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pte_vllm.train.data.questions import at_most, prompt_ids
from pte_vllm.train.data.sources import open_stream
from pte_vllm.train.options.runs import DistillRun
from pte_vllm.train.run.connection import connect


def sample_answers(run: DistillRun, tokenizer: Any, path: Path, console: Console) -> None:
    """Ask the server `run.server`, and write one rollout record a line.

    `sampling.group_size` answers to each question, `distill.max_sequences` in all at most. The file
    appears whole or not at all.

    Raises:
        ValueError: if there is no question, or it is too long.
        ServerError: if the server refuses or stays away.
    """
    assert run.data is not None
    group_size = run.sampling.group_size
    keep = at_most(run.data.max_prompt_tokens, tokenizer)
    problems = open_stream(run.data, keep=keep).take(
        max(1, run.distill.max_sequences // group_size)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        connect(run.server) as client,
        draft.open("w", encoding="utf-8") as file,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("sampling", total=len(problems) * group_size)
        for pin_tokens in sorted({problem.pin_tokens for problem in problems}, key=_unset_first):
            chosen = [(i, p) for i, p in enumerate(problems) if p.pin_tokens == pin_tokens]
            for rollout in client.rollouts(
                [prompt_ids(problem, tokenizer) for _, problem in chosen],
                n=group_size,
                sampling={
                    "temperature": run.sampling.temperature,
                    "max_tokens": run.sampling.max_tokens,
                    "seed": run.run.seed,
                },
                window_tokens=0,
                pin_tokens=pin_tokens,
                group_ids=[str(i) for i, _ in chosen],
            ):
                file.write(rollout.to_line().decode() + "\n")
                progress.advance(task)
    draft.replace(path)


def _unset_first(pin_tokens: int | None) -> int:
    return -1 if pin_tokens is None else pin_tokens
