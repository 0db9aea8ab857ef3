"""`pte-vllm eval run --model`: the server that it starts, and what becomes of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pte_vllm.launch import pte_command
from tests.harness.engine import BLOCK


def _command(model: Path, adapter: Path, out: Path) -> list[str]:
    problems = out.with_suffix(".jsonl")
    problems.write_text('{"prompt": "What?", "answer": "1"}\n{"prompt": "And?", "answer": "2"}\n')
    return pte_command(
        *("eval", "run", "--model", str(model), "--benchmark", str(problems)),
        *("--adapter", f"own={adapter}", "--equal-bytes", "--window", str(2 * BLOCK)),
        *("--max-tokens", "80", "--concurrency", "4", "--out", str(out)),
        *("--server-flags", "--dtype float32 --max-model-len 2048"),
    )


@pytest.mark.slow
def test_own_server(
    tiny: Callable[[str], Path], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny("qwen3")
    adapter = adapters(model, rank=8, rule="ridge", features="squared", seed=3)
    out = tmp_path / "out"
    command = _command(model, adapter, out)
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr
    rows = {row["arm"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert set(rows) == {"full", "w64", "w64-own", "w96-as-own"}
    assert rows["w64-own"]["state_bytes"] > 0 == rows["w64"]["state_bytes"]
    assert not _alive(out)

    # A server that dies ends the run with its log, and the answers stay.
    log = (tmp_path / "second.log").open("w")
    more = [*command, "--temperature", "1", "--epochs", "40", "--max-tokens", "900"]
    process = subprocess.Popen(more, stdout=log, stderr=log)
    while "memories" not in Path(log.name).read_text():  # what it says once it has a server
        assert process.poll() is None, Path(log.name).read_text()
        time.sleep(0.2)
    for pid in _alive(out):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=300) == 2
    said = Path(log.name).read_text()
    assert "the server ended" in said and "the same command goes on" in said
    assert not _alive(out)


def _alive(out: Path) -> list[int]:
    """Return the servers of a sweep that are still there: their log is open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if folder.readlink() == out / "server.log":
                found.append(int(re.findall(r"\d+", str(folder))[0]))
        except OSError:
            continue
    return found
