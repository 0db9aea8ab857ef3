"""Adapters that tests of rollouts and scores push to a server, and the replay beside a record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pte_vllm.wire.client import RolloutClient
from pte_vllm.wire.rollout import Rollout
from tests.harness.engine import BLOCK
from tests.harness.kinds import ADMIN_KEY
from tests.harness.parity import replayed
from tests.harness.server import WINDOW, Server

LENGTH = WINDOW + 7 * BLOCK + 5
SAMPLING = {"max_tokens": LENGTH, "temperature": 0.8, "seed": 7, "ignore_eos": True}


def make_versions(model: Path, adapters: Callable[..., Path]) -> dict[str, Path]:
    """Make what the tests push, by the engine's name for it."""
    return {
        "paper@1": adapters(model, rank=8, rule="paper", seed=1),
        "paper@2": adapters(model, rank=8, rule="paper", seed=2),
        "ridge@1": adapters(model, rank=8, rule="ridge", features="squared", seed=3),
        "plain@1": adapters(model, plain=True, rank=8, seed=4),
    }


def push_all(server: Server, versions: dict[str, Path]) -> None:
    """Push them, unless the server has them already."""
    with RolloutClient(server.url, admin_key=ADMIN_KEY) as client:
        for engine_name, path in versions.items():
            name, _, number = engine_name.partition("@")
            assert client.push(path, name, int(number)) == int(number)


def difference(server: Server, versions: dict[str, Path], rollout: Rollout, **options) -> float:
    """Return the largest |Δ log p| between a record and the replay, which keeps what it kept."""
    if rollout.plan.keep_tokens:
        options |= {"probes": server.probes, "record": rollout.kept}
    expected = replayed(
        server.model,
        versions[rollout.adapter] if rollout.adapter is not None else None,
        list(rollout.token_ids),
        rollout.plan,
        **options,
    )
    found = torch.tensor(rollout.logprobs)
    return (found - expected[len(rollout.prompt_ids) - 1 :]).abs().max().item()
