"""Asks the questions of the demo, each in all arms at once, and shows the answers live."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live

from pte_vllm.demo.answers import Answer, Arm, Asked
from pte_vllm.demo.notes import SYSTEM, Question
from pte_vllm.demo.view import answer_lines, answers_table, question_lines
from pte_vllm.launch import http_get

POLL_S = 0.05
ANSWER_TOKENS = 24
"""Most tokens of one answer."""


async def ask_all(
    console: Console, questions: Sequence[Question], used: Sequence[Arm], *, url: str
) -> list[Asked]:
    """Ask one question after the other, each in all arms at once, and show it live.

    Raises:
        ExceptionGroup: if a request or a poll fails.
    """
    from openai import AsyncOpenAI

    asked = []
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", timeout=1800.0, max_retries=0
    ) as client:
        model = (await client.models.list()).data[0].id
        # The instruction stays; everything after it has to be remembered.
        system = [{"role": "system", "content": SYSTEM}]
        pin_tokens = await _count(client, messages=system, add_generation_prompt=False)
        for number, question in enumerate(questions, 1):
            one = Asked(
                question=question,
                tokens_back=await _count(
                    client, prompt=question.since_fact, add_special_tokens=False
                ),
                answers=tuple(Answer(arm=arm, question=question) for arm in used),
            )
            console.print(question_lines(one, number, len(questions)), soft_wrap=True)
            await _ask_one(console, client, model, one, url=url, pin_tokens=pin_tokens)
            if not console.is_terminal:
                console.print(answer_lines(one), soft_wrap=True)
            asked.append(one)
    return asked


async def _ask_one(
    console: Console, client: Any, model: str, one: Asked, *, url: str, pin_tokens: int
) -> None:
    with contextlib.ExitStack() as stack:
        live = None
        if console.is_terminal:
            live = stack.enter_context(Live(console=console, refresh_per_second=10))
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_stream(client, model, answer, pin_tokens=pin_tokens))
                for answer in one.answers
            ]
            unfinished: Any = tasks
            while unfinished:
                _, unfinished = await asyncio.wait(tasks, timeout=POLL_S)
                await _poll(one, url)
                if live is not None:
                    live.update(answers_table(one, console.width))


async def _stream(client: Any, model: str, answer: Answer, *, pin_tokens: int) -> None:
    options = answer.arm.options
    if options["pte_window"]:
        options = options | {"pte_pin_tokens": pin_tokens}
    chunks = await client.chat.completions.create(
        model=model,
        messages=[
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": answer.question.prompt},
        ],
        stream=True,
        max_completion_tokens=ANSWER_TOKENS,
        temperature=0,
        stop=["."],  # one sentence was asked for, and one is judged
        extra_headers={"X-Request-Id": answer.request_id},  # its blocks are found by it
        extra_body={"vllm_xargs": options},
    )
    async for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            answer.text += chunk.choices[0].delta.content
    answer.done = True


async def _poll(one: Asked, url: str) -> None:
    """Sample every answer once; not where the server is too busy to say."""
    with contextlib.suppress(TimeoutError):
        body = await asyncio.to_thread(http_get, f"{url}/pte/v1/requests", timeout_s=30.0)
        report = json.loads(body)
        for answer in one.answers:
            answer.take_sample(report)


async def _count(client: Any, **what: Any) -> int:
    """Count the tokens of a prompt or of messages, as the server's tokenizer does."""
    root = str(client.base_url).removesuffix("/v1/")
    answer = await client.post(f"{root}/tokenize", body=what, cast_to=object)
    return int(answer["count"])
