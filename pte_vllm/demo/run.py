"""`pte-vllm demo`: chats with a fixed KV cache beside chats with full attention, live.

Starts a real server on SmolLM2-135M-Instruct, streams several long answers at once through the
OpenAI SDK, and polls `GET /pte/v1/requests` for the KV blocks that each sequence holds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pte_vllm.demo.view import (
    BLOCK_SIZE,
    Steps,
    Stream,
    full_blocks,
    live_table,
    plain_line,
    save_plot,
    summary_table,
    take_sample,
)
from pte_vllm.engine.cpu_defaults import choose_dtype, on_cpu
from pte_vllm.launch import LaunchError, ProcessGroup, Server, http_get, log_tail, pte_command

PROMPT_ROOM = 512
"""`--pte-max-prompt-tokens` of the demo's server."""
MAX_STREAMS = 16
ADAPTER_NAME = "thoughts"
POLL_S = 0.5
PLAIN_LINE_S = 5.0

PROMPTS = (
    "Tell a long bedtime story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain step by step how a bicycle works, from the pedals to the road, in great detail.",
    "Write a travel diary of two weeks in Iceland, one entry for each day.",
    "Describe the history of bread, from the first grain to the modern bakery.",
    "Teach me the basics of chess: every piece, then openings, then simple tactics.",
    "Write a long dialogue between a robot and a gardener about what grows in spring.",
    "List fifty experiments that a child can do in a kitchen, and explain each one.",
    "Plan a small vegetable garden for a whole year, month by month.",
)


# -- what is served --------------------------------------------------------------------------------


def pool_blocks(*, streams: int, full_streams: int, tokens: int, window: int) -> int:
    """Count the KV blocks of the demo's server: enough that no stream waits for another."""
    bounded = full_blocks(PROMPT_ROOM + window) + 2
    unbounded = full_blocks(PROMPT_ROOM + tokens) + 1
    return streams * bounded + full_streams * unbounded + 1


def serving_dtype(model: Path) -> str:
    """Name the dtype to serve a model in, which the KV pool is sized for: 16 bits if possible."""
    chosen = choose_dtype(model)[0] if on_cpu() else "auto"
    return "bfloat16" if chosen == "auto" else chosen


