"""requirements/torch_wheel.py: pip's own settings first, then uv; what is said if neither helps.

No index is asked: pip may look into one folder only, where the test puts a stand-in for uv.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "requirements/torch_wheel.py"
TORCH = "torch==9.9.9+cpu"  # never installed, so pip has to look for it
UV = """#!/bin/sh
printf '%s\\n' "$@" > "$UV_WAS_TOLD"
"""


def _wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **files,
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = 0o100755 << 16  # pip keeps the right to run it
            archive.writestr(entry, text)


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """The only place where pip may look, empty yet."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    return folder


def _run(wheels: Path, *options: str, torch: str = TORCH) -> subprocess.CompletedProcess[str]:
    lock = wheels.parent / "a.lock"
    lock.write_text(f"rich==14\n{torch}\n")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    environ |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "UV_WAS_TOLD": str(wheels.parent / "told"),
    }
    command = [sys.executable, SCRIPT, lock, "-q", *options]
    return subprocess.run(command, env=environ, capture_output=True, text=True)


def test_where_pip_looks_comes_first(wheels: Path) -> None:
    _wheel(wheels, "torch", "9.9.9+cpu", {})
    _wheel(wheels, "uv", "9", {"uv-9.data/scripts/uv": UV})
    done = _run(wheels, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "where pip's own settings look" in done.stdout
    assert not (wheels.parent / "told").exists()


def test_uv_comes_second(wheels: Path) -> None:
    _wheel(wheels, "uv", "9", {"uv-9.data/scripts/uv": UV})
    done = _run(wheels, "--no-compile", "--no-cache-dir")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("comes from PyTorch's index")
    assert (wheels.parent / "told").read_text().split() == [
        *("pip", "install", "--python", sys.executable, "--torch-backend", "cpu"),
        *("--no-deps", "-q", "--no-compile", "--no-cache-dir", TORCH),
    ]


def test_neither_says_what_to_do(wheels: Path) -> None:
    done = _run(wheels)
    assert done.returncode == 1
    assert "No matching distribution found for torch" in done.stderr
    for way in ("PIP_EXTRA_INDEX_URL=", "PIP_FIND_LINKS=", "PyTorch's index"):
        assert way in done.stderr, way


def test_builds_for_gpus_are_pips_alone(wheels: Path) -> None:
    _wheel(wheels, "uv", "9", {"uv-9.data/scripts/uv": UV})
    done = _run(wheels, torch="torch===9.9.9")
    assert done.returncode == 1 and "pip cannot install torch===9.9.9" in done.stderr
    assert not (wheels.parent / "told").exists()
