"""Pushed adapters on disk: written whole or not at all, and there again after a restart.

    SPOOL/lock                       held by the one server that uses the spool
    SPOOL/incoming/*                 being written; leftovers are deleted at start
    SPOOL/{name}@{version}-{hash}/   the files of one version, and record.json

A directory becomes a version by one rename, after its files are on disk. The hash in its name
matters: vLLM's prefix cache knows an adapter by name and path, so other weights under a version
that was retired before must have another path.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from pte_vllm.adapter.hashes import FILES

RECORD_FILE = "record.json"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CHUNK_BYTES = 1 << 20


class SpoolError(OSError):
    """The spool cannot be written; `errno` and `strerror` say why."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """One immutable version of a pushed adapter."""

    name: str
    number: int
    sha256: str
    """What `pte_vllm.adapter.hashes.content_hash` says of its files."""
    num_bytes: int
    """The size of its files together."""
    created_s: float
    """When it was made, in Unix time."""
    rule: str | None
    """The rule by which its folds add up; None for a plain LoRA."""
    path: str
    """The directory with its files."""

    @property
    def engine_name(self) -> str:
        """The name that the engine knows it by."""
        return f"{self.name}@{self.number}"


def check_name(name: str) -> None:
    """Raise ValueError unless `name` can name an adapter."""
    if not _NAME.fullmatch(name) or not name.strip("."):
        raise ValueError(
            f"adapter name {name!r} must be 1 to 64 of A-Z a-z 0-9 . _ -, not dots alone"
        )


class Incoming:
    """Files of a version being pushed; `delete` deletes what `Spool.commit` did not take."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hashes: dict[str, str] = {}
        self.num_bytes = 0

    def write(self, name: str, source: BinaryIO | IO[bytes]) -> None:
        """Copy one file to disk.

        Raises:
            SpoolError: if it cannot be written.
        """
        assert name in FILES, name
        digest = hashlib.sha256()
        with _writing(), (self.path / name).open("xb") as file:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
                self.num_bytes += len(chunk)
            _sync(file)
        self.hashes[name] = digest.hexdigest()

    def copy_adapter(self, directory: Path, *, max_bytes: int) -> None:
        """Copy an adapter's files, and nothing else.

        Raises:
            ValueError: if there are none, or more than `max_bytes` of them.
            SpoolError: if they cannot be written.
            OSError: if they cannot be read.
        """
        found = [name for name in FILES if (directory / name).is_file()]
        if not found:
            raise ValueError(f"there is no adapter in {directory}")
        num_bytes = sum((directory / name).stat().st_size for name in found)
        if num_bytes > max_bytes:
            raise ValueError(f"the adapter has {num_bytes} bytes, more than {max_bytes}")
        for name in found:
            with (directory / name).open("rb") as file:
                self.write(name, file)

    def delete(self) -> None:
        """Delete the directory, if it is still there."""
        shutil.rmtree(self.path, ignore_errors=True)


def default_root() -> Path:
    """Return where the spools of a user's servers lie, unless `--pte-spool` says otherwise."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "pte-vllm" / "spool"


def default_spool(model: str, port: int | None) -> Path:
    """Return a directory of the user's cache, one for each model and port."""
    where = str(Path(model).resolve()) if Path(model).exists() else model
    label = re.sub(r"[^A-Za-z0-9._-]", "-", Path(model).name) or "model"
    digest = hashlib.sha256(where.encode()).hexdigest()[:8]
    return default_root() / f"{label}-{digest}-{port or 0}"


class Spool:
    """Keeps the directory of one server. Its calls block: keep them off the event loop.

    Args:
        root: the directory, which is made and locked when it is first needed. A copy that is sent
            to another process relies on the lock of the process that sent it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._lock: IO[str] | None = None
        self._is_copy = False

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_lock": None, "_is_copy": True}

    def open(self) -> None:
        """Make and lock the directory, unless that was done before.

        Raises:
            ValueError: if another server uses it.
            SpoolError: if it cannot be written.
        """
        if self._lock is not None or self._is_copy:
            return
        with _writing():
            (self.root / "incoming").mkdir(parents=True, exist_ok=True)
            lock = (self.root / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(
                f"--pte-spool {self.root} is used by another server: stop it, or choose another "
                "directory"
            ) from None
        self._lock = lock
        for leftover in (self.root / "incoming").iterdir():
            shutil.rmtree(leftover)

    def versions(self) -> list[Version]:
        """Return what is stored, by name and number, and delete what was retired before.

        Raises:
            ValueError: if a record is damaged, or another server uses the directory.
            SpoolError: if the directory cannot be written.
        """
        if not self.root.is_dir():
            return []
        self.open()
        found = []
        for path in self.root.glob("*@*"):
            record = path / RECORD_FILE
            if not record.exists():
                shutil.rmtree(path)
                continue
            try:
                found.append(Version(**json.loads(record.read_text()), path=str(path)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"--pte-spool: {record} is not a record: {error}") from error
        return sorted(found, key=lambda v: (v.name, v.number))

    def incoming(self) -> Incoming:
        """Make a place for the files of a new version.

        Raises:
            ValueError: if another server uses the directory.
            SpoolError: if it cannot be written.
        """
        self.open()
        with _writing():
            return Incoming(Path(tempfile.mkdtemp(dir=self.root / "incoming")))

    def commit(
        self, incoming: Incoming, *, name: str, number: int, sha256: str, rule: str | None
    ) -> Version:
        """Make a version of files that were validated; after this it survives a crash.

        Raises:
            SpoolError: if the disk does not take it; then there is no such version.
        """
        path = self.root / f"{name}@{number}-{sha256[:12]}"
        version = Version(
            name=name,
            number=number,
            sha256=sha256,
            num_bytes=incoming.num_bytes,
            created_s=time.time(),
            rule=rule,
            path=str(path),
        )
        record = asdict(version)
        del record["path"]
        with _writing():
            with (incoming.path / RECORD_FILE).open("w") as file:
                json.dump(record, file)
                _sync(file)
            _sync_directory(incoming.path)
            shutil.rmtree(path, ignore_errors=True)  # the same files, retired but not yet deleted
            incoming.path.rename(path)
            _sync_directory(self.root)
        return version

    def retire(self, version: Version) -> None:
        """Let no restart bring the version back; its files stay for those who still read them."""
        (Path(version.path) / RECORD_FILE).unlink(missing_ok=True)

    def delete(self, version: Version) -> None:
        """Delete the files, unless the same version was pushed again meanwhile."""
        if not (Path(version.path) / RECORD_FILE).exists():
            shutil.rmtree(version.path, ignore_errors=True)


@contextmanager
def _writing() -> Iterator[None]:
    """Make a failure inside the block the spool's, not that of what is read meanwhile."""
    try:
        yield
    except OSError as error:
        raise SpoolError(error.errno, error.strerror) from error


def _sync(file: IO[bytes] | IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
