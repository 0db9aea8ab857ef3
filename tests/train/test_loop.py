"""The loop: resumes to the same curve, survives a server that forgets, and ends when told."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.train.data.questions import Problem, QuestionStream
from pte_vllm.train.grpo import sampling
from pte_vllm.train.grpo.loop import train
from pte_vllm.train.grpo.loss import DriftError
from pte_vllm.train.options.runs import GrpoRun
from pte_vllm.train.run.checkpoint import Checkpoints, read_state
from pte_vllm.train.run.log import MetricsLog, read_metrics
from pte_vllm.train.run.start import learning_rate
from pte_vllm.wire.rollout import Rollout
from pte_vllm.wire.transport import ServerError
from tests.harness.models import random_tokens
from tests.train.fake_server import FakeServer

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]


class Questions:
    size = 7

    def __init__(self, growth: int) -> None:
        self.growth = growth

    def problem(self, index: int) -> Problem:
        tokens = random_tokens(12 + self.growth * index, seed=index)
        return Problem(key=str(index), prompt=tokens, answer=[index], reward="exact")


def stream(growth: int = 3) -> QuestionStream:
    return QuestionStream(Questions(growth), seed=5)


@pytest.fixture(autouse=True)
def _reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are random, so what earns is set here: the first token's lowest bits."""
    monkeypatch.setattr(sampling, "score", lambda problem, text, ids, **_: (ids[0] % 4) / 3)


@pytest.fixture
def start(tiny: Tiny, adapters: Adapters) -> tuple[Path, Path]:
    path = tiny("llama")
    return path, adapters(path, rule="ridge")


def options(start: tuple[Path, Path], out: Path, **changes: Any) -> GrpoRun:
    tables: dict[str, dict[str, Any]] = {
        "model": {"base": str(start[0]), "adapter": str(start[1]), "device": "cpu"},
        "plan": {"window_tokens": 32, "block_size": 16},
        "optimizer": {"lr": 3e-3, "steps": 4, "warmup_steps": 2, "schedule": "linear"},
        "sampling": {"group_size": 3, "groups_per_step": 2, "max_tokens": 90},
        "grpo": {"inner_steps": 2},
        "data": {"source": "memory", "task": "recall"},
        "run": {"out": str(out), "save_every_steps": 2, "tensorboard": False},
    }
    for name, table in changes.items():
        tables[name] = {**tables[name], **table}
    return GrpoRun.model_validate(tables)


def weights(path: Path) -> torch.Tensor:
    return weights_of(Adapter.load(path))


def weights_of(adapter: Adapter) -> torch.Tensor:
    return torch.cat([b.flatten() for b in adapter.lora_b.values()])


