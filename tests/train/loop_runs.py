"""Short runs of GRPO's loop on a tiny model, for the tests of the loop: questions and options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.train.data.questions import Problem, QuestionStream
from pte_vllm.train.options.runs import GrpoRun
from tests.harness.models import random_tokens

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]


class Questions:
    size = 7

    def __init__(self, growth: int) -> None:
        self.growth = growth

    def problem(self, index: int) -> Problem:
        tokens = random_tokens(12 + self.growth * index, seed=index)
        return Problem(key=str(index), prompt=tokens, answer=[index], reward="exact")


def stream(growth: int = 3) -> QuestionStream:
    return QuestionStream(Questions(growth), seed=5)


def options(start: tuple[Path, Path], out: Path, **changes: Any) -> GrpoRun:
    tables: dict[str, dict[str, Any]] = {
        "model": {"base": str(start[0]), "adapter": str(start[1]), "device": "cpu"},
        "plan": {"window_tokens": 32, "block_size": 16},
        "optimizer": {"lr": 3e-3, "steps": 4, "warmup_steps": 2, "schedule": "linear"},
        "sampling": {"group_size": 3, "groups_per_step": 2, "max_tokens": 90},
        "grpo": {"inner_steps": 2},
        "data": {"source": "memory", "task": "recall"},
        "run": {"out": str(out), "save_every_steps": 2, "tensorboard": False},
    }
    for name, table in changes.items():
        tables[name] = {**tables[name], **table}
    return GrpoRun.model_validate(tables)


def weights(path: Path) -> torch.Tensor:
    return weights_of(Adapter.load(path))


def weights_of(adapter: Adapter) -> torch.Tensor:
    return torch.cat([b.flatten() for b in adapter.lora_b.values()])
