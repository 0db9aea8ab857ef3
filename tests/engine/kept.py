"""What tests of kept tokens share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.probes import Probes
from pte_vllm.method.keep_marks import packed_bytes
from pte_vllm.method.kept_record import KeptRecord
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import log_probs
from tests.harness.engine import Job
from tests.harness.parity import load_model


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


def own_record(model: Path, job: Job, window_tokens: int) -> KeptRecord:
    """Return what a replay keeps that is told only the tokens."""
    assert job.probes is not None
    adapter = None if job.adapter is None else Adapter.load(Path(job.adapter.lora_path))
    attached = PTEModel(load_model(model), adapter)
    try:
        found = log_probs(
            *(attached, job.prompt + job.tokens, job.plan(window_tokens)),
            keeper=Keeper(attached, Probes.load(job.probes)),
        )
    finally:
        attached.detach()
    return tuple(
        None if fold.marks is None else packed_bytes(fold.marks) for fold in found.folds[0]
    )
