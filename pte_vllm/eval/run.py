"""`pte-vllm eval run`: accuracy under a cache budget, for every arm of a sweep.

    OUT/logs/           inspect-ai's logs: every answer; `inspect view --log-dir OUT/logs`
    OUT/results.json    options and numbers, by problem too
    OUT/table.md        the table
    OUT/bytes.png       accuracy over KV bytes of a sequence, its thought state included
    OUT/tokens.png      share solved over generated tokens
    OUT/server.log      of the server, where one was started

The same command goes on where it stopped: answers that are in the logs are not asked for again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from pte_vllm.eval.arms import Arm, Pins, make_arms
from pte_vllm.eval.asking import find_pins, find_problems, make_tasks
from pte_vllm.eval.options import RunOptions
from pte_vllm.eval.report import write_report
from pte_vllm.eval.results import INTERRUPTED, Cell, Row, rows_of
from pte_vllm.eval.serving import (
    DeadServer,
    OwnServer,
    ServerFacts,
    Watch,
    ask,
    default_block_size,
    key_from,
    started,
)
from pte_vllm.eval.weights import in_kv_tokens, state_bytes

PROMPT_ROOM = 1024
"""Tokens that a question may have on a server that we start."""
LOGS = "logs"


def run(options: RunOptions) -> int:
    """Run a sweep, or go on with it; returns the exit status: 0, 1 if an arm failed, 130.

    Raises:
        ValueError: naming the flag, if the server or a benchmark cannot do what is asked.
        DeadServer: if the server dies or stays silent.
        LaunchError: if a server that we start does not come up.
        OSError: if data or logs cannot be read or written.
    """
    # A file has room for a table; a terminal has what it has.
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 150)
    problems = {name: find_problems(options, name) for name in options.benchmarks}
    counts = ", ".join(f"{name}: {len(found)} problems" for name, found in problems.items())
    console.print(counts)
    if options.model is not None:  # a mistake shows before a server starts
        _check_windows(options, options.block_size or default_block_size())
    options.out.mkdir(parents=True, exist_ok=True)
    with _server(options, console) as (facts, process):
        weights = _weigh(options, facts)
        arms = _arms(options, facts, weights, console)
        answers = (
            sum(len(found) for found in problems.values())
            * len(arms)
            * (len(options.max_tokens) * len(options.seeds) * options.epochs)
        )
        if facts.max_model_len is not None and max(options.max_tokens) >= facts.max_model_len:
            raise ValueError(
                f"--max-tokens {max(options.max_tokens)} leaves no room for a question: the server "
                f"takes {facts.max_model_len} tokens in all (its --max-model-len)"
            )
        console.print(f"{len(arms)} memories, {answers} answers")
        pins = find_pins(options, facts, arms)
        rows = _ask_all(options, facts, arms, pins, process)
    write_report(options, rows, facts, weights, pins, options.out, console)
    if rows and all(row.answers and not row.accuracy().value for row in rows):
        console.print(
            "No answer was right under any memory. Does the judge see what the model says? "
            "`--template` can ask for a box, and `--judge` chooses who judges."
        )
    if any(row.error and INTERRUPTED in row.error for row in rows):
        console.print("The run was interrupted: the same command goes on where it stopped.")
        return 130
    return 1 if any(row.error for row in rows) else 0


@contextmanager
def _server(options: RunOptions, console: Console) -> Iterator[tuple[ServerFacts, Any]]:
    key = key_from(options.api_key_env)
    if options.url is not None:
        yield ask(options.url, api_key=key), None
        return
    assert options.model is not None
    own = OwnServer(
        model=options.model,
        adapters={name: path for name, path in options.adapters.items() if path is not None},
        max_model_len=PROMPT_ROOM + max(options.max_tokens),
        concurrency=options.concurrency,
        block_size=options.block_size,
        evict_ratio=options.evict_ratio,
        extra=options.server_arguments(),
    )
    log = options.out / "server.log"
    with console.status("starting the server") as status:

        def show(line: str) -> None:
            status.update(f"starting the server: {line[-100:]}")

        with started(own, log=log, on_wait=show) as process:
            status.stop()
            yield ask(process.url, api_key=key), process


def _weigh(options: RunOptions, facts: ServerFacts) -> dict[str, int]:
    """Return the bytes of a sequence's state for each adapter whose files are known."""
    from pte_vllm.adapter.format import Adapter

    return {
        name: state_bytes(Adapter.load(path), facts.dtype)
        for name, path in options.adapters.items()
        if path is not None
    }


