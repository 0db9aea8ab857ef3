"""Fidelity with kept tokens: each arm is a replay of its plan, and holds what the report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.probes import Probes
from pte_vllm.cli.eval import main as eval_command
from pte_vllm.eval.fidelity_arms import build_arms
from pte_vllm.eval.fidelity_replay import measure
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import log_probs
from tests.eval.test_fidelity import BLOCK, EVICTION, example, thoughts

Tiny = Callable[[str], Path]


def probes(layers: int = 3) -> Probes:
    generator = torch.Generator().manual_seed(3)
    return Probes.of(torch.randn(layers, 2, 8, 32, generator=generator), "none")


def test_arms_are_replays_of_their_plans(tiny: Tiny) -> None:
    """The teacher's cache is taken over up to the first fold, and answers are read side by side."""
    chosen = [example(7, 150), example(41, 163), example(20, 121)]
    arms = build_arms(
        [32, 64],
        {},
        eviction=EVICTION,
        bytes_per_token=1,
        keep=[BLOCK, 2048],
        keep_scores=["expected", "random"],
    )
    names = [arm.name for arm in arms]
    of_first = ["window 32 keep 16", "window 32 keep 16 random"]
    of_first += ["window 32 keep 2048", "window 32 keep 2048 random"]
    of_second = [name.replace("32", "64") for name in of_first]
    assert names == ["window 32", "window 64", *of_first, *of_second]
    assert {arm.baseline for arm in arms[2:6]} == {"window 32"} and arms[6].baseline == "window 64"
    model = PTEModel.from_pretrained(tiny("llama"))
    ran = [arms[0], *arms[2:5]]
    found = measure(model.base, chosen, ran, {}, batch_sequences=3, probes=probes())
    keeper = Keeper(model, probes())
    chosen.sort(key=lambda e: len(e.tokens))
    for arm in ran:
        expected = []
        for e in chosen:
            alone = log_probs(model, e.tokens, arm.plan(e.plan.pin_tokens), keeper=keeper)
            wanted = torch.tensor(e.wanted)
            expected.append(-alone.logprobs[0, : len(e.tokens)][wanted].numpy())
        losses = found.arms[arm.name].losses
        np.testing.assert_allclose(losses, np.concatenate(expected), atol=1e-4)
    apart = [
        np.abs(found.arms[a].losses - found.arms[b].losses).max()
        for a, b in zip(
            ("window 32", "window 32", "window 32 keep 16"),
            ("window 32 keep 16", "window 32 keep 16 random", "window 32 keep 16 random"),
            strict=True,
        )
    ]
    assert min(apart) > 0.01
    # Who keeps everything has forgotten nothing.
    everything = found.arms["window 32 keep 2048"]
    assert np.abs(everything.kls).max() < 1e-5
    np.testing.assert_allclose(everything.losses, found.losses_full, atol=1e-4)


