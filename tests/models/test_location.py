"""A path at which there is no model is told from a name that the hub may know."""

from __future__ import annotations

from pathlib import Path

import pytest

from pte_vllm.models.location import check_model


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "s3://bucket/model", "a_b/c.d-e"])
def test_names_pass(name: str) -> None:
    check_model(name)


@pytest.mark.parametrize(
    "path", ["./no", "/no/such", "../no", "~/no", "models/of/mine", "no/", ".hidden", "a b"]
)
def test_paths_that_are_not_there(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="--model: the model directory .* does not exist"):
        check_model(path, flag="--model")


def test_directories_and_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MODEL: .* it has no config.json"):
        check_model(str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.touch()
    with pytest.raises(ValueError, match="is a file; give the directory"):
        check_model(str(weights))
    (tmp_path / "config.json").touch()
    check_model(str(tmp_path))
    quantised = tmp_path / "model.gguf"
    quantised.touch()
    check_model(str(quantised))