def _arms(
    options: RunOptions, facts: ServerFacts, weights: dict[str, int], console: Console
) -> list[Arm]:
    missing = [name for name in options.adapters if name not in facts.models]
    if missing:
        raise ValueError(
            f"--adapter: {facts.url} has no {missing[0]!r}; it serves {', '.join(facts.models)}"
        )
    if not facts.pte:
        if options.adapters or options.sinks or options.keep or "random" in options.evict:
            raise ValueError(f"--url: {facts.url} runs without PTE, and has the full cache only")
        return [Arm(window_tokens=0)]
    _check_windows(options, facts.block_size)
    if "random" in options.evict and "pte_evict" not in facts.options:
        raise ValueError(f"--evict random: {facts.url} does not know pte_evict; update it")
    if any((*options.keep, *options.adapter_keep)) and "pte_keep" not in facts.options:
        raise ValueError(f"--keep: {facts.url} does not know pte_keep; update it")
    state_tokens = None
    if options.equal_bytes:
        token_bytes = facts.kv_bytes_per_token
        if token_bytes is None:
            raise ValueError(f"--equal-bytes: {facts.url} does not say what a KV token weighs")
        state_tokens = {name: in_kv_tokens(size, token_bytes) for name, size in weights.items()}
    arms = make_arms(
        options.windows,
        adapters=tuple(options.adapters),
        rules=options.rules,
        evict=options.evict,
        sinks=options.sinks,
        adapter_keep=options.adapter_keep,
        keep=options.keep,
        keep_scores=options.keep_scores,
        plain_windows=options.plain_windows,
        state_tokens=state_tokens,
        block_size=facts.block_size,
    )
    kept = []
    for arm in arms:
        if arm.evict != "oldest" and not arm.draws(
            block_size=facts.block_size, evict_ratio=facts.evict_ratio
        ):
            console.print(f"{arm.title}: left out, as only the oldest block can leave there")
            continue
        kept.append(arm)
    return kept


def _check_windows(options: RunOptions, block_size: int) -> None:
    for window in (*options.windows, *options.plain_windows):
        if window % block_size or window == block_size:
            raise ValueError(
                f"--window {window} must be a multiple of the block size, {block_size}, and at "
                "least two blocks"
            )
    for flag, keeps in (("--keep", options.keep), ("--adapter-keep", options.adapter_keep)):
        for tokens in keeps:
            if tokens % block_size:
                text = f"{flag} {tokens} must be a multiple of the block size, {block_size}"
                raise ValueError(text)


def _ask_all(
    options: RunOptions,
    facts: ServerFacts,
    arms: list[Arm],
    pins: dict[str, dict[str, Pins]],
    process: Any,
) -> list[Row]:
    """Ask what the logs do not have yet, and read all rows from them."""
    os.environ.setdefault("INSPECT_DISABLE_MODEL_API_WARNING", "1")
    from inspect_ai import eval_set

    logs, cells = options.out / LOGS, _cells(options, arms if facts.pte else [None])
    with Watch(facts.url, process) as watch:
        try:
            _, found = eval_set(
                make_tasks(options, facts, cells, pins),
                log_dir=str(logs),
                log_dir_allow_dirty=True,  # further arms may join a sweep later
                retry_attempts=0,
                retry_immediate=False,  # what it would say about the other setting is no news
                fail_on_error=True,
                max_tasks=4,
                max_samples=options.concurrency,
                max_connections=options.concurrency,
                adaptive_connections=False,
                log_buffer=1,  # an answer is on disk once it is there
                log_realtime=False,
                log_model_api=False,
                ctl_server=False,
                acp_server=False,
                display="rich" if sys.stderr.isatty() and sys.stdout.isatty() else "plain",
            )
        except KeyboardInterrupt:
            if watch.found is None:
                raise
            found = []
    if watch.found is not None:
        raise DeadServer(
            f"{watch.found}\nThe answers so far are in {logs}; the same command goes on from there"
        )
    return rows_of(cells, [_with_summaries(log) for log in found])


def _cells(options: RunOptions, arms: Sequence[Arm | None]) -> list[Cell]:
    return [
        Cell(benchmark=benchmark, arm=arm, max_tokens=length, seed=seed)
        for benchmark in options.benchmarks
        for length in options.max_tokens
        for seed in options.seeds
        for arm in arms
    ]


def _with_summaries(log: Any) -> Any:
    """Return a log with the summaries of its samples, which have all that rows need."""
    from inspect_ai.log import read_eval_log_sample_summaries

    if log.location and Path(log.location.removeprefix("file://")).exists():
        log.samples = read_eval_log_sample_summaries(log.location)
    return log
