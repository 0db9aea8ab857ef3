"""What tests of kept tokens share."""

from __future__ import annotations

import pytest

from tests.harness.engine import Job


def same(found: Job, wanted: Job) -> None:
    assert found.tokens == wanted.tokens
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=2e-4)
