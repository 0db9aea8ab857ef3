"""`pte-vllm adapter inspect`: validate an adapter and show what it holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pte_vllm.adapter.files import layer_of
from pte_vllm.adapter.format import Adapter, ModelShape
from pte_vllm.adapter.hashes import content_hash, file_hashes
from pte_vllm.method.reference import TENSORS
from pte_vllm.method.weight import kv_token_bytes, weigh_state


def inspect(path: str | Path, *, model: str | None = None, as_json: bool = False) -> None:
    """Print what the adapter in `path` holds, as tables or as JSON.

    Args:
        path: the adapter's directory.
        model: name or directory of the base model that it must fit; None skips those checks.
        as_json: whether to print JSON instead of tables.

    Raises:
        AdapterError: if the adapter is broken or does not fit.
        OSError: if the model's configuration cannot be read.
    """
    shape = None
    if model is not None:
        from transformers import AutoConfig

        shape = ModelShape.from_hf(AutoConfig.from_pretrained(model))
    summary = describe(path, shape)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _print_tables(summary)


def describe(path: str | Path, model: ModelShape | None = None) -> dict[str, Any]:
    """Return everything that `inspect` shows, as JSON values.

    Raises:
        AdapterError: if the adapter is broken or does not fit.
    """
    adapter = Adapter.load(path, model)
    lora = [*adapter.lora_a.values(), *adapter.lora_b.values()]
    rank = next(iter(adapter.lora_b.values())).shape[1]
    summary: dict[str, Any] = {
        "path": str(path),
        "kind": "plain LoRA" if adapter.pte is None else "progressive thought encoding",
        "base_model": adapter.peft.get("base_model_name_or_path"),
        "rank": rank,
        "scale": adapter.scale,
        "targets": sorted({module.rsplit(".", 1)[-1] for module in adapter.lora_a}),
        "lora_parameters": sum(tensor.numel() for tensor in lora),
        "encoder_parameters": 0,
        "probes": None if adapter.probes is None else adapter.probes.queries.shape[2],
        "checked_against_model": model is not None,
    }
    if adapter.pte is not None:
        summary |= asdict(adapter.pte)
        tensors = [getattr(e, name) for e in adapter.encoders.values() for name in TENSORS]
        summary["encoder_parameters"] = sum(tensor.numel() for tensor in tensors)
        summary["state"] = _weights(adapter, model)
    summary["layers"] = _layers(adapter)
    summary["sha256"] = file_hashes(path)
    summary["content_sha256"] = content_hash(summary["sha256"])
    return summary


def _weights(adapter: Adapter, model: ModelShape | None) -> dict[str, dict[str, float]]:
    """Return what the state of a sequence weighs, for a model in each type.

    Without the model, tokens of KV cache are counted in the layers that have a state.
    """
    assert adapter.pte is not None
    with_state = len(adapter.layers)
    num_layers = with_state if model is None else model.num_layers
    kv_size = next(iter(adapter.encoders.values())).w_k.shape[-1]
    found = {}
    for dtype in ("bfloat16", "float32"):
        weight = weigh_state(adapter.pte, with_state, dtype)
        tokens = weight.kv_tokens(kv_token_bytes(num_layers, kv_size, dtype))
        found[dtype] = {"bytes_per_sequence": weight.total, "kv_tokens": round(tokens, 1)}
    return found


def _layers(adapter: Adapter) -> list[dict[str, Any]]:
    """Return for each layer its linears, and the Frobenius norms of all their A and all their B."""
    modules: dict[int | None, list[str]] = {layer: [] for layer in adapter.layers}
    for module in adapter.lora_a:
        modules.setdefault(layer_of(module), []).append(module)
    rows = []
    for layer in sorted(modules, key=lambda index: -1 if index is None else index):
        encoder = adapter.encoders.get(layer) if layer is not None else None
        norms = {
            name: sum(float(side[m].float().square().sum()) for m in modules[layer]) ** 0.5
            for name, side in (("norm_a", adapter.lora_a), ("norm_b", adapter.lora_b))
        }
        gain = None if encoder is None else float(encoder.gain)
        rows.append({"layer": layer, "linears": len(modules[layer]), "gain": gain, **norms})
    return rows


def _print_tables(summary: dict[str, Any]) -> None:
    console = Console(highlight=False)
    head = Table(title=Path(summary["path"]).name, show_header=False, title_justify="left")
    head.add_column(style="bold")
    head.add_column(overflow="fold")
    rows = {
        "kind": summary["kind"],
        "base model": summary["base_model"] or "not recorded",
        "rank r": summary["rank"],
        "scale alpha / r": f"{summary['scale']:g}",
        "targets": ", ".join(summary["targets"]),
        "parameters": f"{summary['lora_parameters']:,} in A and B, "
        f"{summary['encoder_parameters']:,} in the encoder",
    }
    if "rule" in summary:
        counted = "\ncounted in the layers with state; --model counts all"
        of_layers = "" if summary["checked_against_model"] else counted
        rows |= {
            "global tokens G": summary["global_tokens"],
            "rule": summary["rule"],
            "read": summary["read"],
            "keys": summary["keys"],
            "features": summary["features"],
            "normalize": summary["normalize"],
            "init": summary["init"],
            "state": "\n".join(
                f"{weight['bytes_per_sequence']:,} bytes per sequence = "
                f"{weight['kv_tokens']:g} tokens of KV cache in {dtype}"
                for dtype, weight in summary["state"].items()
            )
            + of_layers,
        }
    probes = summary["probes"]
    rows["probes of its own"] = "none" if probes is None else f"{probes} for each KV head"
    with_state = sum(row["gain"] is not None for row in summary["layers"])
    rows["layers with state"] = with_state
    for name, value in rows.items():
        head.add_row(name, str(value))
    console.print(head)
    layers = Table("layer", "linears", "gain", "‖A‖", "‖B‖")
    for column in layers.columns:
        column.justify = "right"
    for row in summary["layers"]:
        gain = "" if row["gain"] is None else f"{row['gain']:.4g}"
        name = "" if row["layer"] is None else str(row["layer"])
        layers.add_row(
            name, str(row["linears"]), gain, f"{row['norm_a']:.4g}", f"{row['norm_b']:.4g}"
        )
    console.print(layers)
    for name, digest in summary["sha256"].items():
        console.print(f"{digest}  {name}", soft_wrap=True)
    console.print(f"{summary['content_sha256']}  all of them", soft_wrap=True)
    if summary["checked_against_model"]:
        console.print("fits the model given")
