"""Samples answers to distil on: the base model's own, by a server under full attention."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pte_vllm.adapter.counter import counter
from pte_vllm.train.data.questions import at_most, prompt_ids
from pte_vllm.train.data.sources import open_stream
from pte_vllm.train.options.runs import DistillRun
from pte_vllm.train.run.connection import connect
from pte_vllm.wire.rollout import Rollout


def sample_answers(run: DistillRun, tokenizer: Any, path: Path, console: Console) -> None:
    """Ask the server `run.server`, and write one rollout record a line, by question and number.

    `sampling.group_size` answers to each question, `distill.max_sequences` in all at most. The file
    appears whole or not at all; until then answers are kept beside it, and a run that was killed
    asks for the others only.

    Raises:
        ValueError: if there is no question, or it is too long.
        ServerError: if the server refuses or stays away.
        OSError: if the file cannot be written.
    """
    assert run.data is not None
    group_size = run.sampling.group_size
    keep = at_most(run.data.max_prompt_tokens, tokenizer)
    problems = open_stream(run.data, keep=keep).take(
        max(1, run.distill.max_sequences // group_size)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{_options_key(run)}.part")
    whole = _whole_groups(draft, group_size)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with (
        connect(run.server) as client,
        draft.open("a", encoding="utf-8") as file,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        total, before = len(problems) * group_size, len(whole) * group_size
        advance = counter(progress, "answers sampled", total, before=before)
        for pin_tokens in sorted({problem.pin_tokens for problem in problems}, key=_unset_first):
            chosen = [
                (i, p)
                for i, p in enumerate(problems)
                if p.pin_tokens == pin_tokens and str(i) not in whole
            ]
            if not chosen:
                continue
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
                file.flush()
                advance(1)
    rollouts = sorted(_read(draft), key=lambda r: (int(r.group_id or 0), r.index))
    finished = path.with_name(f".{path.name}.{os.getpid()}")
    finished.write_text("".join(r.to_line().decode() + "\n" for r in rollouts), encoding="utf-8")
    finished.replace(path)
    draft.unlink()


def _options_key(run: DistillRun) -> str:
    """Return what tells drafts apart: a hash of all that decides which answers are sampled."""
    decides = [
        run.model.base,
        run.data.model_dump(mode="json") if run.data is not None else None,
        run.sampling.model_dump(mode="json"),
        run.run.seed,
    ]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def _whole_groups(draft: Path, group_size: int) -> set[str]:
    """Return the groups whose answers are all in a draft, and drop all other lines from it."""
    rollouts = _read(draft)
    counts = Counter(rollout.group_id for rollout in rollouts)
    whole = {group for group, count in counts.items() if count == group_size}
    kept = [rollout for rollout in rollouts if rollout.group_id in whole]
    draft.write_text("".join(r.to_line().decode() + "\n" for r in kept), encoding="utf-8")
    return whole


def _read(draft: Path) -> list[Rollout]:
    """Read the records of a draft; the last line may have been cut off by a kill."""
    if not draft.exists():
        return []
    found = []
    lines = draft.read_text(encoding="utf-8").splitlines(keepends=True)
    for line in lines:
        if line.endswith("\n"):
            found.append(Rollout.from_json(line))
    return found


def _unset_first(pin_tokens: int | None) -> int:
    return -1 if pin_tokens is None else pin_tokens
