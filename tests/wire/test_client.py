"""The client shows its patience to a small HTTP server that follows a script."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pte_vllm.method.plan import FoldPlan
from pte_vllm.wire.client import RolloutClient, RolloutMismatch, ServerError
from pte_vllm.wire.rollout import Rollout, WeightSpan

INFO = {
    "plan": {
        "window_tokens": 64,
        "evict_ratio": 0.25,
        "block_size": 16,
        "max_prompt_tokens": None,
    }
}
Step = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class Script:
    """Answers the n-th POST with the n-th step; the info route always answers."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.bodies: list[dict[str, Any]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                send(self, 200, INFO)

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                script.bodies.append(body)
                script.steps.pop(0)(self, body)

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def send(
    handler: BaseHTTPRequestHandler, status: int, value: dict[str, Any], **headers: str
) -> None:
    body = json.dumps(value).encode()
    handler.send_response(status)
    for name, text in headers.items():
        handler.send_header(name.replace("_", "-"), text)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def refuse(status: int, message: str, **headers: str) -> Step:
    return lambda handler, body: send(handler, status, {"error": {"message": message}}, **headers)


def record(prompt: list[int], group_id: str, index: int, **pins: Any) -> dict[str, Any]:
    plan = FoldPlan(pin_tokens=len(prompt), window_tokens=64, block_size=16)
    rollout = Rollout(
        prompt_ids=tuple(prompt),
        completion_ids=(index + 2, 3),
        logprobs=(-0.5, -0.25),
        mask=(1, 1),
        finish_reason="stop",
        adapter=None,
        weight_versions=(WeightSpan(version=0, start=0, end=2),),
        plan=plan,
        group_id=group_id,
        index=index,
        num_preempted=0,
    )
    line = rollout.to_json()
    return line | {"plan": line["plan"] | pins}


def answer(count: int | None = None, *, then: bytes = b"", cut: bool = False, **pins: Any) -> Step:
    """Stream the first `count` of the samples asked for; `cut` drops the connection after them."""

    def step(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        lines = [
            json.dumps(record(prompt, group_id, index, **pins)).encode()
            + b"\n\n"  # a blank: keep-alive
            for prompt, group_id, wanted in zip(
                body["token_ids"], body["group_id"], body["samples"], strict=True
            )
            for index in wanted
        ]
        for chunk in [*lines[:count], *([then] if then else [])]:
            handler.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        if cut:
            handler.close_connection = True
            return
        handler.wfile.write(b"0\r\n\r\n")

    return step


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.http.shutdown()
    script.http.server_close()


@pytest.fixture
def client(script: Script) -> Iterator[RolloutClient]:
    with RolloutClient(script.url, timeout_s=10.0, retry_s=3.0) as client:
        yield client


PROMPTS = [[5, 6, 7], [8, 9]]


def test_imports_neither_vllm_nor_torch() -> None:
    code = "import sys, pte_vllm.wire.client; print(*{'vllm', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_pins_in_words(script: Script, client: RolloutClient) -> None:
    """They are said once for all prompts; a record has them in numbers, within its prompt."""

    def ask(pin: Any, pins: dict[str, Any]) -> FoldPlan:
        script.steps = [answer(**pins)]
        (found,) = client.rollouts([[5, 6, 7, 8]], pin=pin)
        return found.plan

    numbers = {"pin_tokens": 2, "pin_spans": [(3, 4)]}
    assert ask("first_and_last_user", numbers).pin_spans == ((3, 4),)
    assert ask("prompt", {}).pin_tokens == 4
    for pin, pins in (("first_and_last_user", {"pin_spans": [(4, 5)]}), ("prompt", numbers)):
        with pytest.raises(RolloutMismatch, match="plan is"):
            ask(pin, pins)
    assert {"pin", "pin_tokens", "pin_spans"} & set(script.bodies[0]) == {"pin"}
    with pytest.raises(ValueError, match="pin must be one of prompt, first_and_last_user"):
        ask("all", {})
    with pytest.raises(ValueError, match="pin prompt says what is pinned"):
        client.rollouts([[5]], pin="prompt", pin_tokens=1)


def test_resumes_with_what_is_missing(script: Script, client: RolloutClient) -> None:
    dying = b'{"error": {"message": "the engine has died", "code": 503}}\n'
    script.steps = [answer(3, cut=True), answer(1, then=dying), refuse(502, "gone"), answer()]
    records = list(client.rollouts(PROMPTS, n=3, group_ids=["a", "b"]))
    assert [(r.group_id, r.index) for r in records] == [
        (group, index) for group in "ab" for index in range(3)
    ]
    asked = [(body["group_id"], body["samples"]) for body in script.bodies]
    assert asked == [
        (["a", "b"], [[0, 1, 2], [0, 1, 2]]),
        (["b"], [[0, 1, 2]]),
        (["b"], [[1, 2]]),
        (["b"], [[1, 2]]),
    ]


def test_retry_after_is_honoured(script: Script, client: RolloutClient) -> None:
    script.steps = [refuse(429, "slow down", Retry_After="1"), answer()]
    start = time.monotonic()
    assert len(list(client.rollouts(PROMPTS))) == 2
    assert time.monotonic() - start >= 1.0


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 500])
def test_refusals_are_not_retried(script: Script, client: RolloutClient, status: int) -> None:
    script.steps = [refuse(status, "window_tokens is odd"), answer()]
    with pytest.raises(ServerError, match="window_tokens is odd") as error:
        list(client.rollouts(PROMPTS))
    assert error.value.status == status and len(script.bodies) == 1


