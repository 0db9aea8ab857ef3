"""A real `pte-vllm serve` on a tiny model, started by the tests."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import openai
import psutil

from pte_vllm import launch
from tests.harness.engine import BLOCK
from tests.harness.zygote import Forked, Zygote

WINDOW = 4 * BLOCK
IGNORE_EOS = {"ignore_eos": True, "return_token_ids": True}
NUM_BLOCKS = 120
"""Of the pool, vLLM's null block not counted."""


class Server(launch.Server):
    """The server, with what tests ask of it.

    `adapters` are served with `--lora-modules`; `key` goes with each request of its own methods.
    `zygote`: starts its processes, where they would read no other environment early; else the
    command line does.
    """

    def __init__(
        self,
        model: Path,
        adapters: Mapping[str, Path],
        *,
        log: Path,
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        key: str | None = None,
        zygote: Zygote | None = None,
    ) -> None:
        self.model, self._zygote = model, zygote
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.adapters = dict(adapters)
        named = [f"{name}={path}" for name, path in adapters.items()]
        super().__init__(
            [
                str(model),
                *("--pte-window", str(WINDOW), "--pte-max-prompt-tokens", "512"),
                *("--served-model-name", "base", "--dtype", "float32"),
                *("--block-size", str(BLOCK), "--max-model-len", "4096"),
                *("--num-gpu-blocks-override", str(NUM_BLOCKS + 1)),
                *("--kv-cache-memory-bytes", str(2**28)),
                *("--max-num-seqs", "32", "--enforce-eager", "--max-logprobs", "5"),
                *("--enable-lora", "--max-lora-rank", "8", "--max-loras", "4"),
                *(["--lora-modules", *named] if named else []),
                *flags,
            ],
            log=log,
            env={
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                **(env or {}),
            },
        )

    def _start(self, log: BinaryIO) -> Any:
        if self._zygote is None or not self._zygote.fits(self.env):
            return super()._start(log)
        return Forked(self._zygote, self.command, self.env, log.fileno())

    @property
    def spool(self) -> Path:
        return Path(self.command[self.command.index("--pte-spool") + 1])

    @property
    def probes(self) -> Path:
        return Path(self.command[self.command.index("--pte-probes") + 1])

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def complete(
        self,
        model: str,
        prompt: list[int],
        max_tokens: int,
        *,
        options: Mapping[str, object],
        cache_salt: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """A completion of exactly that many tokens, with their ids; `options`: vllm_xargs."""
        body: dict[str, Any] = {**IGNORE_EOS, "vllm_xargs": dict(options)}
        if cache_salt is not None:
            body["cache_salt"] = cache_salt
        return self.client.completions.create(
            model=model, prompt=prompt, max_tokens=max_tokens, extra_body=body, **kwargs
        )

    def reset(self, adapters: Mapping[str, Path]) -> None:
        """Serve these adapters in place of all others, loaded or pushed, with an empty cache."""

        def post(path: str, body: Mapping[str, str]) -> None:
            answer = httpx.post(self.url + path, json=body, headers=self.headers, timeout=120)
            assert answer.status_code == 200, answer.text

        for adapter in self.get("/pte/v1/adapters")["adapters"]:
            url = f"{self.url}/pte/v1/adapters/{adapter['name']}"
            httpx.delete(url, headers=self.headers, timeout=60).raise_for_status()
        for name in self.adapters.keys() - adapters.keys():
            post("/v1/unload_lora_adapter", {"lora_name": name})
            del self.adapters[name]
        for name, path in adapters.items():
            if self.adapters.get(name) != path:
                if name in self.adapters:
                    post("/v1/unload_lora_adapter", {"lora_name": name})
                post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
                self.adapters[name] = path
        post("/reset_prefix_cache", {})

    def get(self, path: str) -> dict:
        answer = httpx.get(self.url + path, headers=self.headers, timeout=30)
        return answer.raise_for_status().json()

    def pace(self, num_tokens: int) -> None:
        """Return when a request of the base model has had that many tokens.

        What was sent before and runs beside it has had about as many: a clock that no load of the
        machine disturbs. Asking the worker for its requests may wait for long while it is busy.
        """
        body = {
            "model": "base",
            "prompt": [5, 6],
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "vllm_xargs": {"pte_window": 2 * BLOCK},
        }
        url = f"{self.url}/v1/completions"
        httpx.post(url, json=body, headers=self.headers, timeout=300).raise_for_status()

    def wait_running(self, count: int) -> None:
        """Return when that many samples run: a thread told to ask may not have asked yet."""
        for _ in range(1200):
            metrics = httpx.get(f"{self.url}/metrics", timeout=60).raise_for_status().text
            running = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", metrics, re.MULTILINE)
            if sum(map(float, running)) >= count:
                return
            time.sleep(0.05)
        raise AssertionError(f"{running} samples run, not {count}")

    def wait_idle(self) -> dict:
        """The pool once nothing runs; the worker hears of the last request one step later."""
        for _ in range(100):
            report = self.get("/pte/v1/requests")
            if not report["running"] and report["free_blocks"] == report["usable_blocks"]:
                return report
            time.sleep(0.1)
        raise AssertionError(f"not idle: {report}")

    def processes(self) -> list[psutil.Process]:
        """Return the API server and all that it started."""
        root = psutil.Process(self.pid)
        return [root, *root.children(recursive=True)]

    def is_running(self) -> bool:
        return self._process is not None and self.exit_status() is None

    def kill(self) -> None:
        """SIGKILL to all of it, as a crash would; enter it again to restart on the same port."""
        process = self._process
        assert process is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._process = None
