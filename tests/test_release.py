"""What is released: sdist and wheel, each installed where no checkout is, and used.

The big dependencies (torch, vLLM, ...) are not installed anew: a `.pth` file lends the clean
environments those of the one that runs the tests. `make release` builds into dist/ and keeps it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pte_vllm import __version__
from tests.harness.models import random_tokens
from tests.harness.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path.parent.name for path in ROOT.glob("pte_vllm/adapter/shipped/*/shipped.json"))
INSPECT = """
import importlib.metadata, json, sys
from importlib.resources import files
import pte_vllm, pte_vllm.server, pte_vllm.patches

found = {
    "file": pte_vllm.__file__,
    "data": {
        name: len(files(package).joinpath(name).read_bytes())
        for package, name in (
            ("pte_vllm.compat", "hooks.toml"),
            ("pte_vllm.kernels", "lora_cpu.cpp"),
            ("pte_vllm.server", "static/page.html"),
        )
    },
    "version": importlib.metadata.version("pte-vllm"),
    "installed_in": str(importlib.metadata.distribution("pte-vllm").locate_file("")),
    "plugins": {
        group: [point.load().__module__ for point in importlib.metadata.entry_points(group=group)
                if point.name == "pte"]
        for group in ("vllm.general_plugins", "vllm.endpoint_plugins")
    },
}
print("FOUND", json.dumps(found))
"""


def _run(*command: str | Path, cwd: Path) -> str:
    """Stdout of a command that must succeed, run outside the checkout."""
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VLLM_PLUGINS")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _venv(path: Path, *requirements: str | Path) -> Path:
    """A fresh environment; returns its folder of programs."""
    _run(sys.executable, "-m", "venv", path, cwd=path.parent)
    pip = (path / "bin/python", "-m", "pip", "--disable-pip-version-check")
    _run(*pip, "install", "-q", "--no-deps", *requirements, cwd=path)
    return path / "bin"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both archives, built as a release is: the wheel from the sdist."""
    scratch = tmp_path_factory.mktemp("build")
    kept = os.environ.get("PTE_DIST")
    out = (ROOT / kept) if kept else scratch / "dist"
    programs = _venv(scratch / "venv", "build", "packaging", "pyproject_hooks")
    _run(programs / "python", "-m", "build", "--outdir", out, ROOT, cwd=scratch)
    return out


def test_sdist_holds_what_git_tracks(dist: Path) -> None:
    with tarfile.open(dist / f"pte_vllm-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert tracked <= names, sorted(tracked - names)
    assert {
        "server/static/page.html",
        "patches/base.py",
        "docs/api.md",
        "tests/conftest.py",
    } <= names


def test_wheel_installs_one_package_and_its_data(dist: Path) -> None:
    with zipfile.ZipFile(dist / f"pte_vllm-{__version__}-py3-none-any.whl") as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {
        "pte_vllm",
        f"pte_vllm-{__version__}.dist-info",
    }
    sources = {str(p.relative_to(ROOT)) for p in ROOT.glob("pte_vllm/**/*.py")}
    for folder in ("server", "patches"):
        sources |= {f"pte_vllm/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    shipped = (ROOT / "pte_vllm/adapter/shipped").rglob("*")
    sources |= {str(path.relative_to(ROOT)) for path in shipped if path.is_file()}
    assert sources <= set(names), sorted(sources - set(names))
    assert {
        "pte_vllm/compat/hooks.toml",
        "pte_vllm/kernels/lora_cpu.cpp",
        *(f"pte_vllm/server/static/{p.name}" for p in (ROOT / "server/static").iterdir()),
        f"pte_vllm-{__version__}.dist-info/licenses/LICENSE",
    } <= set(names)


@pytest.fixture(scope="module", params=["whl", "tar.gz"])
def installed(
    request: pytest.FixtureRequest, dist: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Programs of a clean environment that one of the archives was installed into."""
    root = tmp_path_factory.mktemp("clean")
    (archive,) = dist.glob(f"pte_vllm-{__version__}*.{request.param}")
    programs = _venv(root / "venv", archive)
    site = next((root / "venv/lib").glob("python3*/site-packages"))
    # Only a path: the .pth files in it, one of which stands for the checkout, are not read.
    (site / "big_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def test_installed_archive_works(
    installed: Path,
    tmp_path: Path,
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
) -> None:
    environment = installed.parent
    # -P, as in an installed program: the folder that it runs in is no place for modules.
    out = _run(installed / "python", "-P", "-c", INSPECT, cwd=tmp_path)
    found = json.loads(next(x for x in out.splitlines() if x.startswith("FOUND "))[6:])
    assert Path(found["file"]).is_relative_to(environment)
    assert Path(found["installed_in"]).is_relative_to(environment)
    assert found["version"] == __version__
    assert all(size > 1000 for size in found["data"].values()), found["data"]
    assert found["plugins"] == {
        "vllm.general_plugins": ["pte_vllm.plugin"],
        "vllm.endpoint_plugins": ["pte_vllm.server.endpoint_plugin"],
    }

    command = installed / "pte-vllm"
    assert "doctor" in _run(command, "--help", cwd=tmp_path)
    assert _run(command, "--version", cwd=tmp_path).split() == ["pte-vllm", __version__]
    for name in SHIPPED:
        _run(command, "adapter", "fetch", name, cwd=tmp_path)
        _run(command, "adapter", "inspect", name, cwd=tmp_path)
    report = json.loads(_run(command, "doctor", "--json", cwd=tmp_path))
    checks = {c["name"]: c for section in report["sections"] for c in section["checks"]}
    assert report["status"] != "broken"
    assert checks["python"]["value"].endswith(str(environment).removeprefix(str(Path.home())))
    assert checks["hooks"]["status"] == checks["registration"]["status"] == "ok"

    model = tiny("llama")
    server = Server(model, {"thoughts": adapters(model, rank=8)}, log=tmp_path / "server.log")
    serve = server.command.index("serve")
    server.command = [str(command), *server.command[serve:]]
    with server:
        server.wait_ready()
        answer = server.complete("thoughts", random_tokens(40), 300, options={"pte_window": 64})
        assert len(answer.choices[0].token_ids) == 300
        info = server.get("/pte/v1/info")
        assert info["version"] == __version__
        finished = server.get("/pte/v1/requests")["finished"]
        assert finished[-1]["folds"] > 0 and finished[-1]["adapter"] == "thoughts"
