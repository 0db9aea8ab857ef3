"""The adapter on disk: what is written comes back, and what is broken is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from pte_vllm.adapter.files import AdapterError, is_pte_adapter
from pte_vllm.adapter.for_engine import load_for_engine
from pte_vllm.adapter.format import Adapter, ModelShape
from pte_vllm.adapter.hashes import (
    CONFIG_FILE,
    ENCODER_FILE,
    LORA_FILE,
    PROBES_FILE,
    content_hash,
    file_hashes,
)
from pte_vllm.cli.adapter import main as command
from pte_vllm.method.reference import TENSORS
from tests.harness.models import make_probes

LORA = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, Tensor]


@pytest.fixture
def model(tiny: Callable[[str], Path]) -> ModelShape:
    return ModelShape.from_hf(AutoConfig.from_pretrained(tiny("llama")))


@pytest.fixture
def directory(tiny: Callable[[str], Path], adapters: Callable[..., Path], tmp_path: Path) -> Path:
    """A good adapter that a test may break."""
    return shutil.copytree(adapters(tiny("llama"), rule="ridge"), tmp_path / "adapter")


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "ridge", "features": "squared"},
        {"rule": "paper", "read": "value", "normalize": "row"},
        {"rule": "sum", "global_tokens": 12, "keys": "rotated", "layers": [0, 2]},
        {"plain": True},
        {"rule": "delta", "own_probes": 3},
        {"plain": True, "own_probes": 4},
    ],
    ids=str,
)
def test_what_is_written_comes_back(
    options: dict[str, Any],
    model: ModelShape,
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    tmp_path: Path,
) -> None:
    path = adapters(tiny("llama"), **options)
    adapter = Adapter.load(path, model)
    adapter.save(tmp_path)
    again = Adapter.load(tmp_path, model)
    assert (again.peft, again.pte, again.layers) == (adapter.peft, adapter.pte, adapter.layers)
    assert is_pte_adapter(tmp_path) == (adapter.pte is not None)
    for side in ("lora_a", "lora_b"):
        found, wanted = getattr(again, side), getattr(adapter, side)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for layer, encoder in adapter.encoders.items():
        assert again.encoders[layer].features == options.get("features", "linear")
        for name in TENSORS:
            found, wanted = getattr(again.encoders[layer], name), getattr(encoder, name)
            assert torch.equal(found, wanted)
    assert (again.probes is None) == ("own_probes" not in options)
    if again.probes is not None and adapter.probes is not None:
        assert torch.equal(again.probes.queries, adapter.probes.queries)
    assert content_hash(file_hashes(tmp_path)) == content_hash(file_hashes(path))


def test_an_adapter_from_before_an_option_has_its_default(directory: Path) -> None:
    _change_config(directory, lambda config: config["pte"].pop("keys"))
    adapter = Adapter.load(directory)
    assert adapter.pte is not None
    assert (adapter.pte.features, adapter.pte.keys) == ("linear", "unrotated")


def test_a_server_from_before_features_reads_linear_adapters(
    directory: Path, tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> None:
    """It refuses names that it does not know; a file that says `linear` is read all the same."""

    def stored(path: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text())["pte"]
        return found

    squared = adapters(tiny("llama"), rule="ridge", features="squared")
    assert "features" not in stored(directory)
    assert stored(squared)["features"] == "squared" and "keys" in stored(directory)
    _change_config(directory, lambda config: config["pte"].update(features="linear"))
    assert Adapter.load(directory).encoders[0].features == "linear"


def test_encoders_have_the_features_of_the_adapter(directory: Path) -> None:
    adapter = Adapter.load(directory)
    assert adapter.pte is not None
    for pte in (replace(adapter.pte, features="squared"), None):
        with pytest.raises(AdapterError, match="layer 0 has features linear, the adapter"):
            replace(adapter, pte=pte)
    assert replace(adapter, pte=None, encoders={}).pte is None


def test_optional_tensors_are_zero_where_missing(directory: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(("b_k", "b_v", "log_ridge"))]:
            del tensors[name]

    _change_tensors(directory / ENCODER_FILE, drop)
    for encoder in Adapter.load(directory).encoders.values():
        assert not any(t.any() for t in (encoder.b_k, encoder.b_v, encoder.log_ridge))
        assert encoder.b_k.shape == (8,) and encoder.log_ridge.shape == ()


def _set(name: str, value: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


def _drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (LORA_FILE, _drop(f"{LORA}.lora_B.weight"), "q_proj lacks lora_A or lora_B"),
        (LORA_FILE, _set("extra", torch.zeros(1)), "unexpected tensor extra"),
        (LORA_FILE, _set(f"{LORA}.lora_A.weight", torch.zeros(8, 7)), "columns is 7, expected 96"),
        (LORA_FILE, _set(f"{LORA}.lora_A.weight", torch.zeros(5, 96)), "rows is 5, expected 8"),
        (LORA_FILE, _set(f"{LORA}.lora_B.weight", torch.zeros(9, 8)), "rows is 9, expected 128"),
        (LORA_FILE, _set(f"{LORA}.lora_A.weight", torch.zeros(8)), "must be a matrix"),
        (
            LORA_FILE,
            _set(f"{LORA}.lora_A.weight", torch.full((8, 96), float("nan"))),
            "not finite",
        ),
        (LORA_FILE, _set(f"{LORA}.lora_A.weight", torch.zeros(8, 96).int()), "expected floating"),
        (LORA_FILE, lambda tensors: tensors.clear(), "holds no LoRA weights"),
        (ENCODER_FILE, _drop("layers.1.w_q"), r"layers\.1\.w_q is missing"),
        (ENCODER_FILE, _set("layers.1.gain", torch.ones(1)), r"gain has shape \(1,\), expected"),
        (ENCODER_FILE, _set("layers.1.w_v", torch.ones(3, 64)), r"expected \(8, 64\)"),
        (ENCODER_FILE, _set("layers.1.w_k", torch.ones(8, 60)), "layers disagree on d_kv"),
        (ENCODER_FILE, _set("layers.0.b_k", torch.zeros(8).half()), "expected float32"),
        (ENCODER_FILE, _set("layers.9.w_k", torch.ones(8, 64)), r"layers\.9\.query is missing"),
        (ENCODER_FILE, _set("layers.0.w_x", torch.ones(1)), r"unexpected tensor layers\.0\.w_x"),
        (ENCODER_FILE, lambda tensors: tensors.clear(), "holds no encoder"),
    ],
)
def test_broken_tensors(
    file: str, change: Callable[[Tensors], None], message: str, directory: Path, model: ModelShape
) -> None:
    _change_tensors(directory / file, change)
    with pytest.raises(AdapterError, match=message) as caught:
        Adapter.load(directory, model)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("r"), "r must be a positive number, got None"),
        (lambda c: c.update(lora_alpha=0), "lora_alpha must be a positive number"),
        (lambda c: c.update(r=16), "r is 16, expected 8"),
        (lambda c: c.update(use_dora=True), "use_dora is not supported with PTE"),
        (lambda c: c.pop("pte"), f'no "pte" section beside {ENCODER_FILE}'),
        (lambda c: c.update(pte=[]), '"pte" must be an object'),
        (lambda c: c["pte"].update(colour=1), 'unknown fields in "pte": colour'),
        (lambda c: c["pte"].update(rule="mean"), "rule must be one of"),
        (lambda c: c["pte"].update(features="cubed"), "features must be one of"),
        (lambda c: c["pte"].update(format_version=2), "format_version 2 is not supported"),
        (lambda c: c["pte"].update(rank="8"), "rank must be a positive integer"),
    ],
)
def test_broken_config(
    change: Callable[[dict[str, Any]], Any], message: str, directory: Path, model: ModelShape
) -> None:
    _change_config(directory, change)
    with pytest.raises(AdapterError, match=message):
        Adapter.load(directory, model)


def test_broken_files(directory: Path) -> None:
    (directory / CONFIG_FILE).write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        Adapter.load(directory)
    (directory / CONFIG_FILE).write_text("[]")
    with pytest.raises(AdapterError, match="must hold a JSON object"):
        Adapter.load(directory)
    with pytest.raises(AdapterError, match=f"{CONFIG_FILE} is missing"):
        Adapter.load(directory / "nowhere")


@pytest.mark.parametrize("file", [LORA_FILE, ENCODER_FILE])
def test_cut_short(file: str, directory: Path) -> None:
    data = (directory / file).read_bytes()
    (directory / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterError, match=f"{file} is not a readable safetensors file"):
        Adapter.load(directory)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_plain_lora_with_a_scale_per_module_is_refused(
    field: str, tiny: Callable[[str], Path], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    path = shutil.copytree(adapters(tiny("llama"), plain=True), tmp_path / "plain")
    config = json.loads((path / CONFIG_FILE).read_text())
    (path / CONFIG_FILE).write_text(json.dumps({**config, field: {}}))
    assert Adapter.load(path).pte is None
    (path / CONFIG_FILE).write_text(json.dumps({**config, field: {"q_proj": 4}}))
    with pytest.raises(AdapterError, match=f"{field} is not supported"):
        Adapter.load(path)


def test_an_encoder_that_is_lost_is_no_plain_lora(directory: Path) -> None:
    (directory / ENCODER_FILE).unlink()
    with pytest.raises(AdapterError, match=f'"pte" in {CONFIG_FILE}, but no {ENCODER_FILE}'):
        Adapter.load(directory)


def test_it_must_fit_the_model(directory: Path, tiny: Callable[[str], Path]) -> None:
    other = ModelShape.from_hf(AutoConfig.from_pretrained(tiny("qwen2")))  # hidden 128, not 96
    with pytest.raises(AdapterError, match="rows is 96, expected 128"):
        Adapter.load(directory, other)


def test_what_an_engine_refuses(
    directory: Path, model: ModelShape, tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> None:
    def load(path: Path, **options: Any) -> Adapter | None:
        given = {"max_lora_rank": 8, "dtype": torch.float32, "load_inplace": False, **options}
        return load_for_engine(path, model=model, **given)

    assert load(directory) is not None
    assert load(adapters(tiny("llama"), plain=True)) is None
    with pytest.raises(AdapterError, match="rank 8 exceeds this server's --max-lora-rank 4"):
        load(directory, max_lora_rank=4)
    with pytest.raises(AdapterError, match="load_inplace is not supported"):
        load(directory, load_inplace=True)


@pytest.mark.parametrize("plain", [False, True])
def test_probes_must_fit_and_go_where_there_are_none(
    plain: bool,
    model: ModelShape,
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    tmp_path: Path,
) -> None:
    def load() -> Adapter | None:
        options = {"max_lora_rank": 8, "dtype": torch.float32, "load_inplace": False}
        return load_for_engine(tmp_path, model=model, **options)

    bare = Adapter.load(adapters(tiny("llama"), **({"plain": True} if plain else {})), model)
    probes = make_probes()
    replace(bare, probes=probes).save(tmp_path)
    whole = file_hashes(tmp_path)
    assert PROBES_FILE in whole
    replace(bare, probes=make_probes(6)).save(tmp_path)
    assert content_hash(file_hashes(tmp_path)) != content_hash(whole)
    replace(bare, probes=probes).save(tmp_path)
    assert file_hashes(tmp_path) == whole
    assert (load() is None) == plain
    replace(bare, probes=make_probes(layers=2)).save(tmp_path)
    for loading in (load, lambda: Adapter.load(tmp_path, model)):
        with pytest.raises(AdapterError, match=f"{PROBES_FILE}: these probes are for 2 layers"):
            loading()
    (tmp_path / PROBES_FILE).write_bytes(b"no tensors")
    with pytest.raises(AdapterError, match=f"{PROBES_FILE}: these probes cannot be read"):
        load()
    bare.save(tmp_path)
    assert not (tmp_path / PROBES_FILE).exists() and Adapter.load(tmp_path).probes is None


def test_inspect_tells_of_probes(
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_probes = adapters(tiny("llama"), plain=True, own_probes=4)
    for path, count in ((with_probes, 23), (directory, None)):
        assert command(["inspect", str(path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["probes"] == count and (PROBES_FILE in found["sha256"]) == (count is not None)
        assert command(["inspect", str(path)]) == 0
        assert ("23 for each KV head" in capsys.readouterr().out) == (count is not None)


def test_inspect_says_which_layers_it_counts(
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A token of all the model's layers weighs more than one of those that have a state."""
    path = str(adapters(tiny("llama")))
    for flags, counted in (([], True), (["--model", str(tiny("llama"))], False)):
        assert command(["inspect", path, *flags]) == 0
        assert ("--model counts all" in capsys.readouterr().out) == counted


