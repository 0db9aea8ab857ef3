"""Checkpoints of a run: a directory is whole or absent, whenever the process dies.

OUT/checkpoints/step-000010/
    adapter/          as a server loads it
    optimizer.pt      its state_dict
    rng.safetensors   states of torch's generators
    state.json        step, version of the adapter, position in the data

A later one of the same step is `step-000010.1` and so on: the earlier stays until it is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pte_vllm.adapter.format import Adapter

_ADAPTER, _OPTIMIZER, _RNG, _STATE = "adapter", "optimizer.pt", "rng.safetensors", "state.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")
_DRAFT = ".draft-"
"""Begins the name of what is not a checkpoint yet, or no longer."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands."""

    step: int
    """How many steps are done."""
    version: int
    """The newest version of the adapter that was pushed; 0: none was."""
    stream: dict[str, int]
    """The position in the data, as `QuestionStream.state` returns it; empty without a stream."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: the run's directory; checkpoints lie in `checkpoints` below it.
        keep: how many of the newest stay.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._root, self._keep = directory / "checkpoints", keep

    def newest(self) -> Path | None:
        """Return the directory of the newest whole checkpoint; None if there is none."""
        found = self._all()
        return found[-1] if found else None

    def tidy(self) -> None:
        """Remove what is too old, and what a process that was killed left behind."""
        for left_over in self._root.glob(f"{_DRAFT}*"):
            shutil.rmtree(left_over)
        by_step = {_order(path)[0]: path for path in self._all()}  # the last of each step
        kept = list(by_step.values())[-self._keep :]
        for path in self._all():
            if path not in kept:
                self._remove(path)

    def save(self, state: RunState, adapter: Adapter, optimizer: torch.optim.Optimizer) -> Path:
        """Write a checkpoint, then remove those that are too old.

        Nothing is written if the newest is of the same state.
        """
        newest = self.newest()
        if newest is not None and read_state(newest) == state:
            return newest
        self.tidy()
        self._root.mkdir(parents=True, exist_ok=True)
        draft = self._root / f"{_DRAFT}{os.getpid()}"
        adapter.save(draft / _ADAPTER)
        torch.save(optimizer.state_dict(), draft / _OPTIMIZER)
        save_file(_rng_states(), draft / _RNG)
        record = {"format": _FORMAT, **asdict(state)}
        (draft / _STATE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for path in (*draft.rglob("*"), draft):
            _sync(path)
        same_step = [path for path in self._all() if _order(path)[0] == state.step]
        edition = f".{_order(same_step[-1])[1] + 1}" if same_step else ""
        target = self._root / f"step-{state.step:06d}{edition}"
        draft.rename(target)
        _sync(self._root)
        self.tidy()
        return target

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint, renamed first: half of one must not look like a whole one."""
        gone = path.rename(self._root / f"{_DRAFT}{path.name}")
        shutil.rmtree(gone)

    def _all(self) -> list[Path]:
        """Return the directories of all whole checkpoints, from old to new."""
        found = self._root.glob("step-*")
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_order)


def _order(path: Path) -> tuple[int, int]:
    """Return the step of a checkpoint, and which checkpoint of that step it is."""
    name = _NAME.fullmatch(path.name)
    assert name is not None, path
    return int(name[1]), int(name[2] or 0)


def read_state(path: Path) -> RunState:
    """Read where the run stood.

    Raises:
        ValueError: if the checkpoint is of another format.
    """
    record: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
    if record.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version")
    return RunState(**record)


def adapter_directory(path: Path) -> Path:
    """Return the directory of a checkpoint's adapter."""
    return path / _ADAPTER


def restore(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer and torch's generators their states back.

    Args:
        path: the checkpoint's directory.
        optimizer: an optimizer over the same parameters, which hold the checkpoint's adapter
            already.
    """
    optimizer.load_state_dict(torch.load(path / _OPTIMIZER, weights_only=True))
    states = load_file(path / _RNG)
    torch.set_rng_state(states["cpu"])
    cuda = [states[name] for name in sorted(states) if name.startswith("cuda.")]
    if cuda and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def _rng_states() -> dict[str, torch.Tensor]:
    """Return the states of torch's generators: `cpu`, and `cuda.00` and so on."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{i:02d}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _sync(path: Path) -> None:
    """Wait until the disk holds a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