def block_bytes(config: dict[str, Any], itemsize: int) -> int:
    """Return the bytes of one KV block of all layers, from a model's `config.json`."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    d_kv = int(config.get("num_key_value_heads") or heads) * int(head_dim)
    return 2 * int(config["num_hidden_layers"]) * d_kv * itemsize * BLOCK_SIZE


def make_streams(num_windowed: int, num_full: int) -> list[Stream]:
    """Make windowed chats, then full ones; prompts repeat only if there are too few of them."""
    return [
        Stream(
            name=f"chat {i + 1}",
            prompt=PROMPTS[i % len(PROMPTS)],
            windowed=i < num_windowed,
            seed=i,
        )
        for i in range(num_windowed + num_full)
    ]


# -- the chats -------------------------------------------------------------------------------------


async def chat(client: Any, stream: Stream, *, tokens: int) -> None:
    """Stream one answer of exactly `tokens` tokens.

    All chats use the adapter, so that a batch holds one; without a fold it changes nothing (B = 0).
    """
    extra: dict[str, Any] = {"ignore_eos": True, "min_tokens": tokens}
    if not stream.windowed:
        extra["vllm_xargs"] = {"pte_window": 0}
    start = time.monotonic()
    chunks = await client.chat.completions.create(
        model=ADAPTER_NAME,
        messages=[{"role": "user", "content": stream.prompt}],
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=tokens,
        temperature=0.7,
        top_p=0.95,
        seed=stream.seed,
        extra_body=extra,
    )
    async for chunk in chunks:
        stream.response_id = chunk.id
        if chunk.choices and chunk.choices[0].delta.content:
            stream.text += chunk.choices[0].delta.content
        if chunk.usage is not None:
            stream.completion_tokens = chunk.usage.completion_tokens
    stream.seconds = time.monotonic() - start
    stream.done = True


async def poll(streams: Sequence[Stream], url: str, start: float) -> dict[str, Any]:
    """Sample every stream once; returns the report, {} if the server was too busy to answer."""
    try:
        body = await asyncio.to_thread(http_get, f"{url}/pte/v1/requests", timeout_s=30.0)
    except TimeoutError:
        return {}
    report: dict[str, Any] = json.loads(body)
    for stream in streams:
        take_sample(stream, report, time.monotonic() - start)
    return report


async def run_chats(console: Console, streams: Sequence[Stream], *, url: str, tokens: int) -> None:
    """Run all chats at once, showing them live.

    Raises:
        ExceptionGroup: if a chat or a poll fails; the other chats are given up.
    """
    from openai import AsyncOpenAI

    start = time.monotonic()
    last_line = start
    report: dict[str, Any] = {}
    async with (
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=1800.0, max_retries=0) as client,
        asyncio.TaskGroup() as group,
    ):
        chats = [group.create_task(chat(client, stream, tokens=tokens)) for stream in streams]
        with contextlib.ExitStack() as stack:
            live = None
            if console.is_terminal:
                live = stack.enter_context(Live(console=console, refresh_per_second=4))
            while True:
                _, unfinished = await asyncio.wait(chats, timeout=POLL_S)
                report = await poll(streams, url, start) or report
                now = time.monotonic()
                if live is not None:
                    live.update(live_table(streams, report))
                elif not unfinished or now - last_line >= PLAIN_LINE_S:
                    last_line = now
                    console.print(Text(plain_line(streams, now - start)), soft_wrap=True)
                if not unfinished:
                    return


# -- the command -----------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Return `.cache` of the checkout this runs from, else of the current directory."""
    checkout = Path(__file__).resolve().parents[2]
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / ".cache"


def serve_args(options: argparse.Namespace, model: Path, adapter: Path) -> list[str]:
    """Return what follows `pte-vllm serve`."""
    blocks = pool_blocks(
        streams=options.streams,
        full_streams=options.full_streams,
        tokens=options.tokens,
        window=options.window,
    )
    config = json.loads((model / "config.json").read_text())
    dtype = serving_dtype(model)
    itemsize = 4 if dtype == "float32" else 2
    max_model_len = max(4096, BLOCK_SIZE * full_blocks(options.tokens + PROMPT_ROOM))
    limit = config.get("max_position_embeddings", max_model_len)
    if options.tokens + PROMPT_ROOM > limit:
        raise LaunchError(f"--tokens {options.tokens}: {model} knows {limit} positions only")
    arguments = {
        "--pte-window": options.window,
        "--pte-max-prompt-tokens": PROMPT_ROOM,
        "--dtype": dtype,
        "--block-size": BLOCK_SIZE,
        "--max-model-len": min(max_model_len, limit),
        "--max-lora-rank": 32,
        "--lora-modules": f"{ADAPTER_NAME}={adapter}",
        "--kv-cache-memory-bytes": blocks * block_bytes(config, itemsize),
        "--max-num-seqs": MAX_STREAMS,
    }
    flags = ["--enable-lora", "--disable-uvicorn-access-log"]
    if on_cpu():
        flags.append("--enforce-eager")  # a minute of torch.compile would gain little here
    modules = json.loads((adapter / "adapter_config.json").read_text()).get("target_modules")
    if isinstance(modules, list):
        # Else vLLM also computes a LoRA of the output layer, which on CPU takes a third of a step.
        flags += ["--lora-target-modules", *modules]
    return [str(model), *(str(part) for pair in arguments.items() for part in pair), *flags]


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
    add("--adapter", type=Path, help="adapter directory (default: a fresh one, rule paper, B = 0)")
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
