"""Gets the loop's rollouts: asks questions of a server, and scores the answers by group.

The server may restart in between: it then gets the current version of the adapter again, and what
had not arrived is asked for again, provided that it still evicts as the run says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from pte_vllm.train.data.questions import Problem, QuestionStream, prompt_ids
from pte_vllm.train.grpo.loss import (
    ScoredRollout,
    groups,
    overlong_penalty,
    staleness,
    teaches,
    with_advantages,
)
from pte_vllm.train.grpo.publishing import Publisher, RolloutSource
from pte_vllm.train.options.runs import GrpoRun
from pte_vllm.train.rewards.functions import score
from pte_vllm.wire.rollout import Rollout
from pte_vllm.wire.transport import CONFLICT, UNKNOWN, ServerError

_LACKS_ADAPTER = (UNKNOWN, CONFLICT)
"""HTTP status of a server that lacks the adapter, or its version."""
MAX_RECOVERIES = 5
"""Most times that the adapter is pushed again for one batch; then the run gives up."""


@dataclass(frozen=True, kw_only=True)
class StepRollouts:
    """The scored rollouts of one step."""

    samples: list[ScoredRollout]
    """Those to learn from, with advantages; empty if all groups or samples were dropped."""
    seen: list[ScoredRollout]
    """All that were scored: those of dropped groups too."""
    dropped_groups: int
    """How many groups were dropped because their rewards were all equal (dynamic sampling)."""
    stale_samples: int
    """How many samples were dropped for their age."""
    rounds: int
    """How often the server was asked."""
    window_tokens: int
    """The window that the server was asked for, in the last round; 0: full attention."""


class Sampler:
    """Asks questions, and scores the answers.

    Args:
        run: the options of the run.
        source: the server that samples.
        publisher: keeps the server at the learner's adapter.
        tokenizer: the base model's tokenizer; None where all prompts are token ids.
        note: is called with a line on what is out of the ordinary.
    """

    def __init__(
        self,
        run: GrpoRun,
        source: RolloutSource,
        publisher: Publisher,
        tokenizer: Any,
        *,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._run, self._source, self._publisher = run, source, publisher
        self._tokenizer, self._note = tokenizer, note

    def batch(self, stream: QuestionStream, step: int) -> StepRollouts:
        """Sample the rollouts of a step: `groups_per_step` groups, if dynamic sampling finds them.

        Raises:
            ServerError: if the server refuses, or stays away.
            RolloutMismatch: if an answer is not what was asked for.
            ValueError: if the server came back with another plan.
        """
        options, wanted = self._run.grpo, self._run.sampling.groups_per_step
        kept: list[ScoredRollout] = []
        seen: list[ScoredRollout] = []
        found, dropped, stale, rounds, longest = 0, 0, 0, 0, 0
        while found < wanted:
            rounds += 1
            problems = stream.take(wanted - found)
            # Over all of a step's rounds: questions that replace others get no smaller window.
            longest = max(longest, self._longest(problems))
            window = self._run.plan.window_for(longest)
            answers = self._current(self._ask(problems, f"{step}.{rounds}", window))
            seen += answers
            fresh = [
                sample
                for sample in answers
                if staleness(sample.rollout, self._publisher.version) <= options.max_staleness
            ]
            stale += len(answers) - len(fresh)
            for members in groups(fresh).values():
                if options.dynamic_sampling and not teaches(members):
                    dropped += 1
                    continue
                kept += members
                found += 1
            if not options.dynamic_sampling or rounds == options.dynamic_sampling_max_tries:
                break
        return StepRollouts(
            samples=with_advantages(self._current(kept), options.scale_rewards),
            seen=self._current(seen),
            dropped_groups=dropped,
            stale_samples=stale,
            rounds=rounds,
            window_tokens=self._run.plan.window_for(longest),
        )

    def _longest(self, problems: Sequence[Problem]) -> int:
        """Return how many tokens the longest question has."""
        return max(len(prompt_ids(problem, self._tokenizer)) for problem in problems)

    def _current(self, samples: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        """Give samples the current version, as a later answer may have met a restarted server."""
        return [replace(s, rollout=self._publisher.as_current(s.rollout)) for s in samples]

    def _ask(
        self, problems: Sequence[Problem], label: str, window_tokens: int
    ) -> list[ScoredRollout]:
        """Return all samples of some questions, group by group."""
        open_groups = {f"{label}.{i}": problem for i, problem in enumerate(problems)}
        order = list(open_groups)
        done: dict[str, list[ScoredRollout]] = {}
        for attempt in range(MAX_RECOVERIES + 1):
            try:
                for group_id, members in self._complete_groups(open_groups, label, window_tokens):
                    problem = open_groups.pop(group_id)
                    done[group_id] = [self._sample(problem, rollout) for rollout in members]
                break
            except ServerError as error:
                if error.status not in _LACKS_ADAPTER or attempt == MAX_RECOVERIES:
                    raise
                self._note(f"the server lacks {self._publisher.engine_name}: pushing it again")
                check_plan(self._run, self._source.wait_ready(self._run.server.retry_s))
                self._publisher.restore()
        return [sample for group_id in order for sample in done.get(group_id, ())]

    def _complete_groups(
        self, problems: Mapping[str, Problem], label: str, window_tokens: int
    ) -> Iterator[tuple[str, list[Rollout]]]:
        """Yield groups as they are complete, with their rollouts in order."""
        sampling, size, plan = self._run.sampling, self._run.sampling.group_size, self._run.plan
        drawn = "random" in (plan.evict, plan.keep_score)

        def pinned(item: tuple[str, Problem]) -> int:
            return -1 if item[1].pin_tokens is None else item[1].pin_tokens

        for pin_tokens, items in groupby(sorted(problems.items(), key=pinned), pinned):
            chosen = dict(items)
            arrived: dict[str, list[Rollout]] = {}
            for rollout in self._source.rollouts(
                [prompt_ids(problem, self._tokenizer) for problem in chosen.values()],
                n=size,
                adapter=self._publisher.engine_name,
                sampling={
                    "temperature": sampling.temperature,
                    "max_tokens": sampling.max_tokens,
                    "seed": step_seed(self._run.run.seed, label),
                },
                window_tokens=window_tokens,
                pin_tokens=None if pin_tokens < 0 else pin_tokens,
                evict=plan.evict if plan.evict != "oldest" else None,
                evict_seed=plan.evict_seed if drawn else None,
                keep_tokens=plan.keep_tokens or None,
                keep_score=plan.keep_score if plan.keep_tokens else None,
                group_ids=list(chosen),
            ):
                members = arrived.setdefault(rollout.group_id, [])
                members.append(rollout)
                if len(members) == size:
                    whole = [r for r in members if r.finish_reason != "abort"]
                    yield rollout.group_id, sorted(whole, key=lambda r: r.index)

    def _sample(self, problem: Problem, rollout: Rollout) -> ScoredRollout:
        text = ""
        if self._tokenizer is not None:
            text = self._tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
        stopped = rollout.finish_reason == "stop"
        reward = score(problem, text, rollout.completion_ids, stopped=stopped)
        options = self._run.grpo
        penalty = overlong_penalty(
            len(rollout.completion_ids),
            self._run.sampling.max_tokens,
            options.overlong_tokens,
            options.overlong_penalty,
        )
        return ScoredRollout(rollout=rollout, reward=reward, shaped_reward=reward + penalty)


def check_plan(run: GrpoRun, info: dict[str, Any]) -> None:
    """Refuse a server that evicts otherwise than the run says.

    Raises:
        ValueError: naming the option.
    """
    for name in ("block_size", "evict_ratio"):
        served, wanted = info["plan"][name], getattr(run.plan, name)
        if served != wanted:
            raise ValueError(f"--plan.{name} is {wanted}, but the server's is {served}")
    default = info["plan"].get("keep_tokens", 0)  # earlier versions keep nothing
    if default and not run.plan.keep_tokens:
        raise ValueError(
            f"--plan.keep_tokens is 0, but the server keeps {default} by default: give "
            f"--plan.keep_tokens {default}, or start it with --pte-keep 0"
        )


def step_seed(seed: int, label: str) -> int:
    """Return the seed of one request: the same in a resumed run, another for each request."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{label}".encode()).digest()[:4], "big") >> 1