@pytest.mark.parametrize(
    ("side", "value", "dtype", "message"),
    [
        ("lora_B", 3e38, torch.float32, "q_proj: lora_A and lora_B are too large together"),
        ("lora_A", 1e20, torch.bfloat16, "q_proj: lora_A and lora_B are too large together"),
        ("lora_B", 3.4e38, torch.bfloat16, "q_proj: lora_B has values that are not finite in bf"),
        ("lora_A", 1e5, torch.float16, "q_proj: lora_A has values that are not finite in float16"),
        ("lora_B", 6e4, torch.float16, "q_proj: lora_A and lora_B are too large together"),
    ],
)
def test_finite_weights_that_overflow_are_refused(
    side: str, value: float, dtype: torch.dtype, message: str, directory: Path, model: ModelShape
) -> None:
    tensors = load_file(directory / LORA_FILE)
    tensors[f"{LORA}.{side}.weight"].fill_(value)
    save_file(tensors, directory / LORA_FILE)
    Adapter.load(directory, model)  # they are finite
    with pytest.raises(AdapterError, match=message):
        load_for_engine(directory, model=model, max_lora_rank=8, dtype=dtype, load_inplace=False)


def test_other_users_may_read_what_the_umask_leaves(directory: Path, tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        Adapter.load(directory).save(tmp_path / "saved")
    finally:
        os.umask(previous)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "saved").iterdir()}
    assert modes == {0o640}


