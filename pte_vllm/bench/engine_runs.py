"""What `pte-vllm bench` measures with engines alone, a function for each command.

`cli.py` reads the options, `turns.py` runs the engines, `report.py` prints and writes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pte_vllm.bench import report
from pte_vllm.bench.arm import ArmSpec, Workload
from pte_vllm.bench.turns import BLOCK_TOKENS, Results, Turns, tokens_per_second
from pte_vllm.method.options import EngineConfig


def run(args: argparse.Namespace) -> None:
    report.announce(args)
    with tempfile.TemporaryDirectory() as scratch:
        _RUNS[args.what](args, Turns(args, Path(scratch)))


def _batch(args: argparse.Namespace, turns: Turns, specs: Sequence[ArmSpec]) -> Results:
    """One batch of sequences of one length."""
    workload = Workload(num_seqs=args.seqs, prompt_tokens=args.prompt, output_tokens=args.tokens)
    (results,) = turns.run(specs, [workload])
    return results


def _throughput(args: argparse.Namespace, turns: Turns) -> None:
    """Rollouts shaped like GRPO's in a pool that holds only a few of them whole."""
    length = args.prompt + args.tokens
    pool = args.pool * -(-length // BLOCK_TOKENS)
    common: dict[str, Any] = {
        "max_num_seqs": args.seqs,
        "num_blocks": pool,
        "max_model_len": length + BLOCK_TOKENS,
        "prefix_caching": True,
    }
    specs = [
        turns.spec("vLLM, full cache", **common),
        turns.spec("window, base model", window_tokens=args.window, **common),
        turns.pte(**common),
    ]
    if args.with_lora:  # window 0: full attention, with our LoRA
        lora = {"window_tokens": 0, "adapter": turns.plain, **common}
        specs.insert(1, turns.spec("full cache, plain LoRA", **lora))
    workload = Workload(
        num_seqs=args.seqs,
        group_size=args.group,
        prompt_tokens=args.prompt,
        output_tokens=args.tokens,
    )
    (results,) = turns.run(specs, [workload])
    rates = tokens_per_second(results)
    report.console.print(report.rates(rates, "tok/s"))
    running = {name: runs[0]["mean_running"] for name, runs in results.items()}
    report.console.print(
        f"pool of {pool} blocks; sequences per step, on average: "
        + ", ".join(f"{name} {value:.1f}" for name, value in running.items()),
        highlight=False,
    )
    stem = report.write(args, {"tokens_per_second": rates, "running": running, "pool_blocks": pool})
    report.bars(stem, rates, f"tok/s, {args.seqs} rollouts of {args.tokens} tokens")


def _lora(args: argparse.Namespace, turns: Turns) -> None:
    # As many blocks as all sequences need whole: five engines share the memory.
    whole = -(-(args.prompt + args.tokens) // BLOCK_TOKENS) + 1
    least = ArmSpec.max_model_len // BLOCK_TOKENS  # vLLM wants room for the longest sequence
    num_blocks = max(args.seqs * whole + 1, least)
    common: dict[str, Any] = {"max_num_seqs": args.seqs, "num_blocks": num_blocks}
    bounded = {"window_tokens": args.window, **common}
    specs = [
        turns.spec("vLLM, base model", **common),
        # vLLM compiles no LoRA on a CPU; told so, it takes the operators that are fast without.
        turns.spec("vLLM, its LoRA", adapter=turns.plain, compiled=False, **common),
        turns.spec("window, base model", **bounded),
        turns.spec("window, plain LoRA", adapter=turns.plain, **bounded),
        turns.pte(**common),
    ]
    if args.tensor_parallel_size > 1:  # every rank is a process: leave out what has no adapter
        specs = [spec for spec in specs if spec.adapter is not None]
    results = _batch(args, turns, specs)
    rates = tokens_per_second(results)
    report.console.print(report.rates(rates, "tok/s"))
    steps = {
        name: [statistics.median(r["step_ms"]) for r in runs] for name, runs in results.items()
    }
    report.console.print(report.rates(steps, "ms per step"))
    stem = report.write(args, {"tokens_per_second": rates, "ms_per_step": steps})
    report.bars(stem, rates, f"tok/s, {args.seqs} sequences")


def _drafts(args: argparse.Namespace, turns: Turns) -> None:
    """Texts that repeat themselves, as greedy ones of a small model do, with and without drafts."""
    common: dict[str, Any] = {"max_num_seqs": args.seqs}
    drafts = {"draft_tokens": args.drafts, **common}
    specs = [
        turns.spec("vLLM", adapter=turns.plain, compiled=False, **common),
        turns.spec("vLLM, drafts", adapter=turns.plain, compiled=False, **drafts),
        turns.pte(**common),
        turns.pte("window, PTE, drafts", **drafts),
    ]
    results = _batch(args, turns, specs)
    rates = tokens_per_second(results)
    report.console.print(report.rates(rates, "tok/s"))
    accepted = {name: [run["accepted"] for run in runs] for name, runs in results.items()}
    report.console.print(report.rates(accepted, "tokens a step gives a sequence"))
    stem = report.write(args, {"tokens_per_second": rates, "accepted": accepted})
    report.bars(stem, rates, f"tok/s, {args.seqs} sequences")


def _latency(args: argparse.Namespace, turns: Turns) -> None:
    """One sequence; thoughts before the position are prefilled, the question is pinned."""
    positions = [int(part) for part in args.positions.split(",")]
    common: dict[str, Any] = {
        "max_num_seqs": 1,
        "max_model_len": max(positions) + args.tokens + BLOCK_TOKENS,
    }
    specs = [
        turns.spec("vLLM, full attention", **common),
        turns.pte(**common),
    ]
    workloads = [
        Workload(num_seqs=1, prompt_tokens=p, output_tokens=args.tokens, pin_tokens=64)
        for p in positions
    ]
    results = turns.run(specs, workloads)
    per_token: dict[str, list[float]] = {spec.name: [] for spec in specs}
    first_token: dict[str, list[float]] = {spec.name: [] for spec in specs}
    for found in results:
        for name, runs in found.items():
            # The first output comes with the prefill; the rest are one token each.
            per_token[name].append(statistics.median(ms for r in runs for ms in r["step_ms"][1:]))
            first_token[name].append(statistics.median(r["first_token_ms"][0] for r in runs))
    for values, title in ((per_token, "ms per token"), (first_token, "ms to the first token")):
        table = Table(title, *(f"at {p:,}" for p in positions), "last / first")
        for name, row in values.items():
            cells = (f"{value:.1f}" for value in row)
            table.add_row(name, *cells, f"{row[-1] / row[0]:.2f}")
        report.console.print(table)
    stem = report.write(
        args, {"positions": positions, "ms_per_token": per_token, "ms_to_first": first_token}
    )
    series = {name: (positions, row) for name, row in per_token.items()}
    report.lines(stem, series, "tokens before", "ms per token")


def _fold(args: argparse.Namespace, turns: Turns) -> None:
    """All sequences have one length, so they fold in the same steps; those take longer."""
    spec = turns.pte(max_num_seqs=args.seqs, max_model_len=args.tokens + 2 * BLOCK_TOKENS)
    prompt = BLOCK_TOKENS
    workload = Workload(num_seqs=args.seqs, prompt_tokens=prompt, output_tokens=args.tokens)
    (results,) = turns.run([spec], [workload])
    engine = EngineConfig(window_tokens=args.window)
    plan = engine.plan(pin_tokens=prompt, block_size=BLOCK_TOKENS)
    usual: list[float] = []
    folding: list[float] = []
    for run in results[spec.name]:
        for ms, length in zip(run["step_ms"], run["positions"], strict=True):
            position = length - 2  # of the token that the step read; it made the next one
            folds = plan.folded_blocks(position) > plan.folded_blocks(position - 1)
            (folding if folds else usual).append(ms)
    if not folding:
        raise ValueError(f"--tokens {args.tokens} end before the first fold at {plan.first_fold}")
    step, fold = statistics.median(usual), statistics.median(folding)
    share = (fold - step) / plan.stride / step
    table = Table("", "median", "steps")
    table.add_row("step without a fold", f"{step:.2f} ms", str(len(usual)))
    table.add_row(f"step that folds {args.seqs} sequences", f"{fold:.2f} ms", str(len(folding)))
    table.add_row(f"a fold, over its {plan.stride} tokens", f"{share:.2%} of a step", "")
    report.console.print(table)
    stem = report.write(args, {"usual_ms": usual, "folding_ms": folding, "share": share})
    report.bars(stem, {"without a fold": usual, "with folds": folding}, "ms per step")


def _prefix(args: argparse.Namespace, turns: Turns) -> None:
    common: dict[str, Any] = {"max_num_seqs": args.group, "prefix_caching": True}
    specs = [
        turns.spec("vLLM, prefix caching", **common),
        turns.pte(**common),
        turns.pte("window, PTE, no prefix caching", **{**common, "prefix_caching": False}),
    ]
    workload = Workload(
        num_seqs=args.group,
        group_size=args.group,
        prompt_tokens=args.prompt,
        output_tokens=args.tokens,
    )
    (results,) = turns.run(specs, [workload])
    total = args.group * args.prompt
    table = Table("arm", "prompt tokens computed", f"of {total}", "s to all first tokens")
    slowest: dict[str, list[float]] = {}
    for name, runs in results.items():
        computed = total - statistics.median(r["cached_tokens"] for r in runs)
        slowest[name] = [max(r["first_token_ms"]) / 1e3 for r in runs]
        seconds = statistics.median(slowest[name])
        table.add_row(name, f"{computed:.0f}", f"{computed / total:.0%}", f"{seconds:.2f}")
    report.console.print(table)
    cached = {name: [r["cached_tokens"] for r in runs] for name, runs in results.items()}
    stem = report.write(args, {"cached_tokens": cached, "seconds_to_first": slowest})
    report.bars(stem, slowest, f"s until {args.group} rollouts have their first token")


def _huge_pages(args: argparse.Namespace, turns: Turns) -> None:
    """Run the PTE arm with its memory on huge pages, as a server has it, and on small ones."""
    specs = [
        turns.pte("huge pages", max_num_seqs=args.seqs),
        turns.pte("small pages", max_num_seqs=args.seqs, huge_pages=False),
    ]
    rates = tokens_per_second(_batch(args, turns, specs))
    report.console.print(report.rates(rates, "tok/s"))
    stem = report.write(args, {"tokens_per_second": rates})
    report.bars(stem, rates, f"tok/s, {args.seqs} sequences")


def _profile(args: argparse.Namespace, turns: Turns) -> None:
    """The PTE arm, with clocks around its parts."""
    spec = turns.pte(max_num_seqs=args.seqs, timed=True)
    runs = [run["parts_ms"] for run in _batch(args, turns, [spec])[spec.name]]
    parts = {part: [run[part] for run in runs] for part in runs[0]}
    medians = {part: statistics.median(found) for part, found in parts.items()}
    step = sum(medians.values())
    table = Table("", "ms a step", "share")
    for part, ms in sorted(medians.items(), key=lambda item: -item[1]):
        table.add_row(part, f"{ms:.2f}", f"{ms / step:.1%}")
    table.add_row("a step", f"{step:.2f}", "")
    report.console.print(table)
    stem = report.write(args, {"parts_ms": parts})
    report.bars(stem, parts, f"ms a step, {args.seqs} sequences")


_RUNS = {
    "throughput": _throughput,
    "lora": _lora,
    "drafts": _drafts,
    "latency": _latency,
    "fold": _fold,
    "prefix": _prefix,
    "huge-pages": _huge_pages,
    "profile": _profile,
}
