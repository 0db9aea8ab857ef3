"""Adapters that ship: each directory is complete, and `pte-vllm adapter fetch` copies it out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from pte_vllm.adapter import shipping
from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.hashes import CONFIG_FILE, ENCODER_FILE, LORA_FILE, PROBES_FILE
from pte_vllm.adapter.serve_line import ServePlan, needed_rank, serve_line
from pte_vllm.cli.main import main
from tests.harness.shipped import lacks, ship

TOO_MUCH = "o" * shipping.MAX_BYTES
SHIPPED = sorted(path for path in shipping.SHIPPED.iterdir() if path.is_dir())


@pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.name)
def test_what_ships_is_complete(directory: Path) -> None:
    assert lacks(directory) == []


@pytest.fixture
def shelf(
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder like `shipped/` with the adapter `facts`, where the commands look."""
    adapter = adapters(tiny("llama"), rule="sum", global_tokens=12)
    ship(adapter, tmp_path / "shelf" / "facts", tiny("llama"))
    (tmp_path / "shelf" / "README.md").write_text("as in the package")
    monkeypatch.setattr(shipping, "SHIPPED", tmp_path / "shelf")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shelf"


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_complete_directory_lacks_nothing(shelf: Path) -> None:
    assert lacks(shelf / "facts") == []


@pytest.mark.parametrize(
    ("file", "old", "new", "lack"),
    [
        ("optimizer.pt", "", "o", "optimizer.pt does not belong there"),
        ("pte_probes.safetensors", "", TOO_MUCH, "and 8,000,000 is the most"),
        ("README.md", "license: apache-2.0\n", "", "the card has no license"),
        ("README.md", "library_name: peft", "library_name: other", "library_name is not peft"),
        ("README.md", "## Data", "## Dates", "the card has no section Data"),
        ("README.md", "pte-vllm train experiment recall", "a table", "Figures names no command"),
        ("README.md", "32 kept, blocks of 32", "some kept", "does not say 32"),
        ("README.md", "Facts.\n", "/home/me/facts.txt\n", "a path of one machine: /home/me/facts"),
        ("shipped.json", '"sha256": "', '"sha256": "0', "sha256 must be 64 hex digits"),
        ("shipped.json", '"window_tokens": 64', '"window_tokens": 60', "not a multiple of"),
        ("shipped.json", '"hub": "someone/tiny"', '"hub": "me/tiny"', "base_model is not me/tiny"),
        ("shipped.json", '"block_size": 32', '"block_size": 16', "a CPU serves multiples of 32"),
        (LORA_FILE, "", "no tensors", "not a readable safetensors"),
    ],
)
def test_a_directory_that_lacks_something(
    shelf: Path, file: str, old: str, new: str, lack: str
) -> None:
    path = shelf / "facts" / file
    if old:
        _edit(path, old, new)
    else:
        path.write_text(new)
    try:
        found = lacks(shelf / "facts")
    except ValueError as error:
        found = [str(error)]
    assert any(lack in line for line in found), found


def test_another_hash_in_the_card(shelf: Path) -> None:
    about = json.loads((shelf / "facts" / "shipped.json").read_text())
    about["base_model"]["sha256"] = "0" * 64
    (shelf / "facts" / "shipped.json").write_text(json.dumps(about))
    assert lacks(shelf / "facts") == [
        "the card's hash of the base model is not that in shipped.json"
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"about": "two\nlines"}, "about must be one line"),
        ({"plan": {"window_tokens": 64}}, "the plan lacks block_size"),
        ({"plan": {"window_tokens": 64, "block_size": 16, "keep": 1}}, "unknown field keep"),
        ({"plan": {"window_tokens": "64", "block_size": 16}}, "must be a whole number, got '64'"),
        ({"plan": {"window_tokens": 64, "block_size": 16, "evict_ratio": 2}}, "must lie in (0, 1)"),
        ({"base_model": {"hub": "someone/tiny"}}, "the field sha256 is missing"),
        ({"base_model": {"hub": "tiny", "sha256": "0" * 64}}, 'hub must be "owner/name"'),
        ({"extra": 1}, "there is an unknown field extra"),
    ],
)
def test_a_broken_shipped_json(shelf: Path, change: dict[str, Any], reason: str) -> None:
    file = shelf / "facts" / "shipped.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError) as error:
        shipping.shipped()
    assert reason in str(error.value) and str(file) in str(error.value)


# -- pte-vllm adapter fetch ---------------------------------------------------------------------


