"""Gets the loop's rollouts from an environment: a worker plays episodes, the server records them.

The worker's harness talks to the server's OpenAI-compatible routes as any client does. Each request
carries the episode's name (`X-PTE-Record`) and the plan, and the server hands out what it sampled:
token ids, log-probs, versions, plan and kept tokens. So nothing is tokenised again, whatever the
harness does with the text.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pte_vllm.train.data.questions import Problem
from pte_vllm.train.environments.process import Ended, EnvironmentFailed, EnvironmentWorker
from pte_vllm.train.grpo.loss import ScoredRollout
from pte_vllm.train.grpo.publishing import Publisher, RolloutSource
from pte_vllm.train.grpo.sampling import MAX_RECOVERIES, Sampler, check_plan, step_seed
from pte_vllm.train.options.runs import GrpoRun
from pte_vllm.wire.episode import join_episodes
from pte_vllm.wire.transport import UNKNOWN, ServerError

_NO_KEY = "PTE_VLLM_NO_API_KEY"
"""A variable that nobody sets; the library then sends a placeholder."""


class EpisodeSampler(Sampler):
    """Has episodes played, and takes what the server recorded of them.

    Args:
        run: the options of the run.
        source: the server that samples.
        publisher: keeps the server at the learner's adapter.
        worker: plays the environment.
        note: is called with a line on what is out of the ordinary.
    """

    def __init__(
        self,
        run: GrpoRun,
        source: RolloutSource,
        publisher: Publisher,
        worker: EnvironmentWorker,
        *,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(run, source, publisher, None, note=note)
        self._worker = worker
        self._names = uuid.uuid4().hex[:8]  # records of an earlier process are not ours

    def _longest(self, problems: Sequence[Problem]) -> int:
        """An environment's questions are its own, and its window is a number."""
        return 0

    def _ask(
        self, problems: Sequence[Problem], label: str, window_tokens: int
    ) -> list[ScoredRollout]:
        """Return the samples of all episodes that were played to their end.

        Raises:
            EnvironmentFailed: if too many failed, or the worker has ended.
            ServerError: if the server refuses, or stays away.
        """
        size = self._run.sampling.group_size
        places = [(i, j) for i in range(len(problems)) for j in range(size)]
        ended: dict[tuple[int, int], list[ScoredRollout]] = {}
        errors: list[str] = []
        for attempt in range(MAX_RECOVERIES + 1):
            missing = [place for place in places if place not in ended]
            names = {f"{self._names}-{label}.{i}.{j}.{attempt}": (i, j) for i, j in missing}
            requests = [
                self._request(name, problems[i], f"{label}.{i}.{j}", window_tokens)
                for name, (i, j) in names.items()
            ]
            errors = []
            for name, end in self._worker.play(requests):
                place = names[name]
                samples = self._samples(name, f"{label}.{place[0]}", place[1], end)
                if samples:
                    ended[place] = samples
                else:
                    errors.append(end.error or "it ended without an answer of the model")
            if not errors or attempt == MAX_RECOVERIES or not self._restored():
                break
        if len(errors) > self._run.environment.max_failed * len(places):
            raise EnvironmentFailed(
                f"{len(errors)} of {len(places)} episodes failed, more than "
                f"--environment.max_failed {self._run.environment.max_failed:g} allows; the last: "
                f"{errors[-1]}"
            )
        if errors:
            self._note(f"{len(errors)} of {len(places)} episodes failed; the last: {errors[-1]}")
        return [sample for place in places for sample in ended.get(place, ())]

    def _restored(self) -> bool:
        """Say whether the server had lost the adapter, and has it again."""
        check_plan(self._run, self._source.wait_ready(self._run.server.retry_s))
        known = self._source.adapters().get(self._publisher.name)
        versions = [entry["version"] for entry in known["versions"]] if known else []
        if self._publisher.version in versions:
            return False
        self._note(f"the server lacks {self._publisher.engine_name}: pushing it again")
        self._publisher.restore()
        return True

    def _request(
        self, name: str, problem: Problem, label: str, window_tokens: int
    ) -> dict[str, Any]:
        run = self._run
        options: dict[str, Any] = {
            "Record": name,
            "Window": window_tokens,
            "Keep": run.plan.keep_tokens if window_tokens else None,
            "Keep-Score": run.plan.keep_score if run.plan.keep_tokens else None,
            "Evict": run.plan.evict if run.plan.evict != "oldest" else None,
            "Evict-Seed": (
                run.plan.evict_seed if "random" in (run.plan.evict, run.plan.keep_score) else None
            ),
        }
        return {
            "id": name,
            "task": problem.meta["task"],
            "model": self._publisher.engine_name,
            "client": {
                "type": "train",
                "base_url": f"{run.server.url.rstrip('/')}/v1",
                "api_key_var": run.server.api_key_env or _NO_KEY,
                "headers": {f"X-PTE-{k}": str(v) for k, v in options.items() if v is not None},
                "renderer": run.environment.renderer or None,
                "renderer_model_name": run.model.base,
            },
            "sampling": {
                "temperature": run.sampling.temperature,
                "max_tokens": run.sampling.max_tokens,
                "seed": step_seed(run.run.seed, label),
            },
        }

    def _samples(self, name: str, group_id: str, index: int, end: Ended) -> list[ScoredRollout]:
        """Return what an episode taught: a sample for each conversation in it, all rewarded alike.

        None of an episode that failed: its reward says nothing.
        """
        try:
            records = self._source.records(name)
        except ServerError as error:
            if error.status != UNKNOWN:
                raise
            records = []  # it failed before the model answered, or the server restarted
        if end.error is not None:
            return []
        return [
            ScoredRollout(
                rollout=replace(rollout, group_id=group_id, index=index),
                reward=end.reward,
                shaped_reward=end.reward,
            )
            for rollout in join_episodes(records)
        ]
