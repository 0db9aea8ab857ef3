"""A worker is killed during a rollout, as when memory runs out: all end, and the status tells."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.kinds import ADMIN_KEY
from tests.harness.server import Server
from tests.server.killed_process import assert_killed_process_ends


@pytest.mark.ends_server
def test_killed_worker_ends_the_server(shared: Callable[..., Server]) -> None:
    assert_killed_process_ends(shared("keys"), key=ADMIN_KEY)
