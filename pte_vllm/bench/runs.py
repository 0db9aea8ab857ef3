"""`pte-vllm bench throughput` and `pte-vllm bench latency`."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pte_vllm.bench.arm import Arm, ArmSpec, Workload

console = Console()


def main(argv: list[str]) -> int:
    """`pte-vllm bench ...`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="pte-vllm bench",
        description="Measure speed, every baseline in the same run, the arms taking turns. "
        "throughput: tokens/s of the base model, LoRA and PTE. latency: time per token of one "
        "sequence at 1k and past 8k tokens.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_arguments(parser)
    _run(parser.parse_args(argv))
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=["throughput", "latency", "all"], default="all")
    parser.add_argument("--model", default=".cache/models/smollm2", help="checkpoint directory")
    parser.add_argument("--window", type=int, default=256, help="tokens of the window")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or auto")
    parser.add_argument("--seqs", type=int, default=8, help="sequences at once (throughput)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each (throughput)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each arm, alternating")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="JSON and plot")


def _run(args: argparse.Namespace) -> None:
    if not Path(args.model).exists():
        raise ValueError(
            f"--model {args.model} does not exist; make it with `pte-vllm model fetch`"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    console.print(f"{args.what}: {args.model}, {args.dtype}, window {args.window}; {_machine()}")
    with tempfile.TemporaryDirectory() as scratch:
        thoughts, plain = _make_adapters(Path(args.model), Path(scratch))
        for name, measure in (("throughput", _throughput), ("latency", _latency)):
            if args.what in (name, "all"):
                measure(args, Path(scratch), thoughts, plain)


def _machine() -> str:
    import torch

    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu


def _make_adapters(model: Path, scratch: Path) -> tuple[str, str]:
    """A PTE adapter with random B, and the same LoRA without its encoder."""
    from pte_vllm.adapter_make import make_adapter
    from pte_vllm.config import PTEConfig

    thoughts, plain = scratch / "thoughts", scratch / "plain"
    adapter = make_adapter(str(model), thoughts, PTEConfig(init="random"), b="random")
    replace(adapter, pte=None, encoders={}).save(plain)
    return str(thoughts), str(plain)


def _alternate(
    specs: list[ArmSpec], workload: Workload, repeats: int, scratch: Path
) -> dict[str, list[dict[str, Any]]]:
    """Run every arm `repeats` times in turn, after one unmeasured turn each."""
    results: dict[str, list[dict[str, Any]]] = {spec.name: [] for spec in specs}
    arms: list[Arm] = []
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("starting engines", total=len(specs) * (repeats + 2))
            for i, spec in enumerate(specs):
                arms.append(Arm(spec, scratch / f"arm{i}.log"))
                arms[-1].wait_ready()  # one after the other: loading uses the whole machine
                progress.advance(task)
            for turn in range(repeats + 1):
                for arm in arms:
                    progress.update(task, description=f"turn {turn}: {arm.spec.name}")
                    result = arm.run(Workload(**{**asdict(workload), "seed": turn}))
                    if turn:
                        results[arm.spec.name].append(result)
                    progress.advance(task)
    finally:
        for arm in arms:
            arm.close()
    return results


def _throughput(args: argparse.Namespace, scratch: Path, thoughts: str, plain: str) -> None:
    common: dict[str, Any] = {"model": args.model, "dtype": args.dtype, "max_num_seqs": args.seqs}
    specs = [
        ArmSpec(name="vLLM, base model", **common),
        ArmSpec(name="vLLM, its LoRA", adapter=plain, **common),
        ArmSpec(name="window, base model", window_tokens=args.window, **common),
        ArmSpec(name="window, plain LoRA", window_tokens=args.window, adapter=plain, **common),
        ArmSpec(name="window, PTE", window_tokens=args.window, adapter=thoughts, **common),
    ]
    workload = Workload(num_seqs=args.seqs, prompt_tokens=128, output_tokens=args.tokens)
    results = _alternate(specs, workload, args.repeats, scratch)
    rates = {
        name: [r["output_tokens"] / r["seconds"] for r in runs] for name, runs in results.items()
    }
    base = statistics.median(rates[specs[0].name])
    table = Table("arm", "tok/s, median", "min to max", "ratio to base")
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"{min(values):.1f} to {max(values):.1f}"
        table.add_row(name, f"{median:.1f}", spread, f"{median / base:.2f}")
    console.print(table)
    console.print(
        f"{args.seqs} sequences, 128 + {args.tokens} tokens each, {args.repeats} alternating runs"
    )
    _write(args, "throughput", {"tokens_per_second": rates})


def _latency(args: argparse.Namespace, scratch: Path, thoughts: str, plain: str) -> None:
    """Time per token of one sequence near 1k and past 8k tokens; earlier thoughts are prefilled."""
    common: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "max_num_seqs": 1,
        "max_model_len": 12_288,
    }
    specs = [
        ArmSpec(name="vLLM, full attention", **common),
        ArmSpec(name="window, PTE", window_tokens=args.window, adapter=thoughts, **common),
    ]
    lengths = (1_000, 8_200)
    medians: dict[str, dict[int, float]] = {spec.name: {} for spec in specs}
    for length in lengths:
        workload = Workload(num_seqs=1, prompt_tokens=length - 64, output_tokens=128, pin_tokens=64)
        for name, runs in _alternate(specs, workload, args.repeats, scratch).items():
            # The first output comes with the prefill; the rest are one token each.
            medians[name][length] = statistics.median(ms for r in runs for ms in r["step_ms"][1:])
    table = Table("arm", *(f"ms/token at {n:,}" for n in lengths), "ratio")
    for name, by_length in medians.items():
        first, last = by_length[lengths[0]], by_length[lengths[1]]
        table.add_row(name, f"{first:.1f}", f"{last:.1f}", f"{last / first:.2f}")
    console.print(table)
    _write(args, "latency", {"ms_per_token": medians})


def _write(args: argparse.Namespace, name: str, results: dict[str, Any]) -> None:
    options = {k: str(v) for k, v in vars(args).items() if isinstance(v, str | int | Path)}
    file = args.out / f"{name}.json"
    file.write_text(json.dumps({"machine": _machine(), "options": options, **results}, indent=2))
    console.print(f"written to {file}")
