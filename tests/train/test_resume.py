"""A run that goes on keeps its options: what cannot change is refused, what can is what runs."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.train.distill.loop import train
from pte_vllm.train.options.runs import DistillRun, GrpoRun
from pte_vllm.train.run.checkpoint import Checkpoints
from pte_vllm.train.run.resume import resumed
from pte_vllm.train.run.start import start_run

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]
TEXT = "the quick brown fox jumps over the lazy dog, again and again and again; " * 40


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Path:
    return tiny("llama")


@pytest.fixture
def values(model: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a run of one step that says as little as it can."""
    (tmp_path / "text.txt").write_text(TEXT)
    return {
        "model": {"base": str(model)},
        "adapter": {"rank": 4},
        "plan": {"window_tokens": 64},
        "optimizer": {"steps": 1, "weight_decay": 0.25},
        "distill": {
            "text": str(tmp_path / "text.txt"),
            "sequence_tokens": 150,
            "batch_sequences": 2,
            "eval_sequences": 0,
        },
        "run": {"out": str(tmp_path / "out"), "tensorboard": False},
    }


def run_of(values: dict[str, Any], **changes: dict[str, Any]) -> DistillRun:
    tables = {**values, **{name: {**values.get(name, {}), **t} for name, t in changes.items()}}
    return DistillRun.model_validate(tables)


def written(values: dict[str, Any]) -> dict[str, Any]:
    return tomllib.loads((Path(values["run"]["out"]) / "run.toml").read_text())


def edit(values: dict[str, Any], old: str, new: str) -> None:
    """Make the stored options those of another version of this package."""
    file = Path(values["run"]["out"]) / "run.toml"
    text = file.read_text()
    assert text.count(old) == 1, text
    file.write_text(text.replace(old, new))


def test_what_was_resolved_is_written(values: dict[str, Any]) -> None:
    train(run_of(values))
    adapter = written(values)["adapter"]
    assert (adapter["rule"], adapter["features"], adapter["global_tokens"]) == (
        *("ridge", "squared"),
        4,
    )
    saved = Adapter.load(Path(values["run"]["out"]) / "adapter").pte
    assert saved is not None and saved.features == adapter["features"]


def test_a_default_that_changed_is_no_conflict(values: dict[str, Any]) -> None:
    """The run began when the defaults were others; what is not given stays what it was."""
    old = {"adapter": {"rule": "paper"}, "optimizer": {"lr": 0.5}, "plan": {"evict_ratio": 0.5}}
    train(run_of(values, **old))
    train(run_of(values, optimizer={"steps": 2}))
    found = written(values)
    assert (found["adapter"]["rule"], found["adapter"]["features"]) == ("paper", "linear")
    assert (found["optimizer"]["lr"], found["plan"]["evict_ratio"]) == (0.5, 0.5)
    assert found["optimizer"]["steps"] == 2
    saved = Adapter.load(Path(values["run"]["out"]) / "adapter").pte
    assert saved is not None and (saved.rule, saved.features) == ("paper", "linear")


@pytest.mark.parametrize("record", ["", 'features = "squared"\n'])
def test_linear_features_stay(record: str, values: dict[str, Any]) -> None:
    """Files of adapters do not name them; a run's file may lack them, or have a later default."""
    train(run_of(values, adapter={"features": "linear"}))
    edit(values, 'features = "linear"\n', record)
    train(run_of(values, optimizer={"steps": 2}))
    assert written(values)["adapter"]["features"] == "linear"


