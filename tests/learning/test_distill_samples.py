"""Distillation on answers of a real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pte_vllm.train.distill.loop import train
from pte_vllm.train.options.runs import DistillRun
from pte_vllm.wire.rollout import Rollout
from tests.harness.server import Server

Tiny = Callable[[str], Path]


@pytest.mark.slow
def test_answers_of_the_base_model(tiny: Tiny, tmp_path: Path) -> None:
    path, out, questions = tiny("llama"), tmp_path / "out", tmp_path / "questions.jsonl"
    lines = [{"prompt": f"Question {i}?", "answer": "none"} for i in range(3)]
    lines.append({"prompt": list(range(5, 45)), "answer": [1], "pin_tokens": 7})
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Server(path, {}, log=tmp_path / "server.log") as server:
        server.wait_ready()
        run = DistillRun.model_validate(
            {
                "model": {"base": str(path)},
                "adapter": {"rank": 4, "rule": "ridge"},
                "plan": {"window_tokens": 64, "block_size": 32},
                "optimizer": {"steps": 2},
                "distill": {
                    "data": "samples",
                    "max_sequences": 8,
                    "batch_sequences": 3,
                    "eval_sequences": 1,
                },
                "data": {"source": "jsonl", "path": str(questions), "chat": False},
                "sampling": {"max_tokens": 220, "group_size": 2},
                "server": {"url": server.url},
                "run": {"out": str(out), "tensorboard": False, "save_every_steps": 1},
            }
        )
        records = train(run)
        server.wait_idle()
    samples = (out / "samples.jsonl").read_text()
    rollouts = [Rollout.from_json(line) for line in samples.splitlines()]
    assert len(rollouts) == 8 and {r.index for r in rollouts} == {0, 1}
    assert len({r.completion_ids for r in rollouts}) == 8
    assert all(r.adapter is None and r.plan.window_tokens == 0 for r in rollouts)
    assert sorted({r.plan.pin_tokens for r in rollouts}) == [7, 11]
    assert records[-1]["step"] == 2 and records[-1]["kl"] > 0
    # The server is gone; the answers are there.
    longer = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"steps": 3})})
    assert train(longer)[-1]["step"] == 3
    assert (out / "samples.jsonl").read_text() == samples
