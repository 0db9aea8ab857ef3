"""Reads and writes the files of an adapter, tensor by tensor; `format` says what they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pte_vllm.adapter.hashes import CONFIG_FILE, ENCODER_FILE
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.reference import LayerEncoder

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_LORA_KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$"
)
_ENCODER_KEY = re.compile(r"^layers\.(?P<layer>\d+)\.(?P<name>\w+)$")
_REQUIRED = ("query", "global", "w_q", "w_k", "w_v", "gain")
_OPTIONAL = ("b_k", "b_v", "log_ridge")


class AdapterError(ValueError):
    """The adapter cannot be used; the message names the file, the tensor and the reason."""


def is_pte_adapter(path: str | Path) -> bool:
    """Say whether the directory claims to hold an encoder."""
    if (Path(path) / ENCODER_FILE).exists():
        return True
    config = Path(path) / CONFIG_FILE
    return config.exists() and "pte" in read_config(config)


def read_pte_config(path: str | Path) -> PTEConfig | None:
    """Read the method's options of an adapter, but no tensors; None for a plain LoRA.

    Raises:
        AdapterError: if the config is broken.
    """
    if not is_pte_adapter(path):
        return None
    file = Path(path) / CONFIG_FILE
    return parse_pte(file, read_config(file).get("pte"))


def layer_of(module: str) -> int | None:
    """Return the index of the decoder layer in a module's name, None outside the layers."""
    match = _LAYER.search(module)
    return int(match.group(1)) if match else None


def read_config(file: Path) -> dict[str, Any]:
    """Read PEFT's fields, and `"pte"` where it is there.

    Raises:
        AdapterError: if they cannot be used.
    """
    if not file.exists():
        raise AdapterError(f"{file} is missing")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise AdapterError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file} must hold a JSON object")
    for field, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        value = config.get(field)
        if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
            raise AdapterError(f"{file}: {field} must be a positive number, got {value!r}")
    return config


def parse_pte(file: Path, values: Any) -> PTEConfig:
    """Check what `file` has under `"pte"`.

    Raises:
        AdapterError: if it is not the method's options.
    """
    if not isinstance(values, Mapping):
        raise AdapterError(f'{file}: "pte" must be an object')
    try:
        return PTEConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{file}: {error}") from error


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise AdapterError(f"{file} is missing")
    try:
        # Not load_file: safetensors 0.8 loses memory with every tensor it reads that way.
        tensors: dict[str, Tensor] = dict(sorted(load(file.read_bytes()).items()))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file} is not a readable safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"{file}: {name} has dtype {tensor.dtype}, expected floating point")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{file}: {name} has values that are not finite")
    return tensors


def read_lora(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read A and B by module, as stored.

    Raises:
        AdapterError: if a name, a pair or a number is wrong.
    """
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for name, tensor in _read_tensors(file).items():
        match = _LORA_KEY.match(name)
        if match is None:
            raise AdapterError(f"{file}: unexpected tensor {name}")
        if tensor.dim() != 2:
            raise AdapterError(f"{file}: {name} must be a matrix, got {tuple(tensor.shape)}")
        sides[match["side"]][match["module"]] = tensor
    lonely = set(sides["A"]) ^ set(sides["B"])
    if lonely:
        raise AdapterError(f"{file}: {min(lonely)} lacks lora_A or lora_B")
    if not sides["A"]:
        raise AdapterError(f"{file} holds no LoRA weights")
    return sides["A"], sides["B"]


def lora_tensors(lora_a: Mapping[str, Tensor], lora_b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name A and B as in the file, where `read_lora` finds them."""
    tensors = {}
    for module in lora_a:
        tensors[f"base_model.model.{module}.lora_A.weight"] = lora_a[module].contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = lora_b[module].contiguous()
    return tensors


def encoder_tensors(encoders: Mapping[int, LayerEncoder]) -> dict[str, Tensor]:
    """Name the encoders' tensors as in the file, where `read_encoders` finds them."""
    tensors = {}
    for layer, encoder in encoders.items():
        for name in (*_REQUIRED, *_OPTIONAL):
            field = "global_" if name == "global" else name
            tensors[f"layers.{layer}.{name}"] = getattr(encoder, field).float().contiguous()
    return tensors


def read_encoders(file: Path, pte: PTEConfig) -> dict[int, LayerEncoder]:
    """Read the encoders by layer, ascending.

    Raises:
        AdapterError: if a tensor is missing, unknown or of another shape.
    """
    by_layer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _read_tensors(file).items():
        match = _ENCODER_KEY.match(name)
        if match is None or match["name"] not in (*_REQUIRED, *_OPTIONAL):
            raise AdapterError(f"{file}: unexpected tensor {name}")
        if tensor.dtype != torch.float32:
            raise AdapterError(f"{file}: {name} has dtype {tensor.dtype}, expected float32")
        by_layer.setdefault(int(match["layer"]), {})[match["name"]] = tensor
    if not by_layer:
        raise AdapterError(f"{file} holds no encoder")
    for layer, tensors in by_layer.items():
        for name in ("w_k", "global"):  # their own shapes say d_kv and n_h
            if name in tensors and tensors[name].dim() != 2:
                shape = tuple(tensors[name].shape)
                raise AdapterError(f"{file}: layers.{layer}.{name} must be a matrix, got {shape}")
    widths = {tensors["w_k"].shape[-1] for tensors in by_layer.values() if "w_k" in tensors}
    if len(widths) > 1:
        raise AdapterError(f"{file}: layers disagree on d_kv: {sorted(widths)}")
    return {layer: _layer_encoder(file, layer, by_layer[layer], pte) for layer in sorted(by_layer)}


def _layer_encoder(
    file: Path, layer: int, tensors: dict[str, Tensor], pte: PTEConfig
) -> LayerEncoder:
    missing = [name for name in _REQUIRED if name not in tensors]
    if missing:
        raise AdapterError(f"{file}: layers.{layer}.{missing[0]} is missing")
    d_kv = tensors["w_k"].shape[-1]
    shapes: dict[str, tuple[int, ...]] = {
        "query": (pte.global_tokens, d_kv),
        "global": (tensors["global"].shape[0], d_kv),
        "w_q": (pte.rank, d_kv),
        "w_k": (pte.rank, d_kv),
        "w_v": (pte.rank, d_kv),
        "gain": (),
        "b_k": (pte.rank,),
        "b_v": (pte.rank,),
        "log_ridge": (),
    }
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise AdapterError(
                f"{file}: layers.{layer}.{name} has shape {tuple(tensor.shape)}, "
                f"expected {shapes[name]}"
            )
    zeros = {name: torch.zeros(shapes[name]) for name in _OPTIONAL}
    values = {**zeros, **tensors}
    values["global_"] = values.pop("global")
    return LayerEncoder(**values, features=pte.features)
