"""`pte-vllm train experiment memory`: the paper's ordering on generated memory tasks.

A small Llama learns the tasks with full attention and is frozen (`memory_base`). Then every arm
trains its adapter under the window, with the same budget (`memory_arms`), in worker processes of
one thread each. What a run has finished is kept, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pte_vllm.train.data.memory_tasks import TASKS
from pte_vllm.train.experiments.workers import workers

if TYPE_CHECKING:
    from pte_vllm.train.experiments.memory_arms import Budget, MemoryArm
    from pte_vllm.train.experiments.memory_plans import Plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pte-vllm train experiment memory",
        description="Train a small model on memory tasks, freeze it, and compare what adapters "
        "remember under a window. Writes JSON, a Markdown table and a plot.",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two tasks, one seed; for CI")
    size.add_argument("--ablations", action="store_true", help="the named options, one by one")
    parser.add_argument(
        "--out", type=Path, default=Path("out/memory"), help="(default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--steps", type=int, help="training steps of each adapter")
    parser.add_argument("--seeds", help="such as 0,1,2")
    parser.add_argument("--tasks", help=f"to train and score, of {', '.join(TASKS)}")
    parser.add_argument("--arms", help="only arms whose name contains one of these, by comma")
    return parser


def main(args: Sequence[str]) -> int:
    """Run the experiment; returns the exit status.

    Raises:
        ValueError: naming the flag, if one does not fit.
    """
    options = _parser().parse_args(list(args))
    if options.jobs < 1:
        raise ValueError(f"--jobs must be positive, got {options.jobs}")
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps must be positive, got {options.steps}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; also for the workers
    plan, name = _plan(options)
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    base_report, records = run(plan, options.out, jobs=options.jobs)
    from rich.console import Console

    from pte_vllm.train.experiments import memory_report

    result = {
        "seconds": round(time.monotonic() - began, 1),
        "base": base_report,
        "budget": asdict(plan.budget),
        "bytes": _bytes(plan),
        "runs": records,
    }
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = memory_report.write(result, options.out, name)
    Console().print(text, markup=False, highlight=False)
    return 0


def _plan(options: argparse.Namespace) -> tuple[Plan, str]:
    """Return the run that the flags ask for, and the name of its files."""
    from pte_vllm.train.experiments import memory_plans as plans

    plan, name = plans.FULL_PLAN, "memory"
    if options.quick:
        plan, name = plans.QUICK_PLAN, "quick"
    elif options.ablations:
        plan, name = plans.ABLATION_PLAN, "ablations"
    if options.steps is not None:
        plan = replace(plan, budget=replace(plan.budget, steps=options.steps))
    if options.seeds is not None:
        words = options.seeds.split(",")
        if not all(word.strip().isdigit() for word in words):
            raise ValueError(f"--seeds must look like 0,1,2, got {options.seeds!r}")
        plan = replace(plan, seeds=tuple(int(word) for word in words))
    if options.tasks is not None:
        tasks = tuple(word.strip() for word in options.tasks.split(","))
        if unknown := set(tasks) - set(plan.base.tasks):
            raise ValueError(f"--tasks: {min(unknown)!r} is none of {', '.join(plan.base.tasks)}")
        plan = replace(plan, budget=replace(plan.budget, tasks=tasks))
    if options.arms is not None:
        words = options.arms.split(",")
        chosen = tuple(arm for arm in plan.arms if any(word in arm.name for word in words))
        if not chosen:
            names = ", ".join(arm.name for arm in plan.arms)
            raise ValueError(f"--arms: {options.arms!r} fits none of {names}")
        plan = replace(plan, arms=chosen)
    return plan, name


def run(plan: Plan, out: Path, *, jobs: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train the base model if `out` lacks it, then every arm.

    Returns:
        What the base model reached, and a record for each arm and seed, in the order of the plan.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        base, report = _base(plan, out, progress)
        waiting = [(arm, seed) for arm in plan.arms for seed in _seeds(plan, arm)]
        order = list(waiting)
        found: dict[tuple[str, int], dict[str, Any]] = {}
        files = {(arm.name, seed): _file(plan, out, arm, seed) for arm, seed in waiting}
        for arm, seed in order:
            file = files[arm.name, seed]
            if file.exists():
                found[arm.name, seed] = json.loads(file.read_text())
                waiting.remove((arm, seed))
        # The longest first, so that no worker ends alone.
        waiting.sort(key=lambda job: (job[0].trained, job[0].backward == "full"), reverse=True)
        bar = progress.add_task("arms", total=len(order), completed=len(found))
        with workers(jobs) as (pool, _):
            running = {
                pool.submit(_work, base, arm, plan.budget, seed): (arm.name, seed)
                for arm, seed in waiting
            }
            for future in as_completed(running):
                key, record = running[future], future.result()
                files[key].parent.mkdir(parents=True, exist_ok=True)
                files[key].write_text(json.dumps(record))
                found[key] = record
                inside = [score["accuracy"] for score in record["scores"]]
                progress.console.print(
                    f"{record['arm']}, seed {record['seed']}: {sum(inside) / len(inside):.3f} "
                    f"right over all gaps, {record['seconds']:.0f} s"
                )
                progress.advance(bar)
    return report, [found[arm.name, seed] for arm, seed in order]


def _bytes(plan: Plan) -> dict[str, dict[str, int]]:
    """Count the bytes that a sequence of each arm holds at most, in fp32."""
    from pte_vllm.train.experiments.memory_arms import longest_tokens

    base, longest = plan.base, longest_tokens(plan.budget)
    return {
        arm.name: {
            "kv": arm.kv_bytes(base.layers, base.kv_heads * base.head_dim, longest),
            "state": arm.state_bytes(base.layers),
        }
        for arm in plan.arms
    }


def _seeds(plan: Plan, arm: MemoryArm) -> tuple[int, ...]:
    """Return the seeds of an arm: one where nothing is trained, as all would agree."""
    return plan.seeds if arm.trained else plan.seeds[:1]


def _file(plan: Plan, out: Path, arm: MemoryArm, seed: int) -> Path:
    """Return where the record of an arm and seed lies; its name is a hash of what it depends on."""
    budget = asdict(plan.budget) if arm.trained else {"eval": asdict(plan.budget)}
    text = json.dumps([plan.base.key(), asdict(arm), budget], sort_keys=True)
    return out / "runs" / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}-{seed}.json"


def _base(plan: Plan, out: Path, progress: Any) -> tuple[Path, dict[str, Any]]:
    import torch

    from pte_vllm.train.experiments.memory_base import ensure_base

    torch.set_num_threads(1)
    bar = progress.add_task("base model", total=plan.base.steps)

    def show(step: int, loss: float, reached: dict[str, float]) -> None:
        about = ", ".join(f"{task} {value:.2f}" for task, value in reached.items())
        progress.update(bar, completed=step, description=f"base model ({about})")

    base, report = ensure_base(plan.base, out, show)
    progress.update(bar, completed=report["steps"], total=report["steps"])
    return base, report


def _work(base: Path, arm: MemoryArm, budget: Budget, seed: int) -> dict[str, Any]:
    """Train and score one arm with one seed, in a worker process."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from pte_vllm.train.experiments.memory_arms import run_arm
    from pte_vllm.train.experiments.memory_base import load

    torch.set_num_threads(1)
    disable_progress_bar()
    return run_arm(load(base), arm, budget, seed)
