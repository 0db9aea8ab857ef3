"""A base model has one name, wherever it lies, and another once its files change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pte_vllm.models.location import model_hash

Tiny = Callable[[str], Path]


def test_hash_of_a_model(tiny: Tiny, tmp_path: Path) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "a")
    first = model_hash(model)
    assert first == model_hash(tiny("llama")) != model_hash(tiny("qwen2"))
    (model / "README.md").write_text("not a part of the model")
    assert model_hash(model) == first
    found, weights = {first}, model / "model.safetensors"
    tensors = load_file(weights)

    def changed() -> bool:
        found.add(model_hash(model))
        return len(found) == changed_before + 1

    changed_before = 1
    save_file({name: 1.001 * t for name, t in tensors.items()}, weights)  # same size and header
    assert changed()
    changed_before += 1
    save_file(dict(list(tensors.items())[1:]), weights)
    assert changed()
    changed_before += 1
    weights.rename(model / "model-00001-of-00001.safetensors")
    assert changed()
    changed_before += 1
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    assert changed()


def test_parts_of_a_model_have_no_hash(tiny: Tiny, tmp_path: Path) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "a")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="only a part of a model: model-2.safetensors"):
        model_hash(model)
    (model / "model.safetensors.index.json").unlink()
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert model_hash(model) != model_hash(tiny("llama"))
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="only a part of a model: weights missing"):
        model_hash(model)
    (model / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="it has no config.json"):
        model_hash(model)