def test_the_adapter_knows_better_than_a_false_record(values: dict[str, Any]) -> None:
    """Earlier versions wrote what the options of the last start would have made."""
    train(run_of(values, adapter={"rule": "paper"}))
    edit(values, 'rule = "paper"', 'rule = "ridge"')
    edit(values, 'features = "linear"\n', "")
    edit(values, "rank = 4", "rank = 4\nan_option_that_is_gone = 1")
    train(run_of(values, adapter={"rule": "paper"}, optimizer={"steps": 2}))
    adapter = written(values)["adapter"]
    assert (adapter["rule"], adapter["features"]) == ("paper", "linear")
    assert "an_option_that_is_gone" not in adapter
    with pytest.raises(ValueError, match="--adapter.rule is ridge, but was paper"):
        resumed(run_of(values, adapter={"rule": "ridge"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"rank": 8}}, "--adapter.rank is 8, but was 4"),
        ({"adapter": {"features": "linear"}}, "--adapter.features is linear, but was squared"),
        ({"adapter": {"plain": True}}, "--adapter.plain is True, but was False"),
        ({"adapter": {"alpha": 2.0}}, "--adapter.alpha is 2.0, but was unset"),
        ({"plan": {"window_tokens": 96}}, "--plan.window_tokens is 96, but was 64"),
        ({"model": {"base": "another"}}, "--model.base is another, but was "),
        ({"model": {"adapter": "some"}}, "--model.adapter is some, but was unset"),
    ],
)
def test_what_cannot_change_is_refused(
    values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    train(run_of(values))
    before = written(values)
    with pytest.raises(ValueError) as caught:
        train(run_of(values, **changes))
    assert message in str(caught.value) and "start afresh in another --run.out" in str(caught.value)
    assert written(values) == before
    elsewhere = run_of(values, **changes, run={"out": values["run"]["out"] + "-2"})
    assert resumed(elsewhere) is elsewhere


def test_the_same_path_in_other_words(values: dict[str, Any], model: Path) -> None:
    train(run_of(values))
    again = f"{model.parent}/../{model.parent.name}/{model.name}"
    assert resumed(run_of(values, model={"base": again})).model.base == again


def test_options_of_the_optimizer_are_those_given_now(values: dict[str, Any]) -> None:
    train(run_of(values))
    run = resumed(run_of(values, optimizer={"weight_decay": 0.5, "betas": (0.7, 0.8), "steps": 2}))
    start = start_run(run)
    assert start.resumed
    (group,) = start.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.7, 0.8))
    assert written(values)["optimizer"]["weight_decay"] == 0.5
    assert start.optimizer.state, "the moments are the checkpoint's"
    del values["optimizer"]["weight_decay"]
    (group,) = start_run(resumed(run_of(values))).optimizer.param_groups
    assert group["weight_decay"] == 0.5


def test_a_named_adapter_has_no_section_of_its_making(
    values: dict[str, Any], model: Path, adapters: Adapters
) -> None:
    """What makes adapters was not used, whatever it says."""
    named = {"model": {"adapter": str(adapters(model, rule="paper"))}}
    train(run_of(values, **named))
    assert "adapter" not in written(values)
    train(run_of(values, **named, adapter={"rule": "sum"}, optimizer={"steps": 2}))
    assert "adapter" not in written(values)
    with pytest.raises(ValueError, match="--model.adapter is unset, but was /"):
        resumed(run_of(values, model={"adapter": None}))
    kept = resumed(run_of(values))  # not given: as it was
    assert kept.model.adapter == named["model"]["adapter"]


def test_a_run_of_another_command_is_no_checkpoint(values: dict[str, Any]) -> None:
    train(run_of(values))
    tables = {name: table for name, table in values.items() if name != "distill"}
    run = GrpoRun.model_validate({**tables, "data": {"source": "gsm8k"}})
    with pytest.raises(ValueError, match="holds a run of `pte-vllm train distill`"):
        resumed(run)


def test_what_has_no_checkpoint_begins_anew(values: dict[str, Any]) -> None:
    train(run_of(values))
    newest = Checkpoints(Path(values["run"]["out"]), keep=1).newest()
    assert newest is not None
    newest.rename(newest.with_name("elsewhere"))
    torch.manual_seed(0)
    run = run_of(values, adapter={"rank": 8})
    assert resumed(run) is run
