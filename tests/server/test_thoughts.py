"""Thought states over HTTP are the replay's, live, bounded, and forgotten on demand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from pte_vllm.method.plan import FoldPlan
from pte_vllm.server.thought_routes import MAX_LISTENERS
from pte_vllm.wire.client import RolloutClient
from tests.harness.engine import BLOCK, drawn
from tests.harness.kinds import KEEP_THOUGHTS
from tests.harness.server import IGNORE_EOS, WINDOW, Server
from tests.server.thinking import LENGTH, PROMPT, complete, finished, replay


@pytest.fixture(scope="module")
def server(
    shared: Callable[..., Server], tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> Server:
    model = tiny("qwen3")
    served = {
        "paper": adapters(model, rank=8, rule="paper"),
        "ridge": adapters(model, rank=8, rule="ridge"),
        "few": adapters(
            model, rank=4, global_tokens=6, rule="sum", features="squared", layers=[0, 2]
        ),
    }
    return shared("open", served)


def _get(server: Server, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}/pte/v1/thoughts/{path}", timeout=30)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("paper", {}),
        ("ridge", {"pte_window": 2 * BLOCK}),
        ("few", {"pte_pin_tokens": 10}),
        ("paper", {"pte_update": "none"}),
        ("ridge", {"pte_evict": "random", "pte_evict_seed": 4}),
    ],
)
def test_thoughts_are_those_of_the_replay(server: Server, model: str, options: dict) -> None:
    response = complete(server, model, **options)
    found = finished(server, response.id)
    plan = FoldPlan(
        pin_tokens=options.get("pte_pin_tokens", 50),
        window_tokens=options.get("pte_window", WINDOW),
        block_size=BLOCK,
        **drawn(options),
    )
    tokens = [*PROMPT, *response.choices[0].token_ids]
    # The last token is sampled, never computed.
    expected = replay(server, model, tokens[:-1], plan, options.get("pte_update"))
    rho = [fold.rho.mean().item() for fold in expected.folds[0]]
    assert len(rho) >= 5 and found["rho"] == pytest.approx(rho, rel=1e-3, abs=1e-6)
    assert (found["folds"], found["folded_tokens"]) == (len(rho), len(rho) * BLOCK)
    assert found["id"] == response.id and found["adapter"] == model
    assert found["rule"] == options.get("pte_update", "sum" if model == "few" else model)
    assert (found["pin_tokens"], found["window_tokens"]) == (plan.pin_tokens, plan.window_tokens)
    assert found["num_tokens"] == len(tokens) - 1 and found["held_blocks"] == 0
    content = _get(server, f"{response.id}?format=safetensors").content
    state, reference = load(content)["state"], expected.states[:, 0]
    assert state.shape == reference.shape and state.dtype == torch.float32
    assert (state - reference).norm() / reference.norm() < 1e-3
    assert [entry["layer"] for entry in found["layers"]] == (
        [0, 2] if model == "few" else [0, 1, 2]
    )
    norms = [entry["norm"] for entry in found["layers"]]
    assert norms == pytest.approx(reference.flatten(1).norm(dim=-1).tolist(), rel=1e-3)
    events = _follow(iter(_get(server, f"{response.id}/events").text.splitlines()))
    told = [(e["at"], e.get("spans", [e.get("blocks")])) for kind, e in events if kind == "fold"]
    assert told == [(fold.at, [list(span) for span in fold.spans]) for fold in expected.folds[0]]
    for name, value in drawn(options).items():  # said only where blocks are drawn, or tokens kept
        option = "pte_keep" if name.startswith("keep") else "pte_evict"
        assert found.get(name, value) == value and (name in found) == (option in options)
    print(f"{model} {options}: {len(rho)} folds, rho {rho[0]:.3f} .. {rho[-1]:.3f}")


def test_safetensors_say_what_it_takes_to_read_them(server: Server, tmp_path: Path) -> None:
    response = complete(server, "few", 10)
    file = tmp_path / "state.safetensors"
    file.write_bytes(_get(server, f"{response.id}?format=safetensors").content)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["layers"]) == [0, 2]
        found = {name: opened.metadata()[name] for name in ("rule", "features", "read")}
        assert found == {"rule": "sum", "features": "squared", "read": "key"}


def test_rollouts_report_rho(server: Server) -> None:
    sampling = {"max_tokens": LENGTH, "seed": 1, "ignore_eos": True}
    with RolloutClient(server.url) as client:
        records = list(client.rollouts([PROMPT], n=3, adapter="ridge", sampling=sampling))
        (plain,) = client.rollouts([PROMPT], sampling=sampling)
        (score,) = client.score([records[0].token_ids], [50], adapter="ridge")
    assert len(plain.fold_events) >= 5 and all(e.rho is None for e in plain.fold_events)
    for record in [*records, score]:
        expected = replay(server, "ridge", list(record.token_ids[:-1]), record.plan)
        rho = [fold.rho.mean().item() for fold in expected.folds[0]]
        assert [event.rho for event in record.fold_events] == pytest.approx(rho, rel=1e-3)


def test_each_choice_has_its_thoughts(server: Server) -> None:
    many = complete(server, "paper", n=3)
    seen = [finished(server, f"{many.id}-{choice.index}")["rho"] for choice in many.choices]
    for choice, rho in zip(many.choices, seen, strict=True):
        plan = FoldPlan(pin_tokens=50, window_tokens=WINDOW, block_size=BLOCK)
        expected = replay(server, "paper", [*PROMPT, *choice.token_ids[:-1]], plan)
        means = [fold.rho.mean().item() for fold in expected.folds[0]]
        assert rho == pytest.approx(means, rel=1e-3)
    assert finished(server, many.id)["rho"] == seen[0]
    assert _get(server, f"{many.id}-3").status_code == 404
    chat = server.client.chat.completions.create(
        model="ridge", messages=[{"role": "user", "content": "Hello"}], max_tokens=9, n=2
    )
    for name in (chat.id, f"{chat.id}-1"):
        assert finished(server, name)["folds"] == 0


def test_without_a_thought_state(server: Server) -> None:
    response = complete(server, "base", 200)
    found = finished(server, response.id)
    assert (found["adapter"], found["rule"], found["layers"], found["rho"]) == (None, None, [], [])
    assert found["folds"] == found["folded_tokens"] // BLOCK > 0
    answer = _get(server, f"{response.id}?format=safetensors")
    assert answer.status_code == 404 and "no thought state" in answer.text


def test_unknown_forgotten_and_dropped(server: Server) -> None:
    for path in ("cmpl-nothing", "cmpl-nothing?format=safetensors", "cmpl-nothing/events"):
        answer = _get(server, path)
        assert answer.status_code == 404 and "--pte-keep-thoughts" in answer.text
    assert _get(server, "x?format=pickle").status_code == 400
    first = complete(server, "paper", 5)
    url = f"{server.url}/pte/v1/thoughts/{first.id}"
    assert httpx.delete(url, timeout=30).json() == {"deleted": first.id}
    assert httpx.delete(url, timeout=30).status_code == httpx.get(url).status_code == 404
    oldest = complete(server, "paper", 5)
    finished(server, oldest.id)
    for _ in range(KEEP_THOUGHTS):
        assert _get(server, oldest.id).status_code == 200
        newest = complete(server, "paper", 2)
        finished(server, newest.id)
    assert _get(server, oldest.id).status_code == 404


def test_folds_in_the_response(server: Server) -> None:
    """Clients that send an option of ours get it; for others the response is vLLM's."""
    response = complete(server, "paper", pte_window=2 * BLOCK)
    found = finished(server, response.id)
    told = response.kv_transfer_params["pte"]
    assert told == {
        "pin_tokens": len(PROMPT),
        "folds": found["folds"],
        "folded_tokens": found["folded_tokens"],
    }
    chat = server.client.chat.completions.create(
        model="paper",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=150,
        extra_body={**IGNORE_EOS, "vllm_xargs": {"pte_window": 2 * BLOCK}},
    )
    assert chat.kv_transfer_params["pte"]["folds"] == finished(server, chat.id)["folds"] > 0
    assert complete(server, "paper", 5).kv_transfer_params is None
    several = complete(server, "paper", 150, n=2, pte_window=2 * BLOCK).kv_transfer_params["pte"]
    assert [choice["index"] for choice in several.pop("choices")] == [0, 1]
    assert several == {"pin_tokens": len(PROMPT)}


