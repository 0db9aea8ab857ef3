"""Draws what `pte-vllm eval fidelity` measured: KL by distance, and KL over memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

_MIB = 1 << 20


def plot(report: dict[str, Any], path: Path, kl: str) -> None:
    """Write a PNG with two panels.

    Args:
        report: What `fidelity_report.summarize` returned.
        path: The file to write.
        kl: The name by which the report has its KL.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_distance, over_bytes) = pyplot.subplots(1, 2, figsize=(13, 4.2), sharey=False)
    _by_distance(by_distance, report, kl)
    _over_bytes(over_bytes, report, kl)
    for axes in (by_distance, over_bytes):
        axes.set_ylabel(f"KL to full attention{'' if kl == 'kl' else ', at least'}, nats a token")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _by_distance(axes: Any, report: dict[str, Any], kl: str) -> None:
    """Draw a line for each arm over the tokens since the first fold."""
    rows = [row for row in report["arms"][0][f"{kl}_by_distance"] if row["tokens"]]
    labels = [f"{r['from']}+" if r["to"] is None else f"{r['from']}–{r['to'] - 1}" for r in rows]
    for i, arm in enumerate(report["arms"]):
        found = [row["kl"] for row in arm[f"{kl}_by_distance"]][: len(rows)]
        values, errors = np.array(found, dtype=float).T  # None becomes NaN, which is not drawn
        shifted = np.arange(len(rows)) + 0.04 * (i - len(report["arms"]) / 2)  # bars stay apart
        axes.errorbar(shifted, values, yerr=errors, marker="o", capsize=2, label=arm["name"])
    axes.set_xticks(range(len(rows)), labels)
    axes.set_xlabel("tokens since the first fold")


def _over_bytes(axes: Any, report: dict[str, Any], kl: str) -> None:
    """Draw a line for each kind of memory over the bytes of an answer at its peak."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for arm in report["arms"]:
        value, error = arm[kl]
        size = arm["kv_tokens"] * report["kv_bytes_per_token"] + arm["state_bytes"]
        point = size / _MIB, value, 0.0 if error is None else error
        lines.setdefault(_kind(arm), []).append(point)
    for kind, points in lines.items():
        x, y, errors = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, yerr=errors, marker="o", capsize=2, label=kind)
    axes.set_xlabel("KV cache of an answer at its peak, MiB, thought state included")


def _kind(arm: dict[str, Any]) -> str:
    """Return what a memory is, without the size of its window."""
    if arm["kind"] == "keep":
        at_random = " at random" if arm["keep_score"] == "random" else ""
        return f"keep {arm['keep_tokens']}{at_random}"
    return "window" if arm["kind"] in ("window", "equal-bytes") else arm["name"]
