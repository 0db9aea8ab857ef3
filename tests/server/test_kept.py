"""What is kept over HTTP is what records of the same request say, live, bounded and guarded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from pte_vllm.method.kept_positions import KeptPositions, kept_positions
from pte_vllm.server.kept_routes import MAX_TOKENS
from pte_vllm.wire.client import RolloutClient
from pte_vllm.wire.rollout import Rollout
from tests.harness.engine import BLOCK
from tests.harness.kinds import KEEP_THOUGHTS
from tests.harness.models import TINY, TINY_LAYERS, random_tokens
from tests.harness.server import IGNORE_EOS, WINDOW, Server
from tests.server.thinking import LENGTH, PROMPT, complete, finished

HEADS = TINY["num_key_value_heads"]
KEEP = BLOCK


@pytest.fixture(scope="module")
def server(
    shared: Callable[..., Server], tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> Server:
    return shared("open", {"ridge": adapters(tiny("qwen3"), rank=8, rule="ridge")})


def _get(server: Server, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}/pte/v1/thoughts/{path}", timeout=30)


def _kept(server: Server, path: str) -> dict:
    return _get(server, path).raise_for_status().json()


def _rollout(server: Server, **plan: object) -> tuple[Rollout, str]:
    """Return a record, and the engine's id of the request that it is of."""
    sampling = {"max_tokens": LENGTH, "seed": 1, "ignore_eos": True}
    with RolloutClient(server.url) as client:
        (record,) = client.rollouts([PROMPT], adapter="ridge", sampling=sampling, **plan)
    server.wait_idle()
    return record, server.get("/pte/v1/requests")["finished"][-1]["request_id"]


def _folds(record: Rollout) -> list[KeptPositions]:
    assert record.kept is not None
    return list(kept_positions(record.kept, record.plan, TINY_LAYERS, HEADS))


@pytest.mark.parametrize(
    "plan",
    [{"keep_tokens": 2 * KEEP}, {"keep_tokens": KEEP, "keep_score": "random", "evict_seed": 3}],
    ids=str,
)
def test_kept_is_what_the_record_says(server: Server, plan: dict) -> None:
    record, name = _rollout(server, **plan)
    folds = _folds(record)
    assert len(folds) - 1 == len(record.fold_events) >= 6
    for at in folds:
        found = _kept(server, f"{name}/kept?fold={at.folds}")
        assert (found["fold"], found["folds"]) == (at.folds, len(folds) - 1)
        assert (found["layers"], found["heads_per_layer"]) == (TINY_LAYERS, HEADS)
        assert found["heads"] == TINY_LAYERS * HEADS and "kept" not in found
        left = at.evicted or ((found["pinned"][1], found["pinned"][1]),)  # nothing yet
        assert found["evicted"] == [left[0][0], left[-1][1]]
        assert found["pinned"] == [0, 2 * BLOCK]
        if at.folds:
            assert found["at"] == record.fold_events[at.folds - 1].at
            assert found["window"] == [[found["evicted"][1], found["at"]]]
        assert found["questions"] == []
        before, after = (Counter(t.flatten().tolist()) for t in (at.candidates, at.kept))
        assert dict(zip(found["positions"], found["before"], strict=True)) == before
        held = dict(zip(found["positions"], found["after"], strict=True))
        assert {position: heads for position, heads in held.items() if heads} == after
        assert found["dropped"] == sorted(before.keys() - after.keys())
    latest = _kept(server, f"{name}/kept")
    assert latest == found and latest["status"] == "finished" and latest["request_id"] == name
    assert latest["keep_tokens"] == plan["keep_tokens"]
    assert latest["keep_score"] == plan.get("keep_score", "expected")


def test_heads_one_by_one(server: Server) -> None:
    record, name = _rollout(server, keep_tokens=KEEP)
    last = _folds(record)[-1]
    for layer in range(TINY_LAYERS):
        whole = _kept(server, f"{name}/kept?layer={layer}")
        assert [(row["layer"], row["head"]) for row in whole["kept"]] == [(layer, 0), (layer, 1)]
        assert [row["positions"] for row in whole["kept"]] == last.kept[layer].tolist()
        assert whole["heads"] == HEADS
        for head in range(HEADS):
            one = _kept(server, f"{name}/kept?layer={layer}&head={head}")
            assert one["kept"] == [whole["kept"][head]] and one["heads"] == 1
            assert one["dropped"] == last.dropped[layer, head].tolist()
            assert one["positions"] == last.candidates[layer, head].tolist()
    across = _kept(server, f"{name}/kept?head=1")
    assert across["heads"] == TINY_LAYERS and "kept" not in across
    assert sum(across["after"]) == TINY_LAYERS * KEEP


