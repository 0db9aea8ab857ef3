"""Models whose keys would be encoded wrongly are refused, others are not, whatever the dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.init import init_adapter
from pte_vllm.method.options import PTEConfig
from pte_vllm.models.rope_check import check_unrotation
from pte_vllm.train.replay.modeling import PTEModel
from tests.harness.models import TINY, VOCAB, make_random_adapter, random_tokens

LAYERS = 4  # SmolLM3's fourth has no RoPE
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(architecture: str, **options: Any) -> Any:
    """A random model of four layers, heads of 32 dimensions."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        **TINY, hidden_size=128, num_hidden_layers=LAYERS, **options
    )
    return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()


def an_adapter(model: Any, directory: Path, **options: Any) -> Adapter:
    model.config.save_pretrained(directory / "model")
    targets = ["q_proj", "v_proj"]
    make_random_adapter(directory / "model", directory / "adapter", targets=targets, **options)
    return Adapter.load(directory / "adapter")


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Llama", {}),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
        ("Qwen3", {}),
        ("Gemma", {}),
        ("Phi", {"partial_rotary_factor": 0.5}),
    ],
    ids=str,
)
def test_half_layout_passes(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    for dtype in DTYPES:
        check_unrotation(make(architecture, **options).to(dtype), range(LAYERS))
    model = make(architecture, **options)
    PTEModel(model, an_adapter(model, tmp_path))


@pytest.mark.parametrize("architecture", ["Glm", "Ernie4_5"])
def test_interleaved_layout_is_refused(architecture: str, tmp_path: Path) -> None:
    model = make(architecture)
    message = f"{model.config.model_type}: layer 0 has an unsupported RoPE layout"
    for dtype in DTYPES:
        with pytest.raises(ValueError, match=message):
            check_unrotation(make(architecture).to(dtype), range(LAYERS))
    with pytest.raises(ValueError, match=message):
        PTEModel(model, an_adapter(model, tmp_path))
    assert not any("lora" in name for name, _ in model.named_modules())
    PTEModel(model, an_adapter(model, tmp_path, keys="rotated"))


def test_keys_changed_after_rope_are_refused() -> None:
    model = make("HunYuanDenseV1")  # normalises them, with a weight for each dimension
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.self_attn.key_layernorm.weight, 1.0, 3.0)
    with pytest.raises(ValueError, match="nothing after it"):
        check_unrotation(model, range(LAYERS))


def test_a_layer_without_rope_is_refused(tmp_path: Path) -> None:
    model = make("SmolLM3")
    with pytest.raises(ValueError, match="smollm3: layer 3 has no RoPE"):
        PTEModel(model, an_adapter(model, tmp_path))
    for dtype in DTYPES:
        check_unrotation(make("SmolLM3").to(dtype), range(3))
        with pytest.raises(ValueError, match="layer 3 has no RoPE"):
            check_unrotation(make("SmolLM3").to(dtype), range(LAYERS))
    PTEModel(model, an_adapter(model, tmp_path, layers=[0, 1, 2]))


def test_no_adapter_is_made_for_such_models() -> None:
    text = torch.tensor([random_tokens(64, seed=i) for i in range(2)])
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    for architecture, message in (("Glm", "layer 0 has an unsupp"), ("SmolLM3", "layer 3 has no")):
        config = PTEConfig(rank=8, global_tokens=8)
        with pytest.raises(ValueError, match=message):
            init_adapter(make(architecture), text, config, **options)
    init_adapter(make("SmolLM3"), text, config, layers=[0, 1, 2], **options)


def test_a_model_without_rotary_embedding_is_refused() -> None:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="built like Llama"):
        PTEModel(transformers.GPT2LMHeadModel(config))