def test_gives_up_in_the_end(script: Script, client: RolloutClient) -> None:
    script.steps = [refuse(503, "starting")] * 50
    start = time.monotonic()
    with pytest.raises(ServerError, match="503 starting"):
        list(client.rollouts(PROMPTS))
    assert time.monotonic() - start < 6.0
    assert 2 < len(script.bodies) < 20


def test_nobody_there() -> None:
    with RolloutClient("http://127.0.0.1:9", retry_s=0.5) as client:
        with pytest.raises(ServerError, match="ConnectError"):
            client.info()
        with pytest.raises(ServerError, match="not ready after 0 s"):
            client.wait_ready(timeout_s=0.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt_ids": [5, 6, 6]}, "prompt_ids are not the tokens"),
        ({"group_id": "c"}, "was not asked for"),
        ({"index": 1}, "was not asked for"),
        ({"adapter": "policy@1"}, "adapter is policy@1"),
        ({"finish_reason": "scored"}, "finish_reason is scored"),
        ({"logprobs": [-1.0]}, "malformed record: logprobs has 1 values"),
        ({"logprobs": None}, "malformed record: logprobs: .* valid array"),
        (
            {"plan": {"pin_tokens": 3, "window_tokens": 32, "evict_ratio": 0.25, "block_size": 16}},
            "plan is",
        ),
    ],
)
def test_mismatched_records_raise(
    script: Script, client: RolloutClient, changed: dict[str, Any], message: str
) -> None:
    line = json.dumps({**record(PROMPTS[0], "0", 0), **changed}).encode() + b"\n"
    script.steps = [answer(0, then=line)]
    with pytest.raises(RolloutMismatch, match=message):
        list(client.rollouts([PROMPTS[0]]))
    assert len(script.bodies) == 1


def test_draws_are_those_asked_for(script: Script, client: RolloutClient) -> None:
    """A server of an earlier version would refuse the fields: only who draws sends them."""
    drawn = {**record(PROMPTS[0], "0", 0)["plan"], "evict": "random", "evict_seed": 4}
    right, wrong = (
        json.dumps({**record(PROMPTS[0], "0", 0), "plan": plan}).encode() + b"\n"
        for plan in (drawn, drawn | {"evict_seed": 5})
    )
    script.steps = [answer(0, then=line) for line in (right, wrong, right)]
    asked = {"evict": "random", "evict_seed": 4}
    (found,) = client.rollouts([PROMPTS[0]], **asked)
    assert (found.plan.evict, found.plan.evict_seed) == ("random", 4)
    for options in (asked, {}):
        with pytest.raises(RolloutMismatch, match="plan is"):
            list(client.rollouts([PROMPTS[0]], **options))
    sent = [{name: body[name] for name in asked if name in body} for body in script.bodies]
    assert sent == [asked, asked, {}]


def test_the_rule_is_the_one_asked_for(script: Script, client: RolloutClient) -> None:
    def line(rule: str | None) -> bytes:
        return json.dumps({**record(PROMPTS[0], "0", 0), "rule": rule}).encode() + b"\n"

    script.steps = [answer(0, then=line(rule)) for rule in ("sum", "ridge", "ridge", None)]
    for asked, rule in (("sum", "sum"), (None, "ridge")):  # None: whatever the adapter has
        (found,) = client.rollouts([PROMPTS[0]], rule=asked)
        assert (script.bodies[-1]["update"], found.rule) == (asked, rule)
    for said in ("ridge", "not said"):
        with pytest.raises(RolloutMismatch, match=f"rule is {said}, asked for was sum"):
            list(client.rollouts([PROMPTS[0]], rule="sum"))


def test_what_a_new_version_does_is_passed_on(script: Script, client: RolloutClient) -> None:
    script.steps = [answer(), answer()]
    list(client.rollouts([PROMPTS[0]]))
    list(client.rollouts([PROMPTS[0]], in_flight="switch_rebuild", max_staleness=2))
    sent = [(body["in_flight"], body["max_staleness"]) for body in script.bodies]
    assert sent == [("pin", None), ("switch_rebuild", 2)]


def test_a_sample_that_comes_twice(script: Script, client: RolloutClient) -> None:
    line = json.dumps(record(PROMPTS[0], "0", 0)).encode() + b"\n"
    script.steps = [answer(1, then=line)]
    with pytest.raises(RolloutMismatch, match="came twice"):
        list(client.rollouts([PROMPTS[0]], n=2))


def test_closing_early_closes_the_connection(script: Script, client: RolloutClient) -> None:
    script.steps = [answer(), answer()]
    stream = client.rollouts(PROMPTS, n=2)
    next(stream)
    stream.close()
    assert len(list(client.rollouts(PROMPTS))) == 2


def test_arguments(client: RolloutClient) -> None:
    with pytest.raises(ValueError, match="group_ids must be 2 different names"):
        client.rollouts(PROMPTS, group_ids=["a", "a"])
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        client.rollouts(PROMPTS, n=0)
    with pytest.raises(ValueError, match="prompt_tokens 3"):
        client.score([[1, 2, 3]], [3])
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        client.push("no-such-directory", "a", 1)
