"""Two engines, with an API server each, answer as one does, also where each has two ranks."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from pte_vllm.method.plan import FoldPlan
from pte_vllm.wire.client import RolloutClient, ServerError
from tests.harness.engine import BLOCK
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE, replayed
from tests.harness.server import NUM_BLOCKS, WINDOW, Server
from tests.server.killed_process import assert_killed_process_ends
from tests.server.pushed import SAMPLING, difference, make_versions, push_all

ENGINES = 2
PROMPT = random_tokens(50, 500, 1)
KINDS = ["engines", pytest.param("engines_of_ranks", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def versions(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> dict[str, Path]:
    return make_versions(tiny("qwen3"), adapters)


@pytest.fixture(scope="module", params=KINDS)
def server(
    request: pytest.FixtureRequest, shared: Callable[..., Server], versions: dict[str, Path]
) -> Server:
    server = shared(request.param)
    push_all(server, versions)
    return server


@pytest.fixture
def client(server: Server) -> Iterator[RolloutClient]:
    with RolloutClient(server.url) as client:
        yield client


def _finished(server: Server, count: int) -> list[dict]:
    """Return the reports of the newest requests of each engine, which together are so many."""
    server.wait_idle()
    lines = server.get("/pte/v1/requests")["finished"]
    return [line for i in range(ENGINES) for line in lines if line["engine"] == i][-count:]


def test_all_engines_are_shown(server: Server) -> None:
    info, report = server.get("/pte/v1/info"), server.wait_idle()
    assert info["engines"] == ENGINES
    assert str(info["tensor_parallel_size"]) in server.command[-5:]
    assert report["usable_blocks"] == ENGINES * NUM_BLOCKS
    one = {"usable_blocks": NUM_BLOCKS, "free_blocks": NUM_BLOCKS, "running": 0}
    assert report["engines"] == [one] * ENGINES


@pytest.mark.parametrize(
    ("adapter", "plan"),
    [
        ("ridge", {"keep_tokens": 2 * BLOCK}),
        ("paper", {"keep_tokens": BLOCK, "keep_score": "random", "evict_seed": 3}),
        ("plain", {"window_tokens": 2 * BLOCK}),
        (None, {"window_tokens": 0}),
    ],
    ids=str,
)
def test_rollouts_spread_and_agree(
    server: Server,
    client: RolloutClient,
    versions: dict[str, Path],
    adapter: str | None,
    plan: dict,
) -> None:
    prompts = [PROMPT, random_tokens(7, 500, 2)]
    records = list(client.rollouts(prompts, n=3, adapter=adapter, sampling=SAMPLING, **plan))
    newest = {"paper": 2}.get(adapter or "", 1)
    for record in records:
        if adapter is not None:
            assert [span.version for span in record.weight_versions] == [newest]
        worst = difference(server, versions, record, temperature=0.8)
        print(f"{record.adapter}: {len(record.fold_events)} folds, max |Δ log p| {worst:.1e}")
        assert worst <= TOLERANCE
    lines = server.get("/pte/v1/requests")["finished"]
    ran = {line["engine"] for line in lines if line["adapter"] == records[0].adapter}
    assert ran == set(range(ENGINES))


@pytest.mark.parametrize("options", [{}, {"pte_keep": 2 * BLOCK}], ids=str)
def test_requests_go_on_where_their_state_is(server: Server, options: dict) -> None:
    """The engine that has a state gets what continues it, however the load is spread."""
    prompts = [random_tokens(50, 500, seed) for seed in range(4)]
    first = [server.complete("ridge", p, 200, options=options, seed=1) for p in prompts]
    where = {line["request_id"]: line["engine"] for line in _finished(server, 64)}
    for prompt, answer in zip(prompts, first, strict=True):
        longer = [*prompt, *answer.choices[0].token_ids, 7, 7, 7]
        ids = {"pte_state_id": answer.id}
        then = server.complete("ridge", longer, 70, options=ids, seed=5, logprobs=0)
        assert then.usage.prompt_tokens_details.cached_tokens == (len(longer) - 4) // BLOCK * BLOCK
        thoughts = server.get(f"/pte/v1/thoughts/{then.id}")
        plan = FoldPlan(
            pin_tokens=50,
            window_tokens=WINDOW,
            block_size=BLOCK,
            keep_tokens=options.get("pte_keep", 0),
        )
        assert thoughts["folds"] == plan.folded_blocks(len(longer) + 69) // plan.evict_blocks
        lines = _finished(server, 64)
        (engine,) = {line["engine"] for line in lines if line["request_id"].startswith(then.id)}
        assert engine == next(at for name, at in where.items() if name.startswith(answer.id))
    assert set(where.values()) == set(range(ENGINES))


def test_folds_of_all_engines_are_counted(server: Server) -> None:
    def folds() -> float:
        text = httpx.get(f"{server.url}/metrics", timeout=60).raise_for_status().text
        return sum(map(float, re.findall(r"^pte_folds_total\{.*\} (\S+)$", text, re.MULTILINE)))

    before = folds()
    names = [
        server.complete("base", random_tokens(40, 500, i), 300, options={}, seed=i).id
        for i in range(2)
    ]
    server.wait_idle()
    expected = sum(server.get(f"/pte/v1/thoughts/{name}")["folds"] for name in names)
    for _ in range(100):  # scrapes that come faster than one a second show older totals
        if folds() - before == expected:
            return
    raise AssertionError(f"{folds() - before} folds, not {expected}")


def test_what_no_engine_can_load_harms_nobody(
    server: Server, client: RolloutClient, versions: dict[str, Path], tmp_path: Path
) -> None:
    for file in versions["ridge@1"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pte_encoder.safetensors").write_bytes(b"half")
    with pytest.raises(ServerError) as error:
        client.push(tmp_path, "broken")
    assert error.value.status == 400
    (record,) = client.rollouts([[5, 6, 7]], adapter="ridge", sampling=SAMPLING)
    assert difference(server, versions, record, temperature=0.8) <= TOLERANCE


def test_a_push_reaches_samples_on_every_engine(
    server: Server, client: RolloutClient, versions: dict[str, Path]
) -> None:
    """Samples that run go on under the new version, wherever they run."""
    weights = [versions["ridge@1"], versions["paper@1"]]
    sampling = {"max_tokens": 1500, "temperature": 0.8, "seed": 7, "ignore_eos": True}
    options = {"n": 4, "adapter": "moving", "sampling": sampling, "in_flight": "switch_rebuild"}
    client.push(weights[0], "moving")
    with ThreadPoolExecutor(1) as pool, RolloutClient(server.url) as sampler:
        answer = pool.submit(lambda: list(sampler.rollouts([PROMPT], **options)))
        server.wait_running(4)
        server.pace(150)
        assert client.push(weights[1], "moving") == 2
        records = answer.result(300)
    lines = server.get("/pte/v1/requests")["finished"]
    ran = {line["engine"] for line in lines if line["adapter"] == "moving@2"}
    assert ran == set(range(ENGINES))
    for record in records:
        first, second = record.weight_versions
        assert (first.version, second.version) == (1, 2)
        for span in (first, second):
            tokens = list(record.token_ids[: len(PROMPT) + span.end])
            expected = replayed(
                *(server.model, weights[span.version - 1], tokens, record.plan), temperature=0.8
            )[len(PROMPT) - 1 :][span.start : span.end]
            found = torch.tensor(record.logprobs[span.start : span.end])
            assert (found - expected).abs().max().item() <= TOLERANCE


def test_nothing_is_left_of_aborted_requests(
    server: Server, request: pytest.FixtureRequest
) -> None:
    """Clients that leave in the middle take their blocks, slots and states along."""
    count = 500 if "engines_of_ranks" in request.node.name else 40

    async def leave(client: httpx.AsyncClient, i: int) -> None:
        body = {
            "model": ("ridge", "base", "plain")[i % 3],
            "prompt": random_tokens(20 + i % 40, 500, i),
            "max_tokens": 3000,
            "ignore_eos": True,
            "stream": True,
            "vllm_xargs": {"pte_keep": BLOCK * (i % 2)},
        }
        async with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            lines = 0
            async for _ in answer.aiter_lines():
                lines += 1
                if lines > 4 * (i % 40):
                    return

    async def crowd() -> None:
        async with httpx.AsyncClient(timeout=300, limits=httpx.Limits()) as client:
            await asyncio.gather(*(leave(client, i) for i in range(count)))

    asyncio.run(crowd())
    report = server.wait_idle()
    assert [one["free_blocks"] for one in report["engines"]] == [NUM_BLOCKS] * ENGINES


def test_page_says_which_engine_runs_what(server: Server, browser: Any) -> None:
    page = browser.new_page()
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{server.url}/pte")
    page.locator("#facts", has_text="engine 1").wait_for()
    page.locator("#finished th", has_text="engine").wait_for()
    answer = server.complete("base", random_tokens(40, 500, 3), 600, options={})
    where = {line["request_id"]: line["engine"] for line in _finished(server, 64)}
    engine = next(at for name, at in where.items() if name.startswith(answer.id))
    page.locator("#finished tr", has_text=answer.id).locator(f"td >> text='{engine}'").wait_for()
    assert not complaints


@pytest.mark.ends_server
def test_killed_worker_ends_all_engines(server: Server) -> None:
    """Whichever dies, a client hears of it, and no process is left that waits for it."""
    assert_killed_process_ends(server)
