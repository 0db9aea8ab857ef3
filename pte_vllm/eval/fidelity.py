"""`pte-vllm eval fidelity`: how well an arm predicts the model's own thoughts, without sampling.

    OUT/fidelity.json   all figures
    OUT/fidelity.png    KL by distance from the first fold

Standard library only until the flags are read and checked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pte_vllm.eval.fidelity_flags import BLOCK_SIZE, EVICT_RATIO, parse
from pte_vllm.models.location import check_model

if TYPE_CHECKING:
    from rich.console import Console

    from pte_vllm.adapter.format import ModelShape
    from pte_vllm.adapter.probes import Probes
    from pte_vllm.eval.fidelity_arms import Eviction, FidelityArm
    from pte_vllm.eval.fidelity_tokens import MeasuredTokens
    from pte_vllm.train.distill.examples import Example


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm eval fidelity ...`; returns the exit status.

    Raises:
        ValueError, OSError: naming the flag, if something does not fit or is not there.
    """
    options = parse(arguments)
    check_model(options.model)
    if not options.thoughts.is_file():
        raise FileNotFoundError(
            f"THOUGHTS: {options.thoughts} does not exist; make it with "
            f"`pte-vllm eval thoughts {options.model} {options.thoughts} --task TASK`"
        )
    for name, directory in options.adapter.items():
        if not (directory / "adapter_config.json").is_file():
            raise FileNotFoundError(f"--adapter {name}: {directory} holds no adapter")
    if options.probes is not None and not options.probes.is_file():
        raise FileNotFoundError(f"--probes: {options.probes} does not exist")
    from pte_vllm.wire.transport import ServerError

    try:
        run(options)
    except ServerError as error:
        print(f"pte-vllm: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, and write the report; returns it."""
    from rich.console import Console
    from transformers import AutoConfig

    from pte_vllm.adapter.format import Adapter, ModelShape
    from pte_vllm.eval import fidelity_arms, fidelity_report
    from pte_vllm.eval.weights import state_bytes

    console = Console(stderr=True, highlight=False)
    shape = ModelShape.from_hf(AutoConfig.from_pretrained(options.model))
    adapters = {name: Adapter.load(path, shape) for name, path in options.adapter.items()}
    probes = _probes(options.probes, shape)
    without = [name for name, adapter in adapters.items() if adapter.probes is None]
    if any(options.adapter_keep or ()) and probes is None and without:
        raise ValueError(
            f"--adapter-keep: {without[0]} brings no probes of its own: give --probes FILE"
        )
    bytes_per_token = fidelity_arms.kv_bytes_per_token(shape, options.kv_dtype)
    eviction = _eviction(options)
    arms = fidelity_arms.build_arms(
        options.window,
        {name: state_bytes(adapter, options.kv_dtype) for name, adapter in adapters.items()},
        eviction=eviction,
        bytes_per_token=bytes_per_token,
        adapter_keep=options.adapter_keep or (0,),
        evict=options.evict,
        sinks=options.sinks,
        keep=options.keep,
        keep_scores=options.keep_score,
    )
    examples = _read(options.thoughts, arms, options.sequences)
    console.print(f"{len(examples)} answers, {len(arms)} arms")
    if options.url is None:
        measured = _by_replay(options, examples, arms, adapters, probes, console)
    else:
        measured = _by_server(options, examples, arms, console)
    report = {
        "model": options.model,
        "thoughts": str(options.thoughts),
        "measured_by": "replay" if options.url is None else options.url,
        "block_size": eviction.block_size,
        "evict_ratio": None if eviction.evict_tokens else eviction.evict_ratio,
        "evict_tokens": eviction.evict_tokens,
        "kv_dtype": options.kv_dtype,
        "probes": None if probes is None else probes.content_hash,
        **fidelity_report.summarize(measured, arms, examples, bytes_per_token=bytes_per_token),
    }
    # Tables are wide; into a file they go as they are.
    width = None if sys.stdout.isatty() else 140
    fidelity_report.write(report, options.out, Console(highlight=False, width=width))
    return report


def _eviction(options: argparse.Namespace) -> Eviction:
    """Return how windows evict: as the flags say, or as the server does.

    Raises:
        ValueError: if the flags say something else than the server.
    """
    from pte_vllm.eval.fidelity_arms import Eviction

    block_size, ratio = options.block_size, options.evict_ratio
    if options.url is not None:
        with _client(options) as client:
            plan = client.info()["plan"]
        for flag, given, name in (
            ("--block-size", block_size, "block_size"),
            ("--evict-ratio", ratio, "evict_ratio"),
        ):
            if given not in (None, plan[name]):
                raise ValueError(f"{flag} is {given}, and that of the server {plan[name]}")
        block_size, ratio = plan["block_size"], plan["evict_ratio"]
    return Eviction(
        block_size=BLOCK_SIZE if block_size is None else block_size,
        evict_ratio=EVICT_RATIO if ratio is None else ratio,
        evict_tokens=options.evict_tokens,
    )


def _probes(path: Path | None, shape: ModelShape) -> Probes | None:
    """Read the probes, if there are some.

    Raises:
        ValueError: naming the flag, if they cannot be read or are for another model.
    """
    from pte_vllm.adapter.probes import Probes, ProbesError

    if path is None:
        return None
    try:
        probes = Probes.load(path)
        shape.check_probes(probes)
    except ProbesError as error:
        raise ValueError(f"--probes: {error}") from error
    return probes


def _read(path: Path, arms: Sequence[FidelityArm], count: int) -> list[Example]:
    """Read answers that reach beyond the first fold of the smallest window.

    Of more than `count` those are taken that are spread over the file: a server writes short
    answers first.

    Raises:
        ValueError: if there is none, or a record is malformed.
    """
    from pte_vllm.train.distill.examples import read_rollouts

    smallest = min((arm for arm in arms if arm.kind == "window"), key=lambda arm: arm.window_tokens)
    if not path.stat().st_size:
        raise ValueError(f"THOUGHTS: {path} is empty")
    with path.open(encoding="utf-8") as lines:
        try:
            examples = read_rollouts(lines, smallest.plan)
        except ValueError as error:
            raise ValueError(
                f"THOUGHTS: {path} is no file of `pte-vllm eval thoughts`: {error}"
            ) from error
    if not examples:
        raise ValueError(
            f"{path}: no answer reaches beyond the first fold of a window of "
            f"{smallest.window_tokens} tokens"
        )
    count = min(count, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def _by_replay(
    options: argparse.Namespace,
    examples: Sequence[Example],
    arms: Sequence[FidelityArm],
    adapters: dict[str, Any],
    probes: Probes | None,
    console: Console,
) -> MeasuredTokens:
    import torch

    from pte_vllm.eval import fidelity_replay
    from pte_vllm.eval.fidelity_parts import shown_progress
    from pte_vllm.train.options.sections import ModelOptions
    from pte_vllm.train.replay.modeling import PTEModel

    chosen = ModelOptions(base=options.model, dtype=options.dtype, device=options.device)
    chosen = chosen.resolve(cuda=torch.cuda.is_available())
    base = PTEModel.from_pretrained(chosen.base, dtype=chosen.dtype, device=chosen.device).base
    with shown_progress(console, len(examples), arms, options.batch) as progress:
        return fidelity_replay.measure(
            base,
            examples,
            arms,
            adapters,
            probes=probes,
            batch_sequences=options.batch,
            on_done=progress,
        )


def _by_server(
    options: argparse.Namespace,
    examples: Sequence[Example],
    arms: Sequence[FidelityArm],
    console: Console,
) -> MeasuredTokens:
    from pte_vllm.eval import fidelity_server
    from pte_vllm.eval.fidelity_parts import shown_progress

    bar = shown_progress(console, len(examples), arms, options.batch)
    with _client(options) as client, bar as progress:
        return fidelity_server.measure(
            client,
            examples,
            arms,
            fidelity_server.push_adapters(client, options.adapter),
            batch_sequences=options.batch,
            top_logprobs=options.top_logprobs,
            on_done=progress,
        )


def _client(options: argparse.Namespace) -> Any:
    from pte_vllm.eval.serving import key_from
    from pte_vllm.wire.client import RolloutClient

    return RolloutClient(options.url, api_key=key_from(options.api_key_env))
