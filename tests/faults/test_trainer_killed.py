"""A trainer killed at any moment goes on from a whole checkpoint to the same curve."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.train.run.checkpoint import Checkpoints, RunState, adapter_directory, read_state
from pte_vllm.train.run.log import read_metrics
from tests.faults.killing import run_killed
from tests.faults.trainer import pushed, save_again, train

CURVE = ("loss", "reward", "length", "lr", "entropy", "grad_norm", "drift")
STEPS = 3
Run = tuple[Path, Path, Path, Path]
"""Return what `train` takes: base, adapter, out and served."""


@pytest.fixture(scope="module")
def make_run(
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], Run]:
    base = tiny("llama")

    def make() -> Run:
        directory = tmp_path_factory.mktemp("run")
        return base, adapters(base, rule="ridge"), directory / "out", directory / "served"

    return make


@pytest.fixture(scope="module")
def whole(make_run: Callable[[], Run]) -> tuple[Run, int]:
    """Return a run that nobody disturbed, and how many steps its file work has."""
    run = make_run()
    taken = run_killed(None, run[2].parent, train, *run)
    assert taken is not None
    return run, taken


def weights(path: Path) -> torch.Tensor:
    adapter = Adapter.load(path)
    return torch.cat([b.flatten() for b in adapter.lora_b.values()])


def newest_state(out: Path) -> RunState | None:
    """Return the state of the newest checkpoint, which must be whole."""
    newest = Checkpoints(out, keep=1).newest()
    if newest is None:
        return None
    Adapter.load(adapter_directory(newest))
    torch.load(newest / "optimizer.pt", weights_only=True)
    assert (newest / "rng.safetensors").stat().st_size > 0
    return read_state(newest)


def check_same(run: Run, whole: Run) -> None:
    """The finished `run` learned what `whole` did, and every version is of one step."""
    records, expected = (read_metrics(r[2] / "metrics.jsonl") for r in (run, whole))
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    for found, wanted in zip(records, expected, strict=True):
        for name in CURVE:
            assert found[name] == pytest.approx(wanted[name], abs=1e-6), (found["step"], name)
    torch.testing.assert_close(
        weights(run[2] / "adapter"), weights(whole[2] / "adapter"), atol=1e-6, rtol=0
    )
    versions, there = [int(r["version"]) for r in records], pushed(run[3])
    assert versions == sorted(set(versions)) and set(versions) <= set(there)
    assert there == list(range(1, there[-1] + 1)) and there[-1] == versions[-1]
    # The version of a step is what the undisturbed run pushed after it, not what a killed one did.
    for version, undisturbed in zip(versions, expected, strict=True):
        torch.testing.assert_close(
            weights(run[3] / str(version)),
            weights(whole[3] / str(int(undisturbed["version"]))),
            atol=1e-6,
            rtol=0,
        )
    left = {path.name for path in (run[2] / "checkpoints").iterdir()}
    assert left == {f"step-{STEPS:06d}"}


def kill_and_resume(run: Run, step: int) -> None:
    """Kill a fresh run before that step; what it leaves must be whole, and go on."""
    assert run_killed(step, run[2].parent, train, *run) is None
    state, before = newest_state(run[2]), pushed(run[3])
    if state is not None:
        assert before and state.version <= before[-1]
    assert run_killed(None, run[2].parent, train, *run) is not None


@pytest.mark.parametrize("part", [0.4, 0.95])
def test_killed_once(make_run: Callable[[], Run], whole: tuple[Run, int], part: float) -> None:
    run = make_run()
    kill_and_resume(run, round(part * whole[1]))
    check_same(run, whole[0])


@pytest.mark.slow
def test_killed_at_every_step(make_run: Callable[[], Run], whole: tuple[Run, int]) -> None:
    undisturbed, taken = whole
    assert taken > 60
    for step in range(1, taken + 1):
        run = make_run()
        kill_and_resume(run, step)
        check_same(run, undisturbed)
        shutil.rmtree(run[2].parent)


@pytest.mark.slow
def test_killed_again_and_again(make_run: Callable[[], Run], whole: tuple[Run, int]) -> None:
    """It is killed each time a little later in what is left; steps that were saved stay."""
    run, done = make_run(), 0
    for attempt in itertools.count(1):
        if run_killed(14 + 5 * attempt, run[2].parent, train, *run) is not None:
            break
        state = newest_state(run[2])
        assert (state.step if state is not None else 0) >= done
        done = state.step if state is not None else 0
        assert attempt < 50
    assert attempt > 3
    check_same(run, whole[0])


def test_killed_while_a_checkpoint_is_replaced(
    tiny: Callable[[str], Path], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    """A run that was just resumed stops before its next step, and keeps one checkpoint."""
    adapter = adapters(tiny("llama"), rule="ridge")
    assert run_killed(None, tmp_path, save_again, adapter, tmp_path) is not None
    seen = set()
    for step in itertools.count(1):
        taken = run_killed(step, tmp_path, save_again, adapter, tmp_path)
        state = newest_state(tmp_path)
        assert state is not None and state.step == 7, step
        seen.add(state.version)
        if taken is not None:
            break
    assert step > 15 and seen == set(range(1, max(seen) + 1)) and len(seen) > 2
    (left,) = (tmp_path / "checkpoints").iterdir()
    assert read_state(left).version == max(seen)
