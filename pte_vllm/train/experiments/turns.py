"""`pte-vllm train experiment turns`: what conversations remember over many turns.

A small Llama learns generated conversations with full attention and is frozen (`turns_base`). Then
every arm holds the past in its own way: the first question and the newest one are pinned, and all
that lies between folds (`turns_arms`). Arms are trained with the same budget, and scored by how
many turns lie between telling and asking.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pte_vllm.train.data.turn_tasks import TURN_TASKS
from pte_vllm.train.experiments.arm_runs import (
    add_flags,
    check_flags,
    chosen,
    run_and_report,
    start_worker,
)

if TYPE_CHECKING:
    from pte_vllm.train.experiments.turns_arms import TurnsArm, TurnsBudget
    from pte_vllm.train.experiments.turns_base import TurnsBase


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pte-vllm train experiment turns",
        description="Train a small model on conversations of many turns, freeze it, and compare "
        "what is remembered by the number of turns since it was told: with full attention, with "
        "windows, kept tokens and adapters. Writes JSON, a Markdown table and a plot. "
        "`pte-vllm eval turns` asks a real model on a server.",
    )
    parser.add_argument("--quick", action="store_true", help="one task, short conversations")
    add_flags(parser, out="out/turns", tasks=TURN_TASKS)
    return parser


def main(args: Sequence[str]) -> int:
    """Run the experiment; returns the exit status.

    Raises:
        ValueError: naming the flag, if one does not fit.
    """
    options = _parser().parse_args(list(args))
    check_flags(options)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; also for the workers
    from pte_vllm.train.experiments import turns_plans as plans
    from pte_vllm.train.experiments import turns_report
    from pte_vllm.train.experiments.turns_arms import longest_tokens

    plan, name = (plans.QUICK_PLAN, "quick") if options.quick else (plans.FULL_PLAN, "turns")
    plan = chosen(plan, options)
    run_and_report(
        plan,
        options,
        name=name,
        train_base=_train_base,
        work=_work,
        longest=longest_tokens(plan.budget),
        write=turns_report.write,
    )
    return 0


def _train_base(config: TurnsBase, out: Path, show: Any) -> tuple[Path, dict[str, Any]]:
    from pte_vllm.train.experiments.small_llama import ensure_model
    from pte_vllm.train.experiments.turns_base import TurnsCourse

    return ensure_model(config, TurnsCourse(config), out, show)


def _work(base: Path, arm: TurnsArm, budget: TurnsBudget, seed: int) -> dict[str, Any]:
    """Train and score one arm with one seed, in a worker process."""
    start_worker()
    from pte_vllm.train.experiments.small_llama import load
    from pte_vllm.train.experiments.turns_arms import run_arm

    return run_arm(load(base), arm, budget, seed)
