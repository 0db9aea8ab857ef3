"""The tests kill this trainer; the server it talks to outlives it on disk."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

from pte_vllm.adapter.format import Adapter  # noqa: E402
from pte_vllm.train.data.questions import Problem, QuestionStream  # noqa: E402
from pte_vllm.train.grpo import learner, loop, sampling  # noqa: E402, F401 (a run imports them)
from pte_vllm.train.options.runs import GrpoRun  # noqa: E402
from pte_vllm.train.run.checkpoint import Checkpoints, RunState, read_state  # noqa: E402
from tests.faults.killing import EVENT  # noqa: E402
from tests.harness.models import random_tokens  # noqa: E402
from tests.train.fake_server import FakeServer  # noqa: E402


class Questions:
    size = 5

    def problem(self, index: int) -> Problem:
        tokens = random_tokens(12 + 3 * index, seed=index)
        return Problem(key=str(index), prompt=tokens, answer=[index], reward="exact")


class LastingServer(FakeServer):
    """Versions are kept in `directory`; what was pushed is there whoever dies then.

    Args:
        base: directory of the base model.
        directory: versions by number.
    """

    def __init__(self, base: Path, directory: Path) -> None:
        super().__init__(base)
        self._directory = directory
        for number in pushed(directory):
            self.versions.setdefault("policy", {})[number] = Adapter.load(directory / str(number))

    def push(self, adapter: Adapter, name: str, version: int | None = None) -> int:
        sys.audit(EVENT)  # killed before the server has it
        number = super().push(adapter, name, version)
        torn = self._directory / "incoming"
        shutil.rmtree(torn, ignore_errors=True)  # of a push that was killed
        adapter.save(torn)
        torn.rename(self._directory / str(number))
        sys.audit(EVENT)  # killed before the trainer knows that it has
        return number


def pushed(directory: Path) -> list[int]:
    """Return the versions that the server has."""
    if not directory.exists():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def train(base: Path, adapter: Path, out: Path, served: Path) -> None:
    """Run three steps of GRPO with a checkpoint after each, and keep the newest."""
    # Answers are random, so what earns is set here: the first token's lowest bits.
    sampling.score = lambda problem, text, ids, stopped: (ids[0] % 4) / 3
    tables: dict[str, dict[str, Any]] = {
        "model": {"base": str(base), "adapter": str(adapter), "device": "cpu"},
        "plan": {"window_tokens": 32, "block_size": 16},
        "optimizer": {"lr": 3e-3, "steps": 3, "warmup_steps": 2, "schedule": "linear"},
        "sampling": {"group_size": 3, "groups_per_step": 1, "max_tokens": 61},
        "data": {"source": "memory", "task": "recall"},
        "run": {
            "out": str(out),
            "save_every_steps": 1,
            "keep_checkpoints": 1,
            "tensorboard": False,
        },
    }
    run = GrpoRun.model_validate(tables)
    assert loop.train(run, LastingServer(base, served), stream=QuestionStream(Questions(), seed=5))


def save_again(adapter: Path, directory: Path) -> None:
    """Save a checkpoint of step 7 under the next version, in place of the one that is there."""
    checkpoints = Checkpoints(directory, keep=1)
    newest = checkpoints.newest()
    version = read_state(newest).version + 1 if newest is not None else 1
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    state = RunState(step=7, version=version, stream={"drawn": 2})
    checkpoints.save(state, Adapter.load(adapter), optimizer)