def test_init_keeps_the_adapter_that_is_there(directory: Path, tiny: Callable[[str], Path]) -> None:
    before = file_hashes(directory)
    with pytest.raises(ValueError, match="holds an adapter already.*--overwrite"):
        command(["init", str(tiny("llama")), str(directory)])
    assert file_hashes(directory) == before


def test_half_written_does_not_load(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that dies after any of its files leaves nothing that loads."""
    adapter = Adapter.load(directory)
    for files in (0, 1):
        written: list[Any] = []

        def fail(*args: Any, files: int = files, written: list[Any] = written, **kw: Any) -> None:
            if len(written) == files:
                raise OSError("no space left on device")
            written.append(args)
            save_file(*args, **kw)

        with monkeypatch.context() as patch:
            patch.setattr("pte_vllm.adapter.format.save_file", fail)
            with pytest.raises(OSError, match="no space"):
                adapter.save(directory)
        with pytest.raises(AdapterError, match=f"{CONFIG_FILE} is missing"):
            Adapter.load(directory)
    adapter.save(directory)
    Adapter.load(directory)


def test_what_needs_no_torch_imports_none() -> None:
    """A trainer of another stack pushes adapters, and the command's help is quick."""
    modules = "pte_vllm.adapter.defaults, pte_vllm.adapter.hashes, pte_vllm.wire.client"
    code = f"import sys, {modules}\nassert not {{'torch', 'numpy'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _change_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = directory / CONFIG_FILE
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def _change_tensors(file: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
