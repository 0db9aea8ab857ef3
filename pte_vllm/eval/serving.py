"""The server that a sweep asks: one at a URL, or one started for it and ended after it."""

from __future__ import annotations

import _thread
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from pte_vllm.adapter.serve_line import allowed_lora_rank
from pte_vllm.engine.cpu_defaults import choose_dtype, free_memory, on_cpu
from pte_vllm.launch import Server, log_tail
from pte_vllm.method.weight import kv_token_bytes

READY_TIMEOUT_S = 1800.0
GIVE_UP_S = 60.0
"""How long a server may stay silent before it is called dead; inspect-ai asks again meanwhile."""
BASE_NAME = "base"
"""Name of the base model on a server that we start."""


class DeadServer(RuntimeError):
    """The server ended or stays silent; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What a sweep must know of a server."""

    url: str
    """Base URL, without `/v1`."""
    models: tuple[str, ...]
    """Names that requests may give, the base model first."""
    block_size: int = 16
    """Tokens in a block of its KV cache; meaningless without PTE."""
    evict_ratio: float = 0.25
    kv_bytes_per_token: int | None = None
    """Bytes of one token in the KV caches of all layers; None where the server does not say."""
    dtype: str = "bfloat16"
    """Of its model."""
    pte: bool = True
    """Whether it knows windows."""
    max_model_len: int | None = None
    """Most tokens of question and answer; None where the server does not say."""
    options: tuple[str, ...] = ()
    """Names of the request options that it knows."""
    pin_tokens: int | None = None
    """What it pins of every sequence (`--pte-pin-tokens`); None: questions."""


def key_from(variable: str | None) -> str | None:
    """Return the API key that an environment variable holds; None where none is named.

    Raises:
        ValueError: if there is no such variable.
    """
    if variable is not None and not os.environ.get(variable):
        raise ValueError(f"--api-key-env {variable}: there is no such environment variable")
    return os.environ[variable] if variable is not None else None


def ask(url: str, *, api_key: str | None = None) -> ServerFacts:
    """Read what a server says of itself.

    Raises:
        DeadServer: if nothing answers at the URL.
        ValueError: if what answers is no OpenAI-compatible server, or it wants another key.
    """
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    client = httpx.Client(trust_env=False, timeout=30.0, headers=headers)
    try:
        models = client.get(f"{base}/v1/models")
        if models.status_code == 401:
            raise ValueError(f"--url: {base} wants an API key: name its variable by --api-key-env")
        if models.status_code != 200:
            raise ValueError(f"--url: {base}/v1/models answers HTTP {models.status_code}")
        entries = models.json()["data"]
        names = tuple(entry["id"] for entry in entries)
        if not names:
            raise ValueError(f"--url: {base} serves no model")
        info = client.get(f"{base}/pte/v1/info")
    except httpx.HTTPError as error:
        raise DeadServer(f"--url: nothing answers at {base}: {error}") from error
    finally:
        client.close()
    if info.status_code != 200:
        return ServerFacts(
            url=base, models=names, max_model_len=entries[0].get("max_model_len"), pte=False
        )
    found = info.json()
    return ServerFacts(
        url=base,
        models=names,
        block_size=found["plan"]["block_size"],
        evict_ratio=found["plan"]["evict_ratio"],
        kv_bytes_per_token=found.get("kv_bytes_per_token"),
        max_model_len=found["max_model_len"],
        dtype=found.get("dtype", "bfloat16"),
        options=tuple(found["request_options"]),
        pin_tokens=found["plan"].get("pin_tokens"),
    )


