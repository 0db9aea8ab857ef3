"""Benchmarks of engines that take turns: `throughput`, `lora`, `latency`, `fold`, ..."""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from pte_vllm.bench import report
from pte_vllm.bench.arm import Arm, ArmSpec, Workload
from pte_vllm.config import EngineConfig
from pte_vllm.preload import LIBRARIES, find

BLOCK_TOKENS = 32
Results = dict[str, list[dict[str, Any]]]


def run(args: argparse.Namespace) -> None:
    report.announce(args)
    with tempfile.TemporaryDirectory() as scratch:
        _RUNS[args.what](args, _Turns(args, Path(scratch)))


class _Turns:
    """The adapters of a benchmark, and engines that run workloads in turn."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self._args, self._scratch = args, scratch
        self.thoughts, self.plain = make_adapters(args, scratch)

    def spec(self, name: str, **options: Any) -> ArmSpec:
        args = self._args
        common = {
            **{"model": args.model, "dtype": args.dtype, "rank": args.rank},
            **{"compiled": not args.eager, "preload": args.preload},
        }
        return ArmSpec(name=name, block_size=BLOCK_TOKENS, **{**common, **options})

    def run(self, specs: Sequence[ArmSpec], workloads: Sequence[Workload]) -> list[Results]:
        """Every arm runs every workload `--repeats` times in turn, after one short unmeasured one.

        Returns:
            For each workload, by arm what its runs gave.
        """
        repeats = self._args.repeats
        results: list[Results] = [{spec.name: [] for spec in specs} for _ in workloads]
        arms: list[Arm] = []
        total = len(specs) * (2 + repeats * len(workloads))
        try:
            with Progress(console=report.console, transient=True) as progress:
                task = progress.add_task("starting engines", total=total)
                for i, spec in enumerate(specs):
                    log = self._scratch / f"arm{i}.log"
                    arms.append(Arm(spec, log))
                    arms[-1].wait_ready()  # one by one: loading uses the whole machine
                    progress.advance(task)
                for arm in arms:
                    progress.update(task, description=f"warming up: {arm.spec.name}")
                    first = workloads[0]
                    arm.run(replace(first, output_tokens=min(16, first.output_tokens), seed=0))
                    progress.advance(task)
                for turn in range(1, repeats + 1):
                    for workload, found in zip(workloads, results, strict=True):
                        for arm in arms:
                            progress.update(task, description=f"turn {turn}: {arm.spec.name}")
                            found[arm.spec.name].append(arm.run(replace(workload, seed=turn)))
                            progress.advance(task)
        finally:
            for arm in arms:
                arm.close()
        return results


def make_adapters(
    args: argparse.Namespace, scratch: Path, *, seed: int = 0, b_scale: float = 1.0
) -> tuple[str, str]:
    """A PTE adapter with random B, and the same LoRA without its encoder.

    Speed does not depend on what B holds; where answers matter a small `b_scale` keeps a real model
    from being sure of nonsense.
    """
    from pte_vllm.adapter_make import make_adapter
    from pte_vllm.config import PTEConfig

    scratch.mkdir(parents=True, exist_ok=True)
    thoughts, plain = scratch / "thoughts", scratch / "plain"
    config = PTEConfig(init="random", rule=args.rule, rank=args.rank, global_tokens=args.rank)
    adapter = make_adapter(args.model, thoughts, config, b="random", seed=seed)
    if b_scale != 1.0:
        lora_b = {module: b_scale * weight for module, weight in adapter.lora_b.items()}
        adapter = replace(adapter, lora_b=lora_b)
        adapter.save(thoughts)
    replace(adapter, pte=None, encoders={}).save(plain)
    return str(thoughts), str(plain)


def _rates(results: Results) -> dict[str, list[float]]:
    return {
        name: [r["output_tokens"] / r["seconds"] for r in runs] for name, runs in results.items()
    }


def _throughput(args: argparse.Namespace, turns: _Turns) -> None:
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
        turns.spec("window, PTE", window_tokens=args.window, adapter=turns.thoughts, **common),
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
    rates = _rates(results)
    report.console.print(report.rates(rates, "tok/s"))
    running = {name: runs[0]["mean_running"] for name, runs in results.items()}
    report.console.print(
        f"pool of {pool} blocks; sequences per step, on average: "
        + ", ".join(f"{name} {value:.1f}" for name, value in running.items()),
        highlight=False,
    )
    stem = report.write(args, {"tokens_per_second": rates, "running": running, "pool_blocks": pool})
    report.bars(stem, rates, f"tok/s, {args.seqs} rollouts of {args.tokens} tokens")


def _lora(args: argparse.Namespace, turns: _Turns) -> None:
    common: dict[str, Any] = {"max_num_seqs": args.seqs}
    window = {"window_tokens": args.window, **common}
    specs = [
        turns.spec("vLLM, base model", **common),
        # vLLM compiles no LoRA on a CPU; told so, it takes the operators that are fast without.
        turns.spec("vLLM, its LoRA", adapter=turns.plain, compiled=False, **common),
        turns.spec("window, base model", **window),
        turns.spec("window, plain LoRA", adapter=turns.plain, **window),
        turns.spec("window, PTE", adapter=turns.thoughts, **window),
    ]
    workload = Workload(num_seqs=args.seqs, prompt_tokens=args.prompt, output_tokens=args.tokens)
    (results,) = turns.run(specs, [workload])
    rates = _rates(results)
    report.console.print(report.rates(rates, "tok/s"))
    steps = {
        name: [statistics.median(r["step_ms"]) for r in runs] for name, runs in results.items()
    }
    report.console.print(report.rates(steps, "ms per step"))
    stem = report.write(args, {"tokens_per_second": rates, "ms_per_step": steps})
    report.bars(stem, rates, f"tok/s, {args.seqs} sequences")


def _latency(args: argparse.Namespace, turns: _Turns) -> None:
    """One sequence; thoughts before the position are prefilled, the question is pinned."""
    positions = [int(part) for part in args.positions.split(",")]
    common: dict[str, Any] = {
        "max_num_seqs": 1,
        "max_model_len": max(positions) + args.tokens + BLOCK_TOKENS,
    }
    specs = [
        turns.spec("vLLM, full attention", **common),
        turns.spec("window, PTE", window_tokens=args.window, adapter=turns.thoughts, **common),
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


def _fold(args: argparse.Namespace, turns: _Turns) -> None:
    """All sequences have one length, so they fold in the same steps; those take longer."""
    spec = turns.spec(
        "window, PTE",
        window_tokens=args.window,
        adapter=turns.thoughts,
        max_num_seqs=args.seqs,
        max_model_len=args.tokens + 2 * BLOCK_TOKENS,
    )
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


def _prefix(args: argparse.Namespace, turns: _Turns) -> None:
    common: dict[str, Any] = {"max_num_seqs": args.group, "prefix_caching": True}
    window = {"window_tokens": args.window, "adapter": turns.thoughts}
    specs = [
        turns.spec("vLLM, prefix caching", **common),
        turns.spec("window, PTE", **{**common, **window}),
        turns.spec(
            "window, PTE, no prefix caching", **{**common, **window, "prefix_caching": False}
        ),
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


def _preload(args: argparse.Namespace, turns: _Turns) -> None:
    """The PTE arm with each library that this machine has, with none, and on small pages."""
    found = [name for name in LIBRARIES if find(name)]
    common: dict[str, Any] = {
        "window_tokens": args.window,
        "adapter": turns.thoughts,
        "max_num_seqs": args.seqs,
    }
    specs = [
        turns.spec(" + ".join(names) or "nothing preloaded", **{**common, "preload": names})
        for size in range(len(found) + 1)
        for names in itertools.combinations(found, size)
    ]
    specs.append(turns.spec("default, no huge pages", huge_pages=False, **common))
    workload = Workload(num_seqs=args.seqs, prompt_tokens=args.prompt, output_tokens=args.tokens)
    (results,) = turns.run(specs, [workload])
    rates = _rates(results)
    report.console.print(report.rates(rates, "tok/s"))
    missing = [f"{name} ({LIBRARIES[name].get})" for name in LIBRARIES if name not in found]
    if missing:
        report.console.print(f"not found here: {', '.join(missing)}", highlight=False)
    stem = report.write(args, {"tokens_per_second": rates})
    report.bars(stem, rates, f"tok/s, {args.seqs} sequences")


def _profile(args: argparse.Namespace, turns: _Turns) -> None:
    """The PTE arm, with clocks around its parts."""
    spec = turns.spec(
        "window, PTE",
        window_tokens=args.window,
        adapter=turns.thoughts,
        max_num_seqs=args.seqs,
        timed=True,
    )
    workload = Workload(num_seqs=args.seqs, prompt_tokens=args.prompt, output_tokens=args.tokens)
    (results,) = turns.run([spec], [workload])
    runs = [run["parts_ms"] for run in results[spec.name]]
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
    "latency": _latency,
    "fold": _fold,
    "prefix": _prefix,
    "preload": _preload,
    "profile": _profile,
}
