"""Finds the probes of a base model: in this package, in the user's cache, or by sampling them.

The package brings those of some models of its catalog, in `shipped_probes/`, one file for each. A
file says in its metadata which model it is for. Standard library only until a model is looked at.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pte_vllm.launch import pte_command
from pte_vllm.models.location import local_directory, model_hash

SHIPPED = Path(__file__).parent / "shipped_probes"
"""The directory with what the package brings."""


def calibrated(model: str, *, flag: str = "MODEL", options: Sequence[str] = ()) -> Path:
    """Return the file with the probes of a model, sampled now unless there is one.

    What the package brings goes first, so that all machines keep the same tokens.

    `pte-vllm adapter calibrate` samples them in a process of its own, with its progress on stderr:
    when this returns, none of its memory is held, on the host or on a GPU. It takes minutes on a
    CPU. The file appears whole or not at all. Of several callers at once, one samples while the
    others wait for its file; one that is interrupted leaves the work to the next.

    The cache is `pte-vllm/probes/` in `$XDG_CACHE_HOME` or `~/.cache`, its files
    `{model_hash}-{format}.safetensors`: models of equal content share one, wherever they lie.

    Args:
        model: Directory or name of the base model; what only the hub has is fetched.
        flag: Where the user gave it, for errors.
        options: Flags for the sampling, such as `("--device", "cpu")`. What is there already is
            returned whatever flags it was sampled with.

    Raises:
        FileNotFoundError, ValueError: If there is no such model, naming the flag.
        ProbesError: If sampling failed, which has said why on stderr.
    """
    from pte_vllm.adapter.probes import FORMAT_VERSION, ProbesError

    directory = local_directory(model, download=True, flag=flag)
    name = model_hash(directory)
    if (file := shipped(name)) is not None:
        return file
    file = _cache() / f"{name}-{FORMAT_VERSION}.safetensors"
    if _holds(file, name):
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file) as lock:
        if _holds(file, name):  # another one has sampled them
            return file
        print(f"no probes of {model} in {file.parent}: sampling them, once", file=sys.stderr)
        command = ["adapter", "calibrate", str(directory), str(file), "--overwrite", *options]
        status = subprocess.run(
            pte_command(*command),
            stdin=subprocess.DEVNULL,
            stdout=2,  # its stderr is ours
            pass_fds=(lock,),  # if this process is killed, the lock is held until that one ends
        ).returncode
    if status in (130, -signal.SIGINT):  # Ctrl-C reaches all processes of a terminal
        raise KeyboardInterrupt
    if status or not _holds(file, name):
        raise ProbesError(
            f"{flag}: sampling the probes of {model} failed with exit status {status}; the lines "
            "above say why"
        )
    return file


def shipped(name: str) -> Path | None:
    """Return the package's own file with the probes of a model; None where it brings none.

    Args:
        name: What `models.location.model_hash` says of the model.
    """
    files = sorted(SHIPPED.glob("*.safetensors"))
    return next((file for file in files if _holds(file, name)), None)


def _holds(file: Path, name: str) -> bool:
    """Return whether a file has the probes of a model; a broken one is as good as none."""
    from pte_vllm.adapter.probes import Probes, ProbesError

    try:
        return Probes.load(file).model_hash == name
    except ProbesError:
        return False


@contextmanager
def _alone(file: Path) -> Iterator[int]:
    """Wait until no other process samples the probes of `file`; yields the lock's descriptor."""
    with file.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process samples {file}: waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: both sample, and one file stays
            pass
        yield lock.fileno()


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "pte-vllm" / "probes"
