"""A harness of the `verifiers` library: a chat with tools, in the process that plays episodes.

The library's own `null` harness does the same in a program of its own for each episode, which takes
`uv`, packages from an index, and seconds of a core to start. Where many short episodes run beside
each other, that is most of their time. This one runs no code that a model wrote, as `null`.

`verifiers` finds it as `harness.id = "pte-chat"`, as this folder is on the worker's path.
"""

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

from openai import APIStatusError, AsyncOpenAI
from verifiers.v1.clients import ModelContext
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harness import Harness
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.runtimes import ProgramResult, Runtime
from verifiers.v1.task import TaskData
from verifiers.v1.trace import Trace

__all__ = ["PteChatHarness"]


class PteChatConfig(HarnessConfig):
    """Options of the harness; it has none of its own."""


class PteChatHarness(Harness[PteChatConfig]):
    """Asks the model, runs the tools that it calls, and so on until it calls none."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: ModelContext,
        trace: Trace,
        runtime: Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: TaskData,
    ) -> ProgramResult:
        """Play one segment; every call of the model goes to `endpoint`."""
        system, prompt = self.resolve_prompt(data)
        messages: list[dict[str, Any]] = []
        if system:
            messages.append({"role": "system", "content": system})
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or ()]
        urls = {name: {"url": url} for name, url in mcp_urls.items()}
        async with (
            AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0, timeout=None) as client,
            AsyncExitStack() as stack,
        ):
            tools, dispatch, servers = await connect_mcp({"mcpServers": urls}, stack)
            wanted: dict[str, Any] = {"tools": tools} if tools else {}
            while True:
                try:
                    answer = await client.chat.completions.create(
                        model=ctx.model, messages=messages, **wanted
                    )
                except APIStatusError as error:
                    if trace.stop_condition is not None:  # a limit, such as `max_turns`
                        break
                    return ProgramResult(exit_code=1, stdout="", stderr=str(error))
                message = answer.choices[0].message
                messages.append(message.model_dump(exclude_none=True))
                if not message.tool_calls:
                    break
                results = [self._call(call, dispatch, servers) for call in message.tool_calls]
                messages += await asyncio.gather(*results)
        return ProgramResult(exit_code=0, stdout="", stderr="")

    async def _call(self, call: Any, dispatch: dict, servers: dict) -> dict[str, Any]:
        name = call.function.name
        try:
            arguments = json.loads(call.function.arguments or "{}")
            if not isinstance(arguments, dict):
                content: Any = "error: the arguments of a tool must be a JSON object"
            elif name not in dispatch:
                content = f"error: there is no tool {name}"
            else:
                limit = self.config.tool_timeout
                async with asyncio.timeout(limit):
                    content = await call_mcp(servers, dispatch, name, arguments)
        except json.JSONDecodeError as error:
            content = f"error: the arguments are not JSON: {error}"
        except TimeoutError:
            content = f"error: {name} took longer than {self.config.tool_timeout:g} s"
        return {"role": "tool", "tool_call_id": call.id, "content": content, "name": name}
