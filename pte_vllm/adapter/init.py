"""Makes new adapters: puts the starts of their layers together (`starts`), and calibrates gains.

Letters in shapes: G global tokens, r rank, d_kv = KV heads × head size, N sequences, m tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pte_vllm.adapter.calibration import (
    TEXT_SPANS,
    LayerSample,
    Spans,
    decoder_layers,
    visit_layers,
)
from pte_vllm.adapter.defaults import B_STARTS, TARGET_MODULES
from pte_vllm.adapter.files import layer_of
from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.starts import STARTS, LayerReport, evicted_kv, lora_a_rows
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.reference import LayerEncoder, contribution, initial_state, relative_update
from pte_vllm.models.rope_check import check_unrotation

TARGET_RHO = 0.2
"""How much one fold is to weigh against the state, ‖S'‖ / ‖S‖, on sample text."""
READS_RESIDUAL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linears whose input is the residual stream, so that an aligned A fits them."""
_RANDOM_B_STD = 0.02


def init_adapter(
    model: Any,
    token_ids: Tensor,
    config: PTEConfig,
    *,
    layers: Collection[int] | None = None,
    target_modules: Sequence[str] = TARGET_MODULES,
    b: str = "zero",
    alpha: float | None = None,
    seed: int = 0,
    base_model: str | None = None,
    spans: Spans = TEXT_SPANS,
    progress: Callable[[LayerReport], None] | None = None,
) -> Adapter:
    """Make an untrained adapter for a transformers model built like Llama, Qwen2 or Qwen3.

    Args:
        model: the causal language model, in any dtype, on any device; not changed.
        token_ids: sample text `[N, T]`, such as `calibration.sample_sequences` makes.
        config: the method's options, stored with the adapter; `config.init` selects the start.
        layers: the layers that get a state; None: all.
        target_modules: last names of the linears that get A and B.
        b: how B starts: `zero` keeps the model exact, `random` is for tests.
        alpha: LoRA's alpha; None: the rank, so that the scale is 1.
        seed: the seed of everything that starts random.
        base_model: the model's name, recorded in the adapter; None: `model.config`'s. Of an
            absolute path, only the last part is recorded.
        spans: which parts of the sample text count as pinned, window and recalled.
        progress: is called after each layer with how it started.

    Returns:
        The adapter, on the CPU in fp32.

    Raises:
        ValueError: naming the option, if one does not fit the model; if RoPE of its keys is to be
            undone and cannot be.
    """
    if b not in B_STARTS:
        raise ValueError(f"b must be one of {', '.join(B_STARTS)}, got {b!r}")
    if alpha is not None and alpha <= 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if token_ids.dim() != 2 or token_ids.shape[1] < 16:
        raise ValueError(
            f"sample text must be [N, T >= 16] token ids, got {tuple(token_ids.shape)}"
        )
    chosen = choose_layers(layers, len(decoder_layers(model)))
    linears = _target_linears(model, chosen, target_modules)
    if config.keys == "unrotated":
        check_unrotation(model, chosen)
    encoders: dict[int, LayerEncoder] = {}
    lora_a: dict[str, Tensor] = {}
    lora_b: dict[str, Tensor] = {}

    def visit(sample: LayerSample) -> None:
        # Seeded per layer, so that a layer starts alike whichever others are chosen.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sample.layer)
        start = STARTS[config.init](sample, config, generator)
        encoder, rho = _calibrate_gain(start.encoder, sample, config)
        encoders[sample.layer] = encoder
        for module, linear in linears[sample.layer].items():
            d_out, d_in = linear.weight.shape
            aligned = start.ask if module.rsplit(".", 1)[-1] in READS_RESIDUAL else None
            lora_a[module] = (
                lora_a_rows(config.global_tokens, d_in, generator)
                if aligned is None
                else aligned.clone()
            )
            noise = torch.randn(d_out, config.rank, generator=generator)
            lora_b[module] = noise * (_RANDOM_B_STD if b == "random" else 0.0)
        if progress is not None:
            progress(replace(start.report, gain=float(encoder.gain), rho=tuple(rho.tolist())))

    visit_layers(model, token_ids, chosen, visit, spans)
    name = base_model or getattr(model.config, "_name_or_path", "") or type(model).__name__
    peft = _peft_config(config.rank, alpha, target_modules, name)
    if len(chosen) < len(decoder_layers(model)):
        peft |= {"layers_to_transform": chosen, "layers_pattern": "layers"}
    return Adapter(peft=peft, pte=config, lora_a=lora_a, lora_b=lora_b, encoders=encoders)


def choose_layers(layers: Collection[int] | None, num_layers: int) -> list[int]:
    """Return the layers asked for, ascending; all of them for None.

    Raises:
        ValueError: if there are none, or the model lacks one.
    """
    chosen = sorted(set(range(num_layers) if layers is None else layers))
    if not chosen:
        raise ValueError("--layers names no layer")
    if chosen[0] < 0 or chosen[-1] >= num_layers:
        raise ValueError(f"--layers: the model has layers 0-{num_layers - 1}, not {chosen[-1]}")
    return chosen


def _target_linears(
    model: nn.Module, layers: list[int], names: Sequence[str]
) -> dict[int, dict[str, nn.Linear]]:
    """Return by layer and module name the linears that get A and B."""
    found: dict[int, dict[str, nn.Linear]] = {layer: {} for layer in layers}
    missing = set(names)
    for module, linear in model.named_modules():
        layer, last = layer_of(module), module.rsplit(".", 1)[-1]
        if last in names and isinstance(linear, nn.Linear) and layer is not None:
            missing.discard(last)
            if layer in found:
                found[layer][module] = linear
    if missing or not names:
        raise ValueError(f"--target-modules: the model has no linear {min(missing, default='')!r}")
    return found


def _calibrate_gain(
    encoder: LayerEncoder, sample: LayerSample, config: PTEConfig
) -> tuple[LayerEncoder, Tensor]:
    """Choose the gain with which a fold of a sample sequence weighs `TARGET_RHO`.

    Returns:
        The encoder with that gain, and the ρ reached on each sequence, `[N]`.
    """
    k, v = evicted_kv(sample, config.keys)
    state = initial_state(encoder, config.normalize)
    rho = relative_update(state, contribution(encoder, k, v))
    mean = float(rho.mean())
    gain = TARGET_RHO / mean if math.isfinite(mean) and mean > 0 else 1.0
    encoder = replace(encoder, gain=torch.tensor(gain))
    state = initial_state(encoder, config.normalize)
    return encoder, relative_update(state, contribution(encoder, k, v))


def _peft_config(
    rank: int, alpha: float | None, target_modules: Sequence[str], base_model: str
) -> dict[str, Any]:
    """Return what PEFT would write to `adapter_config.json`."""
    # A path is of use on one machine only, and may say whose.
    name = Path(base_model).name if Path(base_model).is_absolute() else base_model
    scale = rank if alpha is None else alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "r": rank,
        "lora_alpha": int(scale) if float(scale).is_integer() else scale,
        "target_modules": sorted(target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
    }
