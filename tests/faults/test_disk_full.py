"""On a full disk pushes are refused, nothing is half written, and what was there serves on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from pte_vllm.adapter.hashes import LORA_FILE
from pte_vllm.server.adapters.spool import Spool, SpoolError
from pte_vllm.wire.client import RolloutClient, ServerError
from tests.faults.conftest import small_disk
from tests.faults.spooling import content, push
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE, replayed
from tests.harness.server import Server
from tests.server.under_way import post

PAGE = 4096


def test_room_for_a_part_of_a_version(tmp_path: Path) -> None:
    """It does not matter what does not fit any more: directory, file, second file or record."""
    with small_disk(tmp_path / "disk", 2**20) as disk:
        spool = Spool(disk / "spool")
        first = push(spool, "policy", 1)
        filler, refused = disk / "filler", 0
        with filler.open("wb", buffering=0) as file:
            while True:  # until the disk is full
                try:
                    file.write(b"x" * PAGE)
                except OSError:
                    break
        while True:
            try:
                second = push(spool, "policy", 2)
                break
            except SpoolError as error:
                assert error.strerror == "No space left on device"
                refused += 1
            assert list((spool.root / "incoming").iterdir()) == []
            assert spool.versions() == [first]
            free = shutil.disk_usage(disk).free
            with filler.open("r+b") as file:
                file.truncate(filler.stat().st_size - PAGE)
            assert shutil.disk_usage(disk).free >= free  # nothing was left behind
        assert refused > len(content(2)) // PAGE
        assert spool.versions() == [first, second]
        assert (Path(second.path) / LORA_FILE).read_bytes() == content(2)


@contextmanager
def full_disk(server: Server) -> Iterator[None]:
    spool = server.spool
    filler = spool.parent / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(spool).free - 20_000))
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def size_limit(server: Server) -> Iterator[None]:
    """No file may exceed the log that the server writes, and 20 kB: needs no right to mount."""
    process = psutil.Process(server.pid)
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (server.log.stat().st_size + 20_000, before[1]))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_server_goes_on_with_what_it_has(
    tiny: Callable[[str], Path], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny("llama")
    rules = ("ridge", "paper", "sum", "none")
    versions = [adapters(model, rank=8, rule=rule, seed=3) for rule in rules]
    with small_disk(tmp_path / "disk", 8 * 2**20) as disk:
        flags = ["--pte-spool", str(disk / "spool"), "--pte-keep-versions", "4"]
        with Server(model, {}, log=tmp_path / "log", flags=flags) as server:
            server.wait_ready()
            with RolloutClient(server.url) as client:
                for path in versions[:2]:
                    client.push(path, "policy")
                for number, limited in ((3, full_disk), (4, size_limit)):
                    path, before = versions[number - 1], client.adapters()
                    with limited(server):
                        refusal = "--pte-spool cannot be written"
                        with pytest.raises(ServerError, match=refusal) as error:
                            client.push(path, "policy")
                        assert error.value.status == 507
                        body = {"lora_name": "policy", "lora_path": str(path)}
                        answer = post(server, "/load_lora_adapter", body)
                        assert answer.status_code == 507 and refusal in answer.text
                        assert list((disk / "spool" / "incoming").iterdir()) == []
                        assert client.adapters() == before
                        check_serves(server, client, versions[: number - 1])
                    assert client.push(path, "policy") == number
                check_serves(server, client, versions)
            server.wait_idle()


def check_serves(server: Server, client: RolloutClient, versions: list[Path]) -> None:
    sampling = {"max_tokens": 250, "temperature": 0.8, "ignore_eos": True}
    for number, path in enumerate(versions, start=1):
        (record,) = client.rollouts(
            [random_tokens(40, 500, number)], adapter=f"policy@{number}", sampling=sampling
        )
        expected = replayed(
            server.model, path, list(record.token_ids), record.plan, temperature=0.8
        )[len(record.prompt_ids) - 1 :]
        worst = (torch.tensor(record.logprobs) - expected).abs().max().item()
        assert worst <= TOLERANCE
