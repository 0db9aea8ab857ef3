"""The card of an adapter on the hub: what a push writes for one that has none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pte_vllm.adapter.serve_line import needed_rank, serve_line
from pte_vllm.adapter.shipping import HUB_ID, About, read_about

_TAGS = ("lora", "pte-vllm", "progressive-thought-encoding")
PROJECT = "Progressive Thought Encoding for vLLM (pte-vllm)"


def hub_base(summary: Mapping[str, Any], about: About | None = None) -> str | None:
    """Return the base model's name on the hub; None where the adapter names a directory.

    Args:
        summary: what `inspect.describe` says of the adapter.
        about: what its `shipped.json` says, if it has one.
    """
    if about is not None:
        return about.base_model.hub
    name = str(summary["base_model"] or "")
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def default_card(directory: str | Path, repo_id: str, summary: Mapping[str, Any]) -> str:
    """Write the card of an adapter, from its own files.

    Args:
        directory: the adapter's directory.
        repo_id: the repository that the card will stand in.
        summary: what `inspect.describe` says of the adapter.
    """
    about = read_about(directory)
    base = hub_base(summary, about)
    name = repo_id.rpartition("/")[2]
    plain = "rule" not in summary
    head = ["---", *([f"base_model: {base}"] if base else []), "library_name: peft"]
    head += ["pipeline_tag: text-generation", "tags:"]
    head += [f"- {tag}" for tag in (_TAGS[:2] if plain else _TAGS)]
    what = "A plain LoRA" if plain else "A LoRA with thought states"
    lines = [*head, "---", "", f"# {name}", ""]
    lines += [f"{about.about.rstrip('.')}.", ""] if about is not None else []
    lines += [f"{what}, for {PROJECT}.", "", *_table(summary, about, base), ""]
    line = serve_line(
        base or "MODEL",
        None if about is None else about.plan,
        rank=needed_rank(directory),
        name=name,
        path=name,
    )
    lines += [
        "## Serve it",
        "",
        "```sh",
        f"pte-vllm adapter pull {repo_id} {name}",
        line,
        "```",
        "",
    ]
    if about is None:
        lines += [
            "The adapter's files do not say for which window it was trained. The flags above are "
            "the server's defaults.",
            "",
        ]
    return "\n".join(lines)


def _table(summary: Mapping[str, Any], about: About | None, base: str | None) -> list[str]:
    rows = {"base model": base or "not recorded"}
    if about is not None:
        rows["base model's hash"] = about.base_model.sha256
        rows["plan"] = about.plan.words()
    rows["rank"] = str(summary["rank"])
    if "rule" in summary:
        rows["rule"] = f"{summary['rule']}, {summary['features']} features"
    rows["linears"] = ", ".join(summary["targets"])
    rows["probes of its own"] = "no" if summary["probes"] is None else "yes"
    rows["adapter's hash"] = summary["content_sha256"]
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
