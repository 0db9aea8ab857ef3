"""`pte-vllm bench push`: a server under load, with and without new adapter versions coming in.

Streams of rollouts run all the time. Phases of nothing else and phases of pushes take turns; tokens
are counted by the server.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.progress import Progress

from pte_vllm.bench import report
from pte_vllm.bench.turns import BLOCK_TOKENS, make_adapters
from pte_vllm.launch import Server, http_get
from pte_vllm.wire.client import RolloutClient

NAME = "bench"
PROMPT_TOKENS = 64
_KV_BYTES = 1 << 30
_TOKENS_METRIC = "vllm:generation_tokens_total"


def run(args: argparse.Namespace) -> None:
    report.announce(args)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        adapters = [make_adapters(args, scratch / str(i))[0] for i in range(2)]
        flags = [
            *("--pte-window", str(args.window), "--pte-spool", str(scratch / "spool")),
            *("--enable-lora", "--max-lora-rank", str(args.rank), "--max-loras", "4"),
            *("--dtype", args.dtype, "--block-size", str(BLOCK_TOKENS)),
            *(("--enforce-eager",) if args.eager else ()),
            *("--max-num-seqs", str(args.streams + 1), "--max-model-len", "4096"),
            *("--kv-cache-memory-bytes", str(_KV_BYTES)),  # fits beside whatever else runs
        ]
        with Server([args.model, *flags], log=args.out / "push-server.log") as server:
            with report.console.status("starting the server"):
                server.wait_ready()
            rates, seconds = _measure(args, server, adapters)
    report.console.print(report.rates(rates, "tok/s"))
    report.console.print(
        f"{len(seconds)} pushes; from push to first token of the new version "
        f"{statistics.median(seconds):.2f} s median, {max(seconds):.2f} s most",
        highlight=False,
    )
    stem = report.write(args, {"tokens_per_second": rates, "push_to_first_token_s": seconds})
    report.bars(stem, rates, f"tok/s, {args.streams} streams")


def _measure(
    args: argparse.Namespace, server: Server, adapters: list[str]
) -> tuple[dict[str, list[float]], list[float]]:
    """tok/s of each phase, and seconds from each push to a first token."""
    stop, failures = threading.Event(), []
    rates: dict[str, list[float]] = {"steady": [], "while pushing": []}
    seconds: list[float] = []

    def stream(number: int) -> None:
        rng = random.Random(number)
        sampling: dict[str, Any] = {"max_tokens": args.tokens, "ignore_eos": True}
        try:
            with RolloutClient(server.url) as client:
                while not stop.is_set():
                    prompt = [rng.randrange(10, 500) for _ in range(PROMPT_TOKENS)]
                    list(client.rollouts([prompt], adapter=NAME, sampling=sampling))
        except Exception as error:  # shown by the thread that measures
            failures.append(error)

    with (
        RolloutClient(server.url) as client,
        Progress(console=report.console, transient=True) as progress,
    ):
        newest = client.push(adapters[0], NAME)
        threads = [threading.Thread(target=stream, args=(i,)) for i in range(args.streams)]
        for thread in threads:
            thread.start()
        task = progress.add_task("warming up", total=2 * args.repeats)
        time.sleep(min(10.0, args.seconds))
        for _ in range(args.repeats):
            for phase, found in rates.items():
                progress.update(task, description=phase)
                began, tokens = time.monotonic(), _tokens(server)
                while (left := began + args.seconds - time.monotonic()) > 0:
                    if failures:
                        raise RuntimeError(f"a stream failed: {failures[0]}")
                    if phase == "while pushing":
                        newest += 1
                        seconds.append(_push(client, adapters[newest % 2], newest))
                    time.sleep(max(0.0, min(args.every, left)))
                found.append((_tokens(server) - tokens) / (time.monotonic() - began))
                progress.advance(task)
        stop.set()
        for thread in threads:
            thread.join()
    return rates, seconds


def _push(client: RolloutClient, adapter: str, version: int) -> float:
    """Push a version and sample one token of it; seconds that took."""
    began = time.monotonic()
    client.push(adapter, NAME, version)
    sampling = {"max_tokens": 1}
    list(client.rollouts([[7]], adapter=NAME, min_weight_version=version, sampling=sampling))
    return time.monotonic() - began


def _tokens(server: Server) -> float:
    """Generated so far, by the server's own count."""
    lines = http_get(f"{server.url}/metrics", timeout_s=30.0).decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(_TOKENS_METRIC))
