"""The tasks of a sweep: for each of its cells the problems of a benchmark, and whom they ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pte_vllm.eval.arms import Arm, Pins
from pte_vllm.eval.options import RunOptions
from pte_vllm.eval.prompts import count_prompts, pins_of
from pte_vllm.eval.results import Cell
from pte_vllm.eval.serving import ServerFacts, key_from
from pte_vllm.eval.tasks import problems_of, problems_under
from pte_vllm.train.data.questions import Problem


def find_problems(options: RunOptions, name: str) -> Mapping[str, Problem]:
    """Return the problems of a benchmark by key, loaded once for all arms."""
    return problems_of(
        name,
        options.limit,
        options.data,
        options.data_seed,
        options.template,
        options.judge,
        options.system,
    )


def _prompts(options: RunOptions, name: str) -> dict[str, Any]:
    return {key: problem.prompt for key, problem in find_problems(options, name).items()}


def find_pins(
    options: RunOptions, facts: ServerFacts, arms: Sequence[Arm]
) -> dict[str, dict[str, Pins]]:
    """Return what is pinned of problems that are not pinned whole, by benchmark and problem."""
    windows = [arm.window_tokens for arm in arms if arm.window_tokens]
    key = key_from(options.api_key_env)
    return {
        name: pins_of(facts, _prompts(options, name), window_tokens=min(windows), api_key=key)
        for name in (options.benchmarks if windows else ())
    }


def make_tasks(
    options: RunOptions,
    facts: ServerFacts,
    cells: Sequence[Cell],
    pins: dict[str, dict[str, Pins]],
) -> list[Any]:
    """Return the task of each cell, for inspect-ai."""
    from inspect_ai.model import GenerateConfig, get_model

    key = key_from(options.api_key_env) or "none"
    prompt_tokens: dict[str, int] = {}
    if any(cell.arm is not None and cell.arm.sinks for cell in cells):
        for name in options.benchmarks:
            prompt_tokens |= count_prompts(facts, _prompts(options, name), api_key=key)
    made = []
    for cell in cells:
        arm, own = cell.arm, pins.get(cell.benchmark)
        model = get_model(
            f"openai-api/pte/{(arm and arm.adapter) or facts.models[0]}",
            base_url=f"{facts.url}/v1",
            api_key=key,
            config=GenerateConfig(max_connections=options.concurrency),
        )
        task = problems_under(
            benchmark=cell.benchmark,
            arm=asdict(arm) if arm is not None else None,
            limit=options.limit,
            data=options.data,
            data_seed=options.data_seed,
            template=options.template,
            judge=options.judge,
            system=options.system,
            epochs=options.epochs,
            pass_at=list(options.pass_at),
            max_tokens=cell.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=cell.seed,
            block_size=facts.block_size,
            evict_ratio=facts.evict_ratio,
            knows_keep="pte_keep" in facts.options,
            prompt_tokens=prompt_tokens if arm is not None and arm.sinks else None,
            # Not said where there are none: who goes on with a sweep has the same tasks.
            **({"pins": _as_fields(own)} if own and arm is not None and arm.sinks else {}),
        )
        task.model = model
        made.append(task)
    return made


def _as_fields(pins: dict[str, Pins]) -> dict[str, Any]:
    return {key: asdict(found) for key, found in pins.items()}
