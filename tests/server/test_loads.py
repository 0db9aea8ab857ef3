"""Adapters are loaded, replaced and unloaded by any route: answers are those of what is there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from pte_vllm.server.adapters.families import surplus
from pte_vllm.server.options import ServiceConfig
from pte_vllm.wire.client import RolloutClient
from tests.harness.engine import BLOCK
from tests.harness.models import random_tokens
from tests.harness.server import Server
from tests.server.under_way import IN_FLIGHT, TEMPERATURE, check, post, under_way, wait_folds

PROMPT = random_tokens(3 * BLOCK + 9, 500, 71)


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server]) -> Server:
    return shared("open")


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> dict[str, Path]:
    model = tiny("qwen3")
    return {
        "plain": adapters(model, plain=True, rank=8, seed=1),
        "plain too": adapters(model, plain=True, rank=8, seed=2),
        "pte": adapters(model, rank=8, rule="ridge", seed=3),
        "pte too": adapters(model, rank=8, rule="paper", seed=4),
    }


def write(adapter: Path, directory: Path) -> None:
    """Have the directory hold this adapter's files, and no others."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(adapter, directory)


def load(server: Server, name: str, directory: Path, **options: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(directory), **options}
    return post(server, "/v1/load_lora_adapter", body)


def unload(server: Server, name: str) -> httpx.Response:
    return post(server, "/v1/unload_lora_adapter", {"lora_name": name})


def ask(server: Server, name: str, adapter: Path) -> int:
    """Check an answer against the replay; return how many tokens of the prompt were cached."""
    answer = server.complete(
        name, PROMPT, 40, options={}, temperature=TEMPERATURE, logprobs=0, seed=3
    )
    choice = answer.choices[0]
    check(server, adapter, PROMPT, choice.token_ids, choice.logprobs.token_logprobs)
    return answer.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize(
    ("before", "after", "in_place"),
    [
        ("plain", "plain too", False),
        ("pte", "pte too", False),
        ("plain", "pte", False),
        ("pte", "plain", False),
        ("plain", "plain too", True),
        ("pte", "pte too", True),
        ("plain", "pte", True),
    ],
)
def test_a_name_means_what_it_was_loaded_with_last(
    server: Server, made: dict[str, Path], tmp_path: Path, before: str, after: str, in_place: bool
) -> None:
    """The name, and the directory too, are those of another adapter before."""
    directory = tmp_path / "adapter"
    write(made[before], directory)
    assert load(server, "x", directory).status_code == 200
    assert ask(server, "x", made[before]) == 0
    assert ask(server, "x", made[before]) == 3 * BLOCK
    write(made[after], directory)
    if not in_place:
        assert unload(server, "x").status_code == 200
    answer = load(server, "x", directory, load_inplace=in_place)
    assert answer.status_code == 200, answer.text
    assert ask(server, "x", made[after]) == 0
    assert ask(server, "x", made[after]) == 3 * BLOCK
    assert unload(server, "x").status_code == 200


def test_reloads_of_one_name_are_versions(
    server: Server, made: dict[str, Path], tmp_path: Path
) -> None:
    """As TRL's trainer loads: one name, `load_inplace` from the first time on."""
    directory = tmp_path / "adapter"
    for number, name in enumerate(("pte", "pte too", "plain"), start=1):
        write(made[name], directory)
        answer = load(server, "trl", directory, load_inplace=True)
        assert answer.status_code == 200, answer.text
        if name != "plain":
            assert f"version {number}" in answer.text
        ask(server, "trl", made[name])
    assert load(server, "trl@2", directory, load_inplace=True).status_code == 400
    ask(server, "trl@2", made["pte too"])
    assert unload(server, "trl").status_code == 200
    assert unload(server, "trl").status_code == 404


@pytest.mark.parametrize("route", ["ours", "vLLM's", "SageMaker's"])
def test_a_version_can_be_deleted_by_any_route(
    server: Server, made: dict[str, Path], route: str
) -> None:
    def delete(spec: str) -> int:
        if route == "vLLM's":
            return unload(server, spec).status_code
        path = f"/pte/v1/adapters/{spec}" if route == "ours" else f"/adapters/{spec}"
        return httpx.delete(server.url + path, timeout=60).status_code

    def listed() -> set[str]:
        return {model["id"] for model in server.get("/v1/models")["data"]}

    with RolloutClient(server.url) as client:
        client.push(made["pte"], "pol")
        client.push(made["pte too"], "pol")
    assert {"pol", "pol@1", "pol@2"} <= listed()
    assert delete("pol@2") == 200
    assert delete("pol@2") == 404
    assert {"pol", "pol@1"} <= listed() and "pol@2" not in listed()
    ask(server, "pol", made["pte"])
    assert delete("pol") == 200
    assert delete("pol") == delete("pol@1") == delete("never") == 404
    assert not {name for name in listed() if name.startswith("pol")}
    body = {"model": "pol", "prompt": PROMPT, "max_tokens": 1}
    assert post(server, "/v1/completions", body).status_code == 404


def test_every_load_checks(server: Server, made: dict[str, Path], tmp_path: Path) -> None:
    """A broken adapter gets 400 with a reason by SageMaker's route as well."""
    write(made["pte"], tmp_path / "broken")
    (tmp_path / "broken/pte_encoder.safetensors").write_bytes(b"no tensors")
    for path, body in (
        ("/v1/load_lora_adapter", {"lora_name": "b", "lora_path": str(tmp_path / "broken")}),
        ("/adapters", {"name": "b", "src": str(tmp_path / "broken")}),
    ):
        answer = post(server, path, body)
        assert answer.status_code == 400 and "pte_encoder" in answer.text, answer.text


