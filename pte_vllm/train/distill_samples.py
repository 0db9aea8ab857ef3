"""Answers to distil on: the base model's own, sampled by a server under full attention."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pte_vllm.train.config import DistillRun
from pte_vllm.train.data import at_most, prompt_ids
from pte_vllm.train.data_sources import open_stream
from pte_vllm.train.loop import connect


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
    prompts = [prompt_ids(problem, tokenizer) for problem in problems]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        connect(run.server) as client,
        draft.open("w", encoding="utf-8") as file,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("sampling", total=len(prompts) * group_size)
        for rollout in client.rollouts(
            prompts,
            n=group_size,
            sampling={
                "temperature": run.sampling.temperature,
                "max_tokens": run.sampling.max_tokens,
                "seed": run.run.seed,
            },
            window_tokens=0,
        ):
            file.write(json.dumps(rollout.to_json()) + "\n")
            progress.advance(task)
    draft.replace(path)
