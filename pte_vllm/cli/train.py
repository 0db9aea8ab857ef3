"""`pte-vllm train ...`: finds what runs a command.

Options are read before torch, and what trains with it, are imported: these take seconds, for which
help and mistakes do not wait.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from pte_vllm.models.location import check_model


def _grpo(arguments: Sequence[str]) -> int:
    """Run `pte-vllm train grpo ...`; returns the exit status."""
    from pte_vllm.train.options.runs import GrpoRun

    run = GrpoRun.parse(arguments, prog="pte-vllm train grpo")
    check_model(run.model.base, flag="--model.base")
    from pte_vllm.train.grpo.loop import main

    return main(run)


def _distill(arguments: Sequence[str]) -> int:
    """Run `pte-vllm train distill ...`; returns the exit status."""
    from pte_vllm.train.options.runs import DistillRun

    run = DistillRun.parse(arguments, prog="pte-vllm train distill")
    check_model(run.model.base, flag="--model.base")
    from pte_vllm.train.distill.loop import main

    return main(run)


def _later(module: str) -> Callable[[Sequence[str]], int]:
    """Return a function that imports a module when the command runs, and calls its `main`."""

    def run(arguments: Sequence[str]) -> int:
        status: int = importlib.import_module(module).main(list(arguments))
        return status

    return run


_COMMANDS: dict[tuple[str, ...], tuple[Callable[[Sequence[str]], int], str]] = {
    ("grpo",): (
        _grpo,
        "reinforcement learning against a running server",
    ),
    ("distill",): (
        _distill,
        "warm start without rewards, from the base model",
    ),
    ("experiment", "memory"): (
        _later("pte_vllm.train.experiments.memory"),
        "the paper's ordering on generated memory tasks",
    ),
    ("experiment", "recall"): (
        _later("pte_vllm.train.experiments.recall"),
        "facts in plain text, on a real model",
    ),
    ("experiment", "thoughts"): (
        _later("pte_vllm.eval.experiment"),
        "a real model's own thoughts, distilled into every kind of memory",
    ),
    ("memory-curve",): (
        _later("pte_vllm.train.experiments.memory_curve"),
        "peak training memory against the length of an answer",
    ),
}
"""By the words of a command: what runs it and returns the exit status, and what it is for."""


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm train COMMAND ...`; returns the exit status.

    Raises:
        ValueError: if there is no such command.
    """
    words = tuple(arguments)
    for command, (run, _) in _COMMANDS.items():
        if words[: len(command)] == command:
            return run(words[len(command) :])
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
    """Return what `pte-vllm train --help` prints."""
    lines = "\n".join(f"  {' '.join(c):<18} {about}" for c, (_, about) in _COMMANDS.items())
    return (
        "usage: pte-vllm train COMMAND ...\n\n"
        "Train adapters; a process of its own, which needs the extra `train` and no vLLM.\n\n"
        f"commands:\n{lines}\n\n"
        "Each has its own --help. grpo and distill take a file of options and flags that override\n"
        "it: pte-vllm train grpo RUN.toml --optimizer.lr 1e-5"
    )
