"""Tiny checkpoints and random adapters, made by the tests themselves."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pte_vllm.adapter.format import Adapter, ModelShape
from pte_vllm.adapter.hashes import LORA_FILE
from pte_vllm.adapter.probes import Probes
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.reference import LayerEncoder

VOCAB = 512
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


TINY_LAYERS = 3
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""Of a transformers config. Weights are large enough that attention and next-token distributions
are far from uniform."""


def make_tiny_model(
    architecture: str, directory: Path, *, seed: int = 0, layers: int = TINY_LAYERS
) -> None:
    """Write a random checkpoint with grouped-query attention and a byte tokenizer."""
    config_class, model_class = _CLASSES[architecture]
    torch.manual_seed(seed)
    config = config_class(
        **TINY,
        hidden_size=128 if architecture == "qwen2" else 96,  # Qwen2 derives its head size
        num_hidden_layers=layers,
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
        **({"sliding_window": None} if architecture == "mistral" else {}),
    )
    model = model_class(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide a forgotten bias
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):  # Qwen3; one by default
            torch.nn.init.uniform_(parameter, 1.0, 3.0)  # unit norms leave attention flat
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, after <s> and </s>."""
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    vocab |= {f"<extra_{i}>": i for i in range(len(vocab), VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    )


def random_tokens(count: int, vocab: int = 500, seed: int = 0) -> list[int]:
    """Tokens without the special ones."""
    rng = random.Random(seed)
    return [rng.randrange(2, vocab) for _ in range(count)]


def _random_lora(
    shape: ModelShape,
    rank: int,
    rows: int,
    layers: Sequence[int],
    targets: Sequence[str],
    strength: float,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    lora_a, lora_b = {}, {}
    for layer in layers:
        for target in targets:
            block = "self_attn" if target[0] in "qkvo" else "mlp"
            module = f"model.layers.{layer}.{block}.{target}"
            sizes = shape.linear(target)
            assert sizes is not None, target
            d_in, d_out = sizes
            lora_a[module] = torch.randn(rows, d_in) / d_in**0.5
            lora_b[module] = strength * torch.randn(d_out, rank) / rank**0.5
    return lora_a, lora_b


def _peft(rank: int, targets: Sequence[str]) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "base_model_name_or_path": "test",
    }


def make_plain_lora(
    model: Path,
    directory: Path,
    *,
    rank: int = 8,
    seed: int = 0,
    strength: float = 0.1,
    own_probes: int | None = None,
) -> None:
    """A LoRA without an encoder; with `own_probes`, a seed, it brings probes."""
    torch.manual_seed(seed)
    shape = ModelShape.from_hf(AutoConfig.from_pretrained(model))
    lora_a, lora_b = _random_lora(shape, rank, rank, range(shape.num_layers), TARGETS, strength)
    peft = _peft(rank, TARGETS)
    probes = None if own_probes is None else make_probes(own_probes)
    Adapter(peft=peft, pte=None, lora_a=lora_a, lora_b=lora_b, encoders={}, probes=probes).save(
        directory
    )


def enlarge(adapter: Path, directory: Path, largest: float) -> Path:
    """Copy an adapter; each linear of the copy's MLPs may add as much as `largest` to an input.

    With 1e18 a server takes it, and the MLP's product of what its linears add overflows.
    """
    shutil.copytree(adapter, directory)
    tensors = load_file(directory / LORA_FILE)
    for name, b in tensors.items():
        if "mlp" in name and "lora_B" in name:
            a = tensors[name.replace("lora_B", "lora_A")]
            b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(0)))
            b *= largest / (2 * a.norm() * b.norm() * a.shape[1] ** 0.5)  # alpha is twice the rank
    save_file(tensors, directory / LORA_FILE)
    return directory


def make_random_adapter(
    model: Path,
    directory: Path,
    *,
    rank: int = 8,
    global_tokens: int | None = None,
    rule: str = "paper",
    read: str = "key",
    keys: str = "unrotated",
    normalize: str = "matrix",
    features: str = "linear",
    layers: Sequence[int] | None = None,
    targets: Sequence[str] = TARGETS,
    seed: int = 0,
    strength: float = 0.1,
    own_probes: int | None = None,
) -> None:
    """A PTE adapter whose state changes the log-probs; every optional tensor is there.

    With `own_probes`, a seed, it brings probes.
    """
    torch.manual_seed(seed)
    shape = ModelShape.from_hf(AutoConfig.from_pretrained(model))
    rows = global_tokens or rank
    used = list(range(shape.num_layers)) if layers is None else list(layers)
    lora_a, lora_b = _random_lora(shape, rank, rows, used, targets, strength)
    d = shape.d_kv
    encoders = {
        layer: LayerEncoder(
            query=torch.randn(rows, d),
            global_=torch.randn(5, d),
            w_q=torch.randn(rank, d) / d**0.5,
            w_k=torch.randn(rank, d) / d**0.5,
            w_v=torch.randn(rank, d) / d**0.5,
            gain=torch.rand(()) + 0.5,
            b_k=0.3 * torch.randn(rank),
            b_v=0.3 * torch.randn(rank),
            log_ridge=0.5 * torch.randn(()),
            features=features,
        )
        for layer in used
    }
    pte = PTEConfig(
        rank=rank,
        global_tokens=rows,
        rule=rule,
        read=read,
        keys=keys,
        normalize=normalize,
        features=features,
        init="random",
    )
    Adapter(
        peft=_peft(rank, targets),
        pte=pte,
        lora_a=lora_a,
        lora_b=lora_b,
        encoders=encoders,
        probes=None if own_probes is None else make_probes(own_probes),
    ).save(directory)


def make_probes(seed: int = 5, *, layers: int = TINY_LAYERS) -> Probes:
    """Random queries as probes of any tiny model.

    What is kept by them matters to nobody, only that it is kept everywhere. How many there are
    depends on the seed, as adapters may bring more or fewer than the engine has.
    """
    shape = layers, TINY["num_key_value_heads"], 19 + seed, TINY["head_dim"]
    return Probes.of(3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)), "none")


def write_probes(file: Path) -> Path:
    """Write probes of any tiny model, and return the file."""
    make_probes().save(file)
    return file
