"""`pte-vllm train distill`: a warm start for an adapter, without rewards (see `distill.step`).

    OUT/run.toml        every option, as resolved
    OUT/samples.jsonl   answers of the base model, with distill.data samples
    OUT/probes.safetensors, probes.json   trained probes, with keep.steps, and what training found
    OUT/checkpoints/    the newest ones (`run.checkpoint` says what they hold)
    OUT/metrics.jsonl   numbers by step, measurements on held-out sequences among them
    OUT/distill.png     KL by step
    OUT/adapter/        after the last step

A run that was interrupted goes on from its newest checkpoint with the same command.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pte_vllm.adapter.sample_text import SAMPLE_TEXT
from pte_vllm.train.distill.examples import Example, batches, pack, read_rollouts, read_texts
from pte_vllm.train.distill.keep_stage import train_keep
from pte_vllm.train.distill.samples import sample_answers
from pte_vllm.train.distill.step import Evaluation, evaluate, take_step
from pte_vllm.train.options.runs import DistillRun
from pte_vllm.train.run.build import build_keeper
from pte_vllm.train.run.checkpoint import RunState
from pte_vllm.train.run.log import MetricsLog, ProgressBar, series
from pte_vllm.train.run.resume import resumed
from pte_vllm.train.run.start import ADAPTER, StartedRun, learning_rate, load_tokenizer, start_run
from pte_vllm.wire.client import ServerError

SAMPLES_FILE, PLOT_FILE = "samples.jsonl", "distill.png"


def main(run: DistillRun) -> int:
    """Train or go on; what stops it is said in a line. Returns the exit status."""
    try:
        train(run)
    except (ServerError, FloatingPointError) as error:
        print(f"pte-vllm: error: {error}", file=sys.stderr)
        return 2
    return 0


def load_examples(run: DistillRun, tokenizer: Any, console: Console) -> list[Example]:
    """Load what the run is trained and measured on, in a fixed order.

    Raises:
        ValueError: naming the option, if there is too little of it.
        OSError: if a source cannot be read.
    """
    options = run.distill
    if options.data == "text":
        if tokenizer is None:
            raise ValueError(
                f"--model.base {run.model.base} has no tokenizer for --distill.data text"
            )
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
    """Split examples into those to train on and those held out, which are spread over the whole.

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


def train(run: DistillRun) -> list[dict[str, float]]:
    """Distil, from the newest checkpoint on if there is one; returns the metrics by step.

    Raises:
        ValueError: naming the option, if one does not fit.
        OSError: if a file cannot be read or written.
        ServerError: if answers are to be sampled, and the server refuses or stays away.
        FloatingPointError: if a gradient is not finite.
    """
    run = resumed(run)
    console = Console(stderr=True, highlight=False)
    directory, tokenizer = run.run.directory, load_tokenizer(run.model.base)
    examples, held_out = hold_out(
        load_examples(run, tokenizer, console), run.distill.eval_sequences
    )
    console.print(f"{len(examples)} sequences to train on, {len(held_out)} held out")
    start = start_run(run)
    done = start.state.step
    if start.resumed:
        console.print(f"going on after step {done}")
    if run.keep.steps and not start.resumed:
        train_keep(run, start.model, examples, console)
    metrics = MetricsLog(directory, step=done, tensorboard=run.run.tensorboard)
    try:
        _run_steps(run, start, examples, held_out, metrics, console)
    finally:
        metrics.close()
        if metrics.records:
            plot(metrics.records, directory / PLOT_FILE)
    start.model.save_pretrained(directory / ADAPTER)
    console.print(f"wrote {directory / ADAPTER}", soft_wrap=True)
    return metrics.records


def _run_steps(
    run: DistillRun,
    start: StartedRun,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    metrics: MetricsLog,
    console: Console,
) -> None:
    model, optimizer, done = start.model, start.optimizer, start.state.step
    options, last = run.distill, run.optimizer.steps
    keeper = build_keeper(model, run.plan)
    stream = batches(examples, options.batch_sequences, seed=run.run.seed, start=done)
    with ProgressBar(console, title="distill", done=done, total=last) as bar:

        def measure(step: int) -> dict[str, float]:
            if not held_out:
                return {}
            found = evaluate(
                model,
                held_out,
                micro_batch_sequences=options.micro_batch_sequences,
                keeper=keeper,
            )
            bar.note(f"step {step}: {describe(found)}")
            return {f"eval/{name}": value for name, value in found.as_metrics().items()}

        if not done:
            metrics.add(0, measure(0))
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
                keeper=keeper,
            )
            speed = report.tokens / (time.monotonic() - began)
            values = {**report.as_metrics(), "lr": rate, "tokens_per_s": speed}
            bar.update(step, values)
            every = options.eval_every_steps
            if step == last or (every and step % every == 0):
                values |= measure(step)
            if step == last or step % run.run.log_every_steps == 0 or "eval/tokens" in values:
                metrics.add(step, values)
            if step == last or step % run.run.save_every_steps == 0:
                state = RunState(step=step, version=0, stream={})  # the step says which data
                start.checkpoints.save(state, model.adapter(), optimizer)


def describe(found: Evaluation) -> str:
    """Write a measurement in one line."""
    full, window, student = found.perplexities
    return (
        f"perplexity beyond the first fold: full {full:.3f}, window {window:.3f}, student "
        f"{student:.3f}; KL to full: window {found.kl_window:.4f}, student "
        f"{found.kl_student:.4f} ({found.tokens} tokens)"
    )


def plot(records: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot the KL of every step, and that of window and student where held out, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(*series(records, "kl"), color="tab:gray", linewidth=1, label="training batch")
    for name, label, color in (
        ("eval/kl_window", "held out: window only", "tab:red"),
        ("eval/kl_student", "held out: student", "tab:blue"),
    ):
        axes.plot(*series(records, name), color=color, marker="o", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("KL to full attention, nats a token")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
