"""Kept tokens as an axis of `pte-vllm eval run`: flags, arms, and what a server is told."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pte_vllm.eval.arms import Arm
from pte_vllm.eval.flags import add_flags
from pte_vllm.eval.options import RunOptions, read_options
from pte_vllm.eval.results import Cell
from pte_vllm.eval.run import _arms
from pte_vllm.eval.serving import ServerFacts


def options(*arguments: str) -> RunOptions:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    where = () if "--url" in arguments else ("--model", "M")
    return read_options(parser.parse_args([*where, "--benchmark", "b", *arguments]))


def test_every_window_keeps() -> None:
    chosen = options("--window", "0,64,128", "--keep", "32,64,32", "--keep-score", "random")
    facts = ServerFacts(url="u", models=("base",), block_size=32, options=("pte_keep",))
    keys = [arm.key for arm in _arms(chosen, facts, {}, Console(quiet=True))]
    kept = [f"w{w}-keep{k}-random" for w in (64, 128) for k in (32, 64)]
    assert sorted(keys) == sorted(["full", "w64", "w128", *kept])
    older = ServerFacts(url="u", models=("base",), block_size=32, options=("pte_window",))
    with pytest.raises(ValueError, match="--keep: u does not know pte_keep"):
        _arms(chosen, older, {}, Console(quiet=True))
    with pytest.raises(ValueError, match="runs without PTE"):
        _arms(chosen, ServerFacts(url="u", models=("m",), pte=False), {}, Console(quiet=True))
    larger = ServerFacts(url="u", models=("base",), block_size=64, options=("pte_keep",))
    with pytest.raises(ValueError, match="--keep 32 must be a multiple of the block size, 64"):
        _arms(options("--window", "128", "--keep", "32"), larger, {}, Console(quiet=True))
    adapter = ("--url", "http://u", "--adapter", "base", "--adapter-keep", "32")
    with pytest.raises(ValueError, match="--adapter-keep 32 must be a multiple of the block size"):
        _arms(options("--window", "128", *adapter), larger, {}, Console(quiet=True))
    with pytest.raises(ValueError, match="u does not know pte_keep"):
        _arms(options("--window", "128", *adapter), older, {}, Console(quiet=True))


def test_a_server_of_ours_has_probes(tmp_path: Path) -> None:
    probes = tmp_path / "probes.safetensors"
    probes.write_bytes(b"")
    keep = ("--keep", "32,64", "--server-flags=--dtype float32")
    assert options(*keep).server_arguments() == ("--pte-keep", "64", "--dtype", "float32")
    given = options(*keep, "--probes", str(probes)).server_arguments()
    assert given == ("--pte-probes", str(probes), "--dtype", "float32")
    adapter = tmp_path / "a"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    beside = ("--adapter", f"a={adapter}", "--adapter-keep", "0,96")
    assert options(*beside).server_arguments() == ("--pte-keep", "96")
    assert options(*keep, *beside).server_arguments()[:2] == ("--pte-keep", "96")
    drawn = options(*keep, "--keep-score", "random").server_arguments()
    assert drawn == ("--dtype", "float32") == options(keep[2]).server_arguments()


def test_logs_say_what_was_kept() -> None:
    """A run that goes on finds its answers by these values; older logs have none of them."""
    kept = Arm(window_tokens=64, keep_tokens=32, keep_score="random")
    cell = Cell(benchmark="b", arm=kept, max_tokens=100, seed=0)
    assert Cell.from_dict(cell.to_dict()) == cell
    plain = Cell(benchmark="b", arm=Arm(window_tokens=64), max_tokens=100, seed=0).to_dict()
    older: dict[str, Any] = {k: v for k, v in plain["arm"].items() if not k.startswith("keep")}
    assert len(older) < len(plain["arm"])
    assert Cell.from_dict({**plain, "arm": older}) == Cell.from_dict(plain) != cell


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--keep-score", "random"], "--keep-score needs --keep"),
        (["--keep", "32", "--keep-score", "best"], "--keep-score must be among expected, random"),
        (["--keep", "0"], "--keep must be positive"),
        (["--adapter-keep", "32"], "--adapter-keep needs --adapter"),
        (["--probes", "p"], "--probes needs --keep"),
        (["--keep", "32", "--probes", "nowhere"], "--probes: nowhere does not exist"),
        (["--keep", "32", "--probes", "p", "--url", "http://a"], "for a server that is started"),
    ],
)
def test_mistakes(wrong: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(*wrong)
