"""What a distillation is trained on: packed text, or answers that were sampled before.

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
    """0: not to be trained on; None: everything may be."""

    @property
    def wanted(self) -> list[bool]:
        """Thoughts beyond the first fold: tokens that are predicted after it.

        The token at position `first_fold` is predicted by the one before it, which still sees
        everything: there is nothing to learn, and the long first segment needs no graph.
        """
        first = self.plan.first_fold + 1
        return [
            t >= first and (self.mask is None or self.mask[t] == 1) for t in range(len(self.tokens))
        ]


def align(examples: Sequence[Example]) -> AlignedBatch:
    """Examples side by side; their plans may differ in `pin_tokens` only."""
    return AlignedBatch.align(
        [e.tokens for e in examples], [e.plan for e in examples], [e.wanted for e in examples]
    )


def read_rollouts(
    lines: Iterable[str], plan_of: Callable[[int], FoldPlan], *, max_sequences: int | None = None
) -> list[Example]:
    """Answers that were sampled before, whatever plan they were sampled under.

    Args:
        lines: of JSON, one `Rollout` each.
        plan_of: the student's plan, given how many tokens are pinned.
        max_sequences: reading stops there.

    Returns:
        Those that reach beyond their first fold.

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
    """Texts of a source, one document after the other.

    Args:
        source: a `.jsonl` file; a file of plain text, which is one document; a directory, whose
            plain-text files are read in order of their names; or else what
            `datasets.load_dataset` takes, a name or a path.
        split: of a dataset.
        field: that holds the text in a dataset or a `.jsonl` file.

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
    """Files of plain text below a directory, in order."""
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
    """Documents one after the other, an end-of-text token after each, cut into equal sequences.

    What remains at the end is dropped.

    Args:
        plan: of every sequence; its `pin_tokens` are pinned whatever stands there.
        max_sequences: reading stops there.

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
    """Batches for ever, from step `start` on; every epoch in an order of its own.

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
