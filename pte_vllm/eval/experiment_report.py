"""Joins fidelity and accuracy of the experiment's arms in one table; seeds are averaged."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pte_vllm.eval.arms import FULL, Arm
from pte_vllm.eval.experiment_arms import ARMS, adapter_name
from pte_vllm.eval.report import RESULTS, TABLE
from pte_vllm.eval.results import mean_of
from pte_vllm.method.names import KeepScore

_COLUMNS = ("memory", "KV tokens", "state bytes", "KL", "recovered", "accuracy", "less full cache")


def write_report(
    options: argparse.Namespace, fidelity: Mapping[str, Any], accuracy: Mapping[str, Any]
) -> None:
    """Write `results.json` and `table.md` below `options.out`, and print the table."""
    rows = list(_rows(options, fidelity, accuracy))
    report = {
        "model": options.model,
        "options": {k: v for k, v in vars(options).items() if k not in ("out", "api_key_env")},
        "rows": rows,
    }
    path = options.out / RESULTS
    path.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    lines = [[row["memory"], *_cells(row)] for row in rows]
    table = Table(title=f"{options.task}, window {options.window}")
    for place, name in enumerate(_COLUMNS):
        table.add_column(name, justify="right" if place else "left")
    for line in lines:
        table.add_row(*line)
    Console(highlight=False).print(table)
    text = [list(_COLUMNS), ["---", *["---:"] * (len(_COLUMNS) - 1)], *lines]
    (options.out / TABLE).write_text(
        "\n".join(f"| {' | '.join(line)} |" for line in text) + "\n", encoding="utf-8"
    )
    Console(stderr=True, highlight=False).print(f"wrote {path} and {TABLE}", soft_wrap=True)


def _rows(
    options: argparse.Namespace, fidelity: Mapping[str, Any], accuracy: Mapping[str, Any]
) -> list[dict[str, Any]]:
    measured = {arm["name"]: arm for arm in fidelity["arms"]}
    answered = {row["arm"]: row for row in accuracy["rows"]}
    window = options.window

    def row(memory: str, key: str, names: Sequence[str], more_keys: Sequence[str] = ()) -> Any:
        answers = [answered[k] for k in (key, *more_keys) if k in answered]
        return _row(memory, answers, [measured[name] for name in names if name in measured])

    rows = [row("full cache", FULL, [])]
    rows[0] |= {"kl": 0.0}
    for size in (window, *options.plain_windows):
        arm = Arm(window_tokens=size)
        rows.append(row(f"window {size}", arm.key, [f"window {size}"]))
    random, sinks = Arm(window_tokens=window, evict="random"), Arm(window_tokens=window, sinks=True)
    if random.key in answered:
        rows.append(row(f"window {window}, evicting at random", random.key, ["evict random"]))
    rows.append(row(f"window {window}, attention sinks", sinks.key, ["sinks"]))
    keep = options.keep
    scores: tuple[KeepScore, ...] = ("expected", "random")
    for score in scores:
        suffix = "" if score == "expected" else f" {score}"
        arm = Arm(window_tokens=window, keep_tokens=keep, keep_score=score)
        if arm.key in answered:
            rows.append(row(arm.title, arm.key, [f"window {window} keep {keep}{suffix}"]))
    for name in options.arms:
        kept = keep if ARMS[name].keeps else 0
        names = [adapter_name(name, seed) for seed in options.seeds]
        arms = [Arm(window_tokens=window, adapter=each, keep_tokens=kept) for each in names]
        measured_as = [f"{each} keep {kept}" if kept else each for each in names]
        keys = [each.key for each in arms]
        rows.append(row(f"window {window}, {name}", keys[0], measured_as, keys[1:]))
    return rows


def _row(
    memory: str, answers: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Average what seeds found; the errors are those of problems and answers, not of seeds."""
    found: dict[str, Any] = {"memory": memory, "seeds": max(len(answers), len(measured))}
    for name in ("kl", "recovered"):
        pairs = [arm[name] for arm in measured if arm.get(name)]
        if pairs:
            found[name] = mean_of([pair[0] for pair in pairs]).value
            found[f"{name}_stderr"] = math.hypot(*(p[1] or 0.0 for p in pairs)) / len(pairs)
    good = [row for row in answers if row["accuracy"] is not None]
    if good:
        for name in ("accuracy", "difference"):
            parts = [row[name] for row in good if row[name] is not None]
            if parts:
                found[name] = mean_of([part["value"] for part in parts]).value
                found[f"{name}_stderr"] = mean_of([part["stderr"] for part in parts]).value
        found["kv_tokens"] = mean_of([row["kv_tokens"] for row in good]).value
        found["state_bytes"] = good[0]["state_bytes"]
    errors = [row["error"] for row in answers if row["error"]]
    if errors:
        found["error"] = "; ".join(errors)
    return found


def _cells(row: Mapping[str, Any]) -> list[str]:
    def number(name: str, form: str) -> str:
        if row.get(name) is None:
            return ""
        error = row.get(f"{name}_stderr")
        return f"{row[name]:{form}}" + (f" ± {error:.3f}" if error else "")

    cells = [number("kv_tokens", ".0f"), number("state_bytes", "d"), number("kl", ".3f")]
    cells += [number("recovered", ".2f"), number("accuracy", ".3f"), number("difference", "+.3f")]
    if row.get("error"):
        cells[4] += f" failed: {row['error']}"[:120]
    return cells