@dataclass(frozen=True, kw_only=True)
class OwnServer:
    """What to start, where no URL is given."""

    model: str
    """Directory, or name on the hub."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Directories by name."""
    max_model_len: int
    """Most tokens of question and answer."""
    concurrency: int
    """Answers that are sampled at once."""
    block_size: int | None = None
    evict_ratio: float = 0.25
    extra: tuple[str, ...] = ()
    """Further flags of `pte-vllm serve`; they win."""

    def arguments(self) -> list[str]:
        """Return what follows `pte-vllm serve`."""
        size = self.block_size or default_block_size()
        arguments = {
            "--served-model-name": BASE_NAME,
            "--max-model-len": self.max_model_len,
            "--max-num-seqs": self.concurrency,
            "--block-size": size,
            "--pte-evict-ratio": self.evict_ratio,
        }
        flags = ["--disable-uvicorn-access-log"]
        if self.adapters:
            ranks, modules = zip(*map(_rank_and_modules, self.adapters.values()), strict=True)
            arguments |= {"--max-lora-rank": allowed_lora_rank(max(ranks))}
            arguments |= {"--max-loras": len(self.adapters)}
            flags += ["--enable-lora", "--lora-modules"]
            flags += [f"{name}={path}" for name, path in self.adapters.items()]
            if all(isinstance(m, list) for m in modules):
                # Else vLLM also computes a LoRA of the output layer, a third of a step on a CPU.
                flags += ["--lora-target-modules", *sorted({name for m in modules for name in m})]
        if on_cpu():
            flags.append("--enforce-eager")  # a minute of torch.compile would gain little here
            if (Path(self.model) / "config.json").is_file():
                arguments |= {"--kv-cache-memory-bytes": self._kv_bytes(size)}
        return [
            self.model,
            *(str(part) for pair in arguments.items() for part in pair),
            *flags,
            *self.extra,
        ]

    def _kv_bytes(self, block_size: int) -> int:
        """Return room for every answer at full length, and half of the free memory at most."""
        config = json.loads((Path(self.model) / "config.json").read_text())
        dtype = choose_dtype(self.model)[0]
        dtype = "bfloat16" if dtype == "auto" else dtype
        blocks = self.concurrency * (-(-self.max_model_len // block_size) + 1) + 1
        wanted = blocks * block_size * kv_bytes_per_token(config, dtype)
        return min(wanted, free_memory() // 2)


def default_block_size() -> int:
    """Return the block size of a server that we start: the least that the device takes well."""
    return 32 if on_cpu() else 16


def kv_bytes_per_token(config: Mapping[str, Any], dtype: str) -> int:
    """Return the bytes of one token's keys and values in all layers, from a `config.json`."""
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return kv_token_bytes(int(config["num_hidden_layers"]), kv_heads * head_dim, dtype)


def _rank_and_modules(adapter: str) -> tuple[int, Any]:
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    return int(config["r"]), config.get("target_modules")


class Watch:
    """Interrupts the main thread when a server has died, which inspect-ai would wait for.

    Args:
        url: base URL of the server.
        process: the server, where it is ours.
    """

    def __init__(self, url: str, process: Server | None = None) -> None:
        self._url = url
        self._process = process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.found: str | None = None
        """What has happened to the server; None while it lives."""

    def __enter__(self) -> Watch:
        # In the background of a shell SIGINT is ignored, and an interrupt would do nothing.
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._before is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _run(self) -> None:
        silent_s = 0.0
        with httpx.Client(trust_env=False, timeout=10.0) as client:
            while not self._stop.wait(2.0):
                if self._process is not None and self._process.exit_status() is not None:
                    self._give_up(f"the server ended; end of {self._process.log}:\n{self._tail()}")
                    return
                try:
                    client.get(f"{self._url}/health")
                    silent_s = 0.0
                except httpx.TimeoutException:
                    silent_s = 0.0  # busy: it took the connection
                except httpx.HTTPError:
                    silent_s += 2.0
                if silent_s >= GIVE_UP_S:
                    self._give_up(f"nothing has answered at {self._url} for {GIVE_UP_S:.0f} s")
                    return

    def _tail(self) -> str:
        assert self._process is not None
        return log_tail(self._process.log, 15)

    def _give_up(self, why: str) -> None:
        self.found = why
        _thread.interrupt_main()


@contextmanager
def started(own: OwnServer, *, log: Path, on_wait: Any = lambda line: None) -> Iterator[Server]:
    """Start a server, wait until it answers, and end it afterwards.

    Raises:
        LaunchError: if it does not start; the message has the end of its log.
    """
    env = {"VLLM_NO_USAGE_STATS": "1"}
    if Path(own.model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    with Server(own.arguments(), log=log, env=env) as server:
        server.wait_ready(timeout_s=READY_TIMEOUT_S, on_wait=on_wait)
        yield server
