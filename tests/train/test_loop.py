"""The loop: asks again where a server forgot, keeps windows and versions, and ends when told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.train.data.questions import Problem, QuestionStream
from pte_vllm.train.grpo import sampling
from pte_vllm.train.grpo.loop import train
from pte_vllm.train.grpo.loss import DriftError
from pte_vllm.train.run.checkpoint import Checkpoints, read_state
from pte_vllm.train.run.log import read_metrics
from pte_vllm.wire.rollout import Rollout
from pte_vllm.wire.transport import ServerError
from tests.harness.models import random_tokens
from tests.train.fake_server import FakeServer
from tests.train.loop_runs import options, stream, weights, weights_of

pytestmark = pytest.mark.usefixtures("reward_by_first_token")


def test_random_blocks(start: tuple[Path, Path], tmp_path: Path) -> None:
    """The server is asked for draws, and the replay follows them: otherwise drift ends the run."""
    plan = {"window_tokens": 64, "block_size": 16, "evict": "random", "evict_seed": 3}
    seen = []

    class Drawing(FakeServer):
        def rollouts(self, *args: Any, **kwargs: Any) -> Iterator[Rollout]:
            for rollout in super().rollouts(*args, **kwargs):
                seen.append(rollout)
                yield rollout

    changes = {"sampling": {"max_tokens": 160}, "optimizer": {"steps": 1, "warmup_steps": 0}}
    train(
        options(start, tmp_path, plan=plan, grpo={"max_logprob_drift": 1e-4}, **changes),
        Drawing(start[0]),
        stream=stream(),
    )
    assert {(r.plan.evict, r.plan.evict_seed) for r in seen} == {("random", 3)}
    assert sum(len(r.fold_events) for r in seen) >= 6


def test_server_that_forgot_gets_the_version_again(
    start: tuple[Path, Path], tmp_path: Path
) -> None:
    steady, forgetful = FakeServer(start[0]), FakeServer(start[0], forget_after=3)
    assert train(options(start, tmp_path / "a"), steady, stream=stream())
    assert train(options(start, tmp_path / "b"), forgetful, stream=stream())
    assert forgetful.pushed == [1, 2, 3, 3, 4, 5]
    assert torch.equal(weights(tmp_path / "a/adapter"), weights(tmp_path / "b/adapter"))


def test_server_that_returns_with_another_plan_is_refused(
    start: tuple[Path, Path], tmp_path: Path
) -> None:
    class Changed(FakeServer):
        def wait_ready(self, timeout_s: float = 0.0) -> dict[str, Any]:
            info = super().wait_ready(timeout_s)
            return {"plan": info["plan"] | ({} if not self.pushed else {"evict_ratio": 0.5})}

    server = Changed(start[0], forget_after=3)
    with pytest.raises(ValueError, match=r"--plan.evict_ratio is 0.25, but the server's is 0.5"):
        train(options(start, tmp_path), server, stream=stream())
    assert server.pushed == [1, 2, 3]
    assert read_state(Checkpoints(tmp_path, keep=2).newest()).step == 2


@pytest.mark.parametrize("staleness", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_weights_under_a_new_number_are_not_stale(
    staleness: int, start: tuple[Path, Path], tmp_path: Path
) -> None:
    """In the midst of a batch the server loses the version, and has later ones of its own."""

    class Restarted(FakeServer):
        def rollouts(self, *args: Any, **kwargs: Any) -> Any:
            for count, rollout in enumerate(super().rollouts(*args, **kwargs)):
                if count == 3 and self.pushed == [1, 2]:
                    self.versions["policy"] = {7: self.versions["policy"][1]}
                    raise ServerError("there is no adapter policy@2", 404)
                yield rollout

    steady, server = FakeServer(start[0]), Restarted(start[0])
    changes = {"grpo": {"max_staleness": staleness}}
    assert train(options(start, tmp_path / "a", **changes), steady, stream=stream())
    assert train(options(start, tmp_path / "b", **changes), server, stream=stream())
    assert server.pushed == [1, 2, 8, 9, 10, 11]
    assert server.asked[1:3] == [("2.1.0", "2.1.1"), ("2.1.1",)]
    for record in read_metrics(tmp_path / "b/metrics.jsonl"):
        assert record["stale_samples"] == 0 and record["samples"] == 6
    # All tokens count as the learner's own, those from before the restart too.
    curves = [read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab"]
    assert [r["drift_tokens"] for r in curves[0]] == [r["drift_tokens"] for r in curves[1]]
    assert torch.equal(weights(tmp_path / "a/adapter"), weights(tmp_path / "b/adapter"))


@pytest.mark.parametrize("step", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_whose_push_fails_is_logged_once(
    step: int, start: tuple[Path, Path], tmp_path: Path
) -> None:
    class Full(FakeServer):
        def push(self, adapter: Adapter, name: str, version: int | None = None) -> int:
            if len(self.pushed) == step:
                raise ServerError("the disk is full", 500)
            return super().push(adapter, name, version)

    out = tmp_path / "run"
    with pytest.raises(ServerError, match="the disk is full"):
        train(options(start, out), Full(start[0]), stream=stream())
    assert read_state(Checkpoints(out, keep=2).newest()).step == step
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl")] == [1, 2, 3, 4][:step]
    server = FakeServer(start[0])
    assert train(options(start, out), server, stream=stream())
    assert server.pushed == list(range(step + 1, 6))  # the last step's, too
    assert torch.equal(weights(out / "adapter"), weights_of(server.versions["policy"][5]))
    records = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert all("loss" in r for r in records)


def test_drift_stops_the_run_and_is_logged(start: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DriftError, match="max_logprob_drift"):
        train(options(start, tmp_path), FakeServer(start[0], noise=1e-3), stream=stream())
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert record["drift"] == pytest.approx(1e-3, rel=0.05)
    assert read_state(Checkpoints(tmp_path, keep=2).newest()).step == 0


def test_dynamic_sampling_replaces_and_gives_up(
    start: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lucky: list[str] = []

    def reward(problem: Problem, text: str, ids: Any, **_: Any) -> float:
        if problem.key in lucky:
            return float(ids[0] % 2)
        return 1.0

    monkeypatch.setattr(sampling, "score", reward)
    changes = {
        "optimizer": {"steps": 1, "warmup_steps": 0},
        "grpo": {"dynamic_sampling": True, "dynamic_sampling_max_tries": 3},
    }
    server = FakeServer(start[0])
    assert train(options(start, tmp_path / "a", **changes), server, stream=stream())
    record = read_metrics(tmp_path / "a/metrics.jsonl")[-1]
    assert record["sampling_rounds"] == 3 and record["dropped_groups"] == 6
    assert record["samples"] == 0 and "loss" not in record and record["reward"] == 1.0
    assert torch.equal(weights(tmp_path / "a/adapter"), weights(start[1]))

    drawn = stream()
    keys = [p.key for p in drawn.take(4)]
    lucky += [keys[1], keys[2]]
    server = FakeServer(start[0])
    assert train(options(start, tmp_path / "b", **changes), server, stream=stream())
    record = read_metrics(tmp_path / "b/metrics.jsonl")[-1]
    assert server.asked == [("1.1.0", "1.1.1"), ("1.2.0",)]
    assert record["dropped_groups"] == 1 and record["samples"] == 6 and "loss" in record


def test_questions_that_are_asked_later_have_the_window_of_their_step(
    start: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a restarted server is asked again, and what replaces groups that teach nothing."""

    class Shorter:
        size = None

        def problem(self, index: int) -> Problem:
            tokens = random_tokens((60, 20, 30, 10)[index], seed=index)
            return Problem(key=str(index), prompt=tokens, answer=[index], reward="exact")

    class Forgetful(FakeServer):
        def rollouts(self, *args: Any, **kwargs: Any) -> Any:
            for count, rollout in enumerate(super().rollouts(*args, **kwargs)):
                if count == 3 and len(self.asked) == 1:
                    self.versions.clear()
                    raise ServerError("there is no adapter policy@1", 404)
                yield rollout

    monkeypatch.setattr(sampling, "score", lambda problem, text, ids, **_: 1.0)
    tries = {"dynamic_sampling": True, "dynamic_sampling_max_tries": 2}
    run = options(start, tmp_path, plan={"window_tokens": "prompt"}, grpo=tries)
    server = Forgetful(start[0])
    publisher = sampling.Publisher(server, "policy")
    publisher.publish(Adapter.load(start[1]))
    batch = sampling.Sampler(run, server, publisher, None).batch(
        QuestionStream(Shorter(), seed=0), step=1
    )
    assert server.asked == [("1.1.0", "1.1.1"), ("1.1.1",), ("1.2.0", "1.2.1")]
    assert server.windows == [64, 64, 64] and batch.window_tokens == 64
    assert {sample.rollout.plan.window_tokens for sample in batch.seen} == {64}


def test_rewards_know_which_answers_stopped(
    start: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[list[int], bool]] = []

    def reward(problem: Problem, text: str, ids: Any, *, stopped: bool) -> float:
        told.append((list(ids), stopped))
        return 0.0

    monkeypatch.setattr(sampling, "score", reward)
    changes = {"optimizer": {"steps": 2, "warmup_steps": 0}, "sampling": {"max_tokens": 61}}
    assert train(options(start, tmp_path, **changes), FakeServer(start[0]), stream=stream())
    assert {stopped for _, stopped in told} == {True, False}
    assert all(stopped == (len(ids) < 61) for ids, stopped in told)


def test_plan_of_another_server_is_refused(start: tuple[Path, Path], tmp_path: Path) -> None:
    run = options(start, tmp_path, plan={"block_size": 8})
    with pytest.raises(ValueError, match=r"--plan.block_size is 8, but the server's is 16"):
        train(run, FakeServer(start[0]), stream=stream())
