"""docker/entrypoint.sh, run as it is; docker/verify.sh runs it in the images."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pte_vllm import __version__
from pte_vllm.launch import free_port
from tests.docker.files import ROOT

ENTRYPOINT = ROOT / "docker/entrypoint.sh"
SHOWS_WHAT_IT_GETS = """#!/bin/bash
printf 'pid %s\\n' $$
printf 'argument %s\\n' "$@"
env | grep -E '^(VLLM_API_KEY|PTE_ADMIN_KEY|HF_TOKEN)='
exit 7
"""


class Image:
    """What a container has: volumes, and a `pte-vllm`, here one that shows what it gets."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("cache", "spool", "runs", "bin", "model"):
            (root / name).mkdir()
        (root / "model/config.json").write_text("{}")
        (root / "bin/pte-vllm").write_text(SHOWS_WHAT_IT_GETS)
        (root / "bin/pte-vllm").chmod(0o755)
        self.env = {
            "PATH": f"{root / 'bin'}:{os.defpath}",
            "XDG_CACHE_HOME": str(root / "cache"),
            "PTE_SPOOL": str(root / "spool"),
            "PTE_RUNS": str(root / "runs"),
        }

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(ENTRYPOINT), *args],
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *args: str, **env: str) -> tuple[int, str, int]:
        """Status, output, and the id of the process that was started."""
        process = self.start(*args, **env)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output, process.pid

    def secret(self, name: str, text: str) -> str:
        (self.root / name).write_text(text)
        return str(self.root / name)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path)


def test_serve(image: Image) -> None:
    model, admin = str(image.root / "model"), image.secret("admin", "adm\n")
    status, output, pid = image.run(
        "serve",
        model,
        "--pte-window=64",
        VLLM_API_KEY_FILE=image.secret("key", " s3cret\n"),
        PTE_ADMIN_KEY_FILE=admin,
    )
    assert status == 7, output
    assert output.splitlines() == [
        f"pid {pid}",  # in the entry point's place, so that signals reach it
        *(f"argument {word}" for word in ("serve", model, "--pte-window=64")),
        *(f"argument {word}" for word in ("--pte-spool", image.env["PTE_SPOOL"])),
        *(f"argument {word}" for word in ("--pte-admin-key-file", admin)),
        "VLLM_API_KEY=s3cret",
    ]


def test_flags_win_over_the_environment(image: Image) -> None:
    status, output, _ = image.run(
        "serve",
        "--pte-spool=/elsewhere",
        "--pte-admin-key",
        "k",
        PTE_MODEL="some/model",
        PTE_SPOOL="/proc/no/such",
        PTE_ADMIN_KEY_FILE=image.secret("admin", "adm"),
    )
    assert status == 7
    words = [line.removeprefix("argument ") for line in output.splitlines()[1:]]
    assert words == ["serve", "some/model", "--pte-spool=/elsewhere", "--pte-admin-key", "k"]


def test_train(image: Image) -> None:
    status, output, pid = image.run(
        *("train", "grpo", "/config/run.toml"),
        VLLM_API_KEY_FILE=image.secret("key", "a\n"),
        PTE_ADMIN_KEY_FILE=image.secret("admin", "b\n"),
        HF_TOKEN_FILE=image.secret("token", "c\n"),
    )
    assert status == 7 and output.startswith(f"pid {pid}\n")
    assert {"VLLM_API_KEY=a", "PTE_ADMIN_KEY=b", "HF_TOKEN=c"} <= set(output.splitlines())


def test_errors(image: Image) -> None:
    model, empty = str(image.root / "model"), image.secret("empty", " \n")
    (image.root / "folder").mkdir()
    cases = [
        (["serve"], {}, "no model: set PTE_MODEL"),
        ([], {}, "no model: set PTE_MODEL"),
        (["serve", "/models/none"], {}, "model /models/none does not exist in the container"),
        (["serve", str(image.root / "folder")], {}, "holds no config.json"),
        (["serve", model], {"VLLM_API_KEY_FILE": "/run/none"}, "VLLM_API_KEY_FILE: there is no"),
        (["serve", model], {"VLLM_API_KEY_FILE": "/proc"}, "/proc cannot be read by user"),
        (["serve", model], {"PTE_ADMIN_KEY_FILE": empty}, f"PTE_ADMIN_KEY_FILE: {empty} is empty"),
        (
            ["serve", model],
            {"VLLM_API_KEY": "a", "VLLM_API_KEY_FILE": image.secret("key", "b")},
            "VLLM_API_KEY and VLLM_API_KEY_FILE are both set",
        ),
        (["serve", model], {"PTE_SPOOL": "/proc/none"}, "PTE_SPOOL: /proc/none, for adapters"),
        (["serve", model], {"XDG_CACHE_HOME": "/proc/none"}, "XDG_CACHE_HOME: /proc/none, for"),
        (["train", "grpo"], {"PTE_RUNS": "/proc/none"}, "PTE_RUNS: /proc/none, for checkpoints"),
        (["train", "--help"], {"HF_TOKEN_FILE": "/run/none"}, "HF_TOKEN_FILE: there is no"),
    ]
    for args, env, expected in cases:
        status, output, _ = image.run(*args, **env)
        assert status == 2 and expected in output, (args, env, status, output)
        assert output.startswith("pte-vllm: error: ") and output.count("\n") == 1, output


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_cache_that_cannot_hold_code(image: Image) -> None:
    mount = (
        f"mount -t tmpfs -o noexec tmpfs {image.env['XDG_CACHE_HOME']} && exec {ENTRYPOINT} serve m"
    )
    command = ["unshare", "--mount", "bash", "-c", mount]
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    done = subprocess.run(command, env=image.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "is mounted noexec" in done.stderr, done


def test_other_commands_are_those_of_the_package(image: Image) -> None:
    path = f"{Path(sys.executable).parent}:{os.defpath}"
    assert image.run("--version", PATH=path)[:2] == (0, f"pte-vllm {__version__}\n")
    status, output, _ = image.run("serve", "--help", PATH=path, PTE_SPOOL="/proc/none")
    assert status == 0 and "--pte-window" in output
    status, output, _ = image.run("train", "--help", PATH=path, PTE_RUNS="/proc/none")
    assert status == 0 and "usage: pte-vllm train" in output


class _Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        assert self.path == "/health"
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_health(image: Image) -> None:
    port = str(free_port())
    assert image.run("health", port)[:2] == (
        1,
        f"nothing listens on port {port} of the container\n",
    )
    with http.server.HTTPServer(("127.0.0.1", int(port)), _Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert image.run("health", port)[:2] == (0, "")
        _Health.status = 503
        assert image.run("health", port)[:2] == (1, "/health answers 503\n")
        server.shutdown()
