"""Files that others may read: libraries write weights for their owner only.

A server may run as another user than the one who made its files.
"""

from __future__ import annotations

import os
from pathlib import Path


def allow_as_umask(path: Path) -> None:
    """Give a file, or a directory and all in it, the permissions that the umask leaves."""
    mask = os.umask(0)
    os.umask(mask)
    for found in (path, *(path.rglob("*") if path.is_dir() else ())):
        found.chmod((0o777 if found.is_dir() else 0o666) & ~mask)
