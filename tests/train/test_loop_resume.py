"""What the loop saves, whatever ends it, and that it resumes to the same curve."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.train.data.questions import Problem
from pte_vllm.train.grpo import sampling
from pte_vllm.train.grpo.loop import train
from pte_vllm.train.options.runs import GrpoRun
from pte_vllm.train.run.checkpoint import Checkpoints, read_state
from pte_vllm.train.run.log import MetricsLog, read_metrics
from pte_vllm.train.run.start import learning_rate
from tests.train.fake_server import FakeServer
from tests.train.loop_runs import options, stream, weights

pytestmark = pytest.mark.usefixtures("reward_by_first_token")


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
