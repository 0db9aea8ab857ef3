"""Where the files of the deployment are, and what docker-compose makes of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".cache/docker-tools/bin"


def compose(*overrides: str, **settings: str) -> dict[str, Any]:
    """The resolved configuration; `overrides` are files beside compose.yaml."""
    files = [word for name in ("compose.yaml", *overrides) for word in ("-f", f"docker/{name}")]
    done = subprocess.run(
        [TOOLS / "docker-compose", *files, "--profile", "train", "config", "--format", "json"],
        cwd=ROOT,
        env={"PATH": os.defpath, "PTE_MODEL": "/models/model", **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def instructions(dockerfile: str, word: str) -> list[str]:
    """What follows an instruction, each time it stands there; lines joined."""
    text = (ROOT / dockerfile).read_text().replace("\\\n", " ")
    return re.findall(rf"^{word}\s+(.*)$", text, re.MULTILINE)


def environment(dockerfile: str) -> dict[str, str]:
    """Variables that the image sets."""
    return dict(pair.split("=", 1) for pair in " ".join(instructions(dockerfile, "ENV")).split())


def seconds(text: str) -> int:
    """`1m30s` → 90."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", text))