def test_adapters_that_keep(tiny: Tiny, adapters: Callable[..., Path], tmp_path: Path) -> None:
    """An adapter's own probes choose; without some, those of the command."""
    path = tiny("llama")
    file = thoughts(tmp_path / "t.jsonl", [(20, 140), (7, 150)])
    own = replace(
        Adapter.load(adapters(path, rule="ridge")),
        probes=Probes.of(-probes().queries, "none"),
    )
    own.save(tmp_path / "own")
    replace(own, probes=None).save(tmp_path / "bare")
    probes().save(tmp_path / "probes.safetensors")

    def measured(out: str, *names: str, given: bool) -> dict[str, Any]:
        arguments = [str(path), str(file), "--window", "32", "--evict-tokens", "16"]
        arguments += ["--block-size", str(BLOCK), "--adapter-keep", "0,16"]
        for name in names:
            arguments += ["--adapter", f"{name}={tmp_path / name}"]
        if given:
            arguments += ["--probes", str(tmp_path / "probes.safetensors")]
        assert eval_command(["fidelity", *arguments, "--out", str(tmp_path / out)]) == 0
        report = json.loads((tmp_path / out / "fidelity.json").read_text())
        return {arm["name"]: arm for arm in report["arms"]}

    both = measured("both", "own", "bare", given=True)
    arms = ["own", "own keep 16", "bytes of own", "bare", "bare keep 16", "bytes of bare"]
    assert list(both) == ["window 32", *arms]
    assert both["own keep 16"]["adapter"] == "own" and both["own keep 16"]["keep_tokens"] == 16
    assert both["own keep 16"]["kv_tokens"] == both["own"]["kv_tokens"] + 16
    assert both["own"]["kl"] == both["bare"]["kl"] != both["own keep 16"]["kl"]
    assert both["own keep 16"]["kl"] != both["bare keep 16"]["kl"]
    alone = measured("alone", "own", given=False)
    assert alone["own keep 16"]["kl"] == pytest.approx(both["own keep 16"]["kl"], rel=1e-4)
    with pytest.raises(ValueError, match="--adapter-keep: bare brings no probes of its own"):
        measured("missing", "own", "bare", given=False)


def test_command(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("qwen2")
    file = thoughts(tmp_path / "t.jsonl", [(20, 140), (7, 150)])
    probes().save(tmp_path / "probes.safetensors")
    arguments = [str(path), str(file), "--window", "32,48", "--evict-tokens", "16"]
    arguments += ["--block-size", str(BLOCK), "--keep", "16", "--keep-score", "expected,random"]
    arguments += ["--probes", str(tmp_path / "probes.safetensors"), "--kv-dtype", "float32"]
    assert eval_command(["fidelity", *arguments, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert report["probes"] == probes().content_hash
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert list(arms) == [
        "window 32",
        "window 48",
        *(f"window {w} keep 16{score}" for w in (32, 48) for score in ("", " random")),
    ]
    kept = arms["window 32 keep 16 random"]
    assert kept["kind"] == "keep" and kept["keep_tokens"] == 16 and kept["keep_score"] == "random"
    assert arms["window 48"]["keep_tokens"] == 0 and arms["window 48"]["keep_score"] is None
    # What is kept is held: as many bytes as the window that is longer by it.
    assert (
        kept["kv_tokens"] == arms["window 48"]["kv_tokens"] == arms["window 32"]["kv_tokens"] + 16
    )
    assert kept["recovered"][0] == pytest.approx(1 - kept["kl"][0] / arms["window 32"]["kl"][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "16"], "--probes FILE, or --keep-score random"),
        (["--keep-score", "random"], "--keep-score needs --keep"),
        (["--adapter-keep", "16"], "--adapter-keep needs --adapter"),
        (["--probes", "p"], "--probes needs --keep"),
        (["--keep", "16", "--keep-score", "best"], "'best' is none of expected, random"),
        (
            ["--keep", "16", "--keep-score", "random", "--url", "http://a"],
            "a server scores without",
        ),
    ],
)
def test_flags_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        eval_command(["fidelity", "M", "T", *arguments])
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "--probes: .* does not exist"),
        (lambda path: path.write_text("x"), "--probes: .* cannot be read"),
        (lambda path: probes(2).save(path), "--probes: .* for 2 layers"),
        (lambda path: probes().save(path), "--keep: keep of 24 tokens is not a multiple"),
    ],
)
def test_probes_that_do_not_fit(make: Any, message: str, tiny: Tiny, tmp_path: Path) -> None:
    file, path = thoughts(tmp_path / "t.jsonl", [(20, 140)]), tmp_path / "probes.safetensors"
    if make is not None:
        make(path)
    arguments = [str(tiny("llama")), str(file), "--window", "64", "--block-size", str(BLOCK)]
    with pytest.raises((ValueError, OSError), match=message):
        eval_command(["fidelity", *arguments, "--keep", "24", "--probes", str(path)])
