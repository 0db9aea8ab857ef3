"""`pte-vllm train ...`: finds the module of a command. Standard library only until one runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

_COMMANDS = {
    ("grpo",): (
        "pte_vllm.train.run.commands:grpo",
        "reinforcement learning against a running server",
    ),
    ("distill",): (
        "pte_vllm.train.run.commands:distill",
        "warm start without rewards, from the base model",
    ),
    ("experiment", "memory"): (
        "pte_vllm.train.experiments.memory:main",
        "the paper's ordering on generated memory tasks",
    ),
    ("experiment", "recall"): (
        "pte_vllm.train.experiments.recall:main",
        "facts in plain text, on a real model",
    ),
    ("memory-curve",): (
        "pte_vllm.train.experiments.memory_curve:main",
        "peak training memory against the length of an answer",
    ),
}
"""Words of a command → its `function(arguments) -> exit status`, and what it is for."""


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm train COMMAND ...`; returns the exit status.

    Raises:
        ValueError: if there is no such command.
    """
    words = tuple(arguments)
    for command, (function, _) in _COMMANDS.items():
        if words[: len(command)] == command:
            module, _, name = function.partition(":")
            run: Callable[[list[str]], int] = getattr(importlib.import_module(module), name)
            return run(list(words[len(command) :]))
    if words and words[-1] in ("-h", "--help"):
        print(usage())
        return 0
    if not words:
        print(usage(), file=sys.stderr)
        return 2
    given = " ".join(words[:2] if words[0] == "experiment" else words[:1])
    names = ", ".join(" ".join(command) for command in _COMMANDS)
    raise ValueError(f"pte-vllm train {given}: there is no such command, only {names}")


def usage() -> str:
    """What `pte-vllm train --help` prints."""
    lines = "\n".join(f"  {' '.join(c):<18} {about}" for c, (_, about) in _COMMANDS.items())
    return (
        "usage: pte-vllm train COMMAND ...\n\n"
        "Train adapters; a process of its own, which needs the extra `train` and no vLLM.\n\n"
        f"commands:\n{lines}\n\n"
        "Each has its own --help. grpo and distill take a file of options and flags that override\n"
        "it: pte-vllm train grpo RUN.toml --optimizer.lr 1e-5"
    )
