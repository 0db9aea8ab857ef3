"""Install a lock and keep what some extras need; run while an image is built, by its own Python.

    python docker/install.py requirements/cpu.lock cpu [demo ...]

A lock also pins what tests and the trainer need. A dependency of the extras that the lock leaves
out on purpose (torchvision on a CPU) stays left out. Standard library only; pip reads its settings
from the environment and from /etc/pip.conf. Where those have no torch for CPUs, it comes from
PyTorch's index (requirements/torch_wheel.py).
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ModuleNotFoundError:  # a new venv has pip's copy only
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ROOT / "pyproject.toml"
TORCH_WHEEL = ROOT / "requirements/torch_wheel.py"
KEPT = {"pip", "setuptools", "wheel"}  # they build the project's own wheel
NO_USE = {"cpu.lock": {"triton"}}
"""A gigabyte that xgrammar asks for and uses on GPUs only; vLLM turns it off on a CPU."""


def closure(texts: list[str]) -> set[str]:
    """Canonical names of what is installed and needed, directly or not, by these requirements."""
    needed: set[str] = set()
    wanted = [(Requirement(text), "") for text in texts]
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement, extra = wanted.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # left out of the lock
        needed.add(name)
        for own_extra in ("", *requirement.extras):
            if (name, own_extra) not in seen:
                seen.add((name, own_extra))
                wanted += [(Requirement(text), own_extra) for text in requires]
    return needed


def pip(*args: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    if status := subprocess.run(command).returncode:
        raise SystemExit(status)


def main(lock: str, *extras: str) -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    roots = list(project["dependencies"])
    for extra in extras:
        roots += project["optional-dependencies"][extra]
    options = ("-q", "--no-compile", "--no-cache-dir")
    command = [sys.executable, str(TORCH_WHEEL), lock, *options]
    if status := subprocess.run(command).returncode:
        raise SystemExit(status)
    pip("install", "--no-deps", *options, "-r", lock)
    installed = {canonicalize_name(d.metadata["Name"]) for d in distributions()}
    needed = closure(roots) - NO_USE.get(Path(lock).name, set())
    if missing := {canonicalize_name(Requirement(r).name) for r in roots} - needed:
        raise SystemExit(f"install.py: {lock} lacks {', '.join(sorted(missing))}")
    if surplus := sorted(installed - needed - KEPT):
        print(f"install.py: {len(needed)} packages stay, {len(surplus)} go", flush=True)
        pip("uninstall", "-q", "-y", *surplus)


if __name__ == "__main__":
    main(*sys.argv[1:])