def _follow(lines: Iterator[str]) -> Iterator[tuple[str, dict]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_events_of_a_request(server: Server) -> None:
    """There is an event for each fold, then the end, whoever else leaves."""

    async def run() -> tuple[list[tuple[str, dict]], str]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = await client.completions.create(
            model="ridge", prompt=PROMPT, max_tokens=1000, stream=True, extra_body=IGNORE_EOS
        )
        first = await anext(aiter(stream))
        url = f"{server.url}/pte/v1/thoughts/{first.id}/events"
        async with httpx.AsyncClient(timeout=60) as http:
            task = asyncio.create_task(_drain(stream))
            for _ in range(3):
                async with http.stream("GET", url) as left:
                    await anext(left.aiter_lines())
            async with http.stream("GET", url) as followed:
                assert followed.headers["content-type"].startswith("text/event-stream")
                lines = [line async for line in followed.aiter_lines()]
            await task
        return list(_follow(iter(lines))), first.id

    events, name = asyncio.run(run())
    found = finished(server, name)
    *folds, (last, end) = events
    assert last == "end" and end["folds"] == found["folds"] == len(folds) > 20
    assert [event["rho"] for _, event in folds] == pytest.approx(found["rho"])
    plan = FoldPlan(pin_tokens=50, window_tokens=WINDOW, block_size=BLOCK)
    for i, (kind, event) in enumerate(folds):
        assert kind == "fold" and event["fold"] == i + 1
        assert event["at"] == plan.first_fold + i * BLOCK <= event["num_tokens"]
        assert event["blocks"] == [2 + i, 3 + i]
    # Of a finished request: everything at once, and the end.
    again = list(_follow(iter(_get(server, f"{name}/events").text.splitlines())))
    assert [event["at"] for _, event in again[:-1]] == [event["at"] for _, event in folds]
    assert again[-1] == (last, end)


async def _drain(stream: openai.AsyncStream) -> None:
    async for _ in stream:
        pass


def test_running_requests_and_the_bound_on_listeners(server: Server) -> None:
    async def run() -> list[int]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = await client.completions.create(
            model="paper", prompt=PROMPT, max_tokens=4000, stream=True, extra_body=IGNORE_EOS
        )
        first = await anext(aiter(stream))
        thoughts = f"{server.url}/pte/v1/thoughts/{first.id}"
        url = f"{thoughts}/events"
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=99)) as http:
            assert (await http.delete(thoughts)).status_code == 409
            live = (await http.get(thoughts)).json()
            assert live["status"] == "running" and live["held_blocks"] > 0
            opened = [
                await http.send(http.build_request("GET", url), stream=True)
                for _ in range(MAX_LISTENERS + 1)
            ]
            statuses = [response.status_code for response in opened]
            events = opened[0].aiter_lines()  # arrive while it runs
            assert (await anext(events), (await anext(events))[:6]) == ("event: fold", "data: ")
            assert (await http.get(thoughts)).json()["status"] == "running"
            for response in opened:
                await response.aclose()
            for _ in range(100):  # who left makes room
                response = await http.send(http.build_request("GET", url), stream=True)
                await response.aclose()
                if response.status_code == 200:
                    break
                await asyncio.sleep(0.05)
            statuses.append(response.status_code)
        await stream.close()
        return statuses

    *accepted, refused, later = asyncio.run(run())
    assert set(accepted) == {200} and refused == 429 and later == 200


def test_cancelled_requests_keep_their_thoughts(server: Server) -> None:
    with server.client.completions.create(
        model="paper", prompt=PROMPT, max_tokens=3000, stream=True, extra_body=IGNORE_EOS
    ) as stream:
        name, count = "", 0
        for chunk in stream:
            name, count = chunk.id, count + 1
            if count > WINDOW + 3 * BLOCK:
                break
    found = finished(server, name)
    assert len(found["rho"]) == found["folds"] >= 1
    server.wait_idle()
