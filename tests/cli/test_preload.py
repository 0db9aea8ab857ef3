"""What `pte-vllm serve` preloads: what is found, once, and never instead of what the user chose."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pte_vllm import preload
from pte_vllm.cli.main import main


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A file for each library, in place of the machine's."""
    files = {}
    for name, library in list(preload.LIBRARIES.items()):
        file = tmp_path / f"lib{'iomp5' if name == 'iomp' else 'tcmalloc_minimal'}.so.4"
        file.touch()
        files[name] = str(file)
        there = replace(library, patterns=(f"{tmp_path}/absent*", f"{file}*"))
        monkeypatch.setitem(preload.LIBRARIES, name, there)
    return files


def test_adds_what_is_found(found: dict[str, str]) -> None:
    environ = {preload.VARIABLE: "/lib/mine.so"}
    lines = preload.preload(environ, ["tcmalloc", "iomp"])
    assert environ[preload.VARIABLE] == f"{found['iomp']}:{found['tcmalloc']}:/lib/mine.so"
    assert [line.split(":")[0] for line in lines] == ["tcmalloc", "iomp"]
    before = dict(environ)
    assert all("already" in line for line in preload.preload(environ, ["tcmalloc", "iomp"]))
    assert environ == before


def test_leaves_a_choice_alone_and_says_what_is_missing(found: dict[str, str]) -> None:
    environ = {preload.VARIABLE: "/usr/lib/libjemalloc.so.2"}
    preload.preload(environ)
    assert environ == {preload.VARIABLE: "/usr/lib/libjemalloc.so.2"}
    Path(found["tcmalloc"]).unlink()
    environ = {}
    (line,) = preload.preload(environ)
    assert "not found" in line and "apt install" in line and not environ


def test_a_process_gets_it() -> None:
    environ: dict[str, str] = {}
    if "preloads" not in "".join(preload.preload(environ)):
        pytest.skip("needs tcmalloc: apt install libtcmalloc-minimal4")
    code = "print('tcmalloc' in open('/proc/self/maps').read())"
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True
    )
    assert shown.stdout.strip() == "True"


def test_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "model", "--pte-preload", "jemalloc"])
    assert "jemalloc" in capsys.readouterr().err
