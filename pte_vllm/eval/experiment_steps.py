"""The steps of `train experiment thoughts`: sample, distil, measure. Each skips what is there."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pte_vllm.adapter.make_probes import make_probes
from pte_vllm.adapter.probe_options import ProbeOptions
from pte_vllm.eval import fidelity, fidelity_flags
from pte_vllm.eval.experiment_arms import ARMS, adapter_name, read_json
from pte_vllm.eval.options import RunOptions
from pte_vllm.eval.report import RESULTS
from pte_vllm.eval.run import PROMPT_ROOM, run
from pte_vllm.eval.thoughts import TEMPLATE, sample_on_server
from pte_vllm.train.distill.loop import train as distil
from pte_vllm.train.options.runs import DistillRun
from pte_vllm.train.run.start import ADAPTER

PROBES = "probes.safetensors"
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


def probes_file(options: argparse.Namespace) -> Path:
    """Return the model's probes, which are sampled here unless they are given or were before."""
    if options.probes is not None:
        found: Path = options.probes
        return found
    path: Path = options.out / PROBES
    if not path.exists():
        Console(stderr=True).rule("probes")
        # Sampled ones: what their training adds is measured, and where it starts.
        few = ProbeOptions(num_thoughts=4, max_tokens=40, num_probes=16)
        make_probes(options.model, path, few if options.quick else ProbeOptions())
    return path


def train(options: argparse.Namespace) -> dict[str, Path]:
    """Train every arm with every seed; returns the adapters' directories by name."""
    console = Console(stderr=True, highlight=False)
    found = {}
    for seed in options.seeds:
        for arm in options.arms:
            name = adapter_name(arm, seed)
            out = options.out / "arms" / name
            found[name] = out / ADAPTER
            if (out / ADAPTER / "adapter_config.json").exists():
                continue
            console.rule(f"training {name}")
            distil(DistillRun.model_validate(_distill_options(options, arm, seed, out)))
    return found


