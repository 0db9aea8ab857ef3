"""Every route of ours gets bodies and parameters made up from its own OpenAPI schema."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from pte_vllm.wire.client import RolloutClient
from tests.harness.models import random_tokens
from tests.harness.server import Server
from tests.harness.zygote import Zygote

FUZZ = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
PATIENCE_S = 5.0
"""A request that is accepted may sample for long; then it is left, which stops it."""


@pytest.fixture(scope="module")
def server(
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    zygote: Zygote | None,
) -> Iterator[Server]:
    model, directory = tiny("llama"), tmp_path_factory.mktemp("fuzz")
    flags = ["--pte-spool", str(directory / "spool"), "--max-model-len", "256"]
    served = {"paper": adapters(model, rank=8, rule="paper")}
    with Server(model, served, log=directory / "log", flags=flags, zygote=zygote) as server:
        server.wait_ready()
        yield server


def _fuzz(operation: Any) -> Counter[int | str]:
    """Return the statuses that made-up requests got; fail on the first that is a server error."""
    statuses: Counter[int | str] = Counter()

    @FUZZ
    @given(case=operation.as_strategy())
    def run(case: schemathesis.Case) -> None:
        try:
            response = case.call(timeout=PATIENCE_S)
        except requests.exceptions.Timeout:
            statuses["left"] += 1
            return
        statuses[response.status_code] += 1
        case.validate_response(response, checks=[not_a_server_error])

    run()
    return statuses


def test_no_input_breaks_a_route(server: Server) -> None:
    url = f"{server.url}/openapi.json"  # made when it is first asked for
    api = schemathesis.openapi.from_url(url, timeout=300).include(path_regex="^/pte")
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) >= 8
    for operation in operations:
        print(operation.label, dict(_fuzz(operation)))


def test_it_serves_on(server: Server) -> None:
    """Afterwards nothing runs, and answers come."""
    server.wait_idle()
    with RolloutClient(server.url) as client:
        prompt = random_tokens(20, 500, 1)
        (record,) = client.rollouts([prompt], adapter="paper", sampling={"max_tokens": 9})
    assert len(record.prompt_ids + record.completion_ids) > 20
