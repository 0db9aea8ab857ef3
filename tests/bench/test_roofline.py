"""`pte-vllm plan`: its sizes against real files and the engine's own arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from pte_vllm.bench.flags import parse_token_list
from pte_vllm.bench.sizing.hardware import GPUS, hardware_of
from pte_vllm.bench.sizing.model import Model
from pte_vllm.bench.sizing.roofline import plan_rows
from pte_vllm.cli.main import main

QWEN_7B = {
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
"""Of Qwen2.5-7B's config.json."""


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN_7B))
    return file


def test_parameters_are_the_checkpoint_s(tiny: Callable[[str], Path]) -> None:
    path = tiny("llama")
    (file,) = path.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    matrices = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    assert Model.load(str(path)).parameters == matrices


def test_push_is_as_large_as_an_adapter(
    tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> None:
    model = tiny("llama")
    files = adapters(model, rank=8, rule="ridge").glob("*.safetensors")
    measured = sum(file.stat().st_size for file in files)
    planned = Model.load(str(model)).adapter_bytes(8, itemsize=4)
    assert planned == pytest.approx(measured, rel=0.15)  # headers; n_h is taken to be the rank


def test_8_bit_cache_takes_half(qwen: Path, tmp_path: Path) -> None:
    """Half the bytes a token and a fold, twice the sequences; the state stays the model's."""
    found = {}
    for dtype in ("auto", "bfloat16", "fp8", "fp8_e5m2"):
        file = tmp_path / f"{dtype}.json"
        flags = ["--kv-cache-dtype", dtype, "--keep", "64", "--window", "1k", "--kv-gb", "60"]
        assert main(["plan", "--model", str(qwen), *flags, "--json", str(file)]) == 0
        found[dtype] = json.loads(file.read_text())
    assert found["auto"] == found["bfloat16"] and found["fp8"] == found["fp8_e5m2"]
    half, whole = found["fp8"], found["auto"]
    assert 2 * half["kv_bytes_per_token"] == whole["kv_bytes_per_token"] == 56 * 1024
    assert half["weights_bytes"] == whole["weights_bytes"]
    assert half["state_bytes_per_sequence"] == whole["state_bytes_per_sequence"]
    assert half["state_kv_tokens"] == 2 * whole["state_kv_tokens"]
    (fold,), (fold_16,) = half["folds"], whole["folds"]
    assert 2 * fold["written_bytes"] == fold_16["written_bytes"]
    assert half["rows"][0]["sequences"] == pytest.approx(2 * whole["rows"][0]["sequences"], abs=1)


def test_bounds_of_a_7b_model_on_one_h200(qwen: Path) -> None:
    model = Model.load(str(qwen))
    assert model.parameters == pytest.approx(7.6e9, rel=0.01)
    assert model.kv_bytes(2) == 56 * 1024
    rows = plan_rows(
        model,
        GPUS["h200"],
        rollout_tokens=32 * 1024,
        prompt_tokens=64,
        windows=[512, 1024, 4096],
    )
    full, half, one, four = rows
    # By hand: (0.9 * 141 - 15.2 - 4) GB of cache, half a rollout each; a step reads all of it.
    assert full.sequences == pytest.approx(114, abs=1)
    assert full.tokens_per_s == pytest.approx(4450, rel=0.02)
    assert four.ratio == pytest.approx(4, rel=0.05) and four.limit == "memory"
    assert one.ratio > 3.5 * four.ratio and half.limit == "compute"
    assert half.tokens_per_s == pytest.approx(989e12 / (2 * model.parameters))


def test_a_pool_of_known_size_and_a_bound_on_sequences(qwen: Path) -> None:
    model = Model.load(str(qwen))
    options = dict(rollout_tokens=2000, prompt_tokens=64, windows=[256], block_size=32)
    pool = 4 * 65 * 32 * model.kv_bytes(2)
    full, window = plan_rows(model, GPUS["h100"], kv_memory_bytes=pool, max_sequences=16, **options)
    assert (full.sequences, window.sequences) == (7, 16)
    assert window.kv_tokens == 64 + 256 + 32


def test_a_state_counts_in_the_memory_and_only_what_tokens_read_in_the_traffic(qwen: Path) -> None:
    model = Model.load(str(qwen))
    weight = model.state_weight(64, "ridge", 2)
    assert weight.total == 28 * (6 * 64**2 + 2 * 64) and weight.read == 28 * 2 * 64**2
    options = dict(rollout_tokens=2000, prompt_tokens=64, windows=[256], block_size=32, rank=64)
    cache = 352 * model.kv_bytes(2)
    for spare, count in ((0, 4), (-1, 3)):
        pool = 4 * (cache + weight.total) + spare
        gpu = GPUS["h100"]
        _, window = plan_rows(model, gpu, kv_memory_bytes=pool, **options)
        assert window.sequences == count
        read = model.parameters * 2 + count * (cache + weight.read)
        assert window.step_s == pytest.approx(read / gpu.bandwidth)


def test_ranks_share_weights_and_cache_and_each_has_all_states(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = Model.load(str(qwen)), tmp_path / "plan.json"
    rows = {
        ranks: plan_rows(
            *(model, GPUS["h200"]),
            rollout_tokens=32_768,
            prompt_tokens=256,
            windows=[1024],
            ranks=ranks,
        )
        for ranks in (1, 2, 28)
    }
    assert rows[2][0].sequences > 2 * rows[1][0].sequences  # the weights are there once
    assert rows[2][1].tokens_per_s > 1.9 * rows[1][1].tokens_per_s
    # 28 ranks hold each of four KV heads seven times.
    assert rows[28][0].sequences < 28 / 7 * 1.3 * rows[1][0].sequences
    command = ["plan", "--model", str(qwen), "--window", "1k", "--json", str(out)]
    assert main([*command, "--tensor-parallel-size", "4"]) == 0
    assert "what 4 ranks add up" in capsys.readouterr().out
    vllms, states, fold = json.loads(out.read_text())["sums"]
    assert (vllms["count"], vllms["num_bytes"]) == (2 * 28, 2 * 28 * 3584 * 2)
    assert (states["count"], states["num_bytes"]) == (2 * 28, 2 * 28 * 32 * 4)
    assert (fold["count"], fold["num_bytes"]) == (1, 28 * 256 * 2 * 32 * 4)


def test_command(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", "--model", str(qwen), "--json", str(file)]) == 0
    assert "full" in capsys.readouterr().out and len(json.loads(file.read_text())["rows"]) == 4
    own = ["--gpu", "mine", "--memory-gb", "24", "--bandwidth-gb-s", "900", "--tflops", "100"]
    assert main(["plan", "--model", str(qwen), *own]) == 0
    for words, said in (
        (["--model", str(tmp_path / "absent")], "--model"),
        (["--model", str(qwen), "--gpu", "mine"], "--memory-gb"),
        (["--model", str(qwen), "--window", "1m"], "no number of tokens"),
        (["--model", str(qwen), "--gpu", "rtx4090", "--memory-gb", "8"], "leave no room"),
        (["--model", str(qwen), "--window", "100"], "multiple"),
    ):
        assert main(["plan", *words]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--keep x", "--keep: 'x'"),
        ("--keep -32", "--keep: '-32'"),
        ("--keep=", "--keep: ''"),
        ("--window 0", "--window must be at least 1, got 0"),
        ("--window 16", "--window does not fit --block-size: window of 16"),
        ("--rollout x", "--rollout: 'x'"),
        ("--prompt x", "--prompt: 'x'"),
        ("--block-size 0", "--block-size must be at least 1, got 0"),
        ("--max-num-seqs 0", "--max-num-seqs must be at least 1, got 0"),
        ("--tensor-parallel-size 0", "--tensor-parallel-size must be at least 1, got 0"),
        ("--tensor-parallel-size 3", "--tensor-parallel-size 3 does not fit 28 heads and 4 KV"),
        ("--keep 33", "--keep does not fit --block-size: keep of 33"),
        ("--tflops 0", "--tflops must be positive, got 0"),
        ("--fp32-tflops nan", "--fp32-tflops must be positive, got nan"),
        ("--json absent/plan.json", "--json absent/plan.json: there is no directory absent"),
        ("--json .", "--json . is a directory"),
    ],
)
def test_mistakes_name_the_flag_before_anything_is_printed(
    qwen: Path,
    words: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(qwen.parent)
    assert main(["plan", "--model", str(qwen), *words.split()]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err


def test_a_list_has_each_number_once_in_its_order() -> None:
    assert parse_token_list("1k,512, 1024,0", flag="--keep", least=0) == [1024, 512, 0]


def test_float32_speed_is_given_known_or_guessed() -> None:
    own = {"memory_gb": 24, "bandwidth_gb_s": 900, "tflops": 90}
    assert hardware_of("mine", own).fp32_peak == 3e12
    assert hardware_of("mine", {**own, "fp32_tflops": 50}).fp32_peak == 50e12
    assert hardware_of("h200", {"fp32_tflops": None}).fp32_peak == 67e12
    assert hardware_of("h200", {"tflops": 90, "fp32_tflops": 50}).fp32_peak == 50e12
