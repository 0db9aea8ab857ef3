"""`pte-vllm bench keep`: what kept tokens cost, against others that hold as many blocks."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from pte_vllm.bench import report
from pte_vllm.bench.arm import Workload
from pte_vllm.bench.turns import BLOCK_TOKENS, Results, Turns
from pte_vllm.method.options import EngineConfig

PLAIN = "vLLM, as many blocks"
_FOLDS = "folds"


def run(args: argparse.Namespace) -> None:
    """Measure, print and write.

    Every arm decodes `--tokens` tokens of `--seqs` sequences and reads as many tokens of cache in
    each step, on average. Those with a window have folded before: their prompts are longer than
    what they hold. vLLM's prompt is as long as what they hold, less half of the answer.

    Raises:
        ValueError: Naming the flag, if the numbers do not fit each other.
    """
    if not args.keep:
        raise ValueError(f"--keep must be at least one block of {BLOCK_TOKENS} tokens, got 0")
    if not args.window:
        raise ValueError(f"--window must be at least two blocks of {BLOCK_TOKENS} tokens, got 0")
    try:
        config = EngineConfig(window_tokens=args.window, keep_tokens=args.keep)
        plan = config.plan(pin_tokens=args.prompt, block_size=BLOCK_TOKENS)
    except ValueError as error:
        flag = "--keep" if str(error).startswith("keep") else "--window"
        raise ValueError(
            f"{flag} does not fit blocks, which have {BLOCK_TOKENS} tokens here: {error}"
        ) from error
    held = plan.pinned_blocks * BLOCK_TOKENS + args.window + args.keep - plan.stride // 2
    if held <= args.tokens // 2:
        raise ValueError(
            f"--tokens {args.tokens} is more than twice what a sequence holds ({held} tokens): "
            "vLLM without a window cannot hold as little"
        )
    past = plan.first_fold + (2 + plan.keep_blocks // plan.evict_blocks) * plan.stride
    folding = Workload(
        num_seqs=args.seqs,
        prompt_tokens=past,
        pin_tokens=args.prompt,
        output_tokens=args.tokens,
    )
    plain = replace(folding, prompt_tokens=held - args.tokens // 2, pin_tokens=None)
    report.announce(args)
    with tempfile.TemporaryDirectory() as scratch:
        turns = Turns(args, Path(scratch))
        probes = _random_probes(args, Path(scratch))
        common: dict[str, Any] = {
            "max_num_seqs": args.seqs,
            "max_model_len": past + args.tokens + BLOCK_TOKENS,
        }
        keeping = {**common, "window_tokens": args.window, "keep_tokens": args.keep}
        specs = [
            turns.spec(PLAIN, **common),
            turns.spec("window, as many blocks", window_tokens=args.window + args.keep, **common),
            turns.spec(f"window, keeping {args.keep}", probes=probes, **keeping),
            turns.spec("the same, timed", probes=probes, timed=True, **keeping),
        ]
        (results,) = turns.run(specs, [folding], own={PLAIN: plain})
    _show(args, results, held)


def _show(args: argparse.Namespace, results: Results, held: int) -> None:
    timed = results.pop("the same, timed")
    decoding = {
        name: [r["decoded"]["tokens"] / r["decoded"]["seconds"] for r in runs]
        for name, runs in results.items()
    }
    folds = [r["parts_ms"][_FOLDS] / sum(r["parts_ms"].values()) for r in timed]
    report.console.print(report.rates(decoding, "tok/s of decoding"))
    table = Table("a sequence", "")
    table.add_row("holds, on average", f"{held:,} tokens")
    table.add_row("folds' share of the time", f"{statistics.median(folds):.2%}")
    report.console.print(table)
    stem = report.write(
        args, {"tokens_per_second": decoding, "share_of_folds": folds, "held_tokens": held}
    )
    report.bars(stem, decoding, f"tok/s, {args.seqs} sequences that hold {held} tokens")


def _random_probes(args: argparse.Namespace, scratch: Path) -> str:
    """Write as many probes as calibration would: the speed does not depend on their numbers."""
    from transformers import AutoConfig

    from pte_vllm.adapter.format import ModelShape
    from pte_vllm.adapter.probe_options import ProbeOptions
    from pte_vllm.adapter.probes import Probes

    shape = ModelShape.from_hf(AutoConfig.from_pretrained(args.model))
    sizes = shape.num_layers, shape.num_kv_heads, ProbeOptions().num_probes, shape.head_dim
    queries = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    path = scratch / "probes.safetensors"
    Probes.of(queries, "random").save(path)
    return str(path)
