"""Tables and a plot of what `pte-vllm bench gpu` found so far, against the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pte_vllm.bench.report import bars, console

GAIN_AT_32K = 4.0
"""Least tok/s of PTE with a window of 2k against the full cache, rollouts of 32k tokens."""
MOST_OVERHEAD = 0.05
"""Most of a step that folds and modulation may take."""

Rows = list[list[str]]


def write(out: Path, results: Mapping[str, Any]) -> str:
    """Write `gpu.md` and, once there is throughput, `gpu.png`; prints and returns the text."""
    options = results.get("options", {})
    lines = ["# pte-vllm bench gpu", ""]
    if options.get("dry_run") == "True":
        lines += ["**Dry run on a CPU: figures mean nothing.**", ""]
    machines = {found["machine"] for found in results.values() if "machine" in found}
    lines += [f"Machine: {', '.join(sorted(machines)) or 'none'}.", ""]
    if len(machines) > 1:
        lines += ["Measured on different machines: do not compare across them.", ""]
    sections = (
        ("kernels", _kernels),
        ("parity", _parity),
        ("profile", _profile),
    )
    for key, section in sections:
        if "result" in results.get(key, {}):
            lines += [f"## {key.capitalize()}", "", *section(results[key]["result"]), ""]
    arms = {
        key.removeprefix("throughput "): found["result"]
        for key, found in results.items()
        if key.startswith("throughput ") and "result" in found
    }
    if arms:
        lines += ["## Throughput", "", *_throughput(arms), ""]
    failed = {key: found["error"] for key, found in results.items() if "error" in found}
    if failed:
        lines += ["## Failed", "", *(f"- {key}: {error}" for key, error in failed.items()), ""]
    text = "\n".join(lines)
    (out / "gpu.md").write_text(text)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if arms:
        rates = {
            label: [run["tokens_per_second"]]
            for name, arm in arms.items()
            for run in arm["runs"]
            for label in [_label(name, run)]
        }
        bars(out / "gpu", rates, "tok/s in a steady state")
    return text


def _table(head: Sequence[str], rows: Rows) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _kernels(result: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            row["kernel"],
            row["dtype"],
            row["size"],
            f"{row['ms']:.3f}",
            "–" if row["torch_ms"] is None else f"{row['torch_ms']:.3f}",
            "–" if row["error"] is None else f"{row['error']:.1e}",
        ]
        for row in result
    ]
    head = ("kernel", "type", "size", "ms", "ms in PyTorch", "relative error")
    return _table(head, rows)


def _parity(result: Mapping[str, Any]) -> list[str]:
    worst = result["largest_difference"]
    rows = [
        [rule, str(result["folds"][rule]), f"{value:.1e}", _verdict(value <= result["tolerance"])]
        for rule, value in worst.items()
    ]
    head = ("rule", "folds", "max |Δ log p|, fp32", f"at most {result['tolerance']:.0e}")
    return _table(head, rows)


def _profile(result: Mapping[str, Any]) -> list[str]:
    rows = [
        ["step", f"{result['step_ms']:.2f}", ""],
        ["folds, on the device", f"{result['fold_device_ms']:.3f}", ""],
        ["of these the kernel", f"{result['fold_kernel_ms']:.3f}", ""],
        ["modulation", f"{result['modulate_device_ms']:.3f}", ""],
        [
            "folds + modulation, of a step",
            f"{result['share']:.2%}",
            _verdict(result["share"] <= MOST_OVERHEAD),
        ],
        ["folds, on the host", f"{result['fold_host_ms']:.3f}", ""],
        ["publishing a step, on the host", f"{result['publish_host_ms']:.3f}", ""],
    ]
    head = (f"{result['sequences']} sequences", "ms a step", f"at most {MOST_OVERHEAD:.0%}")
    return _table(head, rows)


def _throughput(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    base = {run["rollout_tokens"]: run for run in arms.get("full", {}).get("runs", ())}
    rows = []
    for name, arm in arms.items():
        for run in arm["runs"]:
            ratios = ", ".join(
                f"{run['tokens_per_second'] / full['tokens_per_second']:.2f} ({rollout:,})"
                for rollout, full in base.items()
                if run["rollout_tokens"] in (None, rollout)
            )
            rows.append(
                [
                    _label(name, run),
                    f"{run['sequences']:,}",
                    f"{run['sequences_per_step']:,.1f}",
                    f"{run['step_ms']:.1f}",
                    f"{run['tokens_per_second']:,.0f}",
                    ratios or "–",
                ]
            )
    head = ("arm", "sequences", "in a step", "ms a step", "tok/s", "ratio to full (rollout)")
    lines = _table(head, rows)
    ours = next((arm["runs"][0] for name, arm in arms.items() if name == "pte-2048"), None)
    if ours is not None and 32_768 in base:
        gain = ours["tokens_per_second"] / base[32_768]["tokens_per_second"]
        verdict = _verdict(gain >= GAIN_AT_32K)
        lines += [
            "",
            f"Window 2,048, rollouts of 32k: {gain:.2f}, aim {GAIN_AT_32K:.0f}: {verdict}",
        ]
    return lines


def _label(name: str, run: Mapping[str, Any]) -> str:
    rollout = run["rollout_tokens"]
    return name if rollout is None else f"{name}, {rollout:,}"


def _verdict(good: bool) -> str:
    return "met" if good else "missed"
