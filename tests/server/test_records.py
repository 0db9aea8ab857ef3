"""Records of what any route answered: the same sequence as a rollout's, and the replay's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.probes import Probes
from pte_vllm.method.keep_marks import marks_of
from pte_vllm.server.sharing.answer_records import RecordStore
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import log_probs
from pte_vllm.wire.client import RolloutClient, ServerError
from pte_vllm.wire.episode import join_turns
from pte_vllm.wire.rollout import Rollout
from tests.harness.engine import BLOCK
from tests.harness.models import TINY_LAYERS, random_tokens
from tests.harness.parity import TOLERANCE, load_model
from tests.harness.server import IGNORE_EOS, Server

LENGTH = 170
PLAN = {"pte_keep": BLOCK, "pte_pin_tokens": 40}


@pytest.fixture(scope="module")
def server(
    shared: Callable[..., Server], tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> Server:
    return shared("open", {"ridge": adapters(tiny("qwen3"), rank=8, rule="ridge")})


def _post(server: Server, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers=headers, timeout=300)


def _completion(name: str, **fields: Any) -> dict[str, Any]:
    xargs = fields.pop("vllm_xargs", PLAN | {"pte_record": name})
    return {
        "model": "ridge",
        "prompt": random_tokens(60, 500, 5),
        "max_tokens": LENGTH,
        "temperature": 0.8,
        "seed": 3,
        "vllm_xargs": xargs,
        **IGNORE_EOS,
        **fields,
    }


def _off_by(server: Server, record: Rollout) -> float:
    """Return the largest difference between the record's log-probs and the replay's."""
    model = PTEModel(load_model(server.model), Adapter.load(server.adapters["ridge"]))
    try:
        marks = marks_of(record.kept, record.plan, TINY_LAYERS, 2)
        keeper = Keeper(model, Probes.load(server.probes))
        ids = list(record.token_ids)
        found = log_probs(
            model, ids, record.plan, keeper=keeper, marks=[marks], temperature=0.8
        ).logprobs[0]
    finally:
        model.detach()
    expected = found[len(record.prompt_ids) : len(ids)]
    sampled = torch.tensor(record.mask, dtype=torch.bool)
    return (torch.tensor(record.logprobs) - expected)[sampled].abs().max().item()


def test_every_route_is_recorded(server: Server) -> None:
    """Also streamed, and where the option comes as a header; the answer stays what it was."""
    prompt = random_tokens(60, 500, 5)
    plain = _post(server, "/v1/completions", _completion("", vllm_xargs=PLAN)).json()
    told = _post(server, "/v1/completions", _completion("one")).json()
    assert told["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]
    assert told["choices"][0]["logprobs"] is None
    streamed = _post(server, "/v1/completions", _completion("one", stream=True))
    assert streamed.status_code == 200 and "[DONE]" in streamed.text
    body = _completion("", vllm_xargs=PLAN)
    assert _post(server, "/v1/completions", body, **{"X-PTE-Record": "one"}).status_code == 200
    sampling = {"temperature": 0.8, "seed": 3, "max_tokens": LENGTH, "ignore_eos": True}
    generate = {
        "model": "ridge",
        "token_ids": prompt,
        "sampling_params": sampling | {"extra_args": PLAN | {"pte_record": "one"}},
    }
    assert _post(server, "/inference/v1/generate", generate).status_code == 200
    with RolloutClient(server.url) as client:
        records = client.records("one", drop=False)
        assert client.records("one") == records and len(records) == 4
        with pytest.raises(ServerError, match="no record is called one"):
            client.records("one")
    for record in records:
        assert list(record.completion_ids) == plain["choices"][0]["token_ids"]
        assert (record.finish_reason, record.group_id, record.adapter) == ("length", "one", "ridge")
        assert record.plan.keep_tokens == BLOCK and record.plan.pin_tokens == 40
        assert record.kept and record.rho and record.rule is None
        assert record.logprobs == pytest.approx(records[0].logprobs, abs=TOLERANCE)
    assert _off_by(server, records[0]) <= TOLERANCE


def test_choices_and_stops(server: Server) -> None:
    """Each choice has a record with what it kept; an answer ends where the route ended it."""
    body = _completion("several", n=3, stream=True)
    assert _post(server, "/v1/completions", body).status_code == 200
    chat = {
        "model": "base",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 20,
        "temperature": 1.0,
        "vllm_xargs": {"pte_record": "chat"},
    }
    answer = _post(server, "/v1/chat/completions", chat | {"logprobs": True}).json()
    with RolloutClient(server.url) as client:
        several, (said,) = client.records("several"), client.records("chat")
    assert [record.index for record in several] == [0, 1, 2]
    assert len({record.completion_ids for record in several}) == 3
    for record in several:
        assert _off_by(server, record) <= TOLERANCE
    shown = answer["choices"][0]["logprobs"]["content"]
    assert said.adapter is None and said.weight_versions[0].version == 0
    assert [entry["logprob"] for entry in shown] == pytest.approx(said.logprobs, abs=1e-5)
    assert answer["usage"]["completion_tokens"] == len(said.completion_ids)


def test_an_episode_of_requests_is_one_record(server: Server) -> None:
    """Turns that go on from each other's tokens, by any route, are replayed at once."""
    history = random_tokens(40, 500, 8)
    spans: list[int] = []
    for turn in range(4):
        if turn:
            question = random_tokens(25 + 9 * turn, 500, 70 + turn)
            spans += [len(history), len(history) + len(question)]
            history += question
        options = PLAN | {"pte_record": "episode"} | ({"pte_pin_spans": spans} if turn else {})
        body = _completion("", prompt=history, vllm_xargs=options, max_tokens=50)
        answer = _post(server, "/v1/completions", body).json()
        history += answer["choices"][0]["token_ids"]
    with RolloutClient(server.url) as client:
        episode = join_turns(client.records("episode"))
    assert list(episode.token_ids) == history and len(episode.plan.pin_spans) == 3
    assert _off_by(server, episode) <= TOLERANCE