def test_fetch(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "fetch", "facts"]) == 0
    told = capsys.readouterr().out
    assert Adapter.load("facts").layers == [0, 1, 2]
    for file in (shelf / "facts").iterdir():
        assert Path("facts", file.name).read_bytes() == file.read_bytes()
    assert (
        "    pte-vllm serve someone/tiny --pte-window 64 --pte-keep 32 --block-size 32 \\\n"
        "        --enable-lora --max-lora-rank 16 --lora-modules facts=facts\n" in told
    )
    assert main(["adapter", "fetch", "facts"]) == 0
    assert "facts holds it already" in capsys.readouterr().out
    Path("facts", ENCODER_FILE).write_bytes(b"mine")
    assert main(["adapter", "fetch", "facts"]) == 2
    assert f"holds another adapter already ({ENCODER_FILE}" in capsys.readouterr().err
    assert Path("facts", ENCODER_FILE).read_bytes() == b"mine"
    assert sorted(path.name for path in Path().iterdir()) == ["facts", "shelf"]


def test_fetch_says_how_to_get_a_base_model_of_the_catalog(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shelf / "facts" / "shipped.json"
    about = json.loads(file.read_text())
    about["base_model"] |= {"catalog": "smollm2", "source": "packages"}
    file.write_text(json.dumps(about))
    assert main(["adapter", "fetch", "facts", "some where/out"]) == 0
    told = capsys.readouterr().out
    assert "    pte-vllm model fetch smollm2 models/smollm2 --source packages\n" in told
    assert "pte-vllm serve models/smollm2 " in told and "'facts=some where/out'" in told


def test_list(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "fetch", "--list"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "facts" in words and "someone/tiny" in words and "window 64, keep 32" in words
    shutil.rmtree(shelf / "facts")
    assert main(["adapter", "fetch", "--list"]) == 0
    assert "this version ships no adapters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["fact"], "no adapter fact ships; did you mean facts?"),
        ([], "NAME is missing"),
        (["facts", "shelf"], "shelf holds other files"),
        (["facts", "shelf/README.md"], "shelf/README.md is a file"),
        (["facts", "shelf/README.md/out"], "cannot be written"),
        (["facts", "--model", "./nowhere"], "--model: the model directory ./nowhere does not"),
    ],
)
def test_mistakes(
    shelf: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "fetch", *words]) == 2
    assert reason in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["shelf"]


def test_a_base_model_at_hand(
    shelf: Path, tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama")
    assert main(["adapter", "fetch", "facts", "--model", str(model)]) == 0
    told = capsys.readouterr()
    assert "is the base model that facts was trained with" in told.out and not told.err
    assert f"pte-vllm serve {model} --pte-window" in told.out
    # The same sizes with other numbers, as a copy from another source would have.
    other = shutil.copytree(model, "other")
    network = AutoModelForCausalLM.from_pretrained(model)
    network.model.embed_tokens.weight.data += 0.01
    network.save_pretrained(other)
    assert main(["adapter", "fetch", "facts", "--model", str(other)]) == 0
    assert "is not the copy of someone/tiny that facts was trained with" in capsys.readouterr().err
    # Other sizes.
    assert main(["adapter", "fetch", "facts", "elsewhere", "--model", str(tiny("qwen2"))]) == 2
    assert "--model: facts does not fit" in capsys.readouterr().err
    assert not Path("elsewhere").exists()


def test_an_interruption_leaves_nothing(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(source: Path, target: Path) -> None:
        target.write_bytes(b"a part")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", copy)
    assert main(["adapter", "fetch", "facts"]) == 130
    assert [path.name for path in Path().iterdir()] == ["shelf"]


# -- the command that serves it -----------------------------------------------------------------


def test_serve_line_has_what_is_not_the_default() -> None:
    plan = ServePlan(window_tokens=64, block_size=16, evict_ratio=0.5)
    line = serve_line("a model", plan, rank=33, name="a", path="b")
    assert line == (
        "pte-vllm serve 'a model' --pte-window 64 --block-size 16 --pte-evict-ratio 0.5 \\\n"
        "    --enable-lora --max-lora-rank 64 --lora-modules a=b"
    )


def test_needed_rank(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text('{"r": 8, "pte": {"global_tokens": 12}}')
    assert needed_rank(tmp_path) == 12
    (tmp_path / CONFIG_FILE).write_text("{}")
    with pytest.raises(ValueError, match="does not say the rank"):
        needed_rank(tmp_path)


def test_probes_of_an_adapter_serve_the_base_model_too(tmp_path: Path) -> None:
    """Else the server would sample some before its first start."""
    plan = ServePlan(window_tokens=64, block_size=32, keep_tokens=32)
    path = str(tmp_path)
    assert "--pte-probes" not in serve_line("m", plan, rank=8, name="a", path=path)
    (tmp_path / PROBES_FILE).touch()
    line = serve_line("m", plan, rank=8, name="a", path=path)
    assert line.endswith(f"--lora-modules a={path} --pte-probes {tmp_path / PROBES_FILE}")
    none_kept = replace(plan, keep_tokens=0)
    assert "--pte-probes" not in serve_line("m", none_kept, rank=8, name="a", path=path)
