"""`pte-vllm train memory-curve`: peak memory and time of one training step against answer length.

Three arms, each step in a process of its own, so that peaks do not mix:

    full attention, LoRA   every token sees all before it; one graph
    window, LoRA           the paper's LoRA_c: what leaves the window is forgotten
    window, PTE            the same window; what leaves it is folded

On a CPU the peak is the process's resident set, Python and torch included; on CUDA what torch
allocated. Writes memory_curve.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pte_vllm.adapter.counter import counter
from pte_vllm.models.location import check_model

ARMS = {
    "full attention, LoRA": {"window": False, "encoder": False},
    "window, LoRA": {"window": True, "encoder": False},
    "window, PTE": {"window": True, "encoder": True},
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pte-vllm train memory-curve",
        description="Peak memory and time of one training step against answer length.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="name or directory of the base model")
    parser.add_argument("--lengths", default="512,1024,2048,4096", help="answer tokens")
    parser.add_argument("--prompt", type=int, default=32, help="pinned tokens")
    parser.add_argument("--window", type=int, default=256, help="tokens; a multiple of --block")
    parser.add_argument("--block", type=int, default=32, help="tokens per KV block")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step")
    parser.add_argument("--rule", default="paper", help="update rule of the PTE arm")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=1, help="steps timed; the fastest counts")
    parser.add_argument("--out", default="out/memory-curve", metavar="DIR")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # an arm and a length, in a child
    return parser


def main(args: Sequence[str]) -> int:
    """Measure every arm at every length; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(args)
    check_model(options.model)
    lengths = [int(part) for part in options.lengths.split(",")]
    if options.one is not None:
        arm, length = json.loads(options.one)
        print(json.dumps(_measure(options, arm, length)), flush=True)
        return 0
    from rich.console import Console
    from rich.progress import Progress

    console, rows = Console(stderr=True), []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        advance = counter(progress, "training steps", len(ARMS) * len(lengths))
        for length in lengths:
            for arm in ARMS:  # arms take turns, so that a slow minute hits all of them
                rows.append(_in_child(args, arm, length))
                advance(1)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    report = {"options": vars(options), "rows": rows}
    (out / "memory_curve.json").write_text(json.dumps(report, indent=2) + "\n")
    table = _table(rows, lengths)
    (out / "memory_curve.md").write_text(table)
    _plot(rows, lengths, out / "memory_curve.png")
    print(table)
    print(f"wrote {out}/memory_curve.json, .md and .png")
    return 0


def _in_child(args: Sequence[str], arm: str, length: int) -> dict[str, Any]:
    """Measure one arm at one length in a process of its own; the row says if that failed."""
    command = [sys.executable, "-m", "pte_vllm.train.experiments.memory_curve", *args]
    command += ["--one", json.dumps([arm, length])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"arm": arm, "tokens": length, "error": done.stderr.strip().splitlines()[-1:]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _measure(options: argparse.Namespace, arm: str, length: int) -> dict[str, Any]:
    """Train a few steps, and return the peak of memory and the time of the fastest."""
    import torch

    from pte_vllm.method.plan import FoldPlan
    from pte_vllm.train.replay.aligned import AlignedBatch
    from pte_vllm.train.replay.results import Scores
    from pte_vllm.train.replay.segments import replay

    model = _model(options, encoder=ARMS[arm]["encoder"])
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-5)
    plan = FoldPlan(
        pin_tokens=options.prompt,
        window_tokens=options.window if ARMS[arm]["window"] else 0,
        block_size=options.block,
    )
    num_tokens = options.prompt + length
    generator = torch.Generator().manual_seed(0)
    vocab = model.base.config.vocab_size
    ids = torch.randint(vocab, (options.batch, num_tokens), generator=generator).tolist()
    wanted = [[t >= options.prompt for t in range(num_tokens)]] * options.batch
    batch = AlignedBatch.align(ids, [plan] * options.batch, wanted)

    def loss(scores: Scores) -> torch.Tensor:
        return -scores.logprobs.mean()

    loaded, seconds = _peak_bytes(options.device), []
    for _ in range(options.repeats):
        began = time.perf_counter()
        replay(model, batch, backward="segments", loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return {
        "arm": arm,
        "tokens": length,
        "peak_bytes": _peak_bytes(options.device),
        "loaded_bytes": loaded,
        "ms_per_token": 1e3 * min(seconds) / (num_tokens * options.batch),
    }


def _model(options: argparse.Namespace, *, encoder: bool) -> Any:
    """Load the model with an adapter of rank 32 on every linear of every layer.

    Its start is random, which costs in training what any other does.
    """
    from dataclasses import replace

    import torch

    from pte_vllm.adapter.init import init_adapter
    from pte_vllm.method.options import PTEConfig
    from pte_vllm.train.replay.modeling import PTEModel

    model = PTEModel.from_pretrained(options.model, dtype=options.dtype, device=options.device)
    sample = torch.arange(16)[None] % model.base.config.vocab_size
    adapter = init_adapter(model.base, sample, PTEConfig(init="random", rule=options.rule))
    if not encoder:
        adapter = replace(adapter, pte=None, encoders={})
    return PTEModel(model.base, adapter, gradient_checkpointing=options.gradient_checkpointing)


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _table(rows: list[dict[str, Any]], lengths: list[int]) -> str:
    """Write a Markdown table of memory, its growth from the shortest length, and time per token."""
    by_key = {(row["arm"], row["tokens"]): row for row in rows}
    lines = [
        "| arm | " + " | ".join(f"{n:,} tokens" for n in lengths) + " | last / first |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    for arm in ARMS:
        found = [by_key[arm, n] for n in lengths]
        cells = [
            f"{r['peak_bytes'] / 2**30:.2f} GiB, {r['ms_per_token']:.1f} ms/token"
            if "error" not in r
            else f"failed: {' '.join(r['error'])}"
            for r in found
        ]
        ratio = "–"
        if all("error" not in row for row in found):
            ratio = f"{found[-1]['peak_bytes'] / found[0]['peak_bytes']:.2f}"
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {ratio} |")
    return "\n".join(lines) + "\n" + _cost(by_key, lengths)


def _cost(by_key: dict[tuple[str, int], dict[str, Any]], lengths: list[int]) -> str:
    """Say what PTE costs per token against windowed LoRA, where both were measured."""
    pairs = [(by_key["window, PTE", n], by_key["window, LoRA", n]) for n in lengths]
    ratios = [
        f"{pte['ms_per_token'] / lora['ms_per_token']:.2f}"
        for pte, lora in pairs
        if "error" not in pte and "error" not in lora
    ]
    return f"\nTime per token, PTE / windowed LoRA: {', '.join(ratios)}\n" if ratios else ""


def _plot(rows: list[dict[str, Any]], lengths: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for arm in ARMS:
        found = [r for r in rows if r["arm"] == arm and "error" not in r]
        axes.plot(
            [r["tokens"] for r in found],
            [r["peak_bytes"] / 2**30 for r in found],
            marker="o",
            label=arm,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("answer tokens")
    axes.set_ylabel("peak memory of a training step, GiB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
