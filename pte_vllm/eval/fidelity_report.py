"""Writes what was measured: JSON, tables for the terminal, and a plot (`fidelity_plot`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pte_vllm.eval.fidelity_arms import FidelityArm
from pte_vllm.eval.fidelity_plot import plot
from pte_vllm.eval.fidelity_tokens import Answers, ArmTokens, Array, MeasuredTokens
from pte_vllm.eval.weights import in_kv_tokens
from pte_vllm.train.distill.examples import Example

JSON_FILE, PLOT_FILE = "fidelity.json", "fidelity.png"
BUCKETS = (0, 64, 128, 256)
"""Where the buckets of the distance begin, in tokens since the first fold; the last has no end."""
_TOKENS = (
    "predicted after the first fold of the smallest window, the same for all arms; distances count "
    "from that fold"
)


def summarize(
    measured: MeasuredTokens,
    arms: Sequence[FidelityArm],
    examples: Sequence[Example],
    *,
    bytes_per_token: int,
) -> dict[str, Any]:
    """Return all figures as JSON values; those with an error are `[value, standard error]`.

    Args:
        measured: what was measured of `arms`.
        examples: the answers.
        bytes_per_token: what one token holds in the KV cache.
    """
    answers = Answers(measured.sequence)
    kl = "kl_at_least" if measured.kl_is_bound else "kl"
    figures = []
    for arm in arms:
        own = measured.arms[arm.name]
        plain = measured.arms[arm.baseline] if arm.baseline is not None else None
        state = in_kv_tokens(arm.state_bytes, bytes_per_token)
        peaks = [arm.plan(e.plan.pin_tokens).peak_blocks(len(e.tokens)) for e in examples]
        figure: dict[str, Any] = {
            "name": arm.name,
            "kind": arm.kind,
            "adapter": arm.adapter,
            "window_tokens": arm.window_tokens,
            "keep_tokens": arm.keep_tokens,
            "keep_score": arm.keep_score if arm.keep_tokens else None,
            "kv_tokens": float(np.mean(peaks)) * arm.eviction.block_size,
            "state_bytes": arm.state_bytes,
            "state_kv_tokens": state,
            "loss": answers.mean(own.losses).as_json(),
            kl: answers.mean(own.kls).as_json(),
            "same_top": answers.mean(own.same_top).as_json(),
            f"{kl}_by_distance": _by_distance(answers, measured, own),
            "beyond_own_first_fold": {
                "tokens": int(own.own.sum()),
                kl: answers.mean(own.kls, own.own).as_json(),
            },
        }
        if plain is not None:
            figure |= _beside(answers, own, plain, kl)
        figure["by_answer"] = {
            "loss": answers.by_answer(own.losses),
            kl: answers.by_answer(own.kls),
            "same_top": answers.by_answer(own.same_top),
        }
        figures.append(figure)
    return {
        "tokens": len(measured.sequence),
        "tokens_are": _TOKENS,
        "answers": len(examples),
        "answer_tokens": sorted(len(e.tokens) for e in examples),
        "kv_bytes_per_token": bytes_per_token,
        "loss_full": answers.mean(measured.losses_full).as_json(),
        "arms": figures,
    }


def _by_distance(
    answers: Answers, measured: MeasuredTokens, own: ArmTokens
) -> list[dict[str, Any]]:
    rows = []
    for first, end in zip(BUCKETS, (*BUCKETS[1:], None), strict=True):
        inside = measured.distance >= first
        if end is not None:
            inside = inside & (measured.distance < end)
        found = answers.mean(own.kls, inside)
        rows.append({"from": first, "to": end, "tokens": int(inside.sum()), "kl": found.as_json()})
    return rows


def _beside(answers: Answers, own: ArmTokens, plain: ArmTokens, kl: str) -> dict[str, Any]:
    """Compare an arm with the plain window of its size, token by token."""

    def less(ours: Array, theirs: Array) -> list[float | None]:
        return answers.mean(ours.astype(float) - theirs.astype(float)).as_json()

    found: dict[str, Any] = {
        "beside_plain_window": {
            "loss": less(own.losses, plain.losses),
            kl: less(own.kls, plain.kls),
            "same_top": less(own.same_top, plain.same_top),
        }
    }
    if kl == "kl":  # a share of two bounds says nothing
        found["recovered"] = answers.share(plain.kls - own.kls, plain.kls).as_json()
    return found


def write(report: dict[str, Any], out: Path, console: Console) -> None:
    """Write JSON and plot below `out`, and print the tables."""
    out.mkdir(parents=True, exist_ok=True)
    (out / JSON_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, out / PLOT_FILE, kl_name(report))
    for table in (_table(report), _distances(report)):
        console.print(table)
    console.print(f"wrote {out / JSON_FILE} and {out / PLOT_FILE}", soft_wrap=True)


def kl_name(report: dict[str, Any]) -> str:
    """Return the name by which a report has its KL: `kl`, or `kl_at_least` by a server."""
    return "kl" if "kl" in report["arms"][0] else "kl_at_least"


def _table(report: dict[str, Any]) -> Table:
    kl = kl_name(report)
    title = (
        f"{report['answers']} answers, {report['tokens']} tokens after the first fold; loss under "
        f"full attention {_cell(report['loss_full'])} nats"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("arm", no_wrap=True)
    headings = ("KV tokens", "state", "loss", "KL ≥" if kl != "kl" else "KL", "same top token")
    for name in (*headings, "KL − window's", "recovered"):
        table.add_column(name, justify="right")
    for arm in report["arms"]:
        beside = arm.get("beside_plain_window", {})
        table.add_row(
            arm["name"],
            f"{arm['kv_tokens']:.0f}",
            str(arm["state_kv_tokens"] or ""),
            *(_cell(arm[name]) for name in ("loss", kl, "same_top")),
            _cell(beside.get(kl), sign="+"),
            _cell(arm.get("recovered")),
        )
    return table


def _distances(report: dict[str, Any]) -> Table:
    kl = kl_name(report)
    table = Table(title="KL by tokens since the first fold", title_justify="left")
    table.add_column("arm", no_wrap=True)
    for row in report["arms"][0][f"{kl}_by_distance"]:
        end = "" if row["to"] is None else str(row["to"] - 1)
        name = f"{row['from']}–{end}" if end else f"{row['from']}+"
        table.add_column(f"{name}\n{row['tokens']} tokens", justify="right")
    for arm in report["arms"]:
        table.add_row(arm["name"], *(_cell(row["kl"]) for row in arm[f"{kl}_by_distance"]))
    return table


def _cell(pair: list[float | None] | None, *, sign: str = "") -> str:
    value, error = (None, None) if pair is None else pair
    if value is None:
        return ""
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")