def _edited(adapter: Path, directory: Path, **changes: Any) -> Path:
    """Write the adapter with another `adapter_config.json`."""
    write(adapter, directory)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


@pytest.mark.parametrize("kind", ["plain", "pte"])
@pytest.mark.parametrize("fault", ["rank", "DoRA", "PiSSA", "no weights", "no config", "nothing"])
def test_a_wrong_directory_gets_400_and_a_reason_by_every_route(
    server: Server,
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    made: dict[str, Path],
    tmp_path: Path,
    kind: str,
    fault: str,
) -> None:
    """Not 500, which clients try again, nor 404, which to them means that there is no route."""
    directory = tmp_path / "adapter"
    if fault == "rank":
        options = {"plain": True} if kind == "plain" else {"rule": "paper"}
        write(adapters(tiny("qwen3"), rank=16, seed=5, **options), directory)
    else:
        changes = {"DoRA": {"use_dora": True}, "PiSSA": {"init_lora_weights": "pissa"}}
        _edited(made[kind], directory, **changes.get(fault, {}))
    if fault == "no weights":
        (directory / "adapter_model.safetensors").unlink()
    if fault == "no config":
        (directory / "adapter_config.json").unlink()
    if fault == "nothing":
        shutil.rmtree(directory)
    reason = {
        "rank": r"[Rr]ank 16 .*8",
        "DoRA": "DoRA|use_dora",
        "PiSSA": "init_lora_weights",
        "no weights": "adapter_model.safetensors",
        "no config": "adapter_config.json",
        "nothing": "lora_path|directory|adapter_config.json",
    }[fault]
    listed = [model["id"] for model in server.get("/v1/models")["data"]]
    later = 404 if fault.startswith("no") else 400  # files may lag: prime-rl tries again on 404
    for path, body, status in (
        ("/v1/load_lora_adapter", {"lora_name": "b", "lora_path": str(directory)}, 400),
        ("/adapters", {"name": "b", "src": str(directory)}, 400),
        ("/load_lora_adapter", {"lora_name": "b", "lora_path": str(directory)}, later),
        ("/skyrl/v1/load_lora_adapter", {"lora_name": "b", "lora_path": str(directory)}, later),
    ):
        for options in ({}, {"load_inplace": True}):
            answer = post(server, path, {**body, **options})
            assert answer.status_code == status, (path, answer.status_code, answer.text)
            assert re.search(reason, answer.text), (path, answer.text)
            assert "stack trace" not in answer.text, answer.text  # of the server's log
    assert [model["id"] for model in server.get("/v1/models")["data"]] == listed


def test_numbered_names_do_not_pile_up(server: Server, made: dict[str, Path]) -> None:
    """As AReaL loads: `actor-v{N}` for every step, and nothing is ever unloaded."""
    keep = ServiceConfig.keep_loaded
    assert load(server, "critic-v1", made["plain"]).status_code == 200  # of another family
    assert load(server, "actor", made["plain"]).status_code == 200

    def actors() -> list[str]:
        listed = [model["id"] for model in server.get("/v1/models")["data"]]
        return [name for name in listed if name.startswith("actor-")]

    def step(number: int) -> None:
        answer = load(server, f"actor-v{number}", made["pte"])
        assert answer.status_code == 200, answer.text

    def generate() -> httpx.Response:
        body = {"model": "actor-v8", "prompt": PROMPT, "max_tokens": IN_FLIGHT, "ignore_eos": True}
        return post(server, "/v1/completions", body)

    for number in range(8, 8 + keep):
        step(number)
    with under_way(generate) as results:
        wait_folds(server, 1)
        step(8 + keep)
        step(9 + keep)
        assert actors() == [f"actor-v{n}" for n in (8, *range(10, 10 + keep))]
    assert results[0].status_code == 200
    server.wait_idle()
    step(10 + keep)
    assert actors() == [f"actor-v{n}" for n in range(11, 11 + keep)]
    for name in (*actors(), "actor", "critic-v1"):
        assert unload(server, name).status_code == 200


@pytest.mark.parametrize(
    ("newest", "keep", "gone"),
    [
        ("a-v10", 2, ["a-v2", "a-v3"]),  # by number, not by text
        ("a-v2", 2, ["a-v3"]),  # what was just loaded stays
        ("a-v10", 0, []),
        ("a-v10", 9, []),
        ("b-v1", 1, []),
        ("a", 1, []),
        ("a-v-v1", 1, []),
    ],
)
def test_which_of_a_family_are_surplus(newest: str, keep: int, gone: list[str]) -> None:
    names = ["a", "a-v10", "a-v2", "b-v1", "a-v9", "a-v3", "a-vx", "a-v-v1", "ba-v1"]
    assert surplus(names, newest, keep) == gone


@pytest.mark.parametrize("options", [{}, {"vllm_xargs": {"pte_window": 0}}])
def test_beam_search_is_refused(server: Server, options: dict[str, Any]) -> None:
    beams = {"model": "base", "use_beam_search": True, "n": 2, "max_tokens": 4, **options}
    for path, body in (
        ("/v1/completions", {**beams, "prompt": PROMPT}),
        ("/v1/chat/completions", {**beams, "messages": [{"role": "user", "content": "Hm?"}]}),
    ):
        answer = post(server, path, body)
        assert answer.status_code == 400 and "use_beam_search" in answer.text, answer.text
