"""What every run starts with: its newest checkpoint, its model, its optimizer.

OUT/run.toml        every option, as resolved
OUT/checkpoints/    the newest ones (`run.checkpoint` says what they hold)
OUT/adapter/        after the last step
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pte_vllm.train.options.runs import DistillRun, GrpoRun
from pte_vllm.train.options.sections import OptimizerOptions
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.run.build import build_model
from pte_vllm.train.run.checkpoint import (
    Checkpoints,
    RunState,
    adapter_directory,
    read_state,
    restore,
)
from pte_vllm.train.run.resume import save_options

ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class StartedRun:
    """A run that is ready for its next step."""

    checkpoints: Checkpoints
    state: RunState
    """Where the newest checkpoint stood; step 0 where there is none."""
    resumed: bool
    model: PTEModel
    optimizer: torch.optim.Optimizer


def start_run(run: GrpoRun | DistillRun) -> StartedRun:
    """Begin a run, or go on after its newest checkpoint; writes OUT/run.toml.

    Args:
        run: the options, as `resumed` returns them.

    Raises:
        ValueError: naming the option, if one does not fit.
        OSError: if a file cannot be read or written.
    """
    directory = run.run.directory
    checkpoints = Checkpoints(directory, keep=run.run.keep_checkpoints)
    checkpoints.tidy()
    newest = checkpoints.newest()
    if newest is not None and not run.run.resume:
        raise ValueError(f"--run.out {run.run.out} holds checkpoints, and --run.resume is false")
    torch.manual_seed(run.run.seed)
    model = build_model(
        run.model,
        run.adapter,
        seed=run.run.seed,
        start=adapter_directory(newest) if newest else None,
    )
    optimizer = torch.optim.AdamW(
        model.trainable_parameters(),
        lr=run.optimizer.lr,
        betas=run.optimizer.betas,
        weight_decay=run.optimizer.weight_decay,
    )
    save_options(run)
    if newest is not None:
        restore(newest, optimizer)
        for group in optimizer.param_groups:  # whose options came from the checkpoint, too
            group |= {"betas": run.optimizer.betas, "weight_decay": run.optimizer.weight_decay}
    return StartedRun(
        checkpoints=checkpoints,
        state=read_state(newest) if newest else RunState(step=0, version=0, stream={}),
        resumed=newest is not None,
        model=model,
        optimizer=optimizer,
    )


def load_tokenizer(base: str) -> Any:
    """Load the base model's tokenizer; None if its directory holds none, as generated models do."""
    if Path(base).is_dir() and not any(Path(base).glob("*token*")):
        return None
    return AutoTokenizer.from_pretrained(base)


def learning_rate(options: OptimizerOptions, steps_done: int) -> float:
    """Return the learning rate of the next step: a linear warm-up, then the schedule."""
    if steps_done < options.warmup_steps:
        return options.lr * (steps_done + 1) / options.warmup_steps
    part = (steps_done - options.warmup_steps) / max(options.steps - options.warmup_steps, 1)
    shape = {"constant": 1.0, "linear": 1.0 - part, "cosine": 0.5 * (1 + math.cos(math.pi * part))}
    return options.lr * shape[options.schedule]
