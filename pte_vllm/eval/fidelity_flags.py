"""The flags of `pte-vllm eval fidelity`. Standard library only, so that help answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from pte_vllm.method.names import EVICTS, KEEP_SCORES

KV_DTYPES = ("bfloat16", "float16", "float32", "fp8")
BLOCK_SIZE, EVICT_RATIO = 32, 0.25


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        prog="pte-vllm eval fidelity",
        description="Measure how well windows, adapters and controls predict answers that the "
        "model gave under full attention: loss, KL to full attention, share of the same top token. "
        "Nothing is sampled. It reads the answers in the trainer's replay, or with --url on a "
        "running server.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="name or directory of the base model")
    add("thoughts", metavar="THOUGHTS", type=Path, help="file of `pte-vllm eval thoughts`")
    add(
        "--window",
        type=_counts,
        default="64",
        metavar="W,W,...",
        help="plain windows, in tokens; adapters and controls have the first (%(default)s)",
    )
    add(
        "--adapter",
        type=_named,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="an adapter under the first window, and a plain window of the same bytes; repeatable",
    )
    add(
        "--adapter-keep",
        type=_counts_or_zero,
        metavar="K,K,...",
        help="evicted tokens that each KV head keeps beside an adapter, by the adapter's own "
        "probes or else --probes; 0 keeps none (0); not with --url",
    )
    add(
        "--evict",
        type=_among(EVICTS),
        default="oldest",
        metavar="HOW,...",
        help="controls that fold other blocks than the oldest: random (%(default)s)",
    )
    add(
        "--keep",
        type=_counts,
        default=[],
        metavar="K,K,...",
        help="for each --window also windows that keep so many evicted tokens for each KV head; a "
        "plain --window longer by K holds as many bytes, and with --evict-tokens folds as often; "
        "not with --url",
    )
    add(
        "--keep-score",
        type=_among(KEEP_SCORES),
        metavar="HOW,...",
        help="how --keep chooses: expected, random (expected)",
    )
    add(
        "--probes",
        type=Path,
        metavar="FILE",
        help="the model's probes, by which --keep-score expected chooses",
    )
    add(
        "--sinks",
        action="store_true",
        help="a control of the same memory that pins four tokens, and not the question",
    )
    add("--sequences", type=_count, default=24, metavar="N", help="answers to read (%(default)s)")
    add("--block-size", type=_count, metavar="N", help=f"tokens of a KV block ({BLOCK_SIZE})")
    add(
        "--evict-ratio",
        type=float,
        metavar="R",
        help=f"part of a full window that one fold frees ({EVICT_RATIO})",
    )
    add(
        "--evict-tokens",
        type=_count,
        metavar="N",
        help="tokens that one fold frees, the same for all windows; in place of --evict-ratio",
    )
    add(
        "--kv-dtype",
        choices=KV_DTYPES,
        default="bfloat16",
        help="dtype of the KV cache that a state's bytes are compared with (%(default)s)",
    )
    add("--url", help="score on this server in place of the replay; adapters are pushed to it")
    add(
        "--api-key-env",
        metavar="NAME",
        help="environment variable that holds the server's key; pushing may need the admin key",
    )
    add(
        "--top-logprobs",
        type=_count,
        default=20,
        metavar="K",
        help="tokens that the server names in each place, up to its --max-logprobs (%(default)s)",
    )
    add(
        "--batch",
        type=_count,
        default=8,
        metavar="N",
        help="answers read at once; bounds memory, does not change the result (%(default)s)",
    )
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the replay")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the replay")
    add("--out", type=Path, default=Path("out/fidelity"), metavar="DIR", help="(%(default)s)")
    options = parser.parse_args(arguments)
    names = [name for name, _ in options.adapter]
    if len(set(names)) < len(names):
        parser.error("--adapter: two adapters have the same name")
    options.adapter = dict(options.adapter)
    if options.evict_tokens is not None and options.evict_ratio is not None:
        parser.error("--evict-tokens and --evict-ratio exclude each other")
    _check_keep(parser, options)
    if options.url is not None:
        options.url = options.url.rstrip("/")
        if not options.url.startswith(("http://", "https://")):
            parser.error(f"--url must start with http:// or https://, got {options.url}")
        if options.sinks or options.evict_tokens is not None:
            parser.error(
                "--sinks and --evict-tokens: a server folds the part of a window that it was "
                "started with; leave them out, or leave out --url"
            )
        if options.keep or options.adapter_keep:
            parser.error(
                "--keep, --adapter-keep: a server scores without kept tokens; leave out --url"
            )
    return options


def _check_keep(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse flags of kept tokens that do not go together, and fill in the score."""
    if options.adapter_keep and not options.adapter:
        parser.error("--adapter-keep needs --adapter; for windows without memory it is --keep")
    if not options.keep and options.keep_score is not None:
        parser.error("--keep-score needs --keep: nothing is kept")
    if not (options.keep or any(options.adapter_keep or ())) and options.probes is not None:
        parser.error("--probes needs --keep or --adapter-keep: nothing is kept")
    options.keep_score = options.keep_score or ["expected"]
    if options.keep and "expected" in options.keep_score and options.probes is None:
        parser.error(
            "--keep chooses by the model's probes: give --probes FILE, or --keep-score random"
        )


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _counts_or_zero(text: str) -> list[int]:
    return [0 if part == "0" else _count(part) for part in text.split(",")]


def _among(names: Sequence[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(names)}")
        return found

    return read


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _named(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=DIR")
    return name, Path(path)
