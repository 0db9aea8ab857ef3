"""The trainer's client asks a real server for rollouts and scores, and pushes adapters to it."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from pte_vllm.adapter.hashes import CONFIG_FILE, ENCODER_FILE, LORA_FILE, content_hash, file_hashes
from pte_vllm.wire.client import RolloutClient, ServerError
from tests.harness.engine import BLOCK
from tests.harness.kinds import ADMIN_KEY
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE
from tests.harness.server import NUM_BLOCKS, Server
from tests.server.pushed import LENGTH, SAMPLING, difference, make_versions, push_all


@pytest.fixture(scope="module")
def versions(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> dict[str, Path]:
    return make_versions(tiny("qwen3"), adapters)


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server], versions: dict[str, Path]) -> Server:
    server = shared("admin")
    push_all(server, versions)
    return server


@pytest.fixture
def client(server: Server) -> Iterator[RolloutClient]:
    with RolloutClient(server.url, admin_key=ADMIN_KEY) as client:
        yield client


@pytest.mark.parametrize("adapter", [None, "plain", "paper@1", "ridge"])
def test_rollouts_agree_with_the_replay(
    server: Server, client: RolloutClient, versions: dict[str, Path], adapter: str | None
) -> None:
    prompts = [random_tokens(50, 500, 1), random_tokens(7, 500, 2)]
    records = list(client.rollouts(prompts, n=2, adapter=adapter, sampling=SAMPLING))
    assert {(r.group_id, r.index) for r in records} == set(itertools.product("01", (0, 1)))
    assert len({r.completion_ids for r in records}) == 4  # each with a seed of its own
    for record in records:
        assert len(record.fold_events) >= 6
        assert record.finish_reason == "length" and len(record.completion_ids) == LENGTH
        assert record.num_preempted == 0
        assert record.rule == {"paper@1": "paper", "ridge": "ridge"}.get(adapter or "")
        worst = difference(server, versions, record, temperature=0.8)
        print(f"{record.adapter}: {len(record.fold_events)} folds, max |Δ log p| {worst:.1e}")
        assert worst <= TOLERANCE
    done = server.get("/pte/v1/requests")["finished"][-4:]
    engine_folds = sorted(report["folds"] for report in done)
    assert engine_folds == sorted(len(record.fold_events) for record in records)


def test_names_versions_and_seeds(
    server: Server, client: RolloutClient, versions: dict[str, Path]
) -> None:
    prompt = random_tokens(40, 500, 3)
    seen = {}
    for name in ("paper", "paper@2", "paper@1"):
        (record,) = client.rollouts([prompt], adapter=name, sampling=SAMPLING)
        seen[name] = record
        assert difference(server, versions, record, temperature=0.8) <= TOLERANCE
        assert record.weight_versions[0].version == int(record.adapter[-1])
    assert seen["paper"].adapter == "paper@2"
    assert seen["paper"].completion_ids == seen["paper@2"].completion_ids
    assert seen["paper"].completion_ids != seen["paper@1"].completion_ids
    (summed,) = client.rollouts([prompt], adapter="paper@1", rule="sum", sampling=SAMPLING)
    assert (summed.rule, seen["paper@1"].rule) == ("sum", "paper")
    assert difference(server, versions, summed, temperature=0.8, rule="sum") <= TOLERANCE
    assert difference(server, versions, summed, temperature=0.8) > TOLERANCE
    assert client.info()["adapters"] == {"paper": 2, "plain": 1, "ridge": 1}
    with pytest.raises(ServerError, match="min_weight_version is 3") as refusal:
        list(client.rollouts([prompt], adapter="paper", min_weight_version=3))
    assert refusal.value.status == 409


def test_versions_say_rule_and_features(client: RolloutClient) -> None:
    newest = {name: entry["versions"][-1] for name, entry in client.adapters().items()}
    found = {n: (newest[n]["rule"], newest[n]["features"]) for n in ("paper", "ridge", "plain")}
    assert found == {
        "paper": ("paper", "linear"),
        "ridge": ("ridge", "squared"),
        "plain": (None,) * 2,
    }
    assert client.info()["features"] == ["linear", "squared"]


def test_openai_routes_know_pushed_names(server: Server, versions: dict[str, Path]) -> None:
    """`name` is the newest version; both are listed, and may be unloaded by vLLM's route."""
    listed = [m["id"] for m in server.get("/v1/models")["data"]]
    assert sorted(listed) == sorted(["base", "paper", "plain", "ridge", *versions])
    texts = {}
    for name in ("paper", "paper@2", "paper@1"):
        answer = server.client.completions.create(
            model=name,
            prompt=random_tokens(40, 500, 3),
            max_tokens=LENGTH,
            temperature=0.8,
            seed=7,
            extra_body={"ignore_eos": True},
        )
        assert answer.model in (name, "paper@2")
        texts[name] = answer.choices[0].text
    assert texts["paper"] == texts["paper@2"] != texts["paper@1"]
    key = {"Authorization": f"Bearer {ADMIN_KEY}"}
    url = f"{server.url}/v1/unload_lora_adapter"
    with RolloutClient(server.url, admin_key=ADMIN_KEY) as client:
        client.push(versions["paper@1"], "unloaded")
    for status in (200, 404):
        answer = httpx.post(url, json={"lora_name": "unloaded"}, headers=key)
        assert answer.status_code == status
    assert httpx.post(url, json={"lora_name": "nobody"}, headers=key).status_code == 404
    assert httpx.post(url, json={"lora_name": "nobody"}).status_code == 401


