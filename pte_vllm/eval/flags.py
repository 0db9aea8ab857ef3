"""The flags of `pte-vllm eval run`. Standard library only, so that help answers at once."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pte_vllm.eval.options import JUDGES, PRESETS, read_options
from pte_vllm.method.names import RULE_NAMES
from pte_vllm.models.location import check_model


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm eval run ...`; returns the exit status: 0, 1 if an arm failed, 2 for mistakes.

    Raises:
        ValueError, OSError: naming the flag, if something does not fit or is not there.
    """
    parser = argparse.ArgumentParser(
        prog="pte-vllm eval run",
        description="Measure accuracy under a cache budget: the same problems under the full cache "
        "and under windows, with adapters and controls. It starts a server, or asks one. The same "
        "command goes on where it stopped.",
        epilog="example: pte-vllm eval run --model MODEL --benchmark gsm_symbolic --window 64,128 "
        "--adapter thoughts=ADAPTER --max-tokens 400",
    )
    add_flags(parser)
    options = read_options(parser.parse_args(arguments))
    if options.model is not None:
        check_model(options.model, flag="--model")
    from pte_vllm.eval.run import run
    from pte_vllm.eval.serving import DeadServer
    from pte_vllm.launch import LaunchError

    # Without this SIGTERM would end us at once and leave our server running.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run(options)
    except (DeadServer, LaunchError) as error:
        print(f"pte-vllm: error: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pte-vllm eval run` to a parser."""
    where = parser.add_argument_group("server")
    where.add_argument(
        "--model",
        metavar="DIR",
        help="base model to serve; a server is started for the run and ended after it",
    )
    where.add_argument("--url", help="ask this OpenAI-compatible server instead")
    where.add_argument("--api-key-env", metavar="NAME", help="variable that holds its API key")
    where.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="adapter to try; repeat for more. With --url: NAME of one that the server has, or "
        "NAME=DIR to say where its files are, for --equal-bytes",
    )
    where.add_argument(
        "--block-size", type=_count, metavar="N", help="of our server (default: 16, on a CPU 32)"
    )
    where.add_argument(
        "--evict-ratio",
        type=float,
        default=0.25,
        metavar="F",
        help="of our server: part of a full window that is folded at once (default: 0.25)",
    )
    where.add_argument(
        "--server-flags",
        default="",
        metavar="FLAGS",
        help="further flags of `pte-vllm serve` for our server: --server-flags='--dtype bfloat16'",
    )
    _add_problems(parser)
    _add_arms(parser)
    _add_sampling(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/eval"),
        metavar="DIR",
        help="logs, table, plots; the same command goes on where it stopped (default: out/eval)",
    )


def _add_problems(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("problems")
    group.add_argument(
        "--preset", choices=PRESETS, help="settings of the paper; further flags override them"
    )
    group.add_argument(
        "--benchmark",
        type=names,
        metavar="A,B",
        help="math-500, aime-2024, aime-2025, amc-2023, olympiadbench, minerva, gsm8k (from the "
        "hub or --data); tasks of reasoning-gym such as gsm_symbolic, and .jsonl files with "
        "prompt and answer (no network)",
    )
    group.add_argument(
        "--data",
        metavar="DIR",
        help="local copies of data sets: DIR/math-500 or DIR/math-500.jsonl (.parquet, .csv)",
    )
    group.add_argument(
        "--problems",
        type=_count,
        metavar="N",
        dest="limit",
        help="only the first N of each (default: all; 200 of a task of reasoning-gym)",
    )
    group.add_argument("--template", metavar="TEXT", help="text around a question: {prompt}")
    group.add_argument(
        "--judge",
        choices=JUDGES,
        default="auto",
        help="who judges answers; auto: what fits the benchmark; math: the last box or answer, by "
        "math-verify; exact: the whole text",
    )
    group.add_argument("--system", metavar="TEXT", help="system message")
    group.add_argument(
        "--data-seed", type=int, default=0, metavar="N", help="of generated problems (default: 0)"
    )


def _add_arms(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memories to compare; the full cache is always among them")
    group.add_argument(
        "--window",
        type=numbers,
        metavar="N,N",
        help="KV room for thoughts, in tokens (default: 256,1024)",
    )
    group.add_argument(
        "--plain-window",
        type=numbers,
        default=[],
        metavar="N,N",
        help="further windows, without memory and controls",
    )
    group.add_argument(
        "--adapter-keep",
        type=numbers,
        metavar="N,N",
        help="evicted tokens that each KV head keeps beside an --adapter, by the adapter's own "
        "probes or else the model's; 0 keeps none (default: 0)",
    )
    group.add_argument(
        "--rule",
        type=names,
        default=[],
        metavar="A,B",
        help=f"update rules to try with each adapter beside its own: {', '.join(RULE_NAMES)}",
    )
    group.add_argument(
        "--evict",
        type=names,
        default=["oldest"],
        metavar="A,B",
        help="which blocks leave where there is no memory: oldest, random (default: oldest)",
    )
    group.add_argument(
        "--sinks",
        action="store_true",
        help="also keep only the first tokens and let the question leave, with as many blocks",
    )
    group.add_argument(
        "--keep",
        type=numbers,
        default=[],
        metavar="N,N",
        help="for each --window also windows that keep so many evicted tokens for each KV head; a "
        "--plain-window longer by N holds as many bytes",
    )
    group.add_argument(
        "--keep-score",
        type=names,
        metavar="A,B",
        help="how --keep chooses: expected, random (default: expected)",
    )
    group.add_argument(
        "--probes",
        type=Path,
        metavar="FILE",
        help="of our server: the model's probes, by which --keep-score expected chooses (default: "
        "the server makes some)",
    )
    group.add_argument(
        "--equal-bytes",
        action="store_true",
        help="for each adapter also a window without memory, longer by what its state weighs",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=numbers, metavar="N,N", help="longest answers (default: 3072)"
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: greedy (default: 0)"
    )
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument(
        "--epochs", type=_count, default=1, metavar="N", help="answers to a problem (default: 1)"
    )
    group.add_argument(
        "--pass-at", type=numbers, default=[], metavar="K,K", help="also pass@k, for these k"
    )
    group.add_argument(
        "--seeds", type=numbers, default=[0], metavar="N,N", help="of sampling (default: 0)"
    )
    group.add_argument(
        "--concurrency",
        type=_count,
        default=64,
        metavar="N",
        help="answers that are sampled at once (default: 64)",
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _list_of(make: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        return [make(part.strip()) for part in text.split(",") if part.strip()]

    read.__name__ = "list"
    return read


def _number(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


names = _list_of(str)
"""Reads A,B as a list of names."""
numbers = _list_of(_number)
"""Reads N,N as a list of numbers from 0."""
