"""The steps of `train experiment thoughts`: sample, distil, measure. Each skips what is there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from pte_vllm.eval import fidelity, fidelity_flags
from pte_vllm.eval.experiment_arms import ARMS, adapter_name, read_json
from pte_vllm.eval.options import RunOptions
from pte_vllm.eval.report import RESULTS
from pte_vllm.eval.run import PROMPT_ROOM, run
from pte_vllm.eval.thoughts import TEMPLATE, sample_on_server
from pte_vllm.train.distill.loop import train as distil
from pte_vllm.train.options.runs import DistillRun
from pte_vllm.train.run.start import ADAPTER

THOUGHTS, TRAIN, HELD = "thoughts.jsonl", "train.jsonl", "held.jsonl"
THOUGHT_SEED, PROBLEM_SEED = 5, 990017
"""Of the questions that are distilled, and of the problems that accuracy is measured on."""


def sample(options: argparse.Namespace) -> None:
    """Sample the model's answers under full attention, and split them."""
    console = Console(stderr=True, highlight=False)
    path = options.out / THOUGHTS
    if not path.exists():
        console.rule("answers under full attention")
        asked = DistillRun.model_validate(
            {
                "model": {"base": options.model},
                "data": {
                    "source": "reasoning-gym",
                    "task": options.task,
                    "seed": THOUGHT_SEED,
                    "prompt_template": TEMPLATE,
                    "max_prompt_tokens": PROMPT_ROOM,
                },
                "sampling": {
                    "temperature": options.temperature,
                    "max_tokens": options.max_tokens,
                },
                "distill": {"data": "samples", "max_sequences": options.questions},
                "server": {"api_key_env": options.api_key_env},
                "run": {"seed": THOUGHT_SEED},
            }
        )
        sample_on_server(
            asked,
            path,
            console,
            url=options.url,
            log=options.out / "sampling.log",
            concurrency=options.concurrency,
            block_size=options.block_size,
        )
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if len(lines) <= options.held:
        raise ValueError(f"--held {options.held}: {path} has {len(lines)} answers only")
    (options.out / TRAIN).write_text("".join(lines[: -options.held]), encoding="utf-8")
    (options.out / HELD).write_text("".join(lines[-options.held :]), encoding="utf-8")


def train(options: argparse.Namespace) -> dict[str, Path]:
    """Distil every arm with every seed; returns the adapters' directories by name."""
    console = Console(stderr=True, highlight=False)
    found = {}
    for seed in options.seeds:
        for arm in options.arms:
            name = adapter_name(arm, seed)
            out = options.out / "arms" / name
            found[name] = out / ADAPTER
            if (out / ADAPTER / "adapter_config.json").exists():
                continue
            console.rule(f"distilling {name}")
            distil(DistillRun.model_validate(_distill_options(options, arm, seed, out)))
    return found


def _distill_options(options: argparse.Namespace, arm: str, seed: int, out: Path) -> dict[str, Any]:
    return {
        "model": {"base": options.model},
        "adapter": {"rank": options.rank, **ARMS[arm]},
        "plan": {
            "window_tokens": options.window,
            "evict_ratio": options.evict_ratio,
            "block_size": options.block_size,
        },
        "optimizer": {
            "steps": options.steps,
            "warmup_steps": min(5, options.steps - 1),
            "schedule": "linear",
            "lr": options.lr,
        },
        "distill": {
            "data": "rollouts",
            "rollouts": str(options.out / TRAIN),
            "eval_sequences": 0,
            "batch_sequences": options.batch,
        },
        "run": {"out": str(out), "seed": seed, "tensorboard": False},
    }


def measure_fidelity(options: argparse.Namespace, adapters: dict[str, Path]) -> dict[str, Any]:
    """Measure all arms on the held-out answers, unless that was done; returns the report."""
    out = options.out / "fidelity"
    if (out / "fidelity.json").exists():
        report = read_json(out / "fidelity.json")
        wanted = {f"window {size}" for size in (options.window, *options.plain_windows)}
        if wanted | set(adapters) <= {arm["name"] for arm in report["arms"]}:
            return report
    Console(stderr=True).rule("fidelity")
    arguments = [options.model, str(options.out / HELD), "--out", str(out)]
    windows = [options.window, *options.plain_windows]
    arguments += ["--window", ",".join(map(str, windows)), "--evict", "random", "--sinks"]
    arguments += ["--sequences", str(options.held), "--block-size", str(options.block_size)]
    arguments += ["--evict-ratio", str(options.evict_ratio)]
    for name, path in adapters.items():
        arguments += ["--adapter", f"{name}={path}"]
    return fidelity.run(fidelity_flags.parse(arguments))


def measure_accuracy(
    options: argparse.Namespace, adapters: dict[str, Path]
) -> tuple[int, dict[str, Any]]:
    """Measure accuracy, or go on with it; returns the exit status of `eval run`, and its report."""
    Console(stderr=True).rule("accuracy")
    names = {name: str(path) for name, path in adapters.items()}
    if options.url is not None:
        names = _push(options, adapters)
    out = options.out / "accuracy"
    chosen = RunOptions(
        model=None if options.url else options.model,
        url=options.url,
        api_key_env=options.api_key_env,
        adapters=dict(names),
        benchmarks=(options.task,),
        data=None,
        limit=options.problems,
        template=TEMPLATE,
        judge="math",
        system=None,
        data_seed=PROBLEM_SEED,
        windows=(options.window,),
        plain_windows=tuple(options.plain_windows),
        rules=(None,),
        evict=("oldest", "random"),
        sinks=True,
        keep=(),
        keep_scores=("expected",),
        probes=None,
        equal_bytes=True,
        max_tokens=(options.max_tokens,),
        seeds=(0,),
        epochs=1,
        pass_at=(),
        temperature=0.0,
        top_p=None,
        concurrency=options.concurrency,
        block_size=None if options.url else options.block_size,
        evict_ratio=options.evict_ratio,
        out=out,
        server_flags=(),
    )
    status = run(chosen)
    return status, read_json(out / RESULTS)


def _push(options: argparse.Namespace, adapters: dict[str, Path]) -> dict[str, str]:
    """Push adapters that the server does not have yet; returns all directories by served name."""
    from pte_vllm.eval.fidelity_server import push_adapters
    from pte_vllm.train.options.runs import ServerOptions
    from pte_vllm.train.run.connection import connect

    server = ServerOptions(
        url=options.url, api_key_env=options.api_key_env, admin_key_env=options.admin_key_env
    )
    with connect(server) as client:
        push_adapters(client, adapters)
    return {name: str(path) for name, path in adapters.items()}