def test_texts_as_prompts(client: RolloutClient) -> None:
    (record,) = client.rollouts(["Count the birds."], sampling={"max_tokens": 5})
    assert len(record.prompt_ids) == len("Count the birds.")
    assert record.adapter is None and record.weight_versions[0].version == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"token_ids": [[1, 2]], "colour": "red"}, "colour"),
        ({"token_ids": [[1, 2]], "sampling": {"stop": "x"}}, "stop"),
        ({"token_ids": [[1, 2]], "sampling": {"temperature": -1}}, "temperature"),
        ({"token_ids": [[1, 2]], "window_tokens": 33}, '"window_tokens: window of 33'),
        ({"token_ids": [[1, 2]], "pin_tokens": 3}, '"pin_tokens is 3, beyond'),
        ({"token_ids": [[1, 2]], "update": "sum"}, "needs a PTE adapter"),
        ({"token_ids": [[1, 2]], "evict_seed": 1}, '"evict_seed is 1, but nothing is drawn'),
        ({"token_ids": [[1, 2]], "evict": "all"}, '"evict must be one of oldest, random'),
        ({"token_ids": [[1, 99999]]}, "99999"),
        ({"token_ids": [[1]], "sampling": {"max_tokens": 4096}}, "--max-model-len 4096"),
        ({"token_ids": [[1], [2]], "group_id": ["a", "a"]}, "group_id"),
        ({"prompts": []}, "no prompts"),
    ],
)
def test_bad_requests_get_400(server: Server, body: dict, message: str) -> None:
    answer = httpx.post(f"{server.url}/pte/v1/rollouts", json=body, timeout=30)
    assert answer.status_code == 400 and message in answer.text, answer.text


def _put(server: Server, directory: Path, name: str = "broken", **fields: str) -> httpx.Response:
    files = {f.name: (f.name, f.read_bytes()) for f in directory.iterdir()}
    data = {"sha256": content_hash(file_hashes(directory)), **fields}
    return httpx.put(
        f"{server.url}/pte/v1/adapters/{name}",
        files=files,
        data=data,
        headers={"Authorization": f"Bearer {ADMIN_KEY}"},
        timeout=60,
    )


def test_broken_pushes_change_nothing(
    server: Server, client: RolloutClient, versions: dict[str, Path], tmp_path: Path
) -> None:
    before = (client.adapters(), server.get("/v1/models"))
    good, work = versions["paper@1"], tmp_path / "work"

    def fresh() -> Path:
        shutil.rmtree(work, ignore_errors=True)
        return Path(shutil.copytree(good, work))

    tensors = load_file(good / LORA_FILE)
    first = next(iter(tensors))
    nan = {**tensors, first: torch.full_like(tensors[first], float("nan"))}
    save_file(nan, fresh() / LORA_FILE)
    answer = _put(server, work)
    assert answer.status_code == 400 and "not finite" in answer.text
    save_file({**tensors, first: tensors[first][:, :-1].contiguous()}, fresh() / LORA_FILE)
    answer = _put(server, work)
    assert answer.status_code == 400 and "columns" in answer.text
    (fresh() / ENCODER_FILE).write_bytes((good / ENCODER_FILE).read_bytes()[:-100])
    answer = _put(server, work)
    assert answer.status_code == 400 and "safetensors" in answer.text
    (fresh() / CONFIG_FILE).unlink()
    assert f"{CONFIG_FILE} is missing" in _put(server, work).text
    for change, message in (
        ({"features": "cubed"}, "features must be one of linear, squared"),
        ({"features": "squared", "read": "value"}, "features squared need read key"),
    ):
        file = fresh() / CONFIG_FILE
        config = json.loads(file.read_text())
        config["pte"] |= change
        file.write_text(json.dumps(config))
        answer = _put(server, work)
        assert answer.status_code == 400 and message in answer.text
    fresh()
    for name in ("a b", "x" * 65, "base"):
        assert _put(server, work, name).status_code == 400, name
    assert "files that arrived" in _put(server, work, sha256="0" * 64).text
    assert "version must be" in _put(server, work, version="0").text
    assert _put(server, work, "paper", version="2").status_code == 409  # 2 has other files
    (work / LORA_FILE).rename(work / "adapter_model.bin")
    assert "unexpected part" in _put(server, work).text
    no_key = httpx.put(f"{server.url}/pte/v1/adapters/broken", timeout=30)
    assert no_key.status_code == 401
    assert (client.adapters(), server.get("/v1/models"))[0] == before[0]
    after = [m["id"] for m in server.get("/v1/models")["data"]]
    assert after == [m["id"] for m in before[1]["data"]]


