"""`pte-vllm plan`: its flags. Standard library only until it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from pte_vllm.method.names import RULE_NAMES
from pte_vllm.method.options import PTEConfig


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm plan ...`; returns the exit status."""
    options = _parser().parse_args(arguments)
    from pte_vllm.bench.flags import parse_tokens
    from pte_vllm.bench.sizing.hardware import hardware_of
    from pte_vllm.bench.sizing.model import Model
    from pte_vllm.bench.sizing.report import show
    from pte_vllm.bench.sizing.roofline import plan_rows

    model = Model.load(options.model)
    hardware = hardware_of(options.gpu, vars(options))
    if options.rank < 0:
        raise ValueError(f"--rank must not be negative, got {options.rank}; 0: no adapter")
    rows = plan_rows(
        model,
        hardware,
        rollout_tokens=parse_tokens(options.rollout),
        prompt_tokens=parse_tokens(options.prompt),
        windows=[parse_tokens(part) for part in options.window.split(",")],
        keeps=[parse_tokens(part, least=0) for part in options.keep.split(",")],
        block_size=options.block_size,
        rank=options.rank,
        rule=options.rule,
        itemsize=options.itemsize,
        kv_memory_bytes=options.kv_gb * 1e9 if options.kv_gb is not None else None,
        max_sequences=options.max_num_seqs,
    )
    result = show(
        model,
        hardware,
        rows,
        block_size=options.block_size,
        rank=options.rank,
        rule=options.rule,
        itemsize=options.itemsize,
    )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pte-vllm plan",
        description="How many rollouts fit and how fast they can be at most, under full attention "
        "and under windows: a roofline of memory, bandwidth and operations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="PATH", help="config.json, or its folder")
    parser.add_argument("--gpu", default="h200", help="h100, h200, b200, ..., or a name of yours")
    parser.add_argument("--memory-gb", type=float, help="of the device, or to change the GPU's")
    parser.add_argument("--bandwidth-gb-s", type=float, help="of its memory")
    parser.add_argument("--tflops", type=float, help="dense, in the model's dtype")
    parser.add_argument("--rollout", default="32k", metavar="N", help="tokens of a whole answer")
    parser.add_argument("--prompt", default="256", metavar="N", help="tokens of a question")
    parser.add_argument("--window", default="1k,2k,4k", metavar="N,...", help="windows to compare")
    parser.add_argument("--keep", default="0", metavar="N,...", help="kept tokens of each KV head")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument(
        "--rank", type=int, default=PTEConfig.rank, help="of the adapter; 0: no adapter, no state"
    )
    parser.add_argument("--rule", choices=RULE_NAMES, default="ridge")
    parser.add_argument("--itemsize", type=float, default=2, help="bytes of a weight")
    parser.add_argument("--kv-gb", type=float, help="KV pool, if it is known")
    parser.add_argument("--max-num-seqs", type=int, help="the server's bound, if there is one")
    parser.add_argument("--json", metavar="FILE", help="also write everything there")
    return parser
