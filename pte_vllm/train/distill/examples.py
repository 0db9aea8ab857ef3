"""Examples that a distillation is trained on: packed text, or answers that were sampled before.

Both become examples: tokens, a plan, and which tokens the student is to agree with the teacher on.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.aligned import AlignedBatch

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence of a distillation."""

    tokens: tuple[int, ...]
    plan: FoldPlan
    mask: tuple[int, ...] | None = None
    """By token, 0 where it must not be trained on; None: everything may be."""

    @property
    def wanted(self) -> list[bool]:
        """By token, whether student and teacher are to agree on it: it is predicted after a fold.

        The token at position `first_fold` is predicted by the one before it, which still sees
        everything: there is nothing to learn, and the long first segment needs no graph.
        """
        first = self.plan.first_fold + 1
        return [
            t >= first and (self.mask is None or self.mask[t] == 1) for t in range(len(self.tokens))
        ]


def align(examples: Sequence[Example]) -> AlignedBatch:
    """Put examples side by side; their plans may differ in `pin_tokens` only."""
    return AlignedBatch.align(
        [e.tokens for e in examples], [e.plan for e in examples], [e.wanted for e in examples]
    )


def read_rollouts(
    lines: Iterable[str], plan_of: Callable[[int], FoldPlan], *, max_sequences: int | None = None
) -> list[Example]:
    """Read answers that were sampled before, whatever plan they were sampled under.

    Args:
        lines: lines of JSON that hold one `Rollout` each.
        plan_of: returns the student's plan, given how many tokens are pinned.
        max_sequences: how many examples are read at most; None: all.

    Returns:
        The answers that reach beyond their first fold.

    Raises:
        ValueError: if a record is malformed.
    """
    from pte_vllm.wire.rollout import Rollout

    examples: list[Example] = []
    for line in lines:
        if not line.strip():
            continue
        rollout = Rollout.from_json(line)
        example = Example(
            tokens=tuple(rollout.token_ids),
            plan=plan_of(rollout.plan.pin_tokens),
            mask=(0,) * len(rollout.prompt_ids) + tuple(rollout.mask),
        )
        if any(example.wanted):
            examples.append(example)
        if len(examples) == max_sequences:
            break
    return examples


def read_texts(source: str, *, split: str = "train", field: str = "text") -> Iterator[str]:
    """Yield the texts of a source, one document after the other.

    Args:
        source: a `.jsonl` file; a file of plain text, which is one document; a directory, whose
            plain-text files are read in order of their names; or else what
            `datasets.load_dataset` takes, a name or a path.
        split: which split of a data set is read.
        field: the field that holds the text in a data set or a `.jsonl` file.

    Raises:
        ValueError: naming the field, if a record lacks it.
        OSError: if the source cannot be read.
    """
    path = Path(source)
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text(json.loads(line), field, f"{source}:{number}")
    elif path.is_file():
        yield path.read_text(encoding="utf-8")
    elif path.is_dir() and (files := plain_files(path)):
        for file in files:
            yield file.read_text(encoding="utf-8")
    else:
        import datasets

        for record in datasets.load_dataset(source, split=split, streaming=not path.exists()):
            yield _text(record, field, source)


def plain_files(directory: Path) -> list[Path]:
    """Return the files of plain text below a directory, in order of their names."""
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.suffix in TEXT_SUFFIXES)


def _text(record: Any, field: str, where: str) -> str:
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where}: no text in field {field!r}")
    return text


def pack(
    texts: Iterable[str],
    tokenizer: Any,
    plan: FoldPlan,
    *,
    sequence_tokens: int,
    max_sequences: int | None = None,
) -> list[Example]:
    """Join documents, with an end-of-text token after each, and cut them into equal sequences.

    What remains at the end is dropped.

    Args:
        texts: the documents.
        tokenizer: the base model's tokenizer.
        plan: the plan of every sequence; its `pin_tokens` are pinned whatever stands there.
        sequence_tokens: the length of a sequence, pinned tokens included.
        max_sequences: how many sequences are made at most; None: all.

    Raises:
        ValueError: if a sequence would have no token beyond its first fold, or there is no text.
    """
    if sequence_tokens < plan.first_fold + 2:
        raise ValueError(
            f"sequence_tokens {sequence_tokens} leaves nothing beyond the first fold at "
            f"{plan.first_fold}"
        )
    examples: list[Example] = []
    pending: list[int] = []
    for text in texts:
        pending += tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            pending.append(tokenizer.eos_token_id)
        while len(pending) >= sequence_tokens:
            examples.append(Example(tokens=tuple(pending[:sequence_tokens]), plan=plan))
            pending = pending[sequence_tokens:]
            if len(examples) == max_sequences:
                return examples
    if not examples:
        raise ValueError(
            f"the text has {len(pending)} tokens, less than one sequence of {sequence_tokens}"
        )
    return examples


def batches(
    examples: Sequence[Example], batch_size: int, *, seed: int, start: int = 0
) -> Iterator[list[Example]]:
    """Yield batches for ever, from step `start` on; every epoch has an order of its own.

    The same seed gives the same batch at the same step, so a resumed run goes on as if it had never
    stopped. A batch may span two epochs.
    """

    def endless() -> Iterator[Example]:
        for epoch in itertools.count(start * batch_size // len(examples)):
            order = list(range(len(examples)))
            random.Random(f"{seed}-{epoch}").shuffle(order)
            yield from (examples[i] for i in order)

    stream = endless()
    for _ in range(start * batch_size % len(examples)):
        next(stream)
    while True:
        yield list(itertools.islice(stream, batch_size))
