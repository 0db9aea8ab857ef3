"""One arm on one benchmark, as a task of inspect-ai: its samples, its solver and its scorer.

inspect-ai (https://inspect.aisi.org.uk) asks the server, keeps logs that its viewer shows, repeats
a problem for several epochs, reduces them (mean, pass@k) and goes on where a killed run stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import anyio
from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
)
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver

from pte_vllm.eval.arms import Arm, Pins
from pte_vllm.eval.benchmarks import load_problems
from pte_vllm.eval.results import Cell
from pte_vllm.train.data.questions import Problem
from pte_vllm.train.rewards.functions import score as reward

CUT = ("max_tokens", "model_length")
"""Stop reasons of answers that did not end by themselves."""


@cache
def problems_of(
    benchmark: str,
    limit: int | None,
    data: str | None,
    data_seed: int,
    template: str | None,
    judge: str,
    system: str | None,
) -> Mapping[str, Problem]:
    """Return problems by key, loaded once for all arms; arguments as of `load_problems`."""
    found = load_problems(
        benchmark,
        limit=limit,
        data=data,
        seed=data_seed,
        template=template,
        judge=judge,
        system=system,
    )
    return {problem.key: problem for problem in found}


@task
def problems_under(
    benchmark: str,
    arm: Mapping[str, Any] | None = None,
    limit: int | None = None,
    data: str | None = None,
    data_seed: int = 0,
    template: str | None = None,
    judge: str = "auto",
    system: str | None = None,
    epochs: int = 1,
    pass_at: Sequence[int] = (),
    max_tokens: int = 3072,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int = 0,
    block_size: int = 16,
    evict_ratio: float = 0.25,
    knows_keep: bool = False,
    prompt_tokens: Mapping[str, int] | None = None,
    pins: Mapping[str, Mapping[str, Any]] | None = None,
) -> Task:
    """Make the task that asks the problems of a benchmark under one arm.

    Args:
        benchmark: as `eval.benchmarks.load_problems` takes it, like the next six.
        arm: fields of an `Arm`; None sends no request option, for a server without PTE.
        limit: how many problems are asked; None: all, or 200 of a generator.
        data: directory with local copies of data sets.
        data_seed: of generated problems.
        template: text around a question.
        judge: who judges answers.
        system: a system message.
        epochs: answers to each problem.
        pass_at: values of k to estimate pass@k for; none is above `epochs`.
        max_tokens: most tokens of an answer.
        temperature: of sampling; 0 is greedy.
        top_p: of sampling.
        seed: of sampling; each answer draws with a seed of its own.
        block_size: tokens in a block of the server's KV cache.
        evict_ratio: part of a full window that one fold frees there.
        knows_keep: whether the server knows `pte_keep`.
        prompt_tokens: tokens of each question by problem, for the control with attention sinks.
        pins: fields of `Pins` by problem, of those that are not pinned whole, for the same control.
    """
    problems = problems_of(benchmark, limit, data, data_seed, template, judge, system)
    samples = [
        Sample(id=key, input=as_messages(problem), target=str(problem.answer))
        for key, problem in problems.items()
    ]
    chosen = None if arm is None else Arm(**arm)
    reducers = ["mean", *(f"pass_at_{k}" for k in pass_at)]
    name = chosen.key if chosen is not None else "plain"
    return Task(
        name=f"{benchmark.rsplit('/', 1)[-1]}/{name}/{max_tokens}/{seed}",
        dataset=MemoryDataset(samples, name=benchmark),
        solver=answer_under(
            arm=dict(arm) if arm is not None else None,
            seed=seed,
            block_size=block_size,
            evict_ratio=evict_ratio,
            knows_keep=knows_keep,
            prompt_tokens=dict(prompt_tokens or {}),
            pins=dict(pins or {}),
        ),
        scorer=judged(problems.__getitem__),
        epochs=Epochs(epochs, reducers),
        config=GenerateConfig(max_tokens=max_tokens, temperature=temperature, top_p=top_p),
        metadata=Cell(benchmark=benchmark, arm=chosen, max_tokens=max_tokens, seed=seed).to_dict(),
    )


def as_messages(problem: Problem) -> list[ChatMessage]:
    """Return the messages of a problem's prompt, which is a chat."""
    kinds: dict[str, type[ChatMessage]] = {
        "system": ChatMessageSystem,
        "user": ChatMessageUser,
        "assistant": ChatMessageAssistant,
    }
    return [kinds[m["role"]](content=m["content"]) for m in problem.prompt]  # type: ignore[index]


def sample_seed(*parts: object) -> int:
    """Return a seed of 31 bits, a pure function of what it is for."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@solver
def answer_under(
    arm: dict[str, Any] | None,
    seed: int,
    block_size: int,
    evict_ratio: float,
    knows_keep: bool,
    prompt_tokens: dict[str, int],
    pins: dict[str, Any],
) -> Solver:
    """Answer once, with the request options of an arm and a seed for each problem and epoch.

    The seed does not depend on the arm: where two arms see the same, they sample the same.
    """
    chosen = None if arm is None else Arm(**arm)

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        own = sample_seed(seed, state.sample_id, state.epoch)
        body: dict[str, Any] = {}
        if chosen is not None:
            own_pins = pins.get(str(state.sample_id))
            plan = chosen.plan(
                prompt_tokens.get(str(state.sample_id), 0),
                block_size=block_size,
                evict_ratio=evict_ratio,
                seed=own,
                pins=None if own_pins is None else Pins(**own_pins),
            )
            body["vllm_xargs"] = chosen.request_args(plan, knows_keep=knows_keep)
        return await generate(state, seed=own, extra_body=body)

    return solve


@scorer(metrics=[accuracy(), stderr()])
def judged(problem_of: Callable[[str], Problem]) -> Scorer:
    """Judge by the trainer's reward function, and note what an answer took."""

    async def score(state: TaskState, target: Target) -> Score:
        problem, text = problem_of(str(state.sample_id)), state.output.completion
        # Some rewards wait for a process of theirs.
        value = await anyio.to_thread.run_sync(lambda: reward(problem, text, ()))
        usage = state.output.usage
        return Score(
            value=value,
            answer=text[-200:],
            metadata={
                "cut": state.output.stop_reason in CUT,
                "stop_reason": state.output.stop_reason,
                # inspect-ai leaves out what a prefix cache had, where a server says so.
                "prompt_tokens": usage.input_tokens + (usage.input_tokens_cache_read or 0)
                if usage
                else 0,
                "answer_tokens": usage.output_tokens if usage else 0,
            },
        )

    return score
