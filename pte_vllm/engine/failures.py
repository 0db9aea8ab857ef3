"""Requests that fail in a step, alone: their adapter could not be loaded, or gave no numbers.

The worker tells the scheduler with the step's output. The scheduler ends those requests with an
error that says why, and the API server turns it into an answer of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import AsyncModelRunnerOutput

from pte_vllm.engine.thoughts import to_host

ATTRIBUTE = "pte_failures"
"""The attribute of vLLM's output that carries them."""


@dataclass(frozen=True, kw_only=True)
class StepFailures:
    """What went wrong in a step."""

    adapters: dict[int, str] = field(default_factory=dict)
    """Adapters that could not be loaded, by vLLM's id, and why."""
    not_finite: tuple[str, ...] = ()
    """Requests for which the model's output holds something that is no number."""

    def __bool__(self) -> bool:
        return bool(self.adapters or self.not_finite)


@dataclass(frozen=True)
class FiniteCheck:
    """Whether the model's output is finite, by request; on its way to the host."""

    request_ids: tuple[str, ...]  # of each row
    finite: Tensor  # [rows] bool, on the host once the device was waited for

    @classmethod
    def start(cls, request_ids: Sequence[str], hidden: Tensor) -> FiniteCheck:
        """Start the check of `hidden: [rows, d]`, what the last layer gives each request.

        A request with drafts has a row for each token that may follow, side by side.

        Nothing waits for it: whoever reads the step's tokens has waited. Logits are not looked at,
        as they are a hundred times as many, and may be masked.
        """
        # Where a number is not finite the sum is not; and of normalised numbers it always is.
        finite = torch.isfinite(hidden.sum(-1, dtype=torch.float32))
        return cls(tuple(request_ids), to_host(finite))

    def failed(self) -> tuple[str, ...]:
        """Return the requests whose output is not finite, once the device was waited for."""
        if self.finite.all():
            return ()
        rows = zip(self.request_ids, self.finite.tolist(), strict=False)
        return tuple(dict.fromkeys(request_id for request_id, finite in rows if not finite))


class WatchedOutput(AsyncModelRunnerOutput):
    """An output that is still under way, with what failed in its step."""

    def __init__(
        self, output: AsyncModelRunnerOutput, adapters: dict[int, str], check: FiniteCheck | None
    ) -> None:
        self._output, self._adapters, self._check = output, adapters, check

    def get_output(self) -> Any:
        return with_failures(self._output.get_output(), self._adapters, self._check)


def with_failures(output: Any, adapters: dict[int, str], check: FiniteCheck | None) -> Any:
    """Return a step's output that tells what failed, now or once it is there."""
    if isinstance(output, AsyncModelRunnerOutput):
        return WatchedOutput(output, adapters, check)
    not_finite = check.failed() if check is not None else ()
    failures = StepFailures(adapters=adapters, not_finite=not_finite)
    if failures:
        setattr(output, ATTRIBUTE, failures)
    return output
