"""Names the files of an adapter, and hashes them. Standard library only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

CONFIG_FILE = "adapter_config.json"
LORA_FILE = "adapter_model.safetensors"
ENCODER_FILE = "pte_encoder.safetensors"
PROBES_FILE = "pte_probes.safetensors"
FILES = (CONFIG_FILE, LORA_FILE, ENCODER_FILE, PROBES_FILE)


def file_hashes(path: str | Path) -> dict[str, str]:
    """Compute the SHA-256 of each file of the adapter that is there, by name."""
    files = [Path(path) / name for name in FILES]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.exists()}


def content_hash(hashes: Mapping[str, str]) -> str:
    """Compute one SHA-256 for an adapter.

    It is that of the lines `name:sha256` of its files, sorted, with LF after each.

    Args:
        hashes: SHA-256 by file name, as `file_hashes` returns them.
    """
    lines = "".join(f"{name}:{hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()
