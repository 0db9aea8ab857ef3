"""`pte-vllm demo`: chats with a fixed KV cache beside chats with full attention, live.

Starts a real server on SmolLM2-135M-Instruct, streams several long answers at once through the
OpenAI SDK, and polls `GET /pte/v1/requests` for the KV blocks that each sequence holds.
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

from pte_vllm.demo.chats import make_streams, run_chats
from pte_vllm.demo.serving import MAX_STREAMS, cache_dir, serve_args
from pte_vllm.demo.view import BLOCK_SIZE, Steps, Stream, save_plot, summary_table
from pte_vllm.launch import LaunchError, ProcessGroup, Server, log_tail, pte_command


def run_logged(command: list[str], log: Path, show: Any, *, timeout_s: float = 900.0) -> None:
    with ProcessGroup(command, log=log) as process:
        process.wait_exit(timeout_s=timeout_s, on_wait=show)


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the demo from model to plot.

    Raises:
        LaunchError: if a process of ours fails.
    """
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    server_log = options.server_log or out / "server.log"
    model = (options.model or cache_dir() / "models" / "smollm2").resolve()
    adapter = options.adapter or cache_dir() / "adapters" / f"{model.name}-paper-zero"
    streams = make_streams(options.streams, options.full_streams)
    steps = Steps(console, 5)

    with steps.step(f"model: {model}") as show:
        if not (model / "config.json").exists():
            if options.model:
                raise LaunchError(f"--model {options.model}: there is no config.json")
            command = pte_command("model", "fetch", "smollm2", str(model))
            run_logged(command, out / "model.log", show)

    with steps.step(f"adapter: {adapter}") as show:
        if not (adapter / "adapter_config.json").exists():
            if options.adapter:
                raise LaunchError(f"--adapter {options.adapter}: there is no adapter_config.json")
            command = pte_command("adapter", "init", str(model), str(adapter))
            command += ["--rule", "paper", "--b", "zero"]
            run_logged(command, out / "adapter.log", show)

    server = Server(
        serve_args(options, model, adapter),
        port=options.port,
        log=server_log,
        env={"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    )
    with server:
        with steps.step(f"server: {server.url}, log {server_log}") as show:
            server.wait_ready(timeout_s=options.start_timeout, on_wait=show)
        title = (
            f"{len(streams)} chats of {options.tokens} tokens at once, {options.streams} of them "
            f"with a window of {options.window} tokens"
        )
        start = time.monotonic()
        with steps.step(title, spinner=False):
            try:
                asyncio.run(run_chats(console, streams, url=server.url, tokens=options.tokens))
            except* Exception as errors:
                first = errors.exceptions[0]
                raise LaunchError(
                    f"a chat failed: {first!r}; end of {server_log}:\n{log_tail(server_log, 25)}"
                ) from first
        seconds = time.monotonic() - start

    with steps.step("results"):
        plot, samples = out / "blocks.png", out / "samples.json"
        save_plot(streams, plot)
        samples.write_text(json.dumps(results(options, model, streams, seconds), indent=1))
        console.print(summary_table(streams))
        first_chat = streams[0]
        console.print(Text(f"{first_chat.name}, asked: {first_chat.prompt}", style="bold"))
        console.print(Text(" ".join(first_chat.text[:200].split()) + " ..."))
        generated = sum(s.completion_tokens for s in streams)
        console.print(f"{generated} tokens in {seconds:.0f} s: {generated / seconds:.1f} tok/s")
        console.print(f"plot: {plot}\nraw samples: {samples}", soft_wrap=True)
    console.print(f"done in {time.monotonic() - steps.started:.0f} s")


def results(
    options: argparse.Namespace, model: Path, streams: Sequence[Stream], seconds: float
) -> dict[str, Any]:
    """Return what `samples.json` holds."""
    return {
        "model": model.name,
        "window_tokens": options.window,
        "tokens": options.tokens,
        "block_size": BLOCK_SIZE,
        "seconds": seconds,
        "streams": [asdict(stream) | {"mode": stream.mode} for stream in streams],
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pte-vllm demo", description=__doc__)
    add = parser.add_argument
    add("--streams", type=int, default=4, help="chats with a window (default: %(default)s)")
    add("--full-streams", type=int, default=2, help="chats with full attention (%(default)s)")
    add("--tokens", type=int, default=1000, help="tokens each chat generates (%(default)s)")
    add("--window", type=int, default=256, help="KV room for thoughts, in tokens (%(default)s)")
    add("--model", type=Path, help="checkpoint directory (default: SmolLM2-135M-Instruct, fetched)")
    add("--adapter", type=Path, help="adapter directory (default: a fresh one, B = 0)")
    add("--port", type=int, default=0, help="port of the server; 0 takes a free one")
    add("--out", type=Path, default=Path("out/demo"), help="results go here (%(default)s)")
    add("--server-log", type=Path, help="the server's output (default: server.log in --out)")
    add("--start-timeout", type=float, default=600.0, help="seconds the server may take to start")
    options = parser.parse_args(argv)
    if options.streams < 0 or options.full_streams < 0:
        parser.error("--streams and --full-streams must not be negative")
    if not 1 <= options.streams + options.full_streams <= MAX_STREAMS:
        parser.error(f"--streams and --full-streams must add up to 1 to {MAX_STREAMS}")
    if options.tokens < 1:
        parser.error(f"--tokens must be positive, got {options.tokens}")
    if options.window % BLOCK_SIZE or options.window < 2 * BLOCK_SIZE:
        parser.error(
            f"--window must be a multiple of {BLOCK_SIZE}, at least {2 * BLOCK_SIZE}, "
            f"got {options.window}"
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
