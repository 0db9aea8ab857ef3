"""Options with which a run goes on: what is not given again stays, and some of it cannot change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pte_vllm.adapter.files import read_pte_config
from pte_vllm.train.options.parsing import options_of, read_toml
from pte_vllm.train.options.runs import DistillRun, GrpoRun
from pte_vllm.train.run.checkpoint import Checkpoints, adapter_directory

OPTIONS_FILE = "run.toml"

Run = TypeVar("Run", GrpoRun, DistillRun)

_FIXED = ("model.base", "model.adapter", "adapter.", "plan.")
"""Names, or their beginnings, of options that cannot change within a run."""
_PATHS = ("model.base", "model.adapter", "adapter.text", "plan.probes")
_OF_THIS_START = ("run.out", "run.resume")
_ALGORITHMS = ("grpo", "distill")


def resumed(run: Run) -> Run:
    """Return the options with which a run goes on from the newest checkpoint below `run.out`.

    Those that were not given are what they were, also where a default has changed since. A new
    run's are returned unchanged.

    Raises:
        ValueError: naming flag, old and new value, if one is given that cannot change.
        OSError: if the options cannot be read.
    """
    directory = run.run.directory
    newest, file = Checkpoints(directory, keep=1).newest(), directory / OPTIONS_FILE
    if newest is None or not run.run.resume or not file.is_file():
        return run
    tables = read_toml(file)
    _check_algorithm(run, tables)
    stored = _as_made(options_of(type(run), tables), adapter_directory(newest))
    given = _that_count(run.given(), stored)
    before = type(run).from_options(stored, file)  # fills in options that came later
    _check_fixed(run.run.out, given, options_of(type(run), before.model_dump(mode="json")))
    kept = {name: value for name, value in stored.items() if name not in _OF_THIS_START}
    return type(run).from_options({**kept, **given}, file)


def save_options(run: GrpoRun | DistillRun) -> None:
    """Write OUT/run.toml: options as they are resolved, without those that have no effect."""
    path = run.run.directory / OPTIONS_FILE
    if run.model.adapter is None:
        run.model_copy(update={"adapter": run.adapter.resolve()}).save(path)
    else:  # the section makes adapters where none is named
        run.save(path, without={"adapter"})


def _as_made(stored: Mapping[str, Any], adapter: Path) -> dict[str, Any]:
    """Return what was stored, corrected by what the run's adapter says of itself.

    A file of an earlier version lacks options that came later, and may hold defaults that were
    never this run's.
    """
    if "model.adapter" in stored:
        return {name: value for name, value in stored.items() if not name.startswith("adapter.")}
    pte = read_pte_config(adapter)
    made: dict[str, Any] = {"plain": pte is None}
    if pte is not None:
        made |= asdict(pte)  # not as in its file, which does not name linear features
        del made["format_version"]
    return {**stored, **{f"adapter.{name}": value for name, value in made.items()}}


def _that_count(given: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Drop given options of a new adapter that say nothing.

    They say nothing where the run started from an adapter that it did not make, or where they are
    unset.
    """
    named = "model.adapter" in stored
    return {
        name: value
        for name, value in given.items()
        if not name.startswith("adapter.") or not (named or value is None)
    }


def _check_algorithm(run: GrpoRun | DistillRun, tables: Mapping[str, Any]) -> None:
    own = next(name for name in _ALGORITHMS if name in type(run).model_fields)
    found = next((name for name in _ALGORITHMS if name in tables), own)
    if found != own:
        raise ValueError(
            f"--run.out {run.run.out} holds a run of `pte-vllm train {found}`: start this one in "
            "another --run.out"
        )


def _check_fixed(out: str, given: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    changed = [
        f"--{name} is {_shown(new)}, but was {_shown(before[name])}"
        for name, new in given.items()
        if name.startswith(_FIXED) and not _same(name, before[name], new)
    ]
    if changed:
        raise ValueError(
            f"{'; '.join(changed)}: the run in {out} cannot go on with that. Leave it as "
            "it was, or start afresh in another --run.out"
        )


def _same(name: str, old: Any, new: Any) -> bool:
    if name in _PATHS and old is not None and new is not None:
        return Path(old).resolve() == Path(new).resolve()
    return bool(old == new)


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