def _distill_options(options: argparse.Namespace, arm: str, seed: int, out: Path) -> dict[str, Any]:
    chosen = ARMS[arm]
    keeping: dict[str, Any] = {}
    if chosen.keeps:
        keeping = {"keep_tokens": options.keep, "probes": str(probes_file(options))}
    steps = options.steps if chosen.trains_weights else 0
    return {
        "model": {"base": options.model, "dtype": options.dtype},
        "adapter": {
            "rank": options.rank,
            "target_modules": tuple(options.targets),
            **chosen.adapter,
        },
        "plan": {
            "window_tokens": options.window,
            "evict_ratio": options.evict_ratio,
            "block_size": options.block_size,
            **keeping,
        },
        "keep": {
            "steps": options.probe_steps if chosen.trains_probes else 0,
            "probes": options.num_probes,
        },
        "optimizer": {
            "steps": steps,
            "warmup_steps": max(0, min(5, steps - 1)),
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


def keeping(adapters: Mapping[str, Path], *, keeps: bool) -> dict[str, Path]:
    """Return the adapters of the arms that keep tokens, or of the others, by name."""
    return {
        name: path
        for name, path in adapters.items()
        if ARMS[name.rpartition("-")[0]].keeps is keeps
    }


def measure_fidelity(options: argparse.Namespace, adapters: dict[str, Path]) -> dict[str, Any]:
    """Measure all arms on the held-out answers, unless that was done; returns the reports' arms.

    Arms that keep tokens have a report of their own, beside the same window.
    """
    windows = [options.window, *options.plain_windows]
    flags = ["--window", ",".join(map(str, windows)), "--evict", "random", "--sinks"]
    arms = _fidelity(options, keeping(adapters, keeps=False), flags, "fidelity", set())
    kept = keeping(adapters, keeps=True)
    if kept:
        untrained = f"window {options.window} keep {options.keep}"
        flags = ["--window", str(options.window), "--keep", str(options.keep)]
        flags += ["--keep-score", "expected,random", "--probes", str(probes_file(options))]
        flags += ["--adapter-keep", str(options.keep)]
        arms += _fidelity(options, kept, flags, "fidelity-keep", {untrained})
    return {"arms": arms}


def _fidelity(
    options: argparse.Namespace,
    adapters: Mapping[str, Path],
    flags: Sequence[str],
    folder: str,
    wanted: set[str],
) -> list[dict[str, Any]]:
    """Return the arms of one report of `eval fidelity`, which is made unless it is there."""
    out = options.out / folder
    if (out / "fidelity.json").exists():
        report = read_json(out / "fidelity.json")
        known = {arm["name"] for arm in report["arms"]}
        held = {arm.get("adapter") for arm in report["arms"]}
        sizes = {f"window {size}" for size in (options.window, *options.plain_windows)}
        if (wanted or sizes) <= known and set(adapters) <= held:
            found: list[dict[str, Any]] = report["arms"]
            return found
    Console(stderr=True).rule(folder)
    arguments = [options.model, str(options.out / HELD), "--out", str(out), *flags]
    arguments += ["--sequences", str(options.held), "--block-size", str(options.block_size)]
    arguments += ["--evict-ratio", str(options.evict_ratio)]
    for name, path in adapters.items():
        arguments += ["--adapter", f"{name}={path}"]
    measured: list[dict[str, Any]] = fidelity.run(fidelity_flags.parse(arguments))["arms"]
    return measured


def measure_accuracy(
    options: argparse.Namespace, adapters: dict[str, Path]
) -> tuple[int, dict[str, Any]]:
    """Measure accuracy, or go on with it; returns the exit status of `eval run`, and its rows.

    Arms that keep tokens are asked after the others, by a server that has the probes. What all
    arms are compared with is asked once: both add to the same logs.
    """
    if options.url is not None:
        _push(options, adapters)
    Console(stderr=True).rule("accuracy")
    status, rows = _accuracy(options, keeping(adapters, keeps=False), keeps=False)
    kept = keeping(adapters, keeps=True)
    if kept:
        Console(stderr=True).rule("accuracy, keeping tokens")
        worse, more = _accuracy(options, kept, keeps=True)
        known = {row["arm"] for row in rows}
        status, rows = max(status, worse), rows + [r for r in more if r["arm"] not in known]
    return status, {"rows": rows}


def _accuracy(
    options: argparse.Namespace, adapters: Mapping[str, Path], *, keeps: bool
) -> tuple[int, list[dict[str, Any]]]:
    """Run one sweep; returns its exit status and its rows."""
    out, probes = options.out / "accuracy", None
    if keeps and options.url is None:
        probes = str(probes_file(options))
    chosen = RunOptions(
        model=None if options.url else options.model,
        url=options.url,
        api_key_env=options.api_key_env,
        adapters={name: str(path) for name, path in adapters.items()},
        benchmarks=(options.task,),
        data=None,
        limit=options.problems,
        template=TEMPLATE,
        judge="math",
        system=None,
        data_seed=PROBLEM_SEED,
        windows=(options.window,),
        plain_windows=() if keeps else tuple(options.plain_windows),
        adapter_keep=(options.keep if keeps else 0,),
        rules=(None,),
        evict=("oldest",) if keeps else ("oldest", "random"),
        sinks=not keeps,
        keep=(options.keep,) if keeps else (),
        keep_scores=("expected", "random"),
        probes=probes,
        equal_bytes=not keeps and bool(adapters),
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
    rows: list[dict[str, Any]] = read_json(out / RESULTS)["rows"]
    return status, rows


def _push(options: argparse.Namespace, adapters: Mapping[str, Path]) -> None:
    """Push adapters that the server does not have yet."""
    from pte_vllm.eval.fidelity_server import push_adapters
    from pte_vllm.train.options.runs import ServerOptions
    from pte_vllm.train.run.connection import connect

    server = ServerOptions(
        url=options.url, api_key_env=options.api_key_env, admin_key_env=options.admin_key_env
    )
    with connect(server) as client:
        push_adapters(client, adapters)
