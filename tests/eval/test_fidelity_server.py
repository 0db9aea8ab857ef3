"""Fidelity by a server is that by the replay: losses, most probable tokens, a bound of the KL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pte_vllm.adapter.format import Adapter
from pte_vllm.cli.eval import main as eval_command
from pte_vllm.eval import fidelity_replay, fidelity_server
from pte_vllm.eval.fidelity_arms import Eviction, build_arms
from pte_vllm.eval.fidelity_server import kl_at_least
from pte_vllm.train.distill.examples import Example
from pte_vllm.wire.client import RolloutClient
from tests.eval.test_fidelity import thoughts
from tests.harness.engine import BLOCK
from tests.harness.kinds import ADMIN_KEY
from tests.harness.models import random_tokens
from tests.harness.parity import load_model
from tests.harness.server import Server

TOP = 5
"""The server's `--max-logprobs`."""


@pytest.fixture(scope="module")
def ridge(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> Path:
    return adapters(tiny("qwen3"), rank=8, rule="ridge", features="squared", seed=3)


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server]) -> Server:
    return shared("admin")


def test_server_and_replay_agree(
    server: Server, tiny: Callable[[str], Path], ridge: Path, tmp_path: Path
) -> None:
    path = tiny("qwen3")
    eviction = Eviction(block_size=BLOCK, evict_ratio=0.25)
    arms = build_arms(
        [96, 128],
        {"ridge": 0},
        eviction=eviction,
        bytes_per_token=1,
        evict=("oldest", "random"),
    )
    examples = [
        Example(tokens=tuple(random_tokens(size, 500, size)), plan=arms[0].plan(pin))
        for pin, size in ((20, 230), (0, 190), (50, 280))
    ]
    replayed = fidelity_replay.measure(
        load_model(path), examples, arms, {"ridge": Adapter.load(ridge)}, batch_sequences=3
    )
    with RolloutClient(server.url, admin_key=ADMIN_KEY) as client:
        names = fidelity_server.push_adapters(client, {"ridge": ridge})
        assert fidelity_server.push_adapters(client, {"ridge": ridge}) == names  # not twice
        served = fidelity_server.measure(
            client, examples, arms, names, batch_sequences=2, top_logprobs=TOP
        )
    assert served.kl_is_bound and np.array_equal(served.distance, replayed.distance)
    np.testing.assert_allclose(served.losses_full, replayed.losses_full, atol=1e-4)
    for arm in arms:
        found, expected = served.arms[arm.name], replayed.arms[arm.name]
        print(f"{arm.name}: {np.abs(found.losses - expected.losses).max():.1e}")
        np.testing.assert_allclose(found.losses, expected.losses, atol=1e-4)
        assert np.array_equal(found.own, expected.own)
        assert (found.same_top != expected.same_top).mean() <= 0.01  # near ties
        assert not expected.same_top.all()
        assert np.max(found.kls - expected.kls) < 1e-4  # a lower bound, token by token
        print(f"{arm.name}: KL at least {found.kls.mean():.3f}, is {expected.kls.mean():.3f}")
        assert found.kls.min() > -1e-4 and found.kls[found.own].mean() > 0.05
    both = (served.arms["ridge"].losses, served.arms["window 96"].losses)
    assert np.abs(both[0] - both[1]).max() > 0.1  # the adapter is on
    drawn = served.arms["evict random"].losses
    assert np.abs(drawn - both[1]).max() > 0.1  # other blocks leave


def test_the_bound_is_one_and_closes_in() -> None:
    """For distributions near each other and far apart, with more and more of them known."""
    generator = np.random.default_rng(3)
    for spread, apart in ((1.0, 0.1), (3.0, 1.0), (3.0, 3.0), (6.0, 6.0)):
        z = generator.normal(size=(200, 40)) * spread
        other = z + generator.normal(size=z.shape) * apart
        log_p, log_q = (x - np.logaddexp.reduce(x, 1, keepdims=True) for x in (z, other))
        exact = (np.exp(log_p) * (log_p - log_q)).sum(1)
        before = np.zeros(len(z))
        for k in (1, 3, 10, 40):
            bounds = []
            for p, q in zip(log_p, log_q, strict=True):
                named = [{int(i): float(x[i]) for i in np.argsort(-x)[:k]} for x in (p, q)]
                bounds.append(kl_at_least(*named, most=min(named[1].values())))
            assert np.all(np.array(bounds) <= exact + 1e-6) and np.min(bounds) > -1e-6
            assert np.all(np.array(bounds) >= before - 1e-6)
            before = np.array(bounds)
        np.testing.assert_allclose(before, exact, atol=1e-6)


def test_command_on_a_server(
    server: Server,
    tiny: Callable[[str], Path],
    ridge: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FIDELITY_KEY", ADMIN_KEY)
    file = thoughts(tmp_path / "t.jsonl", [(20, 230), (30, 200)])
    arguments = ["fidelity", str(tiny("qwen3")), str(file), "--window", "64", "--url", server.url]
    arguments += ["--adapter", f"ridge={ridge}", "--api-key-env", "FIDELITY_KEY"]
    arguments += ["--top-logprobs", str(TOP), "--out", str(tmp_path / "out")]
    assert eval_command(arguments) == 0
    report = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert (report["measured_by"], report["evict_ratio"]) == (server.url, 0.25)
    window, adapter, _ = report["arms"]
    assert window["kl_at_least"][0] > 0 and "kl" not in window and "recovered" not in adapter
    with pytest.raises(ValueError, match="--block-size is 16, and that of the server 32"):
        eval_command([*arguments, "--block-size", "16"])
    assert eval_command([*arguments, "--top-logprobs", "9"]) == 2
    assert "more than this server's --max-logprobs 5" in capsys.readouterr().err
