"""Both images, built and run as docker/compose.yaml says: docker/verify.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pte_vllm.launch import log_tail
from tests.docker.files import ROOT

MISSING = [t for t in ("buildah", "debootstrap", "runc") if shutil.which(t) is None]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.geteuid() != 0 or bool(MISSING), reason=f"needs root and {MISSING}")
def test_images(smollm2: Path, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        command = [ROOT / "docker/verify.sh", smollm2]
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    said = log_tail(tmp_path / "log", 60)
    print(said)
    assert done.returncode == 0 and "verify: all passed" in said, said
