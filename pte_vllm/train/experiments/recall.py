"""`pte-vllm train experiment recall`: a real model learns to recall what left its window.

Every arm starts from the same frozen model and trains its adapter with the same budget, on the
digits of facts stated before the window (`recall_task`). It is scored on held-out sequences.
Results are written arm by arm, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pte_vllm.adapter.counter import counter
from pte_vllm.adapter.defaults import parse_layers
from pte_vllm.models.location import check_model
from pte_vllm.train.data.ledger import NAMES
from pte_vllm.train.experiments.recall_arms import ARMS, KNOWN
from pte_vllm.train.experiments.recall_parts import (
    TRAIN_TEXT_BATCH,
    keeper_of,
    perplexity,
    plan_of,
    training_text,
)
from pte_vllm.train.experiments.workers import tell, workers

if TYPE_CHECKING:
    from pte_vllm.train.experiments.recall_task import RecallSequence

_POLL_S = 0.5
"""How often to look what the arms have done."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pte-vllm train experiment recall",
        description="A real model learns to recall in plain text what left its window.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="directory of SmolLM2-135M, or its like")
    names = ", ".join(KNOWN)
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of: {names}")
    parser.add_argument("--layers", default="17,18,20-24", help="layers that get an adapter")
    parser.add_argument(
        "--adapter",
        default="",
        metavar="DIR",
        help="start all arms that are trained from this adapter; with --steps 0 it is scored only",
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--train-tokens", default="160,224,288", help="lengths trained on")
    parser.add_argument("--eval-tokens", default="224,320,424,800", help="lengths scored")
    parser.add_argument(
        "--task",
        choices=("facts", "ledger"),
        default="facts",
        help="facts in text, or long answers that look up what they wrote before; the lengths are "
        "those of the answers then, and the facts are the people",
    )
    parser.add_argument("--facts", type=int, default=3, help="of a sequence that is scored")
    parser.add_argument("--train-facts", default="", help="trained on, such as 3,6; or as --facts")
    parser.add_argument("--eval-facts", default="", help="also score these numbers of facts")
    parser.add_argument("--eval-samples", type=int, default=48)
    parser.add_argument(
        "--eval-text",
        default="",
        metavar="PATH",
        help="ordinary text, a file or a directory, on which to measure perplexity as well",
    )
    parser.add_argument(
        "--train-text",
        default="",
        metavar="PATH",
        help="ordinary text, a file or a directory: the adapter also learns to predict it as the "
        "full cache does",
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen model")
    parser.add_argument("--jobs", type=int, default=2, help="arms at once, one thread each")
    parser.add_argument("--out", default="out/recall", metavar="DIR")
    return parser


def main(args: Sequence[str]) -> int:
    """Run the experiment; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(args)
    check_model(options.model)
    names = options.arms.split(",")
    for flag in ("adapter", "eval_text", "train_text"):
        if (path := getattr(options, flag)) and not Path(path).exists():
            parser.error(f"--{flag.replace('_', '-')}: {path} does not exist")
    if unknown := [name for name in names if name not in KNOWN]:
        parser.error(f"--arms: unknown {unknown[0]!r}; there are {', '.join(KNOWN)}")
    if options.task == "ledger":
        for flag in ("facts", "train_facts", "eval_facts"):
            if not all(2 <= n <= len(NAMES) for n in _ints(str(getattr(options, flag)))):
                name = flag.replace("_", "-")
                parser.error(f"--{name}: a ledger has 2 to {len(NAMES)} people")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed) for seed in _ints(options.seeds) for name in names]
    records = _run_all(options, jobs, out)
    from pte_vllm.train.experiments import recall_report

    print(recall_report.write(records, out))
    return 0


def _run_all(
    options: argparse.Namespace, jobs: list[tuple[str, int]], out: Path
) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress

    console, records, waiting = Console(stderr=True), [], []
    settings = {k: v for k, v in vars(options).items() if k not in ("arms", "seeds", "jobs", "out")}
    for name, seed in jobs:
        file = out / f"{name}-{seed}.json"
        found = json.loads(file.read_text()) if file.exists() else None
        if found is not None and found["settings"] == settings:
            records.append(found)
        else:
            waiting.append((name, seed, file))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the workers; more would spin
    counters: dict[str, Callable[[int], None]] = {}
    with (
        Progress(console=console, disable=not console.is_terminal) as progress,
        workers(options.jobs) as (pool, told),
    ):
        arms = progress.add_task("arms", total=len(jobs), completed=len(records))
        running: dict[Future[dict[str, Any]], Path] = {
            pool.submit(run_arm, name, seed, settings, file.with_suffix("")): file
            for name, seed, file in waiting
        }
        left = set(running)
        while left:
            done, left = wait(left, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            while not told.empty():
                title = told.get()
                if title not in counters:
                    counters[title] = counter(progress, title, settings["steps"])
                counters[title](1)
            for future in done:
                record = future.result()
                running[future].write_text(json.dumps(record, indent=1) + "\n")
                records.append(record)
                scores = ", ".join(
                    f"{n} tokens {s['accuracy']:.3f}" for n, s in record["by_length"].items()
                )
                console.print(
                    f"{record['arm']}, seed {record['seed']}: {scores} ({record['seconds']:.0f} s)"
                )
                progress.advance(arms)
    order = [name for name, _ in jobs]
    return sorted(records, key=lambda r: (order.index(r["arm"]), r["seed"]))


def run_arm(name: str, seed: int, settings: dict[str, Any], adapter: Path) -> dict[str, Any]:
    """Train and score one arm, and save what was trained; a worker tells each step."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from pte_vllm.train.experiments.recall_arms import make_model
    from pte_vllm.train.experiments.recall_ledger import LedgerTask
    from pte_vllm.train.experiments.recall_task import RecallTask
    from pte_vllm.train.experiments.supervised import Schedule, score_answers, train_answers
    from pte_vllm.train.replay.aligned import AlignedBatch
    from pte_vllm.train.replay.modeling import PTEModel

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    disable_progress_bar()
    arm = KNOWN[name]
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])

    def task(num_tokens: int, num_facts: int = settings["facts"]) -> RecallTask | LedgerTask:
        if settings["task"] == "ledger":
            return LedgerTask(tokenizer=tokenizer, num_tokens=num_tokens, people=num_facts)
        return RecallTask(tokenizer=tokenizer, num_tokens=num_tokens, num_facts=num_facts)

    def least_tokens(num_facts: int) -> int:
        """Return a length with room for so many facts, their questions and a little filler."""
        return 48 + 18 * num_facts if settings["task"] == "facts" else 0

    plan = plan_of(arm)

    def batch_of(samples: list[RecallSequence], *, train: bool = False) -> AlignedBatch:
        return AlignedBatch.align(
            [s.token_ids for s in samples],
            [replace(plan, pin_tokens=s.pin_tokens) for s in samples],
            [s.trained if train else s.wanted for s in samples],
        )

    layers = parse_layers(arm.layers or settings["layers"])
    if arm.trained and settings["adapter"]:
        model = PTEModel.from_pretrained(
            settings["model"], settings["adapter"], dtype=settings["dtype"]
        )
    else:
        model = make_model(arm, settings["model"], settings["dtype"], layers, tokenizer, seed)
    keeper = keeper_of(model, arm, settings["model"])
    rng = random.Random(f"train {seed}")
    tasks = [
        task(max(length, least_tokens(facts)), facts)
        for facts in _ints(settings["train_facts"]) or [settings["facts"]]
        for length in _ints(settings["train_tokens"])
    ]

    def next_batch() -> AlignedBatch:
        return batch_of(rng.choice(tasks).samples(settings["batch"], rng), train=True)

    began = time.monotonic()
    losses: list[float] = []
    if arm.trained:
        rate = arm.rate * settings["learning_rate"]
        schedule = Schedule(steps=settings["steps"], learning_rate=rate)
        text = training_text(tokenizer, plan, settings["train_text"])
        losses = train_answers(
            *(model, next_batch, schedule),
            backward=arm.backward,
            next_text=(lambda: rng.sample(text, TRAIN_TEXT_BATCH)) if text else None,
            keeper=keeper,
            progress=lambda step, loss: tell(f"{name}, seed {seed}: steps"),
        )
        model.save_pretrained(adapter)
    seconds = time.monotonic() - began

    def score(num_tokens: int, num_facts: int) -> dict[str, float]:
        held_out = task(num_tokens, num_facts).samples(
            settings["eval_samples"], random.Random("held out")
        )
        parts = [held_out[i : i + 8] for i in range(0, len(held_out), 8)]
        return asdict(score_answers(model, map(batch_of, parts), keeper=keeper))

    lengths = _ints(settings["eval_tokens"])
    return {
        "arm": name,
        "seed": seed,
        "title": arm.title,
        "settings": settings,
        "losses": [round(value, 4) for value in losses],
        "seconds": round(seconds, 1),
        "by_length": {n: score(n, settings["facts"]) for n in lengths},
        "by_facts": {
            n: score(max(lengths[0], least_tokens(n)), n) for n in _ints(settings["eval_facts"])
        },
        "perplexity": perplexity(model, tokenizer, plan, keeper, settings["eval_text"]),
    }


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]
