"""The adapter on disk: a PEFT LoRA plus the encoder that writes thought states.

    adapter_config.json        PEFT's LoRA fields, plus "pte": PTEConfig
    adapter_model.safetensors  base_model.model.<module>.lora_A.weight [G, d_in]
                               base_model.model.<module>.lora_B.weight [d_out, r]
    pte_encoder.safetensors    layers.{i}.{query, global, w_q, w_k, w_v, gain}, fp32;
                               optional layers.{i}.{b_k, b_v, log_ridge}
    pte_probes.safetensors     optional: probes of its own (`probes.py`), in place of the engine's

A directory without `pte_encoder.safetensors` is a plain LoRA (S = identity). A layer without
encoder tensors has no state and no adapter. Everything is validated before anything is used.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pte_vllm.adapter.files import (
    AdapterError,
    encoder_tensors,
    layer_of,
    lora_tensors,
    parse_pte,
    read_config,
    read_encoders,
    read_lora,
)
from pte_vllm.adapter.hashes import CONFIG_FILE, ENCODER_FILE, LORA_FILE, PROBES_FILE
from pte_vllm.adapter.numbers import check_lora
from pte_vllm.adapter.probes import Probes, ProbesError
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.reference import LayerEncoder
from pte_vllm.models.permissions import allow_as_umask

_PATTERNS = ("rank_pattern", "alpha_pattern")
_UNSUPPORTED_PEFT = ("use_dora", "bias", "modules_to_save", *_PATTERNS)


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
        """Read the sizes from a transformers config."""
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
        """The size of a key with all KV heads concatenated."""
        return self.num_kv_heads * self.head_dim

    def check_probes(self, probes: Probes) -> None:
        """Raise ProbesError unless the probes are for a model of these sizes."""
        probes.check_fits(
            num_layers=self.num_layers, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim
        )

    def linear(self, name: str) -> tuple[int, int] | None:
        """Return `(d_in, d_out)` of a linear by its last name, None where unknown."""
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
    """What `adapter_config.json` holds, without `"pte"`."""
    pte: PTEConfig | None
    """The method's options; None: the adapter is a plain LoRA."""
    lora_a: dict[str, Tensor]
    """A `[G, d_in]` by module, such as `model.layers.3.self_attn.q_proj`."""
    lora_b: dict[str, Tensor]
    """B `[d_out, r]` by module."""
    encoders: dict[int, LayerEncoder]
    """The encoder of each layer that has a state."""
    probes: Probes | None = None
    """What scores the tokens that its requests keep; None: the engine's probes do."""

    def __post_init__(self) -> None:
        wanted = self.pte.features if self.pte is not None else None
        for layer, encoder in self.encoders.items():
            if encoder.features != wanted:
                raise AdapterError(
                    f"the encoder of layer {layer} has features {encoder.features}, "
                    f"the adapter {wanted}"
                )

    @property
    def scale(self) -> float:
        """The factor on what A and B add: alpha / r, or alpha / √r with rsLoRA."""
        rank = int(self.peft["r"])
        return float(self.peft["lora_alpha"]) / (rank**0.5 if self.peft.get("use_rslora") else rank)

    @property
    def form(self) -> dict[str, Any]:
        """All that says how the weights are to be read, but not how they began."""
        method = {} if self.pte is None else asdict(self.pte)
        method.pop("init", None)
        return method | {"r": self.peft["r"], "LoRA scale": self.scale}

    @property
    def layers(self) -> list[int]:
        """The layers that have a state, ascending."""
        return sorted(self.encoders)

    def stacked_encoder(self) -> LayerEncoder:
        """Stack the encoders of `layers`: every tensor gets a leading dimension of layers."""
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
        config = read_config(path / CONFIG_FILE)
        pte_fields = config.pop("pte", None)
        has_encoder = (path / ENCODER_FILE).exists()
        if has_encoder and pte_fields is None:
            raise AdapterError(f'{path / CONFIG_FILE}: no "pte" section beside {ENCODER_FILE}')
        if pte_fields is not None and not has_encoder:
            raise AdapterError(f'{path}: "pte" in {CONFIG_FILE}, but no {ENCODER_FILE}')
        pte = parse_pte(path / CONFIG_FILE, pte_fields) if has_encoder else None
        lora_a, lora_b = read_lora(path / LORA_FILE)
        encoders = read_encoders(path / ENCODER_FILE, pte) if pte is not None else {}
        adapter = cls(
            peft=config,
            pte=pte,
            lora_a=lora_a,
            lora_b=lora_b,
            encoders=encoders,
            probes=own_probes(path, model),
        )
        adapter._validate(path, model)
        return adapter

    def check_numbers(self, path: str | Path, dtype: torch.dtype) -> None:
        """Raise AdapterError unless what it adds stays finite in an engine of that precision."""
        for module, a in self.lora_a.items():
            where = f"{Path(path) / LORA_FILE}: {module}"
            check_lora(where, a, self.lora_b[module], scale=self.scale, dtype=dtype)

    def save(self, path: str | Path) -> None:
        """Write the directory; the config comes last, so a half-written adapter does not load."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_FILE).unlink(missing_ok=True)
        _save(lora_tensors(self.lora_a, self.lora_b), path / LORA_FILE)
        config = dict(self.peft)
        if self.pte is not None:
            _save(encoder_tensors(self.encoders), path / ENCODER_FILE)
            config["pte"] = self.pte.to_dict()
        else:
            (path / ENCODER_FILE).unlink(missing_ok=True)
        if self.probes is not None:
            self.probes.save(path / PROBES_FILE)
        else:
            (path / PROBES_FILE).unlink(missing_ok=True)
        (path / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

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


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    allow_as_umask(file)


def own_probes(path: str | Path, model: ModelShape | None = None) -> Probes | None:
    """Read the probes that an adapter brings, a plain LoRA too; None where it has none.

    Args:
        path: the adapter's directory.
        model: the base model's sizes; None skips the check that they fit.

    Raises:
        AdapterError: if they are malformed, not finite or do not fit.
    """
    file = Path(path) / PROBES_FILE
    if not file.exists():
        return None
    try:
        probes = Probes.load(file)
        if model is not None:
            model.check_probes(probes)
    except ProbesError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise AdapterError(f"{file}: {reason}") from error
    return probes


def _expect(where: Path, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise AdapterError(f"{where}: {what} is {found}, expected {wanted}")
