"""`pte-vllm plan`: its flags. Standard library only until it runs."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

from pte_vllm.bench.sizing.hardware import FP32_PART
from pte_vllm.method.names import RULE_NAMES
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.weight import ITEM_BYTES


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm plan ...`; returns the exit status."""
    options = _parser().parse_args(arguments)
    from pte_vllm.bench.flags import parse_token_list, parse_tokens
    from pte_vllm.bench.sizing.hardware import hardware_of
    from pte_vllm.bench.sizing.model import Model
    from pte_vllm.bench.sizing.report import show
    from pte_vllm.bench.sizing.roofline import plan_rows

    _check(options)
    windows = parse_token_list(options.window, flag="--window")
    keeps = parse_token_list(options.keep, flag="--keep", least=0)
    rollout_tokens = parse_tokens(options.rollout, flag="--rollout")
    prompt_tokens = parse_tokens(options.prompt, flag="--prompt")
    _check_blocks(windows, keeps, options.block_size)
    model = Model.load(options.model)
    hardware = hardware_of(options.gpu, vars(options))
    rows = plan_rows(
        model,
        hardware,
        rollout_tokens=rollout_tokens,
        prompt_tokens=prompt_tokens,
        windows=windows,
        keeps=keeps,
        block_size=options.block_size,
        rank=options.rank,
        rule=options.rule,
        itemsize=options.itemsize,
        kv_itemsize=ITEM_BYTES.get(options.kv_cache_dtype),
        kv_memory_bytes=options.kv_gb * 1e9 if options.kv_gb is not None else None,
        max_sequences=options.max_num_seqs,
        ranks=options.tensor_parallel_size,
    )
    result = show(
        model,
        hardware,
        rows,
        rollout_tokens=rollout_tokens,
        prompt_tokens=prompt_tokens,
        block_size=options.block_size,
        rank=options.rank,
        rule=options.rule,
        itemsize=options.itemsize,
        kv_itemsize=ITEM_BYTES.get(options.kv_cache_dtype),
        ranks=options.tensor_parallel_size,
    )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, where one number or path cannot be."""
    if options.rank < 0:
        raise ValueError(f"--rank must not be negative, got {options.rank}; 0: no adapter")
    if options.block_size < 1:
        raise ValueError(f"--block-size must be at least 1, got {options.block_size}")
    if options.tensor_parallel_size < 1:
        raise ValueError(
            f"--tensor-parallel-size must be at least 1, got {options.tensor_parallel_size}"
        )
    if options.max_num_seqs is not None and options.max_num_seqs < 1:
        raise ValueError(f"--max-num-seqs must be at least 1, got {options.max_num_seqs}")
    if options.json and os.path.isdir(options.json):
        raise ValueError(f"--json {options.json} is a directory")
    folder = os.path.dirname(options.json or "") or "."
    if not os.path.isdir(folder):
        raise ValueError(f"--json {options.json}: there is no directory {folder}")


def _check_blocks(windows: Sequence[int], keeps: Sequence[int], block_size: int) -> None:
    """Raise ValueError, naming the flags, where tokens do not fit the blocks."""
    for window in windows:
        for keep in keeps:
            try:
                FoldPlan(
                    pin_tokens=0, window_tokens=window, block_size=block_size, keep_tokens=keep
                )
            except ValueError as error:
                flag = "--keep" if str(error).startswith("keep") else "--window"
                raise ValueError(f"{flag} does not fit --block-size: {error}") from error


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
    parser.add_argument(
        "--fp32-tflops",
        type=float,
        default=argparse.SUPPRESS,  # no one value: help says what it is
        help="in float32 without tensor cores, as folds that keep tokens compute "
        ""
        f"(default: the GPU's; with --tflops a guess, 1/{FP32_PART} of them)",
    )
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
    parser.add_argument(
        "--kv-cache-dtype",
        choices=("auto", *ITEM_BYTES),
        default="auto",
        help="of the KV cache, as vLLM's flag; auto: as many bytes as a weight",
    )
    parser.add_argument("--kv-gb", type=float, help="KV pool, if it is known")
    parser.add_argument("--max-num-seqs", type=int, help="the server's bound, if there is one")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, help="GPUs that share out the model"
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything there")
    return parser