def test_a_continuation_is_recorded_by_its_header(server: Server) -> None:
    """The plan is that of the earlier request; the record is this one's."""
    first = _post(server, "/v1/completions", _completion("", vllm_xargs=PLAN)).json()
    prompt = random_tokens(60, 500, 5) + first["choices"][0]["token_ids"]
    body = _completion("", prompt=prompt, vllm_xargs={"pte_state_id": first["id"]}, max_tokens=9)
    headers = {"X-PTE-Record": "later", "X-PTE-Window": "0"}
    assert _post(server, "/v1/completions", body, **headers).status_code == 200
    with RolloutClient(server.url) as client:
        (record,) = client.records("later")
    assert record.plan.keep_tokens == BLOCK and record.plan.pin_tokens == 40
    assert record.plan.window_tokens > 0 and len(record.completion_ids) == 9


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "x" * 129, 5])
def test_bad_names_are_refused(server: Server, name: Any) -> None:
    body = _completion("", vllm_xargs={"pte_record": name})
    answer = _post(server, "/v1/completions", body)
    assert answer.status_code == 400 and "pte_record must be a name" in answer.text


def test_records_are_dropped(server: Server) -> None:
    path = f"{server.url}/pte/v1/records/gone"
    assert httpx.delete(path).status_code == 404
    body = _completion("gone", max_tokens=2)
    assert _post(server, "/v1/completions", body).status_code == 200
    assert httpx.delete(path).json() == {"deleted": "gone", "records": 1}
    assert httpx.get(path).status_code == 404


def test_records_leave_for_newer_ones(tmp_path: Path) -> None:
    """Within a bound of bytes, whatever their name; two processes see the same."""
    file = tmp_path / "records.db"
    store, other = RecordStore(file, max_bytes=100), RecordStore(file, max_bytes=100)
    for number in range(4):
        (store, other)[number % 2].add("ab"[number % 2], bytes([number]) * 40)
    assert store.get("a") == (3, [b"\x02" * 40]) and other.get("b") == (4, [b"\x03" * 40])
    with pytest.raises(ValueError, match="exceeds the room"):
        store.add("a", b"x" * 101)
    assert other.drop("b") == 1 and store.get("b") == (0, []) and store.drop("b") == 0


def test_what_ends_meanwhile_stays() -> None:
    """Who forgets what it was told does not forget more."""
    store = RecordStore(None)
    store.add("a", b"1")
    last, told = store.get("a")
    store.add("a", b"2")
    assert told == [b"1"] and store.drop("a", last) == 1 and store.get("a")[1] == [b"2"]
