"""Probes that adapters bring to a server: pushed, loaded by path, loaded again with others."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch

from pte_vllm.adapter.hashes import PROBES_FILE, content_hash, file_hashes
from pte_vllm.wire.client import RolloutClient, ServerError
from pte_vllm.wire.rollout import Rollout
from tests.harness.engine import BLOCK
from tests.harness.kinds import ADMIN_KEY
from tests.harness.models import make_probes, random_tokens
from tests.harness.parity import TOLERANCE, replayed
from tests.harness.server import WINDOW, Server

PROMPT = random_tokens(2 * BLOCK + 5, 500, 1)
SAMPLING = {"max_tokens": WINDOW + 4 * BLOCK, "temperature": 1.0, "seed": 7, "ignore_eos": True}
FIRST_CHOICE = 1
"""The first fold that selects where one block leaves and one is kept."""


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server]) -> Server:
    return shared("admin")


@pytest.fixture
def client(server: Server) -> Iterator[RolloutClient]:
    with RolloutClient(server.url, admin_key=ADMIN_KEY) as client:
        yield client


@pytest.fixture
def directory(tiny: Callable[[str], Path], adapters: Callable[..., Path], tmp_path: Path) -> Path:
    """An adapter with probes, whose files a test may change."""
    source = adapters(tiny("qwen3"), rule="ridge", own_probes=9, seed=3)
    return Path(shutil.copytree(source, tmp_path / "adapter"))


def sample(server: Server, client: RolloutClient, name: str, files: Path) -> Rollout:
    """Sample once, and check that the replay of these files says and keeps the same."""
    options = {"adapter": name, "keep_tokens": BLOCK, "sampling": SAMPLING}
    (record,) = client.rollouts([PROMPT], **options)
    assert record.kept is not None and record.kept[FIRST_CHOICE] is not None
    expected = replayed(
        *(server.model, files, list(record.token_ids), record.plan),
        probes=server.probes,
        record=record.kept,
    )
    found = torch.tensor(record.logprobs)
    assert (found - expected[len(PROMPT) - 1 :]).abs().max() <= TOLERANCE
    return record


def test_a_push_carries_them(server: Server, client: RolloutClient, directory: Path) -> None:
    """Each version has its own, on the disk of the server too, and one may have none."""
    records = []
    for number, seed in enumerate((9, 2, None), start=1):
        if seed is None:
            (directory / PROBES_FILE).unlink()
        else:
            make_probes(seed).save(directory / PROBES_FILE)
        assert client.push(directory, "own") == number
        (stored,) = server.spool.glob(f"own@{number}-*")
        assert file_hashes(stored) == file_hashes(directory)
        records.append(sample(server, client, f"own@{number}", directory))
    assert len({record.kept[FIRST_CHOICE] for record in records if record.kept}) == 3


def test_what_does_not_fit_gets_400(server: Server, client: RolloutClient, directory: Path) -> None:
    before = client.adapters()
    for content, reason in (
        (make_probes(layers=2), "these probes are for 2 layers of 2 KV heads of size 32"),
        (b"no tensors", "these probes cannot be read"),
    ):
        file = directory / PROBES_FILE
        file.write_bytes(content) if isinstance(content, bytes) else content.save(file)
        with pytest.raises(ServerError, match=f"{PROBES_FILE}: {reason}") as refusal:
            client.push(directory, "broken")
        assert refusal.value.status == 400 and str(directory) not in str(refusal.value)
        answer = _load(server, "broken", directory)
        assert answer.status_code == 400 and f"{PROBES_FILE}: {reason}" in answer.text, answer.text
    assert client.adapters() == before


@pytest.mark.parametrize("plain", [False, True])
def test_a_reload_brings_others(
    server: Server,
    client: RolloutClient,
    directory: Path,
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    plain: bool,
) -> None:
    """Under the same name and directory; a longer request finds nothing of what was there."""
    if plain:
        shutil.rmtree(directory)
        shutil.copytree(adapters(tiny("qwen3"), plain=True, own_probes=9), directory)
    assert _load(server, "x", directory).status_code == 200
    first = sample(server, client, "x", directory)
    assert _cached(server, first) > first.plan.first_fold
    assert _unload(server, "x").status_code == 200
    make_probes(2).save(directory / PROBES_FILE)
    assert _load(server, "x", directory).status_code == 200
    assert _cached(server, first) == 0
    second = sample(server, client, "x", directory)
    assert second.kept is not None and first.kept is not None
    assert second.kept[FIRST_CHOICE] != first.kept[FIRST_CHOICE]
    assert _unload(server, "x").status_code == 200


def test_the_hash_of_a_push_covers_them(server: Server, directory: Path) -> None:
    data = {"sha256": content_hash(file_hashes(directory))}
    make_probes(4).save(directory / PROBES_FILE)
    files = {file.name: (file.name, file.read_bytes()) for file in directory.iterdir()}
    url = f"{server.url}/pte/v1/adapters/changed"
    answer = httpx.put(url, files=files, data=data, headers=server.headers, timeout=60)
    assert answer.status_code == 400 and "files that arrived" in answer.text


def _load(server: Server, name: str, directory: Path) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(directory)}
    url = f"{server.url}/v1/load_lora_adapter"
    return httpx.post(url, json=body, headers=server.headers, timeout=120)


def _unload(server: Server, name: str) -> httpx.Response:
    url = f"{server.url}/v1/unload_lora_adapter"
    return httpx.post(url, json={"lora_name": name}, headers=server.headers, timeout=120)


def _cached(server: Server, record: Rollout) -> int:
    """Return how many tokens of a rollout are not read again by a request that goes on with it."""
    options = {"pte_keep": BLOCK, "pte_pin_tokens": len(PROMPT)}
    body = {"model": "x", "prompt": list(record.token_ids), "max_tokens": 1, "vllm_xargs": options}
    url = f"{server.url}/v1/completions"
    answer = httpx.post(url, json=body, headers=server.headers, timeout=120).raise_for_status()
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found
