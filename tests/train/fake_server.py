"""A rollout source in the test's process: answers follow from seeds, log-probs from adapters."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pte_vllm.adapter.format import Adapter
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import replay
from pte_vllm.wire.rollout import Rollout, WeightSpan
from pte_vllm.wire.transport import ServerError

BLOCK = 16


class FakeServer:
    """Implements `sampling.RolloutSource`.

    Args:
        base: directory of the base model.
        noise: added to every log-prob.
        forget_after: pushes after which it loses everything, once, as a restart without a spool.
    """

    def __init__(self, base: Path, *, noise: float = 0.0, forget_after: int | None = None) -> None:
        self._base, self._model = base, None
        self.noise, self._forget_after = noise, forget_after
        self.versions: dict[str, dict[int, Adapter]] = {}
        self.pushed: list[int] = []
        self.asked: list[tuple[str, ...]] = []
        self.windows: list[int] = []

    def wait_ready(self, timeout_s: float = 0.0) -> dict[str, Any]:
        return {"plan": {"block_size": BLOCK, "evict_ratio": 0.25, "window_tokens": 32}}

    def adapters(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"newest": max(held), "versions": [{"version": v} for v in sorted(held)]}
            for name, held in self.versions.items()
        }

    def push(self, adapter: Adapter, name: str, version: int | None = None) -> int:
        held = self.versions.setdefault(name, {})
        assert version is not None
        if version <= max(held, default=0):
            raise ServerError(f"version {version} is not above the newest", 409)
        held[version] = adapter
        self.pushed.append(version)
        return version

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        adapter: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        window_tokens: int | None = None,
        pin_tokens: int | None = None,
        evict: str | None = None,
        evict_seed: int | None = None,
        keep_tokens: int | None = None,
        keep_score: str | None = None,
        group_ids: Sequence[str] | None = None,
    ) -> Iterator[Rollout]:
        assert adapter is not None and sampling is not None and group_ids is not None
        assert window_tokens is not None
        assert keep_tokens is None and keep_score is None, "it keeps nothing"
        self.asked.append(tuple(group_ids))
        self.windows.append(window_tokens)
        draws = {"evict": evict or "oldest", "evict_seed": evict_seed or 0}
        self._plan = FoldPlan(pin_tokens=0, window_tokens=window_tokens, block_size=BLOCK, **draws)
        if self._forget_after is not None and len(self.pushed) >= self._forget_after:
            self.versions, self._forget_after = {}, None
        name, _, version = adapter.rpartition("@")
        held = self.versions.get(name, {})
        if int(version) not in held:
            raise ServerError(f"there is no adapter {adapter}", 404)
        if self._model is None:
            self._model = PTEModel.from_pretrained(self._base, held[int(version)])
        self._model.load_adapter_weights(held[int(version)])
        for prompt, group_id in zip(prompts, group_ids, strict=True):
            for index in reversed(range(n)):
                key = f"{sampling['seed']}/{group_id}/{index}"
                rng = random.Random(hashlib.sha256(key.encode()).hexdigest())
                plan = replace(self._plan, pin_tokens=len(prompt))
                yield self._answer(prompt, plan, group_id, index, rng, int(version), sampling)

    def _answer(
        self,
        prompt: Sequence[int],
        plan: FoldPlan,
        group_id: str,
        index: int,
        rng: random.Random,
        version: int,
        sampling: Mapping[str, Any],
    ) -> Rollout:
        assert self._model is not None
        count = rng.randrange(60, sampling["max_tokens"] + 1)
        answer = [rng.randrange(2, 500) for _ in range(count)]
        logprobs = replay(
            self._model,
            AlignedBatch.align([[*prompt, *answer]], [plan]),
            temperature=sampling["temperature"],
        ).logprobs[0, len(prompt) :]
        return Rollout(
            prompt_ids=tuple(prompt),
            completion_ids=tuple(answer),
            logprobs=tuple((logprobs - self.noise).tolist()),
            mask=(1,) * count,
            finish_reason="length" if count == sampling["max_tokens"] else "stop",
            adapter=f"policy@{version}",
            weight_versions=(WeightSpan(version=version, start=0, end=count),),
            plan=plan,
            group_id=group_id,
            index=index,
            num_preempted=0,
        )
