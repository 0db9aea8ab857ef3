"""`pte-vllm eval turns`: what a chat model remembers over many turns, and what it holds.

A server answers conversations under several memories: the full cache, windows that forget, and
windows that keep tokens. Facts are told in early turns and asked for later. The first question and
the newest one are pinned, all that lies between folds, and the KV blocks of each turn are counted.
Standard library only until the flags are read.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pte_vllm.eval.flags import names, numbers
from pte_vllm.eval.talks import draw_talk
from pte_vllm.method.names import KEEP_SCORES
from pte_vllm.models.location import check_model

if TYPE_CHECKING:
    from rich.console import Console

    from pte_vllm.eval.serving import ServerFacts
    from pte_vllm.eval.turns_run import Job

_TURN_TOKENS = 48
"""Room for a question, a given reply and the markers of a turn, on a server that we start."""


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm eval turns ...`; returns the exit status.

    Raises:
        ValueError, OSError: naming the flag, if something does not fit or is not there.
    """
    options = _parser().parse_args(list(arguments))
    _check(options)
    draw_talk("0", turns=options.turns, distances=options.distances)  # a mistake shows now
    from pte_vllm.eval.serving import DeadServer
    from pte_vllm.launch import LaunchError
    from pte_vllm.wire.transport import ServerError

    options.out.mkdir(parents=True, exist_ok=True)
    # Without this SIGTERM would end us at once and leave our server running.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _run(options)
    except (DeadServer, LaunchError, ServerError) as error:
        print(f"pte-vllm: error: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pte-vllm eval turns",
        description="Hold conversations of many turns under several memories: facts are told "
        "early and asked for later. Shows accuracy by the turns between, and the KV blocks of each "
        "turn. It starts a server, or asks one. The same command goes on where it stopped.",
        epilog="example: pte-vllm eval turns --model MODEL --window 256 --keep 64 "
        "--plain-window 320",
    )
    add = parser.add_argument
    add("--model", metavar="MODEL", help="start a server for this model, name or directory")
    add("--url", help="ask this server in place of one that is started")
    add("--api-key-env", metavar="NAME", help="environment variable that holds the server's key")
    add("--turns", type=int, default=50, metavar="N", help="of a conversation (%(default)s)")
    add("--talks", type=int, default=4, metavar="N", help="conversations (%(default)s)")
    add(
        "--distances",
        type=numbers,
        default=[1, 2, 4, 4, 8, 8, 16, 16, 24, 24, 40, 40],
        metavar="N,N",
        help="turns between telling and asking, one for each fact of a conversation "
        "(1,2,4,4,8,8,16,16,24,24,40,40)",
    )
    add("--window", type=numbers, default=[256], metavar="N,N", help="KV room for thoughts (256)")
    add("--keep", type=numbers, default=[64], metavar="N,N", help="under each window; kept (64)")
    add(
        "--keep-score",
        type=names,
        default=["expected", "random"],
        metavar="A,B",
        help=f"how tokens are kept: {', '.join(KEEP_SCORES)} (both)",
    )
    add(
        "--plain-window",
        type=numbers,
        metavar="N,N",
        help="windows that keep nothing (default: window + keep, which hold as many bytes)",
    )
    add("--probes", type=Path, metavar="FILE", help="of our server: the model's probes")
    add("--max-tokens", type=int, default=24, metavar="N", help="of an answer (%(default)s)")
    add("--concurrency", type=int, default=16, metavar="N", help="conversations at once (16)")
    add("--server-flags", default="", metavar="FLAGS", help="further flags of our server")
    add("--out", type=Path, default=Path("out/eval-turns"), metavar="DIR", help="(%(default)s)")
    return parser


