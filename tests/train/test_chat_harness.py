"""The harness of our worker, a chat with tools, at a scripted end of the library's contract."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from mcp.server.mcpserver import MCPServer
from verifiers.v1.task import TaskData

from pte_vllm.train.environments.process import PROGRAM

sys.path.append(str(PROGRAM.parent))
from pte_chat import PteChatConfig, PteChatHarness  # noqa: E402

CALLS = (
    ("add", '{"a": 2, "b": 3}', "5"),
    ("add", "[1]", "must be a JSON object"),
    ("add", "{", "are not JSON"),
    ("sub", "{}", "there is no tool tools_sub"),
)


@pytest.fixture(scope="module")
def tools() -> Iterator[str]:
    """A server of one tool."""
    server = MCPServer("tools")

    @server.tool()
    def add(a: int, b: int) -> str:
        return str(a + b)

    config = uvicorn.Config(server.streamable_http_app(), port=0, log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        assert thread.is_alive()
    port = running.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/mcp"
    running.should_exit = True
    thread.join()


class _Endpoint(ThreadingHTTPServer):
    """Answers chats by a script, and keeps what it was asked."""

    def __init__(self, answers: list[tuple[int, dict[str, Any]]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.asked = answers, list[dict[str, Any]]()


class _Handler(BaseHTTPRequestHandler):
    server: _Endpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append(json.loads(body))
        status, message = self.server.answers[len(self.server.asked) - 1]
        answer = {
            "id": "a",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }
        content = json.dumps(answer if status == 200 else message).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


def _play(
    answers: list[tuple[int, dict[str, Any]]], urls: dict[str, str], *, stopped: bool = False
) -> tuple[Any, list[dict[str, Any]]]:
    endpoint = _Endpoint(answers)
    thread = threading.Thread(target=endpoint.serve_forever)
    thread.start()
    trace: Any = SimpleNamespace(stop_condition="max_turns" if stopped else None)
    try:
        result = asyncio.run(
            PteChatHarness(PteChatConfig(id="pte-chat")).launch(
                SimpleNamespace(model="m"),
                trace,
                SimpleNamespace(),
                f"http://127.0.0.1:{endpoint.server_port}/v1",
                "secret",
                urls,
                TaskData(prompt="What is 2 + 3?", system_prompt="Be brief."),
            )
        )
    finally:
        endpoint.shutdown()
        thread.join()
        endpoint.server_close()
    return result, endpoint.asked


def test_tools_are_called_and_their_results_are_told(tools: str) -> None:
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": f"tools_{n}", "arguments": a}}
        for i, (n, a, _) in enumerate(CALLS)
    ]
    answers = [
        (200, {"role": "assistant", "content": None, "tool_calls": calls}),
        (200, {"role": "assistant", "content": "It is 5."}),
    ]
    result, asked = _play(answers, {"tools": tools})
    assert result.exit_code == 0 and len(asked) == 2
    assert [tool["function"]["name"] for tool in asked[0]["tools"]] == ["tools_add"]
    assert [m["role"] for m in asked[0]["messages"]] == ["system", "user"]
    told = asked[1]["messages"][3:]
    assert [m["tool_call_id"] for m in told] == [call["id"] for call in calls]
    for message, (_, _, expected) in zip(told, CALLS, strict=True):
        assert expected in message["content"]


def test_a_limit_ends_the_episode_and_an_error_fails_it() -> None:
    refusal = (400, {"error": {"message": "no more turns"}})
    for stopped, status in ((True, 0), (False, 1)):
        result, asked = _play([refusal], {}, stopped=stopped)
        assert result.exit_code == status and len(asked) == 1
        assert "tools" not in asked[0]
        assert ("no more turns" in result.stderr) == (not stopped)
