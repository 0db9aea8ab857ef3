"""`pte-vllm serve` and `pte-vllm train grpo` as two processes: run, killed, restarted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.launch import ProcessGroup, pte_command
from pte_vllm.train.run.log import read_metrics
from tests.harness.engine import BLOCK
from tests.harness.models import random_tokens
from tests.harness.server import WINDOW, Server

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]

MAX_TOKENS = 3 * WINDOW
TIMEOUT_S = 900.0


def write_questions(path: Path) -> None:
    """Answers of random tokens: some rollouts happen to match a few, and earn a little."""
    with path.open("w") as file:
        for i in range(50):
            record = {
                "prompt": random_tokens(11 + i, seed=i),
                "answer": random_tokens(MAX_TOKENS, seed=1000 + i),
            }
            file.write(json.dumps(record) + "\n")


def command(
    server: Server, start: Path, out: Path, steps: int, *, window: int | str = WINDOW
) -> list[str]:
    questions = out.with_suffix(".jsonl")
    if not questions.exists():
        write_questions(questions)
    options = {
        "model.base": server.model,
        "model.adapter": start,
        "model.device": "cpu",
        "plan.window_tokens": window,
        "plan.block_size": BLOCK,
        "optimizer.lr": 1e-3,
        "optimizer.steps": steps,
        "sampling.max_tokens": MAX_TOKENS,
        "sampling.group_size": 4,
        "sampling.groups_per_step": 2,
        "sampling.temperature": 0.9,
        "server.url": server.url,
        "data.source": "jsonl",
        "data.path": questions,
        "data.reward": "memory",
        "run.out": out,
        "run.save_every_steps": 2,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return pte_command("train", "grpo", *flags)


def check_run(out: Path, start: Path, steps: int) -> list[dict[str, float]]:
    """Every step was made once, on the policy that sampled it, with versions that only rise."""
    records = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, steps + 1))
    versions = [r["version"] for r in records]
    assert versions == sorted(set(versions))
    for record in records:
        assert record["drift"] <= 1e-4 and record["drift_tokens"] > 0
        assert record["folds"] > 2 and record["ratio_off"] <= 1e-6
    assert any(record["grad_norm"] > 0 for record in records)
    before, after = Adapter.load(start), Adapter.load(out / "adapter")
    assert all(not torch.equal(after.lora_b[name], b) for name, b in before.lora_b.items())
    worst = max(r["drift"] for r in records)
    print(f"{steps} steps, versions {versions}, largest drift {worst:.1e}")
    return records


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["paper", "ridge", "delta", "ridge squared", "plain"])
def test_a_few_steps(rule: str, tiny: Tiny, adapters: Adapters, tmp_path: Path) -> None:
    path, out, steps = tiny("qwen3"), tmp_path / "run", 3
    window = "prompt" if rule == "paper" else WINDOW
    name, _, features = rule.partition(" ")
    start = (
        adapters(path, plain=True, rank=8)
        if rule == "plain"
        else adapters(path, rank=8, rule=name, keys="unrotated", features=features or "linear")
    )
    with Server(path, {}, log=tmp_path / "server.log") as server:
        server.wait_ready()
        words = command(server, start, out, steps, window=window)
        with ProcessGroup(words, log=tmp_path / "log") as trainer:
            trainer.wait_exit(timeout_s=TIMEOUT_S)
        (listed,) = server.get("/pte/v1/adapters")["adapters"]
        server.wait_idle()
    records = check_run(out, start, steps)
    windows = [r["window_tokens"] for r in records]
    assert windows == [2 * BLOCK if rule == "paper" else WINDOW] * steps  # questions of 11 to 60
    assert listed["newest"] == steps + 1 == records[-1]["version"]
    assert (out / "training.png").exists() and list((out / "tensorboard").iterdir())


@pytest.mark.slow
def test_kill_nine(tiny: Tiny, adapters: Adapters, tmp_path: Path) -> None:
    path, out, steps = tiny("llama"), tmp_path / "run", 8
    start, spool = adapters(path, rank=8, rule="paper"), tmp_path / "spool"
    server = Server(path, {}, log=tmp_path / "server.log", flags=["--pte-spool", str(spool)])
    words = command(server, start, out, steps)

    def done(count: int) -> Callable[[], bool]:
        return lambda: len(read_metrics(out / "metrics.jsonl")) >= count

    with server:
        server.wait_ready()
        with ProcessGroup(words, log=tmp_path / "first.log") as trainer:
            trainer.wait_until(done(2), timeout_s=TIMEOUT_S)
            server.kill()
            shutil.rmtree(spool)  # it comes back without the adapter
            server.__enter__()
            server.wait_ready()
            trainer.wait_until(done(5), timeout_s=TIMEOUT_S)
            assert trainer._process is not None
            os.killpg(trainer._process.pid, signal.SIGKILL)
        before = read_metrics(out / "metrics.jsonl")
        with ProcessGroup(words, log=tmp_path / "second.log") as trainer:
            trainer.wait_exit(timeout_s=TIMEOUT_S)
    assert "going on after step" in (tmp_path / "second.log").read_text()
    records = check_run(out, start, steps)
    assert before[:4] == records[:4]
    assert records[-1]["version"] > steps + 1  # the resumed run skipped what was there


@pytest.mark.slow
def test_sigterm_saves(tiny: Tiny, adapters: Adapters, tmp_path: Path) -> None:
    path, out = tiny("llama"), tmp_path / "run"
    start = adapters(path, rank=8, rule="paper")
    with Server(path, {}, log=tmp_path / "server.log") as server:
        server.wait_ready()
        with ProcessGroup(command(server, start, out, 500), log=tmp_path / "log") as trainer:
            trainer.wait_until(
                lambda: len(read_metrics(out / "metrics.jsonl")) >= 1, timeout_s=TIMEOUT_S
            )
            assert trainer._process is not None
            os.kill(trainer._process.pid, signal.SIGTERM)
            assert trainer._process.wait(TIMEOUT_S) == 130
        server.wait_idle()
    last = read_metrics(out / "metrics.jsonl")[-1]["step"]
    assert (out / f"checkpoints/step-{last:06.0f}/state.json").exists()
    assert "the same command goes on" in (tmp_path / "log").read_text()
