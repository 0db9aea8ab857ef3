"""The chats of the demo: several long answers at once, sampled and shown while they come."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pte_vllm.demo.serving import ADAPTER_NAME
from pte_vllm.demo.view import Stream, live_table, plain_line, take_sample
from pte_vllm.launch import http_get

POLL_S = 0.5
PLAIN_LINE_S = 5.0

PROMPTS = (
    "Tell a long bedtime story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain step by step how a bicycle works, from the pedals to the road, in great detail.",
    "Write a travel diary of two weeks in Iceland, one entry for each day.",
    "Describe the history of bread, from the first grain to the modern bakery.",
    "Teach me the basics of chess: every piece, then openings, then simple tactics.",
    "Write a long dialogue between a robot and a gardener about what grows in spring.",
    "List fifty experiments that a child can do in a kitchen, and explain each one.",
    "Plan a small vegetable garden for a whole year, month by month.",
)


def make_streams(num_windowed: int, num_full: int) -> list[Stream]:
    """Make windowed chats, then full ones; prompts repeat only if there are too few of them."""
    return [
        Stream(
            name=f"chat {i + 1}",
            prompt=PROMPTS[i % len(PROMPTS)],
            windowed=i < num_windowed,
            seed=i,
        )
        for i in range(num_windowed + num_full)
    ]


async def chat(client: Any, stream: Stream, *, tokens: int) -> None:
    """Stream one answer of exactly `tokens` tokens.

    All chats use the adapter, so that a batch holds one; without a fold it changes nothing (B = 0).
    """
    extra: dict[str, Any] = {"ignore_eos": True, "min_tokens": tokens}
    if not stream.windowed:
        extra["vllm_xargs"] = {"pte_window": 0}
    start = time.monotonic()
    chunks = await client.chat.completions.create(
        model=ADAPTER_NAME,
        messages=[{"role": "user", "content": stream.prompt}],
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=tokens,
        temperature=0.7,
        top_p=0.95,
        seed=stream.seed,
        extra_body=extra,
    )
    async for chunk in chunks:
        stream.response_id = chunk.id
        if chunk.choices and chunk.choices[0].delta.content:
            stream.text += chunk.choices[0].delta.content
        if chunk.usage is not None:
            stream.completion_tokens = chunk.usage.completion_tokens
    stream.seconds = time.monotonic() - start
    stream.done = True


async def poll(streams: Sequence[Stream], url: str, start: float) -> dict[str, Any]:
    """Sample every stream once; returns the report, {} if the server was too busy to answer."""
    try:
        body = await asyncio.to_thread(http_get, f"{url}/pte/v1/requests", timeout_s=30.0)
    except TimeoutError:
        return {}
    report: dict[str, Any] = json.loads(body)
    for stream in streams:
        take_sample(stream, report, time.monotonic() - start)
    return report


async def run_chats(console: Console, streams: Sequence[Stream], *, url: str, tokens: int) -> None:
    """Run all chats at once, showing them live.

    Raises:
        ExceptionGroup: if a chat or a poll fails; the other chats are given up.
    """
    from openai import AsyncOpenAI

    start = time.monotonic()
    last_line = start
    report: dict[str, Any] = {}
    async with (
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=1800.0, max_retries=0) as client,
        asyncio.TaskGroup() as group,
    ):
        chats = [group.create_task(chat(client, stream, tokens=tokens)) for stream in streams]
        with contextlib.ExitStack() as stack:
            live = None
            if console.is_terminal:
                live = stack.enter_context(Live(console=console, refresh_per_second=4))
            while True:
                _, unfinished = await asyncio.wait(chats, timeout=POLL_S)
                report = await poll(streams, url, start) or report
                now = time.monotonic()
                if live is not None:
                    live.update(live_table(streams, report))
                elif not unfinished or now - last_line >= PLAIN_LINE_S:
                    last_line = now
                    console.print(Text(plain_line(streams, now - start)), soft_wrap=True)
                if not unfinished:
                    return
