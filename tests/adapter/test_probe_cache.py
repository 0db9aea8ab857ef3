"""The probes of a model are sampled once, also where servers start together, or one is stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pte_vllm.adapter import probe_cache
from pte_vllm.adapter.probe_cache import calibrated
from pte_vllm.adapter.probes import Probes, ProbesError
from pte_vllm.models.location import model_hash
from tests.harness.models import write_probes

QUICK = ("--num-thoughts", "3", "--max-tokens", "12", "--probes", "20", "--batch-size", "2")
Tiny = Callable[[str], Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of our own; returns where probes lie in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pte-vllm" / "probes"


def test_a_model_is_calibrated_once(
    cache: Path, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    file = calibrated(str(model), options=QUICK)
    assert file == cache / f"{model_hash(model)}-1.safetensors"
    assert Probes.load(file).model_hash == model_hash(model)
    said = capfd.readouterr()
    assert "sampling them, once" in said.err and "wrote" in said.err and not said.out
    made = file.stat()
    moved = model.rename(tmp_path / "elsewhere")
    assert calibrated(str(moved), options=("--no-such-flag",)) == file
    assert file.stat().st_ino == made.st_ino and not capfd.readouterr().err
    file.write_bytes(file.read_bytes()[:100])  # a broken file is made again
    assert calibrated(str(moved), options=QUICK) == file
    assert Probes.load(file).queries.shape[2] == 20


def test_two_at_once_sample_once(cache: Path, tiny: Tiny) -> None:
    code = (
        "import sys; from pte_vllm.adapter.probe_cache import calibrated; "
        "print(calibrated(sys.argv[1], options=sys.argv[2:]))"
    )
    command = [sys.executable, "-c", code, str(tiny("qwen2")), *QUICK]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    files = {out.strip() for out, _ in said}
    assert len(files) == 1 and Probes.load(files.pop()).queries.shape[2] == 20
    assert sum("sampling them, once" in err for _, err in said) == 1
    assert len(list(cache.glob("*.safetensors"))) == 1 and not list(cache.glob(".*"))


def test_failures_of_the_sampling_are_told(
    cache: Path, tiny: Tiny, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ProbesError, match="--model: sampling the probes of .* exit status 2"):
        calibrated(str(tiny("llama")), flag="--model", options=("--probes", "0"))
    assert "--probes must be at least 1" in capfd.readouterr().err
    assert not list(cache.glob("*.safetensors"))
    with pytest.raises(FileNotFoundError, match="--model: the model directory ./no does not exist"):
        calibrated("./no", flag="--model")
    with pytest.raises(FileNotFoundError, match="--model: the model no-such/model cannot be had"):
        calibrated("no-such/model", flag="--model")


def test_a_stop_leaves_no_file(cache: Path, tiny: Tiny) -> None:
    """Ctrl-C reaches both processes; a file that takes minutes is not there half."""
    code = (
        # A test run in the background ignores the signal, and so would what it starts.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from pte_vllm.adapter.probe_cache import calibrated\n"
        "try: calibrated(sys.argv[1], options=['--num-thoughts', '64', '--max-tokens', '20000'])\n"
        "except KeyboardInterrupt: sys.exit(77)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny("llama"))],
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("sampling 64 thoughts"):
            break
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 77, process.stderr.read()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_what_the_package_brings_is_not_sampled(
    cache: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, brought = tiny("llama"), tmp_path / "brought"
    brought.mkdir()
    (brought / "broken.safetensors").write_bytes(b"no probes")
    write_probes(brought / "other.safetensors")
    monkeypatch.setattr(probe_cache, "SHIPPED", brought)
    assert probe_cache.shipped(model_hash(model)) is None
    ours = brought / "tiny.safetensors"
    Probes.of(torch.ones(3, 2, 4, 32), model_hash(model)).save(ours)
    assert calibrated(str(model), options=("--no-such-flag",)) == ours
    assert not cache.exists()


def test_the_package_brings_probes_of_smollm2(smollm2: Path) -> None:
    file = probe_cache.shipped(model_hash(smollm2))
    assert file is not None and file.name == "smollm2.safetensors"
    assert file.stat().st_size < 3e6
    probes = Probes.load(file)
    probes.check_fits(num_layers=30, num_kv_heads=3, head_dim=64)
    assert probes.queries.dtype == torch.float32
