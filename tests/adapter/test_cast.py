"""`pte-vllm adapter cast`: half the bytes, and what a server in bfloat16 makes of it anyway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.hashes import LORA_FILE, PROBES_FILE
from pte_vllm.adapter.probes import Probes
from pte_vllm.cli.main import main

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]


@pytest.fixture
def full(tiny: Tiny, adapters: Adapters, tmp_path: Path) -> Path:
    """An adapter in fp32, with probes of its own."""
    made = Adapter.load(adapters(tiny("llama")))
    queries = torch.randn(3, 2, 8, 32, generator=torch.Generator().manual_seed(3))
    replace(made, probes=Probes.of(queries, "a model")).save(tmp_path / "full")
    return tmp_path / "full"


def test_half_the_bytes(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "half"
    assert main(["adapter", "cast", str(full), str(out)]) == 0
    before, after = Adapter.load(full), Adapter.load(out)
    for one, other in ((before.lora_a, after.lora_a), (before.lora_b, after.lora_b)):
        assert other and one.keys() == other.keys()
        for name, tensor in other.items():
            assert torch.equal(tensor, one[name].bfloat16())
    for layer, encoder in before.encoders.items():
        assert torch.equal(after.encoders[layer].w_k, encoder.w_k)
    assert before.probes is not None and after.probes is not None
    assert after.probes.model_hash == "a model"
    torch.testing.assert_close(after.probes.queries, before.probes.queries, atol=2e-3, rtol=1e-3)
    for name in (LORA_FILE, PROBES_FILE):
        small, large = ((where / name).stat().st_size for where in (out, full))
        assert small < 0.7 * large
    assert f"wrote {out}: " in capsys.readouterr().err
    assert main(["adapter", "cast", str(full), str(out)]) == 0  # it is there already


def test_mistakes(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = Adapter.load(full)
    name = next(iter(large.lora_b))
    large.lora_b[name].fill_(1e6)
    large.save(full)
    assert main(["adapter", "cast", str(full), str(tmp_path / "a"), "--dtype", "float16"]) == 2
    assert f"--dtype float16 cannot hold {name}; bfloat16 can" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    assert main(["adapter", "cast", str(full), str(other)]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert main(["adapter", "cast", str(tmp_path), str(tmp_path / "a")]) == 2
    assert not (tmp_path / "a").exists()