def test_old_versions_leave_and_deletes(
    server: Server, client: RolloutClient, versions: dict[str, Path]
) -> None:
    for number in (1, 2, 3, 4, 9):
        path = versions["paper@1" if number % 2 else "paper@2"]
        wanted = 9 if number == 9 else None
        assert client.push(path, "many", wanted) == number
        assert client.push(path, "many", number) == number  # a retry
    assert [v["version"] for v in client.adapters()["many"]["versions"]] == [3, 4, 9]
    url = f"{server.url}/pte/v1/adapters"
    key = {"Authorization": f"Bearer {ADMIN_KEY}"}
    assert httpx.delete(f"{url}/many@4", headers=key).json() == {"deleted": ["many@4"]}
    assert httpx.delete(f"{url}/many", headers=key).json() == {"deleted": ["many@3", "many@9"]}
    assert httpx.get(f"{url}/many").status_code == 404
    with pytest.raises(ServerError, match="there is no adapter many"):
        list(client.rollouts([[5]], adapter="many"))
    # The same version with other weights: no stale prefix blocks.
    prompt = random_tokens(3 * BLOCK, 500, 4)
    for path in (versions["paper@1"], versions["paper@2"]):
        client.push(path, "again", 1)
        (record,) = client.rollouts([prompt], adapter="again", sampling=SAMPLING)
        assert difference(server, {"again@1": path}, record, temperature=0.8) <= TOLERANCE
        httpx.delete(f"{url}/again", headers=key).raise_for_status()


def test_disconnect_frees_everything(server: Server, client: RolloutClient) -> None:
    prompts = [random_tokens(20, 500, i) for i in range(12)]
    # Four finish early; the others would run for long.
    body = {
        "token_ids": prompts,
        "n": 2,
        "adapter": "paper",
        "sampling": {"max_tokens": 3500, "ignore_eos": True},
    }
    with httpx.stream("POST", f"{server.url}/pte/v1/rollouts", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        time.sleep(2.0)
        assert server.get("/pte/v1/requests")["running"]
    report = server.wait_idle()
    assert report["free_blocks"] == report["usable_blocks"] == NUM_BLOCKS
    counts = [v["rollouts"] for a in client.adapters().values() for v in a["versions"]]
    assert counts == [0] * len(counts)


@pytest.mark.slow  # faults/test_server_killed.py does so at more points, with a trainer
def test_kill_and_restart_in_the_middle(
    server: Server, client: RolloutClient, versions: dict[str, Path]
) -> None:
    """Adapters come back from the spool, and the client asks for the rest only."""
    prompts = [random_tokens(10 + 5 * i, 500, 40 + i) for i in range(4)]
    adapters = client.adapters()
    # Enough samples that some still wait when the first are there.
    stream = client.rollouts(prompts, n=12, adapter="ridge", sampling=SAMPLING)
    received = list(itertools.islice(stream, 3))
    server.kill()
    server.__enter__()  # the fixture's exit stops it
    received += stream
    assert {(r.group_id, r.index) for r in received} == set(itertools.product("0123", range(12)))
    assert len(received) == 48
    worst = max(
        difference(server, versions, record, temperature=0.8)
        for record in (received[0], received[20], received[-1])
    )
    assert worst <= TOLERANCE
    assert client.adapters() == adapters
    (again,) = client.rollouts([prompts[0]], adapter="ridge", sampling=SAMPLING, group_ids=["0"])
    same = next(r for r in received if (r.group_id, r.index) == ("0", 0))
    assert again.completion_ids == same.completion_ids
    server.wait_idle()
