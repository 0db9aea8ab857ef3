"""What cannot work is refused before an engine starts, with the flag that says it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from pte_vllm.adapter.probes import Probes
from pte_vllm.launch import HOST, free_port, pte_command
from pte_vllm.method.options import EngineConfig
from pte_vllm.models.location import model_hash
from pte_vllm.server.adapters.spool import Spool
from pte_vllm.server.early import check_early, claim_address
from pte_vllm.server.options import ServiceConfig

LORA = ("--enable-lora", "--max-lora-rank", "8")


def _args(model: Path | str, *flags: str) -> Namespace:
    parser = make_arg_parser(FlexibleArgumentParser())
    return parser.parse_args(
        ["--model", str(model), "--host", HOST, "--port", str(free_port()), *flags]
    )


def _check(args: Namespace, **options: str) -> Spool:
    with ExitStack() as until:
        spool = check_early(args, ServiceConfig(**options), until)
        assert spool is not None
        return spool


def _refused(args: Namespace, message: str, **options: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        _check(args, **options)


def test_a_port_in_use(tiny: Callable[[str], Path]) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        args = _args(tiny("llama"), "--port", str(port))
        _refused(args, rf"--port {port} is in use: .* choose another --port")
    claim = claim_address(args)  # free again; a server that starts holds it
    assert claim is not None
    _refused(args, rf"--port {port} is in use: .* still starting")
    claim.close()
    _check(args)
    _check(args)  # and nobody holds it when a server has ended
    assert claim_address(_args("m", "--port", "0")) is None


def test_a_machine_without_http_needs_no_address(tiny: Callable[[str], Path]) -> None:
    with socket.create_server((HOST, 0)) as taken, ExitStack() as until:
        port = str(taken.getsockname()[1])
        args = _args(tiny("llama"), *LORA, "--port", port, "--headless")
        assert check_early(args, ServiceConfig(spool="/dev/null/spool"), until) is None


def test_several_api_servers(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = _args(tiny("llama"), *LORA, "--api-server-count", "2")
    spool = _check(args, spool=str(tmp_path / "spool"))
    with pytest.raises(ValueError, match="used by another"):  # it is held for all of them
        Spool(spool.root).open()
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    _refused(args, "--api-server-count 2 .* VLLM_ALLOW_RUNTIME_LORA_UPDATING=1: .* PUT")


def test_an_address_that_cannot_be_used(tmp_path: Path) -> None:
    _refused(_args("m", "--host", "192.0.2.1"), "--host 192.0.2.1 --port")
    _refused(_args("m", "--host", "no.such.host.invalid"), "--host no.such.host.invalid")
    (tmp_path / "socket").touch()
    _refused(_args("m", "--uds", str(tmp_path / "socket")), "--uds .* exists")


def test_a_spool_in_use(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    args = _args(tiny("llama"), *LORA)
    first = _check(args, spool=str(spool))
    _refused(_args(tiny("llama"), *LORA), "--pte-spool .* is used by another", spool=str(spool))
    first.open()  # it is its own
    file = tmp_path / "file"
    file.touch()
    _refused(_args(tiny("llama"), *LORA), "--pte-spool .* cannot be written", spool=str(file / "s"))
    # Without LoRA nothing is ever pushed.
    assert not _check(_args("m"), spool=str(tmp_path / "no")).root.exists()


def test_adapters_that_cannot_be_served(
    tiny: Callable[[str], Path], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny("llama")
    good, large = adapters(model, rank=8, rule="paper"), adapters(model, rank=16, rule="paper")
    plain = adapters(model, plain=True, rank=16)
    other = adapters(tiny("qwen2"), rank=8, rule="paper")
    broken = tmp_path / "broken"
    shutil.copytree(good, broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config | {"pte": {"rule": "median"}}))
    half = tmp_path / "half"
    half.mkdir()
    (half / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 8}))

    def refused(message: str, *modules: str, flags: tuple[str, ...] = LORA) -> None:
        _refused(_args(model, *flags, "--lora-modules", *modules), message)

    refused("--lora-modules needs --enable-lora", f"a={good}", flags=())
    refused("--lora-modules a=./no: the model directory ./no does not exist", "a=./no")
    refused("rank 16 exceeds --max-lora-rank 8; serve with --max-lora-rank 16", f"a={large}")
    refused("rank 16 exceeds --max-lora-rank 8", f"a={plain}")
    refused("--lora-modules a=.*rule must be one of", f"a={broken}")
    refused("adapter_model.safetensors is missing", f"a={half}")
    refused("--lora-modules a=.* expected", f"a={other}")
    refused("a is the name of another", f"a={good}", f"a={good}")
    refused("base is the name", f"base={good}", flags=(*LORA, "--served-model-name", "base"))
    args = _args(model, *LORA, "--lora-modules", f"a={good}", "b=org/name")
    _check(args, spool=str(tmp_path / "spool"))


def test_probes_that_cannot_be_used(
    tiny: Callable[[str], Path],
    probes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, other, broken = tiny("llama"), tmp_path / "other", tmp_path / "broken"
    Probes.of(torch.ones(2, 2, 3, 32), model_hash(model)).save(other)
    broken.write_text("no probes")

    def args(file: Path | str) -> Namespace:
        found = _args(model)
        found.additional_config = {"pte": EngineConfig(keep_tokens=32, probes=str(file)).to_dict()}
        return found

    _refused(args("no.file"), "--pte-probes no.file: these probes cannot be read")
    _refused(args(broken), f"--pte-probes {broken}: these probes cannot be read")
    _refused(args(other), f"--pte-probes {other}: these probes are for 2 layers of 2 KV heads")
    _check(args(probes))
    assert "these are probes of another model" in capsys.readouterr().err
    Probes.of(Probes.load(probes).queries, model_hash(model)).save(other)
    _check(args(other))
    assert not capsys.readouterr().err


def test_files_and_modules_that_are_not_there() -> None:
    _refused(_args("m", "--ssl-keyfile", "no.pem"), "--ssl-keyfile no.pem does not exist")
    _refused(_args("m", "--middleware", "no.such.thing"), "--middleware no.such.thing cannot be")


def test_no_engine_starts(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The command ends with a line and status 2."""
    spool = Spool(tmp_path / "spool")
    spool.open()
    words = ["--enable-lora", "--pte-spool", str(spool.root), "--block-size", "32"]
    command = pte_command("serve", str(tiny("llama")), "--port", str(free_port()), *words)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert f"pte-vllm: error: --pte-spool {spool.root} is used by another" in done.stderr
    assert "EngineCore" not in done.stdout + done.stderr
