"""What the hub refuses is told in the words of the command, and nothing half-made stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from pte_vllm.adapter.hashes import CONFIG_FILE, ENCODER_FILE, LORA_FILE
from pte_vllm.cli.main import main as command
from tests.adapter.hub_command import REPO, run
from tests.harness.hub import Hub


def _break_lora(path: Path) -> None:
    (path / LORA_FILE).write_bytes(b"no tensors")


def _drop_encoder(path: Path) -> None:
    (path / ENCODER_FILE).unlink()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [(_break_lora, "is not a readable safetensors"), (_drop_encoder, f"no {ENCODER_FILE}")],
)
def test_a_broken_adapter_is_not_pushed(
    hub: Hub,
    full_adapter: Path,
    harm: Callable[[Path], None],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(full_adapter)
    assert run(hub, "push-hub", full_adapter, REPO) == 2
    assert reason in capsys.readouterr().err and not hub.log


def test_a_broken_adapter_leaves_nothing(
    hub: Hub, full_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(hub, "push-hub", full_adapter, REPO)
    files = hub.files(REPO)
    hub.repos[REPO].commit("main", {**files, LORA_FILE: b"no tensors"}, "worse")
    before = sorted(tmp_path.iterdir())
    assert run(hub, "pull", REPO, tmp_path / "out") == 2
    assert f"holds no adapter that works: {LORA_FILE} is not a readable" in capsys.readouterr().err
    hub.repos[REPO].commit("main", files, "as it was")
    hub.change = lambda data: bytes(len(data))
    assert run(hub, "pull", REPO, tmp_path / "out") == 2
    assert "was damaged on its way" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config.json": b"{}", "model.safetensors": b""}, f"it has no {CONFIG_FILE}"),
        ({f"last/{CONFIG_FILE}": b"{}"}, f"last/{CONFIG_FILE} is there, but only"),
        ({CONFIG_FILE: b"{}", "adapter_model.bin": b""}, "adapter_model.bin is a pickle"),
        ({CONFIG_FILE: b'{"peft_type": "IA3"}', LORA_FILE: b""}, "r must be a positive number"),
    ],
)
def test_what_is_no_adapter(
    hub: Hub,
    files: dict[str, bytes],
    reason: str,
    full_adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(hub, "push-hub", full_adapter, REPO)
    hub.repos[REPO].commit("main", files, "something else")
    assert run(hub, "pull", REPO, tmp_path / "out") == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_gitignore_of_the_hub_is_told(
    hub: Hub, full_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(hub, "push-hub", full_adapter, REPO)
    kept = {n: d for n, d in hub.files(REPO).items() if n != ENCODER_FILE}
    hub.repos[REPO].commit("main", {**kept, ".gitignore": f"{ENCODER_FILE}\n".encode()}, "no")
    assert run(hub, "push-hub", full_adapter, REPO) == 2
    assert f"{ENCODER_FILE} did not arrive" in capsys.readouterr().err


def test_a_card_that_the_hub_cannot_read(
    hub: Hub, full_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (full_adapter / "README.md").write_text("---\ntags: [a\n---\n")
    assert run(hub, "push-hub", full_adapter, REPO) == 2
    assert "Invalid metadata in README.md" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "token", "reason"),
    [
        (("push-hub", "RUN", REPO), None, "needs a token that may write: log in with"),
        (("push-hub", "RUN", REPO), "STRANGER", "does not know this token (401)"),
        (("push-hub", "RUN", REPO), "READER", "may not do that with someone/thoughts (403)"),
        (("push-hub", "RUN", "other/thoughts"), "WRITER", "check the owner in REPO_ID"),
        (("push-hub", "RUN", REPO), "NOWHERE", "the environment variable NOWHERE is not set"),
        (("push-hub", "RUN", REPO), "hf_secret", "takes the name of an environment variable"),
        (("push-hub", "RUN", REPO, "--revision", "a" * 40), "WRITER", "--revision: a push goes to"),
        (("push-hub", "RUN", "thoughts"), "WRITER", "REPO_ID must be OWNER/NAME"),
        (("push-hub", "RUN", "a/b--c"), "WRITER", "REPO_ID: Cannot have -- or .."),
        (("push-hub", "NOTHING", REPO), "WRITER", "DIR: there is no directory"),
        (("pull", "someone/nothing", "OUT"), None, "REPO_ID: "),
        (("pull", "someone/nothing", "OUT"), "READER", "this token does not open it"),
        (
            ("pull", "someone/there", "OUT", "--revision", "v2"),
            None,
            "--revision: someone/there has",
        ),
        (("pull", "./someone", "OUT"), None, "REPO_ID must be OWNER/NAME"),
    ],
)
def test_mistakes(
    hub: Hub,
    full_adapter: Path,
    words: tuple[str, ...],
    token: str | None,
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(hub, "push-hub", full_adapter, "someone/there")
    capsys.readouterr()
    paths = {"RUN": full_adapter, "OUT": tmp_path / "out", "NOTHING": tmp_path / "nothing"}
    assert run(hub, *(paths.get(word, word) for word in words), token=token) == 2
    told = capsys.readouterr()
    assert reason in told.err and not (tmp_path / "out").exists()
    assert "hf_" not in told.out + told.err


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("http://127.0.0.1:9", "http://127.0.0.1:9 cannot be reached"),
        ("localhost:8000", "--endpoint must be a URL"),
        ("http://me:secret@localhost", "--endpoint: no user or password"),
    ],
)
def test_an_endpoint_that_is_none(
    hub: Hub, endpoint: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["adapter", "pull", REPO, str(tmp_path / "out"), "--endpoint", endpoint]) == 2
    told = capsys.readouterr().err
    assert reason in told and "secret" not in told


def test_a_page_is_no_hub(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["adapter", "pull", REPO, str(tmp_path / "out"), "--endpoint", f"{hub.url}/page"]
    assert command(words) == 2
    assert "/page does not answer as a hub (JSON" in capsys.readouterr().err
    assert command([*words[:-1], f"{hub.url}/elsewhere"]) == 2
    assert "/elsewhere does not answer as a hub (404)" in capsys.readouterr().err


def test_a_hub_without_xet(
    hub: Hub,
    full_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert run(hub, "push-hub", full_adapter, REPO) == 2
    assert "with HF_HUB_DISABLE_XET=1 in the environment" in capsys.readouterr().err


def test_offline(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(hub, "pull", REPO, tmp_path / "out") == 2
    assert "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set" in capsys.readouterr().err
    assert not hub.log


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str
)
def test_an_interrupted_pull_leaves_nothing(
    hub: Hub, full_adapter: Path, number: signal.Signals, status: int, tmp_path: Path
) -> None:
    run(hub, "push-hub", full_adapter, REPO)
    folder = tmp_path / "adapters"
    folder.mkdir()
    hub.go_on.clear()
    words = ["adapter", "pull", REPO, str(folder / "out"), "--endpoint", hub.url]
    environ = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    puller = subprocess.Popen(
        [sys.executable, "-m", "pte_vllm", *words],
        env={**environ, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")},
        stderr=subprocess.PIPE,
        # What runs in the background of a shell ignores Ctrl-C, and would tell its children to.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert hub.stalled.wait(120)
    assert [path.name[:5] for path in folder.iterdir()] == [".out-"]
    puller.send_signal(number)
    assert puller.wait(60) == status
    assert list(folder.iterdir()) == []
