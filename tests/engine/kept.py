"""What tests of kept tokens share."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.harness.engine import Job


def same(found: Job, wanted: Job) -> None:
    assert found.tokens == wanted.tokens
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=2e-4)


def assert_selected(jobs: Iterable[Job], window_tokens: int) -> int:
    """Every job has a record of all its folds, in which every one that had to choose chose.

    Returns how many did.
    """
    count = 0
    for job in jobs:
        plan = job.plan(window_tokens)
        # The last token is sampled, never computed.
        folds = plan.folds(len(job.prompt) + len(job.tokens) - 2)
        chose = [marks is not None for marks in job.kept]
        assert chose == [plan.selects(fold) for fold in range(folds)] and any(chose)
        count += sum(chose)
    return count
