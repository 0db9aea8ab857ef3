"""`pte-vllm doctor` as a command: options, what it imports, and all that is broken at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pte_vllm.cli.main import main
from pte_vllm.compat.upstream import SourceTree
from pte_vllm.doctor.checks import Check

KEY = "sk-doctor-0123456789"


@pytest.fixture
def other_vllm(tmp_path: Path) -> Path:
    """The installed vLLM's sources, as links, with one change."""
    source = SourceTree.installed().root / "vllm"
    shutil.copytree(
        source,
        tmp_path / "vllm",
        copy_function=os.symlink,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    request = tmp_path / "vllm/v1/request.py"
    text = request.read_text()
    request.unlink()
    assert "self.num_preemptions = 0" in text
    request.write_text(text.replace("self.num_preemptions = 0", "self.num_preemptions = int()"))
    return tmp_path


def test_check_of_another_source(
    other_vllm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["doctor", "--vllm-source", str(other_vllm), "--diff"]) == 1
    out = capsys.readouterr().out
    assert "vllm.v1.request.Request.num_preemptions has changed; pte_vllm.engine.scheduler" in out
    assert "+self.num_preemptions = int()" in out.splitlines()
    assert main(["doctor", "--vllm-source", str(SourceTree.installed().root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "ok"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--vllm-source", "/nowhere"], "--vllm-source: /nowhere holds no vllm"),
        (["--pte-window", "-1"], "--pte-window must not be negative"),
    ],
)
def test_mistakes(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [["--diff"], ["--max-model-len", "9"], ["--vllm-source", "a", "M"]]
)
def test_mistakes_of_usage(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *args])
    assert stopped.value.code == 2
    assert "usage: pte-vllm doctor" in capsys.readouterr().err


@pytest.mark.parametrize("args", ["'--help'", "'--vllm-source', sys.argv[1]"])
def test_imports_neither_torch_nor_vllm(args: str) -> None:
    code = f"""
import sys
from pte_vllm.cli.main import main
try:
    status = main(["doctor", {args}])
except SystemExit as stopped:
    status = stopped.code
assert not {{"torch", "vllm", "transformers"}} & set(sys.modules), "imported"
sys.exit(status)
"""
    root = str(SourceTree.installed().root)
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _doctor(*args: str, **environ: str) -> tuple[int, dict[str, Check], str]:
    """The command in a process of its own: status, checks by name, all that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pte_vllm", "doctor", "--json", *args],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
    )
    sections = json.loads(done.stdout)["sections"]
    checks = [Check(**check) for section in sections for check in section["checks"]]
    return done.returncode, {check.name: check for check in checks}, done.stdout + done.stderr


@pytest.mark.slow
def test_the_whole_command() -> None:
    status, checks, _ = _doctor()
    assert status == 0
    assert {check.status for check in checks.values()} <= {"ok", "warning"}
    assert {"hooks", "CPU", "memory", "GPUs", "registration", "KV layout float32"} <= set(checks)


@pytest.mark.slow
def test_everything_broken_at_once(other_vllm: Path, tmp_path: Path) -> None:
    status, checks, printed = _doctor(
        *("--pte-spool", f"/proc/{KEY}"),
        PYTHONPATH=str(other_vllm),
        PATH=str(tmp_path),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        VLLM_PLUGINS="other",
        VLLM_USE_V2_MODEL_RUNNER="1",
        VLLM_API_KEY=KEY,
        PTE_ADMIN_KEY="admin-" + KEY,
    )
    assert status == 1
    assert KEY not in printed
    assert checks["VLLM_API_KEY"].value == checks["PTE_ADMIN_KEY"].value == "set"
    expected = {
        "hooks": ("broken", "1 of"),
        "changed": ("broken", "vllm.v1.request.Request.num_preemptions has changed"),
        "spool": ("broken", "cannot be written"),
        "compiled LoRA": ("warning", "no C++ compiler"),
        "VLLM_PLUGINS": ("warning", "leaves out pte"),
        "VLLM_USE_V2_MODEL_RUNNER": ("warning", "sets it to 0"),
    }
    for name, (how, text) in expected.items():
        assert checks[name].status == how and text in checks[name].value, checks[name]
        assert checks[name].fix
    assert checks["registration"].status == "ok"  # `pte-vllm serve` would start
    assert checks["KV layout bfloat16"].status == "ok", checks["KV layout bfloat16"]


@pytest.mark.slow
def test_without_vllm(tmp_path: Path) -> None:
    """As after `pip install pte-vllm` without an extra."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise ImportError('vLLM is not here')")
    status, checks, _ = _doctor(PYTHONPATH=str(tmp_path))
    assert status == 1
    assert checks["registration"].status == "broken"
    assert checks["CPU"].status == "ok"
