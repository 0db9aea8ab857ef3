"""Two API servers of one server answer as one does, whichever is asked."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pte_vllm.adapter.hashes import content_hash, file_hashes
from pte_vllm.wire.rollout import Rollout
from tests.harness.engine import BLOCK
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE
from tests.harness.server import Server
from tests.server.api_server import api_servers, connected
from tests.server.killed_process import assert_killed_process_ends
from tests.server.pushed import difference, make_versions

PROMPT = random_tokens(50, 500, 1)
SAMPLING = {"max_tokens": 200, "temperature": 0.8, "seed": 7, "ignore_eos": True}


@pytest.fixture(scope="module")
def versions(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> dict[str, Path]:
    return make_versions(tiny("qwen3"), adapters)


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server]) -> Server:
    return shared("engines")


@pytest.fixture
def both(server: Server) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    first, second = api_servers(server)
    with connected(server, first) as one, connected(server, second) as other:
        yield one, other


def _push(client: httpx.Client, name: str, path: Path, version: int | None = None) -> int:
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    data = {"sha256": content_hash(file_hashes(path))}
    if version is not None:
        data["version"] = str(version)
    answer = client.put(f"/pte/v1/adapters/{name}", files=files, data=data)
    assert answer.status_code in (200, 201), answer.text
    return int(answer.json()["version"])


def _complete(client: httpx.Client, model: str, prompt: list[int], **body: object) -> dict:
    body = {"model": model, "prompt": prompt, "ignore_eos": True, "return_token_ids": True, **body}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def _rollouts(client: httpx.Client, **body: object) -> list[Rollout]:
    body = {"token_ids": [PROMPT], "sampling": SAMPLING, **body}
    answer = client.post("/pte/v1/rollouts", json=body)
    assert answer.status_code == 200, answer.text
    return [Rollout.from_json(json.loads(line)) for line in answer.text.splitlines() if line]


def test_there_are_two(both: tuple[httpx.Client, httpx.Client]) -> None:
    for client in both:
        assert client.get("/pte/v1/info").json()["api_servers"] == 2


def test_a_push_is_seen_at_once(
    server: Server, both: tuple[httpx.Client, httpx.Client], versions: dict[str, Path]
) -> None:
    """Whoever takes a version or a deletion, the other one's next answer knows of it."""
    one, other = both
    paths = [versions["paper@1"], versions["ridge@1"]]
    for number in range(1, 5):  # old versions leave on the way
        assert _push((one, other)[number % 2], "policy", paths[number % 2]) == number
        asked = (other, one)[number % 2]
        shown = asked.get("/pte/v1/adapters/policy").json()
        assert shown["newest"] == number
        assert "policy" in [model["id"] for model in asked.get("/v1/models").json()["data"]]
        assert _complete(asked, "policy", PROMPT, max_tokens=2)["model"]
        (record,) = _rollouts(asked, adapter="policy", min_weight_version=number)
        assert record.adapter == f"policy@{number}"
        made = {f"policy@{number}": paths[number % 2]}
        assert difference(server, made, record, temperature=0.8) <= TOLERANCE
    assert [v["version"] for v in shown["versions"]] == [2, 3, 4]
    assert _push(other, "policy", paths[0], version=4) == 4  # the same files
    assert one.delete("/pte/v1/adapters/policy").status_code == 200
    assert other.get("/pte/v1/adapters/policy").status_code == 404
    body = {"model": "policy", "prompt": PROMPT, "max_tokens": 2}
    assert other.post("/v1/completions", json=body).status_code == 404
    assert _push(other, "policy", paths[1]) == 1
    (record,) = _rollouts(one, adapter="policy")
    made = {"policy@1": paths[1]}
    assert difference(server, made, record, temperature=0.8) <= TOLERANCE


def test_pushes_at_the_same_time(
    both: tuple[httpx.Client, httpx.Client], versions: dict[str, Path]
) -> None:
    """Two processes give no number twice, and the engines' numbers of adapters neither."""
    paths = [versions["paper@1"], versions["paper@2"]]

    def push(which: int) -> list[int]:
        return [_push(both[which], "busy", paths[(which + i) % 2]) for i in range(4)]

    with ThreadPoolExecutor(2) as pool:
        numbers = [number for found in pool.map(push, range(2)) for number in found]
    assert sorted(numbers) == list(range(1, 9))
    shown = [client.get("/pte/v1/adapters/busy").json() for client in both]
    assert shown[0] == shown[1]
    assert [v["version"] for v in shown[0]["versions"]] == [6, 7, 8]


