"""The model that schedules and torch.compile are tested on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")
