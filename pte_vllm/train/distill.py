"""`pte-vllm train distill`: a warm start for an adapter, without rewards (see `distill_step`)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import AutoTokenizer

from pte_vllm.sample_text import SAMPLE_TEXT
from pte_vllm.train.build import build_model
from pte_vllm.train.config import DistillRun, OptimizerOptions
from pte_vllm.train.distill_data import Example, batches, pack, read_rollouts, read_texts
from pte_vllm.train.distill_samples import sample_answers
from pte_vllm.train.distill_state import ADAPTER, Checkpoints, Metrics
from pte_vllm.train.distill_step import Evaluation, evaluate, take_step
from pte_vllm.train.modeling import PTEModel

SAMPLES_FILE = "samples.jsonl"


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm train distill [RUN.toml] [--section.option VALUE ...]`."""
    train(DistillRun.parse(arguments, prog="pte-vllm train distill"))
    return 0


def load_examples(run: DistillRun, tokenizer: Any, console: Console) -> list[Example]:
    """What the run is trained and measured on, in a fixed order.

    Raises:
        ValueError: naming the option, if there is too little of it.
        OSError: if a source cannot be read.
    """
    options = run.distill
    if options.data == "text":
        if options.text is None:
            texts: Iterator[str] = iter([SAMPLE_TEXT])
        else:
            texts = read_texts(options.text, split=options.text_split, field=options.text_field)
        return pack(
            texts,
            tokenizer,
            run.plan.fold_plan(pin_tokens=options.pin_tokens),
            sequence_tokens=options.sequence_tokens,
            max_sequences=options.max_sequences,
        )
    if options.data == "rollouts":
        assert options.rollouts is not None
        path = Path(options.rollouts)
    else:
        path = run.run.directory / SAMPLES_FILE
        if not path.exists():
            sample_answers(run, tokenizer, path, console)
    with path.open(encoding="utf-8") as lines:
        examples = read_rollouts(
            lines,
            lambda pin_tokens: run.plan.fold_plan(pin_tokens=pin_tokens),
            max_sequences=options.max_sequences,
        )
    if not examples:
        raise ValueError(f"{path}: no answer reaches beyond its first fold")
    return examples


def hold_out(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, the latter spread over the whole.

    Raises:
        ValueError: if nothing would be left to train on.
    """
    if count >= len(examples):
        raise ValueError(
            f"--distill.eval_sequences {count} leaves nothing of {len(examples)} sequences to "
            "train on"
        )
    held = {i * len(examples) // count for i in range(count)}
    return (
        [e for i, e in enumerate(examples) if i not in held],
        [e for i, e in enumerate(examples) if i in held],
    )


def learning_rate(options: OptimizerOptions, step: int) -> float:
    """Of the step that follows `step` others: a linear warm-up, then the schedule."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(options.steps - options.warmup_steps, 1)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return options.lr * shape[options.schedule]


def train(run: DistillRun) -> Metrics:
    """Distil, from the newest checkpoint on if there is one; returns what was measured.

    Raises:
        ValueError: naming the option, if one does not fit.
        OSError: if a file cannot be read or written.
        FloatingPointError: if a gradient is not finite.
    """
    console = Console(stderr=True, highlight=False)
    directory, options = run.run.directory, run.distill
    checkpoints = Checkpoints(directory, keep=run.run.keep_checkpoints)
    done = _steps_done(run, checkpoints)
    run.save(directory / "run.toml")
    tokenizer = AutoTokenizer.from_pretrained(run.model.base)
    examples, held_out = hold_out(load_examples(run, tokenizer, console), options.eval_sequences)
    console.print(f"{len(examples)} sequences to train on, {len(held_out)} held out")
    model = build_model(
        run.model,
        run.adapter,
        seed=run.run.seed,
        start=checkpoints.adapter(done) if done else None,
    )
    optimizer = torch.optim.AdamW(
        model.trainable_parameters(),
        lr=run.optimizer.lr,
        betas=run.optimizer.betas,
        weight_decay=run.optimizer.weight_decay,
    )
    if done:
        checkpoints.restore(done, optimizer)
        console.print(f"going on after step {done}")
    metrics = Metrics(directory, step=done, tensorboard=run.run.tensorboard)
    try:
        _steps(run, model, optimizer, examples, held_out, checkpoints, metrics, done, console)
    finally:
        metrics.close()
    model.save_pretrained(directory / ADAPTER)
    plot(metrics, directory / "distill.png")
    console.print(f"wrote {directory / ADAPTER}", soft_wrap=True)
    return metrics


def _steps_done(run: DistillRun, checkpoints: Checkpoints) -> int:
    steps = checkpoints.steps()
    if steps and not run.run.resume:
        raise ValueError(
            f"--run.out {run.run.out} holds checkpoints, and --run.resume is false; "
            "give another directory"
        )
    return steps[-1] if steps else 0


def _steps(
    run: DistillRun,
    model: PTEModel,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    checkpoints: Checkpoints,
    metrics: Metrics,
    done: int,
    console: Console,
) -> None:
    options, last = run.distill, run.optimizer.steps

    def measure(step: int) -> None:
        if not held_out:
            return
        found = evaluate(model, held_out, micro_batch_sequences=options.micro_batch_sequences)
        metrics.add(step, {f"eval/{k}": v for k, v in found.as_metrics().items()})
        console.print(_summary(step, found), soft_wrap=True)

    if not done:
        measure(0)
    stream = batches(examples, options.batch_sequences, seed=run.run.seed, start=done)
    with _progress(console) as progress:
        task = progress.add_task("distill", total=last, completed=done, shown="")
        for step in range(done + 1, last + 1):
            rate, began = learning_rate(run.optimizer, step - 1), time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = rate
            report = take_step(
                model,
                optimizer,
                next(stream),
                max_grad_norm=run.optimizer.max_grad_norm,
                micro_batch_sequences=options.micro_batch_sequences,
                temperature=options.temperature,
                teacher_top_k=options.teacher_top_k,
            )
            speed = report.tokens / (time.monotonic() - began)
            if step % run.run.log_every_steps == 0 or step == last:
                metrics.add(step, {**report.as_metrics(), "lr": rate, "tokens_per_s": speed})
            progress.update(
                task,
                advance=1,
                shown=f"KL {report.loss:.4f} · {report.folds} folds · {speed:.0f} tok/s",
            )
            every = options.eval_every_steps
            if step == last or (every and step % every == 0):
                measure(step)
            if step == last or step % run.run.save_every_steps == 0:
                checkpoints.save(step, model.adapter(), optimizer)


def _summary(step: int, found: Evaluation) -> str:
    full, window, student = found.perplexities
    return (
        f"step {step}: perplexity beyond the first fold: full {full:.3f}, window {window:.3f}, "
        f"student {student:.3f}; KL to full: window {found.kl_window:.4f}, "
        f"student {found.kl_student:.4f} ({found.tokens} tokens)"
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
        console=console,
    )


def plot(metrics: Metrics, path: Path) -> None:
    """The KL of every step, and the held-out KL of window and student."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(*metrics.series("loss"), color="tab:gray", linewidth=1, label="training batch")
    for name, label, color in (
        ("eval/kl_window", "held out: window only", "tab:red"),
        ("eval/kl_student", "held out: student", "tab:blue"),
    ):
        axes.plot(*metrics.series(name), color=color, marker="o", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("KL to full attention, nats a token")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
