"""The stage `keep` of a distillation: the probes are trained before the adapter's weights.

    OUT/probes.safetensors   the trained probes; the adapter brings them from then on
    OUT/probes.json          what training found

A run that is interrupted after it does not repeat it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pte_vllm.adapter.counter import counters
from pte_vllm.adapter.format import ModelShape
from pte_vllm.adapter.probe_training import train_probes
from pte_vllm.adapter.probes import Probes, ProbesError
from pte_vllm.train.distill.examples import Example
from pte_vllm.train.options.runs import DistillRun
from pte_vllm.train.replay.modeling import PTEModel

PROBES_FILE, REPORT_FILE = "probes.safetensors", "probes.json"


def train_keep(
    run: DistillRun, model: PTEModel, examples: Sequence[Example], console: Console
) -> None:
    """Give the model's adapter probes of its own, trained on examples, or read where they are.

    Raises:
        ValueError: naming the option, if the probes to start from cannot be read, or if too few
            examples are long enough.
        FloatingPointError: if the loss is not finite.
    """
    path, options = run.run.directory / PROBES_FILE, run.keep
    if path.exists():
        model.take_probes(Probes.load(path))
        return
    assert run.plan.probes is not None
    try:
        start = Probes.load(run.plan.probes)
        ModelShape.from_hf(model.base.config).check_probes(start)
    except ProbesError as error:
        raise ValueError(f"--plan.probes: {error}") from error
    count = start.queries.shape[2]
    if options.probes > count:
        raise ValueError(
            f"--keep.probes {options.probes}: {run.plan.probes} has {count} for each KV head; "
            "`pte-vllm adapter calibrate --probes N` makes more"
        )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
        ) as progress,
        model.adapter_disabled(),
    ):
        queries, report = train_probes(
            model.base,
            [(example.tokens, example.plan) for example in examples[: options.max_sequences]],
            start.queries[:, :, : options.probes or None],
            steps=options.steps,
            lr=options.lr,
            batch_folds=options.batch_folds,
            seed=run.run.seed,
            progress=counters(progress, "keep"),
        )
    probes = Probes.of(queries, start.model_hash)
    text = json.dumps(asdict(report), indent=1) + "\n"
    (run.run.directory / REPORT_FILE).write_text(text, encoding="utf-8")
    probes.save(path)
    model.take_probes(probes)
    console.print(report.in_words())
