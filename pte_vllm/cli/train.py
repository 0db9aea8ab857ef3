"""`pte-vllm train ...`: finds what runs a command.

Options are read before torch, and what trains with it, are imported: these take seconds, for which
help and mistakes do not wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from pte_vllm.cli.groups import Group, later
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


GROUP = Group(
    name="train",
    about="Train adapters; a process of its own, which needs the extra `train` and no vLLM.",
    commands={
        ("grpo",): (
            _grpo,
            "reinforcement learning against a running server",
        ),
        ("distill",): (
            _distill,
            "warm start without rewards, from the base model",
        ),
        ("experiment", "memory"): (
            later("pte_vllm.train.experiments.memory"),
            "the paper's ordering on generated memory tasks",
        ),
        ("experiment", "recall"): (
            later("pte_vllm.train.experiments.recall"),
            "facts in plain text, on a real model",
        ),
        ("experiment", "turns"): (
            later("pte_vllm.train.experiments.turns"),
            "what conversations of many turns remember, on generated tasks",
        ),
        ("experiment", "thoughts"): (
            later("pte_vllm.eval.experiment"),
            "a real model's own thoughts, distilled into every kind of memory",
        ),
        ("memory-curve",): (
            later("pte_vllm.train.experiments.memory_curve"),
            "peak training memory against the length of an answer",
        ),
    },
    epilog="Each has its own --help. grpo and distill take a file of options and flags that\n"
    "override it: pte-vllm train grpo RUN.toml --optimizer.lr 1e-5",
)
main = GROUP.main
