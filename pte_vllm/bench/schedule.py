"""`pte-vllm bench schedule`: what planning a step costs, and what is computed twice in a full pool.

No model runs. The scheduler is the real one, vLLM's beside ours; see `simulated.py`. Two questions:

    CPU time per step   of decoding at each position: does it grow with the sequences' length?
    computed twice      many requests in a small pool, with and without room kept for whole windows
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Table

from pte_vllm.bench import report
from pte_vllm.bench.simulated import BLOCK_TOKENS, SimulatedEngine, Steps
from pte_vllm.method.options import EngineConfig

QUESTION_TOKENS = 64


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit status."""
    args = _parser().parse_args(argv)
    for name in ("seqs", "positions"):
        if min(getattr(args, name)) < 1:
            raise ValueError(f"--{name} must be positive")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it would tell of each configuration
    args.out.mkdir(parents=True, exist_ok=True)
    report.announce(args)
    times = _times(args)
    _show_times(times)
    crowds = _crowds(args)
    _show_crowds(crowds, args)
    stem = report.write(args, {"ms_per_step": _flat(times), "crowded": crowds})
    report.lines(
        stem,
        {
            f"{arm}, {seqs:,} sequences": (
                args.positions,
                [statistics.median(times[seqs, position][arm]) for position in args.positions],
            )
            for seqs in args.seqs
            for arm in ("vLLM", "PTE")
        },
        "position",
        "CPU ms to plan a step",
    )
    return 0


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pte-vllm bench schedule",
        description="Measure what planning a step costs, beside vLLM's scheduler. No model runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(what="schedule")
    parser.add_argument("--seqs", type=_numbers, default=[256, 1024], help="sequences at once")
    parser.add_argument(
        "--positions", type=_numbers, default=[1000, 32000], help="tokens before the steps measured"
    )
    parser.add_argument("--window", type=int, default=512, help="tokens of the window")
    parser.add_argument("--steps", type=int, default=128, help="steps measured in each turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each arm, alternating")
    parser.add_argument(
        "--requests", type=int, default=1024, help="requests that crowd a small pool; 0 skips that"
    )
    parser.add_argument("--peaks", type=int, default=64, help="how many whole windows it holds")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of their answers")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="for JSON and plot")
    return parser


# -- time per step ------------------------------------------------------------------------------

Times = dict[tuple[int, int], dict[str, list[float]]]


def _times(args: argparse.Namespace) -> Times:
    """Return the median time of a step in ms, by (sequences, position), arm and turn."""
    times: Times = {}
    for seqs in args.seqs:
        for position in args.positions:
            times[seqs, position] = _turns(args, seqs, position)
    return times


def _turns(args: argparse.Namespace, seqs: int, position: int) -> dict[str, list[float]]:
    # Not all alike, so that folds spread over the steps as they do in a server.
    lengths = [position + i % 128 for i in range(seqs)]
    limit = position + 128 + (args.repeats + 1) * args.steps + BLOCK_TOKENS
    arms = {
        name: SimulatedEngine(
            engine,
            num_blocks=seqs * -(-limit // BLOCK_TOKENS),
            max_num_seqs=seqs,
            max_model_len=limit,
        )
        for name, engine in (("vLLM", None), ("PTE", EngineConfig(window_tokens=args.window)))
    }
    for name in track(arms, description=f"{seqs} sequences up to {position:,}", transient=True):
        pin_tokens = QUESTION_TOKENS if name == "PTE" else None
        arms[name].add(lengths, max_tokens=limit, pin_tokens=pin_tokens)
        arms[name].run(until_read=True)
    medians: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.repeats):
        for name, arm in arms.items():
            medians[name].append(statistics.median(arm.run(num_steps=args.steps).ms))
    return medians


def _show_times(times: Times) -> None:
    table = Table("sequences", "position", "vLLM, CPU ms a step", "PTE, CPU ms a step", "ratio")
    for (seqs, position), arms in times.items():
        vllm, pte = (statistics.median(arms[name]) for name in ("vLLM", "PTE"))
        row = (f"{seqs:,}", f"{position:,}", f"{vllm:.2f}", f"{pte:.2f}", f"{pte / vllm:.2f}")
        table.add_row(*row)
    report.console.print(table)


def _flat(times: Times) -> dict[str, dict[str, list[float]]]:
    return {f"{seqs} at {position}": arms for (seqs, position), arms in times.items()}


# -- a full pool --------------------------------------------------------------------------------


def _crowds(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return what happened to many requests in a small pool, by arm."""
    if not args.requests:
        return {}
    found = {}
    for name, reserve in (("when its prompt fits", False), ("when its window fits", True)):
        engine = EngineConfig(window_tokens=args.window, reserve_windows=reserve)
        plan = engine.plan(pin_tokens=QUESTION_TOKENS, block_size=BLOCK_TOKENS)
        limit = QUESTION_TOKENS + args.tokens
        arm = SimulatedEngine(
            engine,
            num_blocks=args.peaks * plan.peak_blocks(limit),
            max_num_seqs=args.requests,
            max_model_len=limit,
        )
        arm.add([QUESTION_TOKENS] * args.requests, max_tokens=args.tokens, pin_tokens=None)
        found[name] = _outcome(arm, arm.run(), needed=args.requests * (limit - 1))
    return found


def _outcome(arm: SimulatedEngine, steps: Steps, needed: int) -> dict[str, float]:
    return {
        "preemptions": arm.preemptions,
        "tokens_computed": steps.num_tokens,
        "tokens_needed": needed,  # the last token of an answer is never computed
        "steps": len(steps.ms),
        "mean_running": statistics.fmean(steps.num_running),
    }


def _show_crowds(crowds: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    if not crowds:
        return
    table = Table("a request starts", "preemptions", "computed twice", "steps", "running, mean")
    for name, found in crowds.items():
        twice = found["tokens_computed"] / found["tokens_needed"] - 1
        table.add_row(
            name,
            f"{found['preemptions']:,}",
            f"{twice:.1%} of {found['tokens_needed']:,} tokens",
            f"{found['steps']:,}",
            f"{found['mean_running']:.0f}",
        )
    report.console.print(
        f"{args.requests:,} requests of {args.tokens:,} tokens, a pool of {args.peaks} windows:",
        highlight=False,
    )
    report.console.print(table)
