"""The real server answers exactly, refuses bad input, and is none the worse for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import httpx
import openai
import pytest

from tests.harness.engine import BLOCK, drawn
from tests.harness.models import random_tokens
from tests.harness.server import NUM_BLOCKS, WINDOW, Server
from tests.server.under_way import TEMPERATURE, check


@pytest.fixture(scope="module")
def server(
    shared: Callable[..., Server], tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> Server:
    model = tiny("qwen3")
    served = {
        "paper": adapters(model, rank=8, rule="paper"),
        "ridge": adapters(model, rank=8, rule="ridge"),
        "plain": adapters(model, plain=True, rank=8),
    }
    return shared("open", served)


def _complete(server: Server, model: str, prompt: list[int], tokens: int, **options: object):
    return server.complete(
        model, prompt, tokens, options=options, temperature=TEMPERATURE, logprobs=0, seed=3
    )


def _check(server: Server, model: str, prompt: list[int], response, **options: object) -> None:
    choice = response.choices[0]
    check(
        server,
        server.adapters.get(model),
        prompt,
        choice.token_ids,
        choice.logprobs.token_logprobs,
        pin_tokens=options.get("pte_pin_tokens"),
        window_tokens=options.get("pte_window", WINDOW),
        rule=options.get("pte_update"),
        **drawn(options),
    )


def test_parity_over_http(server: Server) -> None:
    prompt, length = random_tokens(50, 500, 1), WINDOW + 8 * BLOCK + 9
    for model in ("base", "paper", "ridge", "plain"):
        _check(server, model, prompt, _complete(server, model, prompt, length))
    for options in (
        {"pte_window": 2 * BLOCK},
        {"pte_window": 0},
        {"pte_pin_tokens": 10},
        {"pte_pin_tokens": 4, "pte_window": WINDOW + BLOCK},  # attention sinks: one block, no more
        {"pte_update": "sum"},
        {"pte_evict": "random", "pte_evict_seed": 5},
    ):
        response = _complete(server, "paper", prompt, length, **options)
        _check(server, "paper", prompt, response, **options)


def test_requests_route_shows_a_bounded_cache(server: Server) -> None:
    response = _complete(server, "paper", random_tokens(50, 500, 2), 800)
    report = server.wait_idle()
    record = next(r for r in report["finished"] if r["request_id"].startswith(response.id))
    assert record["adapter"] == record["rule"] == "paper"
    assert record["peak_blocks"] <= 2 + 4 + 1
    assert record["folded_tokens"] == record["folds"] * BLOCK > 600
    assert server.get("/pte/v1/info")["plan"]["window_tokens"] == WINDOW


@pytest.mark.parametrize("options", [{}, {"pte_window": 2 * BLOCK}], ids=["plain", "options"])
class TestOpenAIClient:
    """OpenAI's own client gets its answers, with and without options of ours."""

    MESSAGES: ClassVar = [{"role": "user", "content": "Count the birds on the roof."}]

    def test_chat(self, server: Server, options: dict) -> None:
        answer = self._chat(server, options, max_tokens=150, n=3, temperature=1.0)
        assert len({choice.message.content for choice in answer.choices}) == 3
        assert all(choice.finish_reason == "length" for choice in answer.choices)
        assert answer.usage.completion_tokens == 3 * 150

    def test_chat_streaming(self, server: Server, options: dict) -> None:
        kwargs = {"max_tokens": 200, "temperature": 0.0}
        whole = self._chat(server, options, **kwargs)
        stream = self._chat(
            server, options, stream=True, stream_options={"include_usage": True}, **kwargs
        )
        chunks = list(stream)
        assert chunks[-1].usage.completion_tokens == 200
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content

    def test_chat_logprobs(self, server: Server, options: dict) -> None:
        answer = self._chat(server, options, max_tokens=5, logprobs=True, top_logprobs=2)
        content = answer.choices[0].logprobs.content
        assert len(content) == 5 and all(len(token.top_logprobs) >= 2 for token in content)

    def test_stop(self, server: Server, options: dict) -> None:
        text = self._chat(server, options, max_tokens=200, temperature=0.0).choices[0]
        stop = text.message.content[60:64]
        answer = self._chat(server, options, max_tokens=200, temperature=0.0, stop=[stop])
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.content == text.message.content.split(stop)[0]

    def test_completions(self, server: Server, options: dict) -> None:
        create = server.client.completions.create
        extra = {"ignore_eos": True, "vllm_xargs": options}
        kwargs = {"model": "ridge", "max_tokens": 140, "temperature": 0.0, "extra_body": extra}
        prompts = ["The birds on the roof", "One, two, three"]
        both = create(prompt=prompts, **kwargs)
        alone = [create(prompt=prompt, **kwargs).choices[0].text for prompt in prompts]
        assert [choice.text for choice in both.choices] == alone
        stream = create(prompt=prompts[0], stream=True, **kwargs)
        assert "".join(chunk.choices[0].text for chunk in stream) == alone[0]

    def test_tools_off(self, server: Server, options: dict) -> None:
        function = {"name": "count", "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": function}]
        answer = self._chat(server, options, max_tokens=5, tools=tools, tool_choice="none")
        assert not answer.choices[0].message.tool_calls
        with pytest.raises(openai.BadRequestError, match="tool choice"):
            self._chat(server, options, max_tokens=5, tools=tools, tool_choice="auto")

    def test_errors(self, server: Server, options: dict) -> None:
        with pytest.raises(openai.NotFoundError, match="nobody"):
            self._chat(server, options, model="nobody")
        with pytest.raises(openai.BadRequestError, match="temperature"):
            self._chat(server, options, temperature=-1.0)
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            self._chat(server, options, max_tokens=5000)
        assert len(self._chat(server, options, max_tokens=3).choices) == 1
        assert {"base", "ridge"} <= {model.id for model in server.client.models.list()}

    def _chat(self, server: Server, options: dict, **kwargs: object):
        extra = {"ignore_eos": True, **({"vllm_xargs": options} if options else {})}
        given = {"model": "ridge", "messages": self.MESSAGES, "extra_body": extra, **kwargs}
        return server.client.chat.completions.create(**given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pte_window": 33}, "multiple"),
        ({"pte_window": "wide"}, "pte_window must be an integer"),
        ({"pte_window": -32}, "must not be negative"),
        ({"pte_pin_tokens": 51}, "beyond the prompt"),
        ({"pte_update": "median"}, "paper, sum, none, ridge, delta"),
        ({"pte_evict": "newest"}, "pte_evict must be one of oldest, random"),
        ({"pte_evict": "random", "pte_window": 0}, "pte_evict random needs a window"),
        ({"pte_evict_seed": 3}, "pte_evict_seed is 3, but nothing is drawn"),
        ({"pte_evict": "random", "pte_evict_seed": -1}, "pte_evict_seed must lie in"),
        ({"pte_keep": 33}, "pte_keep: keep of 33 tokens is not a multiple"),
        ({"pte_keep": 32, "pte_window": 0}, "this request has full attention"),
        ({"pte_keep": 32, "pte_kept": ["", "YWI="]}, "pte_kept: fold 1: 3 layers, 2 KV heads"),
        ({"pte_keep": 32, "pte_kept": ["YWI="]}, "pte_kept: fold 0 keeps all candidates"),
        ({"pte_bogus": 1}, "unknown option"),
    ],
)
def test_bad_options_get_400(server: Server, options: dict, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        _complete(server, "paper", random_tokens(50, 500, 3), 5, **options)
    with pytest.raises(openai.BadRequestError, match="multiple"):
        server.client.chat.completions.create(
            model="paper",
            messages=[{"role": "user", "content": "Hello"}],
            extra_body={"vllm_xargs": {"pte_window": 33}},
        )
    assert _complete(server, "paper", random_tokens(50, 500, 3), 5).usage.completion_tokens == 5


def test_update_rule_needs_a_pte_adapter(server: Server) -> None:
    for model in ("base", "plain"):
        with pytest.raises(openai.BadRequestError, match="needs a PTE adapter"):
            _complete(server, model, random_tokens(50, 500, 3), 5, pte_update="sum")


def test_broken_adapter_is_refused(server: Server, tmp_path: Path) -> None:
    """Loading fails with the reason, and the server serves on."""
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(server.adapters["paper"], broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    config["pte"]["rule"] = "median"
    (broken / "adapter_config.json").write_text(json.dumps(config))
    body = {"lora_name": "broken", "lora_path": str(broken)}
    answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)
    assert answer.status_code == 400 and "rule must be one of" in answer.text, answer.text
    prompt = random_tokens(40, 500, 4)
    _check(server, "paper", prompt, _complete(server, "paper", prompt, 200))


def test_loading_an_adapter_while_serving(server: Server, adapters: Callable) -> None:
    fresh = adapters(server.model, rank=8, rule="sum", seed=9)
    body = {"lora_name": "fresh", "lora_path": str(fresh)}
    answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    server.adapters["fresh"] = fresh
    prompt = random_tokens(40, 500, 5)
    _check(server, "fresh", prompt, _complete(server, "fresh", prompt, 300))
    unload = {"lora_name": "fresh"}
    assert httpx.post(f"{server.url}/v1/unload_lora_adapter", json=unload).status_code == 200
    del server.adapters["fresh"]


def test_disconnects_leave_nothing_behind(server: Server) -> None:
    """Of sixty streams most are dropped in the middle; the others are exact."""
    kept, length = random_tokens(60, 500, 6), 250

    async def run() -> list:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        async def drop(i: int) -> None:
            stream = await client.completions.create(
                model=("base", "paper", "ridge", "plain")[i % 4],
                prompt=random_tokens(10 + i, 500, i),
                max_tokens=400,
                stream=True,
                extra_body={"ignore_eos": True, "vllm_xargs": {"pte_window": 2 * BLOCK}},
            )
            seen = 0
            async for _ in stream:
                seen += 1
                if seen > 3 * i:
                    await stream.close()
                    return

        async def keep() -> object:
            return await client.completions.create(
                model="ridge",
                prompt=kept,
                max_tokens=length,
                logprobs=0,
                temperature=TEMPERATURE,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )

        *_, first, second = await asyncio.gather(*(drop(i) for i in range(58)), keep(), keep())
        return [first, second]

    for response in asyncio.run(run()):
        _check(server, "ridge", kept, response)
    report = server.wait_idle()
    assert report["free_blocks"] == report["usable_blocks"] == NUM_BLOCKS
