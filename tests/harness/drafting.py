"""A tiny model whose next token can be foreseen, and what foresees it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM, Qwen2ForCausalLM

CYCLE = 7
"""Tokens after which a calm model says again what it said."""


def calm_down(model: Path, directory: Path, *, share: float = 0.003, boost: float = 16.0) -> None:
    """Copy a tiny model, and have it count: after token `t` it mostly says the next of its cycle.

    Its layers add only a share of what they did. What it says next then depends most on the token
    before, also when it is sampled: at other tokens its logits stay what they were, and the next
    of the cycle has `boost` more.
    """
    shutil.copytree(model, directory)
    weights = load_file(directory / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= share
    size, hidden = weights["lm_head.weight"].shape
    seen = torch.nn.functional.normalize(weights["model.embed_tokens.weight"]) * hidden**0.5
    token = torch.arange(size)
    following = token - token % CYCLE + (token + 1) % CYCLE
    following = torch.where(following < size, following, token - token % CYCLE)
    weights["lm_head.weight"][following] += boost * seen / hidden
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def make_eagle_head(model: Path, directory: Path, *, seed: int = 0) -> None:
    """Write a draft head in EAGLE's form for a calm model of llama's architecture.

    It says what the last token alone makes likely. Its layer disturbs that by what it attends to.
    """
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = 1
    size = config.hidden_size
    layer = LlamaForCausalLM(config).float().model.layers[0]
    weights = {f"layers.0.{name}": 0.03 * tensor for name, tensor in layer.state_dict().items()}
    del weights["layers.0.input_layernorm.weight"]  # an EAGLE head has none
    weights["layers.0.post_attention_layernorm.weight"] = torch.ones(size)
    weights["fc.weight"] = torch.cat([torch.eye(size), 0.005 * torch.randn(size, size)], 1)
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        directory / "model.safetensors",
    )


def add_mtp_layer(model: Path, *, seed: int = 0) -> None:
    """Make a calm model of Qwen2's architecture one of MiMo's, which is Qwen2 and a draft layer.

    The layer says what `make_eagle_head` says. transformers still reads the model as a Qwen2.
    """
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = 1
    size = config.hidden_size
    layer = Qwen2ForCausalLM(config).float().model.layers[0]
    own = {name: 0.03 * tensor for name, tensor in layer.state_dict().items()}
    own["input_proj.weight"] = torch.cat([0.005 * torch.randn(size, size), torch.eye(size)], 1)
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
    for norm in (*norms, "input_layernorm", "post_attention_layernorm"):
        own[f"{norm}.weight"] = torch.ones(size)
    weights = load_file(model / "model.safetensors")
    weights |= {f"model.mtp_layers.0.{name}": tensor for name, tensor in own.items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    fields = json.loads((model / "config.json").read_text())
    fields |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (model / "config.json").write_text(json.dumps(fields))
