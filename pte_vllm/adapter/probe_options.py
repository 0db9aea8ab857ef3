"""How probes are sampled: the options of `pte-vllm adapter calibrate`. Standard library only."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
STORES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What is sampled, and on what; errors name the flag."""

    num_thoughts: int = 32
    """Thoughts to sample, each to a prompt."""
    max_tokens: int = 256
    """Most tokens of one thought."""
    num_probes: int = 512
    """Probes for each KV head of each layer."""
    train_steps: int = 0
    """Steps by which they are trained on the same thoughts; 0: they stay as sampled."""
    temperature: float = 0.7
    """Of the sampling; nothing else shapes it, whatever the model's own defaults are."""
    batch_size: int = 32
    """Thoughts that are sampled at once; other sizes draw other thoughts."""
    seed: int = 0
    """Of all that is drawn: prompts, thoughts and probes."""
    device: str = "auto"
    """CUDA where there is one."""
    dtype: str = "auto"
    """The model's own on CUDA, and on CPUs that multiply bf16 natively; float32 on others."""
    store: str = "float32"
    """What the probes are rounded to; a file in 16 bits has half the size."""

    def __post_init__(self) -> None:
        for flag, count in (
            ("--num-thoughts", self.num_thoughts),
            ("--max-tokens", self.max_tokens),
            ("--probes", self.num_probes),
            ("--batch-size", self.batch_size),
        ):
            if count < 1:
                raise ValueError(f"{flag} must be at least 1, got {count}")
        if self.train_steps < 0:
            raise ValueError(f"--train-steps must not be negative, got {self.train_steps}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature must be above 0, got {self.temperature:g}")
        for flag, name, names in (
            ("--device", self.device, DEVICES),
            ("--dtype", self.dtype, DTYPES),
            ("--store", self.store, STORES),
        ):
            if name not in names:
                raise ValueError(f"{flag} must be one of {', '.join(names)}, got {name!r}")

    def choose(self, prompts: Sequence[str]) -> list[str]:
        """Draw a prompt for each thought: each once, in random order, before any comes again."""
        rng, chosen = random.Random(self.seed), list[str]()
        while len(chosen) < self.num_thoughts:
            chosen += rng.sample(prompts, len(prompts))
        return chosen[: self.num_thoughts]


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts: of a `.jsonl` the field "prompt" of each line, else each line as it is.

    Raises:
        ValueError, OSError: naming --prompts, and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--prompts: the file {path} does not exist")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts: {path} is not text in UTF-8: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompts.append(_prompt_of(line, f"{path}:{number}") if path.suffix == ".jsonl" else line)
    if not prompts:
        raise ValueError(f"--prompts: {path} holds no prompt")
    return prompts


def _prompt_of(line: str, place: str) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"--prompts: {place} is not JSON: {error}") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'--prompts: {place} has no text in a field "prompt"')
    return prompt


def read_thoughts(path: str | Path) -> list[tuple[list[int], int]]:
    """Read answers that were sampled before: token ids, and how many of them are the prompt.

    Args:
        path: lines of JSON with `prompt_ids` and `completion_ids`, as rollout records have them.

    Raises:
        ValueError, OSError: naming --thoughts, and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--thoughts: the file {path} does not exist")
    found = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record: Any = json.loads(line)
                prompt, thought = record["prompt_ids"], record["completion_ids"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"--thoughts: {path}:{number} is no record with prompt_ids and completion_ids"
                ) from error
            ids = [*prompt, *thought]
            if not all(isinstance(i, int) and i >= 0 for i in ids):
                raise ValueError(f"--thoughts: {path}:{number} has ids that are no token ids")
            found.append((ids, len(prompt)))
    if not found:
        raise ValueError(f"--thoughts: {path} holds none")
    return found