def test_while_it_runs_and_when_it_has_gone(server: Server) -> None:
    with server.client.completions.create(
        model="base",
        prompt=PROMPT,
        max_tokens=3000,
        stream=True,
        extra_body={**IGNORE_EOS, "vllm_xargs": {"pte_keep": KEEP}},
    ) as stream:
        chunks, tokens = iter(stream), list(PROMPT)
        name = next(chunks).id
        early = _kept(server, f"{name}/kept?fold=0")
        assert early["positions"] == [] and early["at"] is None and early["status"] == "running"
        for chunk in chunks:
            tokens += chunk.choices[0].token_ids or ()
            if len(tokens) > WINDOW + 6 * BLOCK:
                break
        live = _kept(server, f"{name}/kept")
        assert live["fold"] == live["folds"] >= 2 and sum(live["after"]) == 6 * KEEP
        (report,) = (
            r
            for r in server.get("/pte/v1/requests")["running"]
            if r["request_id"] == live["request_id"]
        )
        assert report["keep_tokens"] == KEEP
        told = _kept(server, f"{name}/tokens")
        assert told["num_tokens"] >= len(tokens)
    ended = finished(server, name)  # cancelled, and kept all the same
    latest = _kept(server, f"{name}/kept")
    assert latest["folds"] == ended["folds"] >= live["folds"]
    again = _kept(server, f"{name}/kept?fold={live['fold']}")
    assert (again["positions"], again["after"]) == (live["positions"], live["after"])
    assert httpx.delete(f"{server.url}/pte/v1/thoughts/{name}").status_code == 200
    for path in ("kept", "tokens"):
        answer = _get(server, f"{name}/{path}")
        assert answer.status_code == 404 and "--pte-keep-thoughts" in answer.text


def test_tokens_and_their_texts(server: Server) -> None:
    response = complete(server, "ridge", MAX_TOKENS + 9, n=2, pte_keep=KEEP)
    for choice in response.choices:
        wanted, found, texts = [*PROMPT, *choice.token_ids], [], []
        while len(found) < len(wanted):
            name = f"{response.id}-{choice.index}"
            part = _kept(server, f"{name}/tokens?first={len(found)}")
            assert (part["first"], part["num_tokens"]) == (len(found), len(wanted))
            assert len(part["token_ids"]) <= MAX_TOKENS
            found, texts = found + part["token_ids"], texts + part["texts"]
        assert found == wanted and len(texts) == len(wanted)
    assert _kept(server, f"{response.id}/tokens?first={10**6}")["token_ids"] == []
    body = {"model": "base", "tokens": wanted[:1]}
    answer = httpx.post(f"{server.url}/detokenize", json=body).raise_for_status().json()
    assert texts[0] == answer["prompt"]


def test_refusals(server: Server) -> None:
    plain, kept = complete(server, "base", 3), complete(server, "base", LENGTH, pte_keep=KEEP)
    finished(server, plain.id)
    folds = finished(server, kept.id)["folds"]
    for path, status, message in (
        ("cmpl-nothing/kept", 404, "--pte-keep-thoughts"),
        ("cmpl-nothing/tokens", 404, "--pte-keep-thoughts"),
        (f"{plain.id}/kept", 404, f"request {plain.id} keeps no tokens: it ran without pte_keep"),
        (f"{plain.id}/tokens", 404, "keeps no tokens"),
        (f"{kept.id}/kept?fold={folds + 1}", 404, f"there are {folds} so far"),
        (f"{kept.id}/kept?layer={TINY_LAYERS}", 400, "layer is 3, and this model has 3"),
        (f"{kept.id}/kept?head={HEADS}", 400, "head is 2, and this model has 2"),
        (f"{kept.id}/kept?fold=-1", 400, "fold"),
        (f"{kept.id}/kept?fold={2**70}", 400, "fold"),
        (f"{kept.id}/kept?head=x", 400, "head"),
        (f"{kept.id}/tokens?first=-1", 400, "first"),
    ):
        answer = _get(server, path)
        assert answer.status_code == status and message in answer.text, (path, answer.text)


def test_what_was_written_leaves_with_the_oldest(server: Server) -> None:
    def short(seed: int) -> str:
        prompt = random_tokens(20, 500, seed)
        return server.complete("base", prompt, 2, options={"pte_keep": KEEP}).id

    oldest = short(0)
    for seed in range(1, KEEP_THOUGHTS + 1):
        assert _get(server, f"{oldest}/tokens").status_code == 200
        short(seed)
    time.sleep(0.1)
    assert _get(server, f"{oldest}/tokens").status_code == 404
