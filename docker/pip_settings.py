"""Write this machine's pip settings as a pip.conf for a container that has its disk at /run/host.

    python docker/pip_settings.py PIP_CONF      prints what must be mounted, a path a line

Only what says where packages come from: indexes, links, constraints, proxy and certificates.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HOST = "/run/host"
_KEPT = {
    *("index-url", "extra-index-url", "find-links", "no-index", "trusted-host"),
    *("cert", "client-cert", "constraint", "proxy", "timeout", "default-timeout"),
}


def settings() -> dict[str, str]:
    """Name → value, in pip's order: files first, the environment wins."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found = {}
    for from_environment in (False, True):
        for line in lines:
            key, _, value = line.partition("=")
            section, _, name = key.rpartition(".")
            if name in _KEPT and section.startswith(":env:") == from_environment:
                found[name] = value.strip("'\"")
    return found


def rewrite(name: str, value: str) -> tuple[str, set[str]]:
    """The value as the container must see it, and paths of this disk that it names."""
    words, paths = [], set()
    for word in value.split():
        scheme = "file://" if word.startswith("file://") else ""
        path = Path(word.removeprefix(scheme))
        if path.is_absolute() and path.exists():
            # Pages of an index may point beside it, and a lone file cannot be mounted over.
            paths.add(str(path if path.is_dir() and "index" not in name else path.parent))
            word = f"{scheme}{HOST}{path}"
        words.append(word)
    return "\n    ".join(words), paths


def main(target: str) -> None:
    lines, mounts = ["[global]"], set()
    for name, value in settings().items():
        text, paths = rewrite(name, value)
        lines.append(f"{name} = {text}")
        mounts |= paths
    Path(target).write_text("\n".join(lines) + "\n")
    Path(target).chmod(0o600)  # an index may carry a password
    print("\n".join(sorted(mounts)))


if __name__ == "__main__":
    main(sys.argv[1])