@pytest.mark.parametrize("options", [{}, {"pte_keep": 2 * BLOCK}], ids=str)
def test_a_request_goes_on_at_the_other(
    both: tuple[httpx.Client, httpx.Client], options: dict[str, int]
) -> None:
    one, other = both
    first = _complete(one, "base", PROMPT, max_tokens=200, vllm_xargs=options, seed=1)
    longer = [*PROMPT, *first["choices"][0]["token_ids"], 7, 7, 7]
    ids = {"pte_state_id": first["id"]}
    then = _complete(other, "base", longer, max_tokens=40, vllm_xargs=ids, seed=2)
    details = then["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == (len(longer) - 4) // BLOCK * BLOCK
    if options:
        told = [c.get(f"/pte/v1/thoughts/{then['id']}/tokens").json() for c in both]
        assert told[0]["token_ids"] == [*longer, *then["choices"][0]["token_ids"]]
        assert told[0] == told[1]
    assert one.delete(f"/pte/v1/thoughts/{then['id']}").status_code == 200
    body = {"model": "base", "prompt": longer, "vllm_xargs": {"pte_state_id": then["id"]}}
    for client in both:
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert "forgotten" in answer.text
        assert client.get(f"/pte/v1/thoughts/{then['id']}/tokens").status_code == 404


def test_samples_hear_of_a_push_to_the_other(
    server: Server, both: tuple[httpx.Client, httpx.Client], versions: dict[str, Path]
) -> None:
    one, other = both
    _push(one, "moving", versions["ridge@1"])
    options = {"n": 2, "adapter": "moving", "in_flight": "switch_rebuild"}
    sampling = {**SAMPLING, "max_tokens": 1500}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: _rollouts(one, sampling=sampling, **options))
        server.wait_running(2)
        server.pace(100)
        assert _push(other, "moving", versions["paper@1"]) == 2
        records = asked.result(300)
    for record in records:
        assert [span.version for span in record.weight_versions] == [1, 2]


@pytest.mark.parametrize("named", [True, False], ids=["by id", "all"])
def test_aborts_reach_the_other(
    server: Server, both: tuple[httpx.Client, httpx.Client], named: bool
) -> None:
    one, other = both
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 3000, "ignore_eos": True}
    headers = {"X-Request-Id": f"long-{named}"}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(one.post, "/v1/completions", json=body, headers=headers)
        server.wait_running(1)
        ids = [f"cmpl-long-{named}-0"] if named else None
        answer = other.post("/abort_requests", json={"request_ids": ids})
        assert answer.json() == {"status": "aborted", "aborted": 1}
        assert asked.result(120).json()["choices"][0]["finish_reason"] == "abort"
    again = _complete(one, "base", PROMPT, max_tokens=20)  # what came later is not ended
    assert again["choices"][0]["finish_reason"] == "length"
    server.wait_idle()


def test_counters_never_go_back(server: Server, both: tuple[httpx.Client, httpx.Client]) -> None:
    """Each API server asks the engines at most once a second; they show the newest of all."""

    def folds(client: httpx.Client) -> float:
        text = client.get("/metrics").text
        return sum(map(float, re.findall(r"^pte_folds_total\{.*\} (\S+)$", text, re.MULTILINE)))

    body = {"model": "base", "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "n": 4}
    before = shown = folds(both[0])
    with ThreadPoolExecutor(1) as pool:
        url = f"{server.url}/v1/completions"
        asked = pool.submit(httpx.post, url, json=body, timeout=300)
        i = 0
        while not asked.done():
            found = folds(both[i % 2])
            assert found >= shown
            shown, i = found, i + 1
        assert asked.result().status_code == 200
    assert shown > before


def test_metrics_are_those_of_both(both: tuple[httpx.Client, httpx.Client]) -> None:
    def read(client: httpx.Client) -> dict[str, float]:
        families = text_string_to_metric_families(client.get("/metrics").text)
        found: dict[str, float] = {}
        for family in families:
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    before = read(both[0])
    for client in both:
        _rollouts(client, n=2)
    for _ in range(100):  # scrapes that come faster than one a second show older totals
        after = [read(client) for client in both]
        if all(found["pte_folds_total"] > before["pte_folds_total"] for found in after):
            break
        time.sleep(0.1)
    for found in after:
        assert found["pte_rollout_seconds_count"] - before.get("pte_rollout_seconds_count", 0) == 4
        assert found["pte_rollouts_in_flight"] == 0
        assert found["pte_adapters"] == len(both[0].get("/pte/v1/adapters").json()["adapters"])
        assert found["vllm:num_requests_running"] == 0


@pytest.mark.slow  # to start the server once more
@pytest.mark.ends_server
def test_a_stop_answers_what_runs(shared: Callable[..., Server]) -> None:
    """Whichever API server a request came to, its client gets what there is."""
    server = shared("engines")
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 3500, "ignore_eos": True}
    url = f"{server.url}/v1/completions"
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(httpx.post, url, json=body, timeout=300) for _ in range(6)]
        server.wait_running(6)
        server.processes()[0].terminate()
        reasons = [one.result(120).json()["choices"][0]["finish_reason"] for one in asked]
    assert reasons == ["abort"] * 6
    assert server._process is not None
    assert server._process.wait(60) == 0, server.log.read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.ends_server
def test_a_killed_one_ends_all(shared: Callable[..., Server]) -> None:
    assert_killed_process_ends(shared("engines"), "APIServer_")


@pytest.mark.slow
@pytest.mark.ends_server
def test_nothing_outlives_the_first_process(shared: Callable[..., Server]) -> None:
    """Killed alone, as when memory runs out, it takes what it started along."""
    processes = shared("engines").processes()
    processes[0].kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
