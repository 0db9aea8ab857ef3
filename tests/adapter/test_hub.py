"""Adapters on a hub: what is pushed comes back, and nothing else travels.

huggingface_hub itself talks to a hub on this machine (tests/harness/hub.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, snapshot_download

from pte_vllm.adapter.hashes import CONFIG_FILE, FILES, PROBES_FILE
from tests.adapter.hub_command import REPO, hash_of, run
from tests.harness.hub import Hub
from tests.harness.shipped import ship


def test_what_is_pushed_comes_back(
    hub: Hub, full_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(hub, "push-hub", full_adapter, REPO) == 0
    assert set(hub.files(REPO)) == {*FILES, "README.md", ".gitattributes"}
    assert run(hub, "pull", REPO, tmp_path / "in" / "out", token=None) == 0
    out = tmp_path / "in" / "out"
    assert {path.name for path in out.iterdir()} == {*FILES, "README.md"}
    assert hash_of(out) == hash_of(full_adapter)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert f"--max-lora-rank 8 --lora-modules thoughts={out}" in capsys.readouterr().out
    assert not hub.leaked  # tokens stay with the hub


def test_the_card_that_is_made_says_how_to_serve(hub: Hub, full_adapter: Path) -> None:
    run(hub, "push-hub", full_adapter, REPO)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.library_name == "peft" and "pte-vllm" in card.data.tags
    assert card.data.base_model is None  # the adapter names a directory
    assert f"pte-vllm adapter pull {REPO} thoughts" in card.text
    assert (
        "pte-vllm serve MODEL --pte-window 1024" in card.text and hash_of(full_adapter) in card.text
    )


def test_an_adapter_that_knows_its_plan(
    hub: Hub,
    full_adapter: Path,
    tiny: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = ship(full_adapter, tmp_path / "shelf" / "facts", tiny("llama"))
    (path / "README.md").unlink()
    assert run(hub, "push-hub", path, REPO) == 0
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.base_model == "someone/tiny"
    line = "pte-vllm serve someone/tiny --pte-window 64 --pte-keep 32 --block-size 32"
    assert line in card.text
    assert run(hub, "pull", REPO, tmp_path / "out") == 0
    assert line in capsys.readouterr().out
    assert (tmp_path / "out" / "shipped.json").read_bytes() == (path / "shipped.json").read_bytes()


def test_a_second_push(
    hub: Hub, full_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(hub, "push-hub", full_adapter, REPO, "--message", "The first one")
    first = hub.repos[REPO].branches["main"]
    assert run(hub, "push-hub", full_adapter, REPO) == 0
    assert hub.repos[REPO].branches["main"] == first
    assert "has the same files already" in capsys.readouterr().out
    hub.repos[REPO].commit("main", {**hub.files(REPO), "README.md": b"mine", "notes": b"1"}, "me")
    (full_adapter / PROBES_FILE).unlink()
    assert run(hub, "push-hub", full_adapter, REPO) == 0
    files = hub.files(REPO)
    assert PROBES_FILE not in files and files["README.md"] == b"mine" and files["notes"] == b"1"
    assert f"as {full_adapter} has none: {PROBES_FILE}" in capsys.readouterr().out
    assert hub.repos[REPO].messages[1] == "The first one"
    # An earlier commit still gives the earlier adapter.
    assert run(hub, "pull", REPO, tmp_path / "old", "--revision", first) == 0
    assert (tmp_path / "old" / PROBES_FILE).exists()


def test_a_branch(hub: Hub, full_adapter: Path, tmp_path: Path) -> None:
    run(hub, "push-hub", full_adapter, REPO, "--revision", "step/800")
    assert CONFIG_FILE not in hub.files(REPO) and CONFIG_FILE in hub.files(REPO, "step/800")
    assert run(hub, "pull", REPO, tmp_path / "out", "--revision", "step/800") == 0
    assert hash_of(tmp_path / "out") == hash_of(full_adapter)


def test_private_stays_private(
    hub: Hub, full_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(hub, "push-hub", full_adapter, REPO, "--private") == 0
    assert hub.repos[REPO].private
    assert run(hub, "pull", REPO, tmp_path / "out", token=None) == 2
    assert "it is private, and then log in" in capsys.readouterr().err
    assert run(hub, "pull", REPO, tmp_path / "out", token="READER") == 0
    run(hub, "push-hub", full_adapter, "someone/open")
    assert run(hub, "push-hub", full_adapter, "someone/open", "--private") == 2
    assert "--private: someone/open is there and open to all" in capsys.readouterr().err


def test_a_plain_lora_of_peft(
    hub: Hub,
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = adapters(tiny("llama"), plain=True)
    run(hub, "push-hub", path, REPO)
    assert run(hub, "pull", REPO, tmp_path / "out") == 0
    assert hash_of(tmp_path / "out") == hash_of(path)
    assert "plain LoRA, rank 8" in capsys.readouterr().out


def test_only_the_adapter_is_downloaded(hub: Hub, full_adapter: Path, tmp_path: Path) -> None:
    run(hub, "push-hub", full_adapter, REPO)
    others = {f"checkpoint-{i}/optimizer.bin": b"o" for i in range(50)}
    hub.repos[REPO].commit("main", {**hub.files(REPO), "model.safetensors": b"m", **others}, "more")
    hub.log.clear()
    assert run(hub, "pull", REPO, tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, "README.md"}
    assert not [line for line in hub.log if "optimizer" in line or "/model.safetensors" in line]
    # The whole repository, as others would fetch it.
    everything = snapshot_download(REPO, endpoint=hub.url, local_dir=tmp_path / "all", token=False)
    assert hash_of(Path(everything)) == hash_of(full_adapter)


def test_out_that_is_taken(
    hub: Hub, full_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(hub, "push-hub", full_adapter, REPO)
    assert run(hub, "pull", REPO, tmp_path / "out") == run(hub, "pull", REPO, tmp_path / "out")
    assert "holds it already" in capsys.readouterr().out
    (tmp_path / "out" / PROBES_FILE).unlink()
    assert run(hub, "pull", REPO, tmp_path / "out") == 2
    assert f"holds another adapter already ({PROBES_FILE}" in capsys.readouterr().err
    assert run(hub, "pull", REPO, tmp_path) == 2
    assert f"OUT: {tmp_path} holds other files" in capsys.readouterr().err


def test_a_base_model_that_others_cannot_find_is_told(
    hub: Hub, full_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(hub, "push-hub", full_adapter, REPO)
    assert "names no base model that others can find (test)" in capsys.readouterr().err
    config = json.loads((full_adapter / CONFIG_FILE).read_text())
    (full_adapter / CONFIG_FILE).write_text(
        json.dumps({**config, "base_model_name_or_path": "someone/tiny"})
    )
    run(hub, "push-hub", full_adapter, "someone/better")
    assert "warning" not in capsys.readouterr().err
    assert ModelCard(hub.files("someone/better")["README.md"].decode()).data.base_model
