"""`pte-vllm train experiment thoughts`: what a memory learns of a real model's own thoughts.

The model answers questions under full attention. Those answers are distilled under a window into
every arm, with the same steps, data and rank; then fidelity and accuracy are measured beside
windows without memory, by `eval fidelity` and `eval run`.

    OUT/options.json            what the files are made with; other values need another OUT
    OUT/thoughts.jsonl          the model's own answers
    OUT/train.jsonl, held.jsonl what is distilled, and what fidelity is measured on
    OUT/arms/ARM-SEED/          one distillation (`train distill`); adapter/ is its result
    OUT/fidelity/, accuracy/    reports of `eval fidelity` and `eval run`
    OUT/results.json, table.md  both together, seeds averaged

Whatever is finished is not done again: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pte_vllm.adapter.defaults import TARGET_MODULES
from pte_vllm.eval.experiment_arms import ARMS, DEFAULT_ARMS, keep_options
from pte_vllm.eval.flags import names, numbers
from pte_vllm.models.location import check_model

QUICK: dict[str, Any] = {
    "questions": 8,
    "held": 2,
    "max_tokens": 120,
    "steps": 2,
    "probe_steps": 2,
    "num_probes": 16,
    "batch": 2,
    "problems": 3,
    "rank": 8,
    "arms": ["lora", "ridge", "keep-probes", "keep-ridge"],
    "plain_windows": [96],
}
"""What `--quick` sets where a flag does not: whether everything works, in a minute."""


def main(arguments: Sequence[str]) -> int:
    """Run the experiment, or go on with it; returns the exit status.

    Raises:
        ValueError, OSError: naming the flag, if something does not fit or is not there.
    """
    options = parse(arguments)
    check_model(options.model)
    from pte_vllm.eval.benchmarks import load_problems
    from pte_vllm.eval.experiment_steps import measure_accuracy, measure_fidelity, sample, train
    from pte_vllm.eval.serving import DeadServer
    from pte_vllm.launch import LaunchError
    from pte_vllm.wire.transport import ServerError

    # Without this SIGTERM would end us at once and leave our server running.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        load_problems(options.task, limit=1)  # a mistake shows before a server starts
        options.out.mkdir(parents=True, exist_ok=True)
        keep_options(options)
        sample(options)
        adapters = train(options)
        fidelity = measure_fidelity(options, adapters)
        status, accuracy = measure_accuracy(options, adapters)
        from pte_vllm.eval.experiment_report import write_report

        write_report(options, fidelity, accuracy)
        return status
    except (DeadServer, LaunchError, ServerError) as error:
        print(f"pte-vllm: error: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the flags.

    Raises:
        ValueError: naming the flag, if a value is out of range.
    """
    from pte_vllm.engine.cpu_defaults import on_cpu

    parser = argparse.ArgumentParser(
        prog="pte-vllm train experiment thoughts",
        description="Distil a model's own thoughts into adapters under a window, and compare them "
        "with each other, with windows without memory, and with the full cache.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory of the base model")
    add(
        "--out",
        type=Path,
        default=Path("out/thoughts"),
        metavar="DIR",
        help="all files (%(default)s)",
    )
    add(
        "--arms",
        type=names,
        default=list(DEFAULT_ARMS),
        metavar="A,B",
        help=f"of {','.join(ARMS)} ({','.join(DEFAULT_ARMS)})",
    )
    add("--seeds", type=numbers, default=[0], metavar="N,N", help="of training (0)")
    add("--quick", action="store_true", help="tiny: two arms, few steps, problems and tokens")
    add(
        "--url",
        help="sample and answer on this server in place of ones that are started; adapters are "
        "pushed to it as ARM-SEED",
    )
    add("--api-key-env", metavar="NAME", help="variable that holds its key")
    add("--admin-key-env", metavar="NAME", help="variable that holds the key for pushing")
    group = parser.add_argument_group("thoughts")
    add = group.add_argument
    add(
        "--task",
        default="gsm_symbolic",
        help="of reasoning-gym, with answers in numbers (%(default)s)",
    )
    add(
        "--questions",
        type=int,
        default=504,
        metavar="N",
        help="answers that are sampled (%(default)s)",
    )
    add(
        "--held",
        type=int,
        default=24,
        metavar="N",
        help="of these, held out for fidelity (%(default)s)",
    )
    add("--max-tokens", type=int, default=400, metavar="N", help="longest answer (%(default)s)")
    add("--temperature", type=float, default=0.7, metavar="T", help="of the thoughts (%(default)s)")
    group = parser.add_argument_group("memory and training")
    add = group.add_argument
    add(
        "--window",
        type=int,
        default=64,
        metavar="N",
        help="window of all trained arms (%(default)s)",
    )
    add(
        "--keep",
        type=int,
        default=32,
        metavar="N",
        help="evicted tokens that each KV head keeps, in arms keep-... (%(default)s)",
    )
    add(
        "--probes",
        type=Path,
        metavar="FILE",
        help="the model's probes (default: sampled once, into OUT)",
    )
    add(
        "--plain-windows",
        type=numbers,
        default=[96, 128, 256],
        metavar="N,N",
        help="further windows, without memory (96,128,256)",
    )
    add(
        "--evict-ratio",
        type=float,
        default=0.25,
        metavar="F",
        help="part that one fold frees (%(default)s)",
    )
    add(
        "--block-size",
        type=int,
        default=32 if on_cpu() else 16,
        metavar="N",
        help="of the cache (%(default)s)",
    )
    add("--rank", type=int, default=64, metavar="R", help="of all arms (%(default)s)")
    add(
        "--targets",
        type=names,
        default=list(TARGET_MODULES),
        metavar="A,B",
        help="linears that get LoRA (all)",
    )
    add("--steps", type=int, default=60, metavar="N", help="of each distillation (%(default)s)")
    add(
        "--num-probes",
        type=int,
        default=128,
        metavar="N",
        help="probes for each KV head that are trained (%(default)s)",
    )
    add(
        "--probe-steps",
        type=int,
        default=1000,
        metavar="N",
        help="of training the probes of arms keep-... (%(default)s)",
    )
    add("--batch", type=int, default=8, metavar="N", help="answers in a step (%(default)s)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the base in training; bfloat16 is faster on a CPU that has instructions for it "
        "(auto: bfloat16 on CUDA, float32 on a CPU)",
    )
    add("--lr", type=float, default=1e-3, metavar="F", help="highest learning rate (%(default)s)")
    group = parser.add_argument_group("accuracy")
    add = group.add_argument
    add(
        "--problems",
        type=int,
        default=200,
        metavar="N",
        help="greedy, others than the questions (%(default)s)",
    )
    add("--concurrency", type=int, default=64, metavar="N", help="answers at once (%(default)s)")
    given = parser.parse_args(arguments)
    if given.quick:
        for name, value in QUICK.items():
            if getattr(given, name) == parser.get_default(name):
                setattr(given, name, value)
    _check(given)
    return given


def _check(given: argparse.Namespace) -> None:
    for name in given.arms:
        if name not in ARMS:
            raise ValueError(f"--arms must be among {', '.join(ARMS)}, got {name!r}")
    for name in (
        *("questions", "held", "max_tokens", "keep", "rank", "steps", "num_probes"),
        *("probe_steps", "batch", "problems"),
    ):
        if getattr(given, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be positive, got {getattr(given, name)}")
    if given.held >= given.questions:
        raise ValueError(f"--held {given.held} leaves nothing of --questions {given.questions}")
    for window in (given.window, *given.plain_windows):
        if window % given.block_size or window < 2 * given.block_size:
            raise ValueError(
                f"--window, --plain-windows: {window} must be a multiple of --block-size "
                f"{given.block_size}, and two blocks at least"
            )
    if given.keep % given.block_size:
        raise ValueError(
            f"--keep {given.keep} must be a multiple of --block-size {given.block_size}"
        )
    if given.probes is not None and not given.probes.is_file():
        raise ValueError(f"--probes: {given.probes} does not exist")
