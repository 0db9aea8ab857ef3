"""The adapter on disk: a PEFT LoRA plus the encoder that writes thought states.

    adapter_config.json        PEFT's LoRA fields, plus "pte": PTEConfig
    adapter_model.safetensors  base_model.model.<module>.lora_A.weight [G, d_in]
                               base_model.model.<module>.lora_B.weight [d_out, r]
    pte_encoder.safetensors    layers.{i}.{query, global, w_q, w_k, w_v, gain}, fp32;
                               optional layers.{i}.{b_k, b_v, log_ridge}

A directory without `pte_encoder.safetensors` is a plain LoRA (S = identity). A layer without
encoder tensors has no state and no adapter. Everything is validated before anything is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from pte_vllm.config import PTEConfig
from pte_vllm.ops.reference import LayerEncoder

CONFIG_FILE = "adapter_config.json"
LORA_FILE = "adapter_model.safetensors"
ENCODER_FILE = "pte_encoder.safetensors"
FILES = (CONFIG_FILE, LORA_FILE, ENCODER_FILE)

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_LORA_KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$"
)
_ENCODER_KEY = re.compile(r"^layers\.(?P<layer>\d+)\.(?P<name>\w+)$")
_REQUIRED = ("query", "global", "w_q", "w_k", "w_v", "gain")
_OPTIONAL = ("b_k", "b_v", "log_ridge")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_UNSUPPORTED_PEFT = ("use_dora", "bias", "modules_to_save", *_PATTERNS)


class AdapterError(ValueError):
    """The adapter cannot be used; the message names the file, the tensor and the reason."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What an adapter must fit: sizes of the base model, from its Hugging Face config."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def from_hf(cls, config: Any) -> ModelShape:
        heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    @property
    def d_kv(self) -> int:
        """Size of a key with all KV heads concatenated."""
        return self.num_kv_heads * self.head_dim

    def linear(self, name: str) -> tuple[int, int] | None:
        """`(d_in, d_out)` of a linear by its last name, None where unknown."""
        q, kv = self.num_heads * self.head_dim, self.d_kv
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }.get(name)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A validated adapter. Tensors are on the CPU, encoders fp32, LoRA as stored."""

    peft: dict[str, Any]
    """`adapter_config.json` without `"pte"`."""
    pte: PTEConfig | None
    """None: a plain LoRA."""
    lora_a: dict[str, Tensor]
    """By module, such as `model.layers.3.self_attn.q_proj`: `[G, d_in]`."""
    lora_b: dict[str, Tensor]
    """By module: `[d_out, r]`."""
    encoders: dict[int, LayerEncoder]
    """By layer."""

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / √r with rsLoRA."""
        rank = int(self.peft["r"])
        return float(self.peft["lora_alpha"]) / (rank**0.5 if self.peft.get("use_rslora") else rank)

    @property
    def form(self) -> dict[str, Any]:
        """All that says how the weights are to be read; not how they began."""
        method = {} if self.pte is None else self.pte.to_dict()
        method.pop("init", None)
        return method | {"r": self.peft["r"], "LoRA scale": self.scale}

    @property
    def layers(self) -> list[int]:
        """Layers that have a state, ascending."""
        return sorted(self.encoders)

    def stacked_encoder(self) -> LayerEncoder:
        """The encoders of `layers` as one, with a leading dimension of layers."""
        return LayerEncoder.stack([self.encoders[i] for i in self.layers])

    @classmethod
    def load(cls, path: str | Path, model: ModelShape | None = None) -> Adapter:
        """Read and validate a directory.

        Args:
            path: the adapter's directory.
            model: the base model's sizes; None skips the checks that need them.

        Raises:
            AdapterError: if anything is missing, malformed, not finite or does not fit.
        """
        path = Path(path)
        config = _read_config(path / CONFIG_FILE)
        pte_fields = config.pop("pte", None)
        has_encoder = (path / ENCODER_FILE).exists()
        if has_encoder and pte_fields is None:
            raise AdapterError(f'{path / CONFIG_FILE}: no "pte" section beside {ENCODER_FILE}')
        if pte_fields is not None and not has_encoder:
            raise AdapterError(f'{path}: "pte" in {CONFIG_FILE}, but no {ENCODER_FILE}')
        pte = _parse_pte(path / CONFIG_FILE, pte_fields) if has_encoder else None
        lora_a, lora_b = _read_lora(path / LORA_FILE)
        encoders = _read_encoders(path / ENCODER_FILE, pte) if pte is not None else {}
        adapter = cls(peft=config, pte=pte, lora_a=lora_a, lora_b=lora_b, encoders=encoders)
        adapter._validate(path, model)
        return adapter

    def save(self, path: str | Path) -> None:
        """Write the directory; the config comes last, so a half-written adapter does not load."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_FILE).unlink(missing_ok=True)
        lora = {}
        for module in self.lora_a:
            lora[f"base_model.model.{module}.lora_A.weight"] = self.lora_a[module].contiguous()
            lora[f"base_model.model.{module}.lora_B.weight"] = self.lora_b[module].contiguous()
        save_file(lora, path / LORA_FILE, metadata={"format": "pt"})
        config = dict(self.peft)
        if self.pte is not None:
            save_file(self._encoder_tensors(), path / ENCODER_FILE, metadata={"format": "pt"})
            config["pte"] = self.pte.to_dict()
        else:
            (path / ENCODER_FILE).unlink(missing_ok=True)
        (path / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def _encoder_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for layer, encoder in self.encoders.items():
            for name in (*_REQUIRED, *_OPTIONAL):
                field = "global_" if name == "global" else name
                tensors[f"layers.{layer}.{name}"] = getattr(encoder, field).float().contiguous()
        return tensors

    def _validate(self, path: Path, model: ModelShape | None) -> None:
        lora_file = path / LORA_FILE
        if self.pte is not None:
            # The scale, and the room vLLM gives the adapter, come from PEFT's r.
            _expect(path / CONFIG_FILE, "r", self.peft["r"], self.pte.rank)
        # Of a plain LoRA, the others would show in the names of its tensors.
        for field in _UNSUPPORTED_PEFT if self.pte is not None else _PATTERNS:
            if self.peft.get(field) not in (None, False, "none", {}, []):
                raise AdapterError(f"{path / CONFIG_FILE}: {field} is not supported with PTE")
        for module in self.lora_a:
            a, b = self.lora_a[module], self.lora_b[module]
            if self.pte is not None:
                _expect(lora_file, f"{module} lora_A rows", a.shape[0], self.pte.global_tokens)
                _expect(lora_file, f"{module} lora_B columns", b.shape[1], self.pte.rank)
            else:
                _expect(lora_file, f"{module} lora_B columns", b.shape[1], a.shape[0])
            layer = layer_of(module)
            if self.pte is not None and layer not in self.encoders:
                raise AdapterError(f"{lora_file}: {module} has no encoder in {ENCODER_FILE}")
            sizes = model.linear(module.rsplit(".", 1)[-1]) if model is not None else None
            if sizes is not None:
                _expect(lora_file, f"{module} lora_A columns", a.shape[1], sizes[0])
                _expect(lora_file, f"{module} lora_B rows", b.shape[0], sizes[1])
        if model is None:
            return
        for layer, encoder in self.encoders.items():
            where = path / ENCODER_FILE
            if layer >= model.num_layers:
                raise AdapterError(f"{where}: layer {layer}, but the model has {model.num_layers}")
            _expect(where, f"layers.{layer}.w_k columns (d_kv)", encoder.w_k.shape[1], model.d_kv)


def load_for_engine(
    path: str | Path, *, model: ModelShape, max_lora_rank: int, load_inplace: bool
) -> Adapter | None:
    """The adapter as an engine would load it; None for a plain LoRA, which is vLLM's to check.

    Raises:
        AdapterError: if the adapter is broken, does not fit the model or the engine, or would
            replace another version under the same name.
    """
    if not is_pte_adapter(path):
        return None
    if load_inplace:
        raise AdapterError(
            f"{path}: load_inplace is not supported for PTE adapters; load the new version under "
            "a new name, so that no sequence mixes two versions"
        )
    adapter = Adapter.load(path, model)
    assert adapter.pte is not None
    rank = max(adapter.pte.rank, adapter.pte.global_tokens)
    if rank > max_lora_rank:
        raise AdapterError(
            f"{path}: rank {rank} exceeds this server's --max-lora-rank {max_lora_rank}"
        )
    return adapter


def is_pte_adapter(path: str | Path) -> bool:
    """Whether the directory claims to hold an encoder."""
    if (Path(path) / ENCODER_FILE).exists():
        return True
    config = Path(path) / CONFIG_FILE
    return config.exists() and "pte" in _read_config(config)


def read_pte_config(path: str | Path) -> PTEConfig | None:
    """The method's options of an adapter, None for a plain LoRA; reads no tensors.

    Raises:
        AdapterError: if the config is broken.
    """
    if not is_pte_adapter(path):
        return None
    file = Path(path) / CONFIG_FILE
    return _parse_pte(file, _read_config(file).get("pte"))


def layer_of(module: str) -> int | None:
    """Index of the decoder layer in a module's name, None outside the layers."""
    match = _LAYER.search(module)
    return int(match.group(1)) if match else None


def file_hashes(path: str | Path) -> dict[str, str]:
    """SHA-256 of each file of the adapter, by name."""
    files = [Path(path) / name for name in FILES]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.exists()}


def content_hash(hashes: Mapping[str, str]) -> str:
    """One SHA-256 for an adapter: of the lines `name:sha256` of its files, sorted, LF after each.

    Args:
        hashes: what `file_hashes` returns.
    """
    lines = "".join(f"{name}:{hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def _expect(where: Path, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise AdapterError(f"{where}: {what} is {found}, expected {wanted}")


def _read_config(file: Path) -> dict[str, Any]:
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


def _parse_pte(file: Path, values: Any) -> PTEConfig:
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


def _read_lora(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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


def _read_encoders(file: Path, pte: PTEConfig) -> dict[int, LayerEncoder]:
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
