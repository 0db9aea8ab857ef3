"""`pte-vllm train experiment memory`: the paper's ordering on generated memory tasks.

A small Llama learns the tasks with full attention and is frozen (`memory_base`). Then every arm
trains its adapter under the window, with the same budget (`memory_arms`, `arm_runs`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pte_vllm.train.data.memory_tasks import TASKS
from pte_vllm.train.experiments.arm_runs import (
    add_flags,
    check_flags,
    chosen,
    run_and_report,
    start_worker,
)

if TYPE_CHECKING:
    from pte_vllm.train.experiments.memory_arms import Budget, MemoryArm
    from pte_vllm.train.experiments.memory_base import BaseConfig


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pte-vllm train experiment memory",
        description="Train a small model on memory tasks, freeze it, and compare what adapters "
        "remember under a window. Writes JSON, a Markdown table and a plot.",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two tasks, one seed; for CI")
    size.add_argument("--ablations", action="store_true", help="the named options, one by one")
    add_flags(parser, out="out/memory", tasks=tuple(TASKS))
    return parser


def main(args: Sequence[str]) -> int:
    """Run the experiment; returns the exit status.

    Raises:
        ValueError: naming the flag, if one does not fit.
    """
    options = _parser().parse_args(list(args))
    check_flags(options)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; also for the workers
    from pte_vllm.train.experiments import memory_plans as plans
    from pte_vllm.train.experiments import memory_report
    from pte_vllm.train.experiments.memory_arms import longest_tokens

    plan, name = plans.FULL_PLAN, "memory"
    if options.quick:
        plan, name = plans.QUICK_PLAN, "quick"
    elif options.ablations:
        plan, name = plans.ABLATION_PLAN, "ablations"
    plan = chosen(plan, options)
    run_and_report(
        plan,
        options,
        name=name,
        train_base=_train_base,
        work=_work,
        longest=longest_tokens(plan.budget),
        write=memory_report.write,
    )
    return 0


def _train_base(config: BaseConfig, out: Path, show: Any) -> tuple[Path, dict[str, Any]]:
    from pte_vllm.train.experiments.memory_base import MemoryCourse
    from pte_vllm.train.experiments.small_llama import ensure_model

    return ensure_model(config, MemoryCourse(config), out, show)


def _work(base: Path, arm: MemoryArm, budget: Budget, seed: int) -> dict[str, Any]:
    """Train and score one arm with one seed, in a worker process."""
    start_worker()
    from pte_vllm.train.experiments.memory_arms import run_arm
    from pte_vllm.train.experiments.small_llama import load

    return run_arm(load(base), arm, budget, seed)
