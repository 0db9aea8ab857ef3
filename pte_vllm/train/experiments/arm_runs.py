"""Runs the arms of an experiment on a small model, and keeps what is finished.

The base model is trained first, unless it is there. Then every arm trains its adapter with the same
budget, in worker processes of one thread each. A record is written as soon as an arm is done, under
a name that is a hash of what it depends on: so the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pte_vllm.train.experiments.workers import workers

if TYPE_CHECKING:
    from pte_vllm.train.experiments.small_llama import SmallLlama

Record = dict[str, Any]
TrainBase = Callable[[Any, Path, Any], tuple[Path, dict[str, Any]]]
"""Takes the options of a base model, a directory, and what is told of each step; returns the
model's folder and a report."""
Work = Callable[[Path, Any, Any, int], Record]
"""Takes the base model's folder, an arm, a budget and a seed, in a worker process; returns a record
with `arm`, `seed`, `seconds` and `scores`, each with an `accuracy`."""


class Budget(Protocol):
    """How long arms are trained, and on what they are scored."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the tasks, trained and scored."""


class Plan(Protocol):
    """What one run of an experiment compares: a frozen dataclass."""

    @property
    def base(self) -> SmallLlama:
        """Return the options of the base model."""

    @property
    def budget(self) -> Any:
        """Return a `Budget`, which is a frozen dataclass with `steps`."""

    @property
    def arms(self) -> Sequence[Any]:
        """Return the arms: dataclasses with `name`, `trained` and `backward`."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds of every arm that is trained."""


def add_flags(parser: argparse.ArgumentParser, *, out: str, tasks: Sequence[str]) -> None:
    """Add the flags that all such experiments have."""
    parser.add_argument("--out", type=Path, default=Path(out), help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--steps", type=int, help="training steps of each adapter")
    parser.add_argument("--seeds", help="such as 0,1,2")
    parser.add_argument("--tasks", help=f"to train and score, of {', '.join(tasks)}")
    parser.add_argument("--arms", help="only arms whose name contains one of these, by comma")


def check_flags(options: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, if a number is not positive."""
    for name in ("jobs", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be positive, got {value}")


def chosen(plan: Any, options: argparse.Namespace) -> Any:
    """Return the plan with what the flags of `add_flags` change.

    Raises:
        ValueError: naming the flag, if it asks for something that is not there.
    """
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
        arms = tuple(arm for arm in plan.arms if any(word in arm.name for word in words))
        if not arms:
            names = ", ".join(arm.name for arm in plan.arms)
            raise ValueError(f"--arms: {options.arms!r} fits none of {names}")
        plan = replace(plan, arms=arms)
    return plan


def run_and_report(
    plan: Any,
    options: argparse.Namespace,
    *,
    name: str,
    train_base: TrainBase,
    work: Work,
    longest: int,
    write: Callable[[dict[str, Any], Path, str], str],
) -> None:
    """Run a plan, write `name`.json and the report, and print the latter.

    Args:
        plan: A `Plan`.
        options: The flags of `add_flags`.
        name: Of the files.
        train_base: Trains the base model unless it is there.
        work: Trains and scores an arm.
        longest: How many tokens the longest scored sequence has.
        write: Writes the report of a result into a directory, under a name; returns its text.
    """
    from rich.console import Console

    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    base_report, records = run(
        plan, options.out, jobs=options.jobs, train_base=train_base, work=work
    )
    result = {
        "seconds": round(time.monotonic() - began, 1),
        "base": base_report,
        "budget": asdict(plan.budget),
        "bytes": held_bytes(plan, longest),
        "runs": records,
    }
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    Console().print(write(result, options.out, name), markup=False, highlight=False)


def run(
    plan: Plan, out: Path, *, jobs: int, train_base: TrainBase, work: Work
) -> tuple[dict[str, Any], list[Record]]:
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
        base, report = _base(plan, out, progress, train_base)
        waiting = [(arm, seed) for arm in plan.arms for seed in _seeds(plan, arm)]
        order = list(waiting)
        found: dict[tuple[str, int], Record] = {}
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
                pool.submit(work, base, arm, plan.budget, seed): (arm.name, seed)
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
                    f"right over all that is scored, {record['seconds']:.0f} s"
                )
                progress.advance(bar)
    return report, [found[arm.name, seed] for arm, seed in order]


def held_bytes(plan: Plan, longest: int) -> dict[str, dict[str, int]]:
    """Count by arm the bytes of `kv` and of `state` that a sequence holds at most, in fp32."""
    base = plan.base
    return {
        arm.name: {
            "kv": arm.kv_bytes(base.layers, base.kv_heads * base.head_dim, longest),
            "state": arm.state_bytes(base.layers),
        }
        for arm in plan.arms
    }


def start_worker() -> None:
    """Prepare a worker process: one thread, no progress bars of its own."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()


def _seeds(plan: Plan, arm: Any) -> tuple[int, ...]:
    """Return the seeds of an arm: one where nothing is trained, as all would agree."""
    return plan.seeds if arm.trained else plan.seeds[:1]


def _file(plan: Plan, out: Path, arm: Any, seed: int) -> Path:
    """Return where the record of an arm and seed lies; its name is a hash of what it depends on."""
    budget = asdict(plan.budget) if arm.trained else {"eval": asdict(plan.budget)}
    text = json.dumps([plan.base.key(), asdict(arm), budget], sort_keys=True)
    return out / "runs" / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}-{seed}.json"


def _base(
    plan: Plan, out: Path, progress: Any, train_base: TrainBase
) -> tuple[Path, dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    bar = progress.add_task("base model", total=plan.base.steps)

    def show(step: int, loss: float, reached: dict[str, float]) -> None:
        about = ", ".join(f"{task} {value:.2f}" for task, value in reached.items())
        progress.update(bar, completed=step, description=f"base model ({about})")

    base, report = train_base(plan.base, out, show)
    progress.update(bar, completed=report["steps"], total=report["steps"])
    return base, report
