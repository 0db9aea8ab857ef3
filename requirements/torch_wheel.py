"""Install the torch that a lock pins, wherever it comes from, into the Python that runs this.

    python requirements/torch_wheel.py requirements/cpu.lock [-q ...]

Options go to pip and to uv alike. First pip looks where its own settings say: indexes, links. PyPI
has no CPU build (`+cpu`); where pip finds none, uv, which knows PyTorch's own index, installs it.
Standard library only.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

_NOWHERE = """\
setup: neither pip nor uv could install {torch} (see above). It is not on PyPI. Either
setup:   let this machine reach PyTorch's index of CPU wheels, or
setup:   tell pip about a mirror of it:     PIP_EXTRA_INDEX_URL=<its address>
setup:   or about a folder with the wheel:  PIP_FIND_LINKS=<the folder>
setup: and run the same command again."""


def pinned_torch(lock: Path) -> str:
    """The line of a lock that pins torch, such as `torch==2.13.0+cpu`."""
    found = re.search(r"^torch=.*$", lock.read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"setup: {lock} pins no torch")
    return found.group()


def install(torch: str, options: list[str]) -> None:
    """Install one torch without its dependencies, and say in a line where it came from.

    Raises:
        SystemExit: if no way works; what pip and uv said is on stderr by then.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    wanted = ["--no-deps", *options, torch]
    first = subprocess.run([*pip, *wanted], stderr=subprocess.PIPE, text=True)
    if first.returncode == 0:
        print(f"setup: {torch} comes from where pip's own settings look", flush=True)
        return
    if "+cpu" not in torch:
        raise SystemExit(f"{first.stderr}setup: pip cannot install {torch} (see above)")
    with tempfile.TemporaryDirectory() as folder:
        get_uv = subprocess.run([*pip, "-qq", "--target", folder, "uv"])
        if get_uv.returncode == 0:
            print(f"setup: pip's own settings have no {torch}; uv asks PyTorch's index", flush=True)
            uv = [f"{folder}/bin/uv", "pip", "install", "--python", sys.executable]
            if subprocess.run([*uv, "--torch-backend", "cpu", *wanted]).returncode == 0:
                print(f"setup: {torch} comes from PyTorch's index", flush=True)
                return
    print(first.stderr, file=sys.stderr, end="")
    raise SystemExit(_NOWHERE.format(torch=torch))


if __name__ == "__main__":
    install(pinned_torch(Path(sys.argv[1])), sys.argv[2:])