def _check(options: argparse.Namespace) -> None:
    if (options.model is None) == (options.url is None):
        raise ValueError("give either --model, to start a server, or --url, to ask one")
    if options.model is not None:
        check_model(options.model, flag="--model")
    for name in ("talks", "max_tokens", "concurrency"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {getattr(options, name)}")
    if not options.distances:
        raise ValueError("--distances is empty: after how many turns is asked for a fact?")
    if unknown := set(options.keep_score) - set(KEEP_SCORES):
        raise ValueError(f"--keep-score must be among {', '.join(KEEP_SCORES)}, got {min(unknown)}")
    if options.probes is not None and not options.probes.is_file():
        raise ValueError(f"--probes: there is no file {options.probes}")
    if options.url is not None and (options.server_flags or options.probes):
        raise ValueError("--server-flags and --probes are for a server that is started here")
    if options.plain_window is None:
        options.plain_window = [w + k for w in options.window if w for k in options.keep if k]


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from pte_vllm.adapter.counter import counter
    from pte_vllm.eval import turns_report
    from pte_vllm.eval.serving import key_from
    from pte_vllm.eval.turns_run import hold_all

    console = Console(stderr=True, highlight=False)
    with _server(options, console) as facts:
        jobs = _jobs(options, facts)
        waiting = sum(len(job.talk) - len(job.done()) for job in jobs)
        console.print(f"{len(jobs)} conversations, {waiting} turns to go")
        with Progress(console=console, disable=not console.is_terminal) as progress:
            count = counter(progress, "turns", waiting)
            records = hold_all(
                jobs,
                facts,
                api_key=key_from(options.api_key_env),
                max_tokens=options.max_tokens,
                concurrency=options.concurrency,
                progress=lambda job, number: count(1),
            )
    told = turns_report.write(records, facts.block_size, options.out)
    Console().print(told, markup=False, highlight=False, soft_wrap=True)  # rows stay whole


@contextmanager
def _server(options: argparse.Namespace, console: Console) -> Iterator[ServerFacts]:
    import shlex

    from pte_vllm.eval.serving import OwnServer, ask, key_from, started

    key = key_from(options.api_key_env)
    if options.url is not None:
        yield ask(options.url, api_key=key)
        return
    extra: list[str] = shlex.split(options.server_flags)
    if options.probes is not None:
        extra = ["--pte-probes", str(options.probes), *extra]
    elif "expected" in options.keep_score and any(options.keep):
        extra = ["--pte-keep", str(max(options.keep)), *extra]  # it then finds or makes probes
    own = OwnServer(
        model=options.model,
        max_model_len=512 + options.turns * (_TURN_TOKENS + options.max_tokens),
        concurrency=options.concurrency,
        extra=tuple(extra),
    )
    log = options.out / "server.log"
    with (
        console.status(f"starting a server, log {log}") as status,
        started(own, log=log) as process,
    ):
        status.stop()
        yield ask(process.url, api_key=key)


def _jobs(options: argparse.Namespace, facts: ServerFacts) -> list[Job]:
    """Return every conversation under every memory; conversations that differ lie side by side."""
    from pte_vllm.eval.arms import make_arms
    from pte_vllm.eval.turns_run import Job

    arms = make_arms(
        options.window,
        keep=[tokens for tokens in options.keep if tokens],
        keep_scores=options.keep_score,
        plain_windows=options.plain_window,
        block_size=facts.block_size,
    )
    settings: dict[str, Any] = {
        "model": facts.models[0] if options.url is not None else options.model,
        "turns": options.turns,
        "distances": list(options.distances),
        "max_tokens": options.max_tokens,
        "block_size": facts.block_size,
        "evict_ratio": facts.evict_ratio,
        "dtype": facts.dtype,
        "probes": None if options.probes is None else str(options.probes),
    }
    return [
        Job(
            arm=arm,
            seed=seed,
            talk=draw_talk(str(seed), turns=options.turns, distances=options.distances),
            file=options.out / "talks" / f"{arm.key}-{seed}.json",
            settings=settings,
        )
        for seed in range(options.talks)
        for arm in (arms if facts.pte else arms[:1])
    ]
