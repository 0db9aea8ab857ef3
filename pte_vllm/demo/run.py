"""`pte-vllm demo`: what a small KV cache forgets, and what kept tokens remember, live.

Starts a real server on SmolLM2-135M-Instruct and asks it about facts that have left the window:
with full attention, with a window, and with a smaller window and kept tokens, which hold as many
blocks together. It polls `GET /pte/v1/requests` for the KV blocks that each sequence holds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pte_vllm.demo.answers import BLOCK_SIZE, Asked, arms, peak_blocks, right
from pte_vllm.demo.asking import ask_all
from pte_vllm.demo.notes import draw
from pte_vllm.demo.serving import cache_dir, serve_args
from pte_vllm.demo.view import Steps, save_plot, summary_line, summary_table
from pte_vllm.launch import LaunchError, ProcessGroup, Server, log_tail, pte_command
from pte_vllm.method.names import KEEP_SCORES

SEED = "5"
"""Draws the questions of the demo: six that are remembered, a lucky draw.

Of random ones about two thirds are: docs/benchmarks/learning.md has the figure."""


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the demo from model to plot.

    Raises:
        LaunchError: if a process of ours fails.
    """
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    server_log = options.server_log or out / "server.log"
    model = (options.model or cache_dir() / "models" / "smollm2").resolve()
    questions = draw(options.questions, options.seed)
    used = arms(window=options.window, keep=options.keep, keep_score=options.keep_score)
    steps = Steps(console, 4)

    with steps.step(f"model: {model}") as show:
        if not (model / "config.json").exists():
            if options.model:
                raise LaunchError(f"--model {options.model}: there is no config.json")
            command = pte_command("model", "fetch", "smollm2", str(model))
            with ProcessGroup(command, log=out / "model.log") as process:
                process.wait_exit(timeout_s=900.0, on_wait=show)

    server = Server(
        serve_args(options, model),
        port=options.port,
        log=server_log,
        env={"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    )
    with server:
        with steps.step(f"server: {server.url}, log {server_log}") as show:
            server.wait_ready(timeout_s=options.start_timeout, on_wait=show)
        title = (
            f"{len(questions)} questions, drawn at random by the seed {options.seed}: three facts, "
            "then other text, then a question about one of them"
        )
        start = time.monotonic()
        with steps.step(title, spinner=False):
            try:
                asked = asyncio.run(ask_all(console, questions, used, url=server.url))
            except* Exception as errors:
                first = errors.exceptions[0]
                raise LaunchError(
                    f"a request failed: {first!r}; end of {server_log}:\n{log_tail(server_log, 25)}"
                ) from first
        seconds = time.monotonic() - start

    with steps.step("results"):
        plot, answers = out / "answers.png", out / "answers.json"
        save_plot(asked, plot)
        answers.write_text(json.dumps(results(options, model, asked, seconds), indent=1) + "\n")
        console.print(summary_table(asked))
        console.print(Text(summary_line(asked), style="bold"), soft_wrap=True)
        console.print(f"plot: {plot}\nanswers: {answers}", soft_wrap=True)
    console.print(f"done in {time.monotonic() - steps.started:.0f} s")


def results(
    options: argparse.Namespace, model: Path, asked: Sequence[Asked], seconds: float
) -> dict[str, Any]:
    """Return what `answers.json` holds."""
    return {
        "model": model.name,
        "window_tokens": options.window,
        "keep_tokens": options.keep,
        "keep_score": options.keep_score,
        "block_size": BLOCK_SIZE,
        "seed": options.seed,
        "seconds": seconds,
        "arms": [
            {"name": a.arm.name, "right": right(asked, i), "peak_blocks": peak_blocks(asked, i)}
            for i, a in enumerate(asked[0].answers)
        ],
        "questions": [
            {
                **asdict(one.question),
                "prompt": one.question.prompt,
                "tokens_back": one.tokens_back,
                "answers": [
                    {
                        "arm": answer.arm.name,
                        "text": answer.text,
                        "right": answer.right,
                        "peak_blocks": answer.peak_blocks,
                        "samples": [asdict(sample) for sample in answer.samples],
                    }
                    for answer in one.answers
                ],
            }
            for one in asked
        ],
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pte-vllm demo", description=__doc__)
    add = parser.add_argument
    add("--questions", type=int, default=6, help="how many are asked (default: %(default)s)")
    add("--seed", default=SEED, help="draws the questions (default: %(default)s)")
    add("--window", type=int, default=64, help="KV room for thoughts, in tokens (%(default)s)")
    add("--keep", type=int, default=192, help="evicted tokens each KV head keeps (%(default)s)")
    add("--keep-score", choices=KEEP_SCORES, default="expected", help="how they are chosen")
    add("--probes", type=Path, metavar="FILE", help="choose by these (default: the package's)")
    add("--model", type=Path, help="checkpoint directory (default: SmolLM2-135M-Instruct, fetched)")
    add("--port", type=int, default=0, help="port of the server; 0 takes a free one")
    add("--out", type=Path, default=Path("out/demo"), help="results go here (%(default)s)")
    add("--server-log", type=Path, help="the server's output (default: server.log in --out)")
    add("--start-timeout", type=float, default=600.0, help="seconds the server may take to start")
    options = parser.parse_args(argv)
    if options.questions < 1:
        parser.error(f"--questions must be positive, got {options.questions}")
    if options.probes is not None and not options.probes.is_file():
        parser.error(f"--probes: {options.probes} does not exist")
    for flag, tokens, least in (("--window", options.window, 2), ("--keep", options.keep, 1)):
        if tokens % BLOCK_SIZE or tokens < least * BLOCK_SIZE:
            parser.error(
                f"{flag} must be a multiple of {BLOCK_SIZE}, at least {least * BLOCK_SIZE}, "
                f"got {tokens}"
            )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = parse(argv)
    console = Console(highlight=False)
    # Without this SIGTERM would end us at once and leave the server running.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run(options, console)
    except LaunchError as error:
        console.print(Text(f"demo: {error}", style="red"), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("demo: stopped")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
