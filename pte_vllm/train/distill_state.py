"""What a distillation keeps on disk: checkpoints to resume from, and the record of its metrics.

OUT/run.toml                    every option, defaults included
OUT/checkpoints/step-000010/    adapter/ as a server loads it, state.pt for the optimizer
OUT/metrics.jsonl               one object a step; measurements among them
OUT/adapter/                    after the last step
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from pte_vllm.adapter import Adapter

CHECKPOINTS, ADAPTER, METRICS_FILE = "checkpoints", "adapter", "metrics.jsonl"
_STATE_FILE = "state.pt"


class Checkpoints:
    """Checkpoints of one run; a directory appears whole or not at all.

    Args:
        directory: of the run.
        keep: newest ones that stay.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._root, self._keep = directory / CHECKPOINTS, keep

    def steps(self) -> list[int]:
        """Steps after which there is a checkpoint, ascending."""
        return sorted(int(p.name.removeprefix("step-")) for p in self._root.glob("step-*"))

    def save(self, step: int, adapter: Adapter, optimizer: torch.optim.Optimizer) -> Path:
        """Write the state after `step` steps, and remove those that are too old."""
        self._root.mkdir(parents=True, exist_ok=True)
        draft = self._root / f".draft-{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        adapter.save(draft / ADAPTER)
        torch.save(optimizer.state_dict(), draft / _STATE_FILE)
        path = self._path(step)
        shutil.rmtree(path, ignore_errors=True)
        draft.rename(path)
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self._path(old))
        return path

    def adapter(self, step: int) -> Path:
        """Directory of a checkpoint's adapter."""
        return self._path(step) / ADAPTER

    def restore(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer its state back; its parameters must be the checkpoint's."""
        state: Any = torch.load(self._path(step) / _STATE_FILE, weights_only=True)
        optimizer.load_state_dict(state)

    def _path(self, step: int) -> Path:
        return self._root / f"step-{step:06d}"


class Metrics:
    """Numbers by step, in a file of JSON lines and, if asked for, in TensorBoard.

    Args:
        directory: of the run.
        step: steps done; records of later ones, from before an interruption, are dropped.
        tensorboard: also write events.
    """

    def __init__(self, directory: Path, *, step: int, tensorboard: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / METRICS_FILE
        self.records: list[dict[str, float]] = []
        if step and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            self.records = [r for r in map(json.loads, lines) if r["step"] <= step]
        self._path.write_text("".join(_line(r) for r in self.records), encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        record = {"step": step, **values}
        self.records.append(record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one number."""
        pairs = [(int(r["step"]), r[name]) for r in self.records if name in r]
        return [s for s, _ in pairs], [v for _, v in pairs]

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _line(record: dict[str, float]) -> str:
    return json.dumps(record) + "\n"
