"""What `pte-vllm bench gpu` runs on: a model by its sizes alone, and random adapters that fit it.

Speed depends on shapes, not on values, so nothing is downloaded: the configuration is written here,
vLLM fills the weights (`--load-format dummy`), and requests are token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from pte_vllm.adapter.defaults import TARGET_MODULES
from pte_vllm.adapter.format import Adapter, ModelShape
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.reference import LayerEncoder

QWEN_7B: Mapping[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Qwen2.5-7B's sizes."""

TINY: Mapping[str, Any] = {
    **QWEN_7B,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "initializer_range": 0.2,  # so that attention and next tokens are far from uniform
    "torch_dtype": "float32",
}


def write_model(directory: Path, config: Mapping[str, Any], *, weights: bool = False) -> str:
    """Write `config.json`, and random weights in fp32 if asked; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=1))
    if weights:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).float()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero by default, which would hide a forgotten bias
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(directory)
    return str(directory)


def random_adapter(
    model: str,
    directory: Path,
    *,
    rank: int,
    rule: str,
    features: str = "linear",
    plain: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> str:
    """Write an adapter on all linears of all layers; returns the directory.

    Args:
        model: directory with a `config.json`.
        directory: where it goes.
        rank: r and G.
        rule: the update rule.
        features: of keys.
        plain: without an encoder, a LoRA as any other.
        dtype: of A and B.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    shape = ModelShape.from_hf(AutoConfig.from_pretrained(model))
    lora_a: dict[str, torch.Tensor] = {}
    lora_b: dict[str, torch.Tensor] = {}
    for layer in range(shape.num_layers):
        for target in TARGET_MODULES:
            block = "self_attn" if target[0] in "qkvo" else "mlp"
            sizes = shape.linear(target)
            assert sizes is not None, target
            name, (d_in, d_out) = f"model.layers.{layer}.{block}.{target}", sizes
            lora_a[name] = noise(rank, d_in, scale=d_in**-0.5).to(dtype)
            lora_b[name] = noise(d_out, rank, scale=0.1 * rank**-0.5).to(dtype)
    d_kv = shape.d_kv
    encoders = {
        layer: LayerEncoder(
            query=noise(rank, d_kv),
            global_=noise(rank, d_kv),
            w_q=noise(rank, d_kv, scale=d_kv**-0.5),
            w_k=noise(rank, d_kv, scale=d_kv**-0.5),
            w_v=noise(rank, d_kv, scale=d_kv**-0.5),
            gain=torch.tensor(1.0),
            b_k=noise(rank, scale=0.3),
            b_v=noise(rank, scale=0.3),
            log_ridge=torch.tensor(-1.0),
            features=features,
        )
        for layer in range(0 if plain else shape.num_layers)
    }
    pte = PTEConfig(rank=rank, global_tokens=rank, rule=rule, features=features, init="random")
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGET_MODULES),
        "base_model_name_or_path": Path(model).name,
    }
    Adapter(
        peft=peft, pte=None if plain else pte, lora_a=lora_a, lora_b=lora_b, encoders=encoders
    ).save(directory)
    return str(directory)