@pytest.mark.parametrize(
    ("window", "growth", "windows"), [(32, 3, [32] * 4), ("prompt", 6, [32, 48, 48, 48])]
)
def test_resume_gives_the_same_curve(
    window: int | str,
    growth: int,
    windows: list[int],
    start: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    plan = {"window_tokens": window}
    whole, server = tmp_path / "whole", FakeServer(start[0])
    assert train(options(start, whole, plan=plan), server, stream=stream(growth))
    assert server.pushed == [1, 2, 3, 4, 5]
    curve = read_metrics(whole / "metrics.jsonl")
    assert [r["step"] for r in curve] == [1, 2, 3, 4]
    assert all(r["drift"] < 1e-5 and r["folds"] >= 1 for r in curve)
    assert [r["window_tokens"] for r in curve] == server.windows == windows
    assert (whole / "training.png").stat().st_size > 1000
    assert GrpoRun.load(whole / "run.toml") == options(start, whole, plan=plan)

    cut = tmp_path / "cut"
    run = options(start, cut, plan=plan)

    class Killed(BaseException):
        """Nothing is saved: what the run holds is lost."""

    class Deadly(FakeServer):
        def push(self, adapter: Adapter, name: str, version: int | None = None) -> int:
            if len(self.pushed) == 4:  # step 3 is done but not saved
                raise Killed
            return super().push(adapter, name, version)

    server = Deadly(start[0])
    with pytest.raises(Killed):
        train(run, server, stream=stream(growth))
    assert read_state(Checkpoints(cut, keep=2).newest()).step == 2
    again = FakeServer(start[0])
    again.versions = server.versions  # the server knows version 4; the checkpoint is at 3
    torch.manual_seed(123)
    assert train(run, again, stream=stream(growth))
    assert again.pushed == [5, 6, 7] and again.windows == windows[2:]
    resumed = read_metrics(cut / "metrics.jsonl")
    for a, b in zip(curve, resumed, strict=True):
        for name in ("loss", "reward", "length", "lr", "entropy", "grad_norm", "ratio_off"):
            assert a[name] == pytest.approx(b[name], abs=1e-6), (a["step"], name)
    torch.testing.assert_close(
        weights(whole / "adapter"), weights(cut / "adapter"), atol=1e-6, rtol=0
    )
    assert not torch.equal(weights(whole / "adapter"), weights(start[1]))


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


def test_any_error_saves_the_steps_before_it(
    start: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def broken(problem: Problem, text: str, ids: Any, *, stopped: bool) -> float:
        asked.append(ids)
        if len(asked) == 9:  # in the midst of the second step
            raise OSError("the answers' file is gone")
        return float(ids[0] % 4) / 3

    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train(options(start, whole), FakeServer(start[0]), stream=stream())
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "score", broken)
        with pytest.raises(OSError, match="file is gone"):
            train(options(start, out), FakeServer(start[0]), stream=stream())
    state = read_state(Checkpoints(out, keep=2).newest())
    assert (state.step, state.stream["drawn"]) == (1, 2)
    assert train(options(start, out), FakeServer(start[0]), stream=stream())
    torch.testing.assert_close(
        weights(whole / "adapter"), weights(out / "adapter"), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(("update", "saved"), [(3, 1), (4, None)])
def test_half_an_update_is_not_saved(
    update: int,
    saved: int | None,
    start: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step has two updates: an error in its first leaves the adapter as the step before did."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def norm(*args: Any) -> torch.Tensor:
        calls.append(args)
        return torch.tensor(float("nan")) if len(calls) == update else clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    with pytest.raises(FloatingPointError):
        train(options(start, tmp_path), FakeServer(start[0]), stream=stream())
    newest = Checkpoints(tmp_path, keep=2).newest()
    assert (read_state(newest).step if newest else None) == saved


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


def test_checkpoints_are_whole_or_absent(start: tuple[Path, Path], tmp_path: Path) -> None:
    run = options(start, tmp_path, run={"save_every_steps": 1, "keep_checkpoints": 2})
    assert train(run, FakeServer(start[0]), stream=stream())
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000003", "step-000004"]
    newest = Checkpoints(tmp_path, keep=2).newest()
    assert newest is not None and read_state(newest).stream["drawn"] == 8
    (tmp_path / "checkpoints/.draft-1").mkdir()
    (tmp_path / "checkpoints/.draft-1/state.json").write_text("{")
    assert Checkpoints(tmp_path, keep=2).newest() == newest
    for old in ("step-000002", "step-000004.1"):  # killed when a checkpoint was there, and not its
        shutil.copytree(newest, tmp_path / "checkpoints" / old)  # predecessor gone
    Checkpoints(tmp_path, keep=2).tidy()
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000003", "step-000004.1"]
    with pytest.raises(ValueError, match="--run.resume is false"):
        train(options(start, tmp_path, run={"resume": False}), FakeServer(start[0]))


@pytest.mark.parametrize("when", ["sampling", pytest.param("learning", marks=pytest.mark.slow)])
def test_signal_saves_and_resumes(when: str, start: tuple[Path, Path], tmp_path: Path) -> None:
    class Signalled(FakeServer):
        def rollouts(self, *args: Any, **kwargs: Any) -> Any:
            for rollout in super().rollouts(*args, **kwargs):
                if when == "sampling" and self.pushed == [1, 2] and rollout.index == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield rollout

        def push(self, *args: Any, **kwargs: Any) -> int:
            if when == "learning" and self.pushed == [1]:  # outside of what is interrupted
                os.kill(os.getpid(), signal.SIGTERM)
            return super().push(*args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    server = Signalled(start[0])
    assert not train(options(start, tmp_path / "a"), server, stream=stream())
    assert signal.getsignal(signal.SIGTERM) == before
    state = read_state(Checkpoints(tmp_path / "a", keep=2).newest())
    assert (state.step, state.version, state.stream["drawn"]) == (1, 2, 2)
    assert train(options(start, tmp_path / "a"), server, stream=stream())
    assert train(options(start, tmp_path / "b"), FakeServer(start[0]), stream=stream())
    torch.testing.assert_close(
        weights(tmp_path / "a/adapter"), weights(tmp_path / "b/adapter"), atol=1e-6, rtol=0
    )


def test_metrics_survive_a_line_cut_off(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, step=0, tensorboard=False)
    log.add(1, {"reward": 0.5, "kl": float("nan")})
    log.add(2, {"reward": 0.6})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    again = MetricsLog(tmp_path, step=1, tensorboard=False)
    again.add(2, {"reward": 0.7})
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.7}]


def test_learning_rate() -> None:
    run = GrpoRun.model_validate(
        {
            "model": {"base": "x"},
            "data": {"source": "memory", "task": "recall"},
            "optimizer": {"lr": 1.0, "steps": 10, "warmup_steps": 2, "schedule": "cosine"},
        }
    )
    found = [learning_rate(run.optimizer, step) for step in (0, 1, 2, 6, 9)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0380602], abs=1e-5)
