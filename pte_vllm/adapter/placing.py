"""Directories that appear whole or not at all, beside what is there already."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pte_vllm.adapter.hashes import FILES, file_hashes
from pte_vllm.models.permissions import allow_as_umask


@contextmanager
def made_aside(out: Path) -> Iterator[Path]:
    """Give an empty directory beside `out`; `put_in_place` makes it `out`, or else it vanishes.

    Raises:
        ValueError: if the folder above `out` cannot be written to.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the rename stays within one file system.
        scratch = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)
    except OSError as error:
        raise ValueError(f"OUT: {out} cannot be written: {error}") from error
    with scratch as name:
        made = Path(name, "made")
        made.mkdir()
        yield made


def put_in_place(made: Path, out: Path) -> bool:
    """Rename `made` to `out`; returns False where `out` holds the same adapter already.

    Raises:
        ValueError: if `out` holds anything else.
    """
    if out.is_dir() and any(out.iterdir()):
        check_same(made, out)
        return False
    check_free(out)
    allow_as_umask(made)  # a server may run as another user
    made.rename(out)
    return True


def check_free(out: Path) -> None:
    """Raise ValueError if `out` is no directory, or holds files that are no adapter's.

    An adapter that is there passes: whether it is the same is known once the new one is there too.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise ValueError(f"OUT: {out} is a file; name a directory")
    if any(out.iterdir()) and not any((out / name).exists() for name in FILES):
        raise ValueError(f"OUT: {out} holds other files; name a new directory")


def check_same(wanted: Path, out: Path) -> None:
    """Raise ValueError unless the files of the adapter in `out` are those in `wanted`."""
    found, expected = file_hashes(out), file_hashes(wanted)
    different = sorted(name for name in FILES if found.get(name) != expected.get(name))
    if different:
        raise ValueError(
            f"OUT: {out} holds another adapter already ({', '.join(different)}: not the same); "
            "name another directory, or delete this one"
        )


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of the files that are there, without their permissions."""
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
