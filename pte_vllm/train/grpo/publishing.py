"""Keeps the server that samples at the learner's adapter, whatever happens to it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from pte_vllm.adapter.format import Adapter
from pte_vllm.method.names import Evict, KeepScore
from pte_vllm.wire.rollout import Rollout


class RolloutSource(Protocol):
    """What the loop needs of `wire.client.RolloutClient`."""

    def wait_ready(self, timeout_s: float = ...) -> dict[str, Any]: ...

    def adapters(self) -> dict[str, dict[str, Any]]: ...

    def push(self, adapter: Adapter, name: str, version: int | None = ...) -> int: ...

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = ...,
        adapter: str | None = ...,
        sampling: Mapping[str, Any] | None = ...,
        window_tokens: int | None = ...,
        pin_tokens: int | None = ...,
        evict: Evict | None = ...,
        evict_seed: int | None = ...,
        keep_tokens: int | None = ...,
        keep_score: KeepScore | None = ...,
        group_ids: Sequence[str] | None = ...,
    ) -> Iterator[Rollout]: ...

    def records(self, name: str) -> list[Rollout]: ...


class Publisher:
    """Keeps the server at the learner's adapter, under versions that only rise.

    Args:
        source: the server that samples.
        name: the adapter's name there.
        version: the newest version that was pushed before this run was resumed; 0: none.
    """

    def __init__(self, source: RolloutSource, name: str, version: int = 0) -> None:
        self.name, self.version = name, version
        self._source = source
        self._adapter: Adapter | None = None
        self._same: set[int] = set()

    @property
    def engine_name(self) -> str:
        """The name of the current version, as requests give it."""
        return f"{self.name}@{self.version}"

    def publish(self, adapter: Adapter) -> int:
        """Push a new version, above ours and above what the server has; returns its number."""
        self._adapter = adapter
        self.version = self._source.push(adapter, self.name, self._above(self.version))
        self._same = {self.version}
        return self.version

    def restore(self) -> None:
        """Push the current adapter again, to a server that lacks it.

        Under its own version if nothing newer is there, else under one above.
        """
        assert self._adapter is not None, "nothing was published"
        versions = self._known()
        if self.version in versions:
            return
        target = self.version if self.version > max(versions, default=0) else max(versions) + 1
        self.version = self._source.push(self._adapter, self.name, target)
        self._same.add(self.version)

    def as_current(self, rollout: Rollout) -> Rollout:
        """Return the rollout with the current version in place of others of the same weights."""
        spans = tuple(
            replace(span, version=self.version) if span.version in self._same else span
            for span in rollout.weight_versions
        )
        if spans == rollout.weight_versions:
            return rollout
        return replace(rollout, weight_versions=spans)

    def _known(self) -> list[int]:
        known = self._source.adapters().get(self.name)
        return [entry["version"] for entry in known["versions"]] if known else []

    def _above(self, version: int) -> int:
        return max([version, *self._known()]) + 1
