"""Where a base model is: in a directory of this machine, or under a name on Hugging Face's hub.

Importing it takes the standard library only, so that commands can tell a mistyped path before
anything slow is imported.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_CONFIGS = ("config.json", "params.json")
"""Of Hugging Face and of Mistral."""
_FILES = (".gguf",)
"""Files that vLLM takes for a model, by the end of their names."""
_WEIGHTS = (".safetensors", ".bin", ".gguf")
"""Of several formats side by side, the first is the model's; libraries load it, and fetch no other.
"""
_HUB_FILES = ("*.json", "*.txt", "*.jinja", "*.model")
"""What a model from the hub needs beside weights."""
_SAMPLES, _SAMPLE_BYTES = 16, 4096
"""Of each file of weights: how many pieces are hashed, and of which size."""


def check_model(model: str, *, flag: str = "MODEL") -> None:
    """Refuse a path at which there is no model; a name that the hub may know passes.

    Args:
        model: what the user gave.
        flag: where the user gave it.

    Raises:
        FileNotFoundError, ValueError: naming the flag and the path.
    """
    if "://" in model:  # a store that vLLM reads
        return
    path = Path(model)
    if path.is_dir():
        if not any((path / name).is_file() for name in _CONFIGS) and not _holds_file(path):
            raise ValueError(f"{flag}: the directory {model} holds no model: it has no config.json")
    elif path.exists():
        if not model.endswith(_FILES):
            raise ValueError(f"{flag}: {model} is a file; give the directory that it is in")
    elif not _HUB_NAME.fullmatch(model):
        raise FileNotFoundError(f"{flag}: the model directory {model} does not exist")


def _holds_file(path: Path) -> bool:
    return any(file.name.endswith(_FILES) for file in path.iterdir())


def local_directory(model: str, *, download: bool = False, flag: str = "MODEL") -> Path:
    """Return the directory that holds a model: itself, or the hub's snapshot on this machine.

    Args:
        model: A directory, or a name on the hub.
        download: Whether a model that only the hub has is fetched, as vLLM would.
        flag: Where the user gave it.

    Raises:
        FileNotFoundError, ValueError: Naming the flag and the reason.
    """
    check_model(model, flag=flag)
    if Path(model).is_dir():
        return Path(model)
    if "://" in model or Path(model).exists():
        raise ValueError(f"{flag}: {model} is no directory; give one with config.json and weights")
    from huggingface_hub import snapshot_download

    try:
        for suffix in _WEIGHTS:
            path = Path(
                snapshot_download(
                    model,
                    allow_patterns=[*_HUB_FILES, f"*{suffix}"],
                    local_files_only=not download,
                )
            )
            if any(path.glob(f"*{suffix}")):
                return path
    except (OSError, ValueError) as error:
        where = "cannot be had from the hub" if download else "is not on this machine"
        raise FileNotFoundError(f"{flag}: the model {model} {where}: {error}") from error
    raise FileNotFoundError(f"{flag}: the snapshot {path} of {model} holds no weights")


def model_hash(model_dir: str | Path) -> str:
    """Name a base model by its content, wherever it lies.

    It is the SHA-256 of config.json, and for each file of weights its name, its size, the header of
    safetensors, and sixteen pieces of 4 KiB spread over it. Gigabytes would take too long; after
    any training that changed all weights, the pieces differ.

    Args:
        model_dir: Its directory; for a name on the hub see `local_directory`.

    Raises:
        FileNotFoundError: If there is no config.json, or no weights, or a part of them is missing.
    """
    path = Path(model_dir)
    digest = hashlib.sha256()
    for name, content in _telling(path):
        digest.update(f"{name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def _telling(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield what tells one model from another, each with a name."""
    config = path / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{path} holds no model: it has no config.json")
    yield config.name, config.read_bytes()
    found = (sorted(path.glob(f"*{suffix}")) for suffix in _WEIGHTS)
    files = next((files for files in found if files), [])
    missing = _named_by_index(path) - {file.name for file in files}
    if missing or not files:
        what = ", ".join(sorted(missing)) or "weights"
        raise FileNotFoundError(f"{path} holds only a part of a model: {what} missing")
    for file in files:
        size = file.stat().st_size
        yield file.name, str(size).encode()
        with file.open("rb") as stream:
            if file.suffix == ".safetensors":  # eight bytes of length, then JSON
                yield "header", stream.read(min(size, int.from_bytes(stream.read(8), "little")))
            for i in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                yield f"piece {i}", stream.read(_SAMPLE_BYTES)


def _named_by_index(path: Path) -> set[str]:
    """Return the files over which safetensors are spread; none where one file has all."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    about: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    return set(about.get("weight_map", {}).values())
