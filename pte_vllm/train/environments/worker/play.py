"""The process that plays episodes of an environment of the `verifiers` library, as asked.

    python play.py

It needs `verifiers` 0.4 and nothing of this project, so that it can run in another Python
environment than the trainer. Requests come on stdin and answers leave on stdout, each a line of
JSON; what libraries print goes to stderr.

    {"load": {"env": {...}, "path": [...], "max_concurrent": 32}}    once, first
        {"loaded": {"tasks": 7473}}                                  null: endless
    {"run": {"id": "a", "task": 5, "client": {...}, "model": "policy@3", "sampling": {...}}}
        {"ended": {"id": "a", "reward": 1.0, "turns": 4, "error": null}}

Whatever fails before an episode can be played is `{"failed": "..."}`, and ends the process.
"""

import asyncio
import itertools
import json
import os
import sys
from collections.abc import Iterator
from typing import Any


class Player:
    """An environment, its tasks, and the episodes that run."""

    def __init__(self, options: dict[str, Any]) -> None:
        sys.path[1:1] = options["path"]
        known = [*options["path"], os.environ.get("PYTHONPATH", "")]  # for servers of tools
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, known))
        from verifiers.v1.utils.loaders import load_environment, resolve_env_config

        self.env = load_environment(resolve_env_config(options["env"]))
        self.gate = asyncio.Semaphore(options["max_concurrent"])
        self._coming: Iterator[Any] = iter(self.env.taskset)
        self._tasks: list[Any] = []
        if self.env.taskset.bounded:
            self._tasks = list(self._coming)

    @property
    def num_tasks(self) -> int | None:
        """How many tasks there are; None: as many as are asked for."""
        return len(self._tasks) if self.env.taskset.bounded else None

    def task(self, index: int) -> Any:
        """Task number `index`."""
        if (missing := index + 1 - len(self._tasks)) > 0:
            self._tasks += itertools.islice(self._coming, missing)
        return self._tasks[index]

    async def play(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Play one episode; what goes wrong in it is told, as the library does."""
        from pydantic import TypeAdapter
        from verifiers.v1.clients import ClientConfig, ModelContext
        from verifiers.v1.types import SamplingConfig

        client = asked["client"] | {"renderer": _renderer(asked["client"])}
        context = ModelContext(
            client=TypeAdapter(ClientConfig).validate_python(client),
            model=asked["model"],
            sampling=SamplingConfig(**asked["sampling"]),
        )
        (slot,) = self.env.slots(self.task(asked["task"]))
        episode = await self.env.run_slot(slot, context, self.gate)
        traces = [trace for trace in episode.traces if trace.agent.trainable] or episode.traces
        errors = [*episode.errors, *(e for trace in episode.traces for e in trace.errors)]
        rewards = [trace.reward for trace in traces]
        return {
            "id": asked["id"],
            "reward": sum(rewards) / len(rewards) if rewards else 0.0,
            "turns": sum(len(trace.calls) for trace in traces),
            "error": None if episode.ok else _last(errors),
        }


def _last(errors: list[Any]) -> str:
    return f"{errors[-1].type}: {errors[-1].message}" if errors else "it failed, without a reason"


def _renderer(client: dict[str, Any]) -> dict[str, Any] | None:
    """Return the config of what writes messages as tokens; None is the library's, by the model."""
    from renderers.base import MODEL_RENDERER_MAP

    given: dict[str, Any] = client.get("renderer") or {}
    if "name" in given:
        return given
    if not given and client["renderer_model_name"] in MODEL_RENDERER_MAP:
        return None
    return {"name": "custom", "import_path": "pte_template.TemplateRenderer", **given}


async def _serve(requests: asyncio.StreamReader, answers: int) -> None:
    def tell(kind: str, what: Any) -> None:
        line = memoryview(json.dumps({kind: what}).encode() + b"\n")
        while line:
            line = line[os.write(answers, line) :]

    try:
        player = Player(json.loads(await requests.readline())["load"])
        async with player.env.serving():
            tell("loaded", {"tasks": player.num_tasks})
            episodes: set[asyncio.Task[None]] = set()

            async def played(asked: dict[str, Any]) -> None:
                try:
                    told = await player.play(asked)
                except Exception as error:  # one episode; the others go on
                    why = f"{type(error).__name__}: {error}"
                    told = {"id": asked["id"], "reward": 0.0, "turns": 0, "error": why}
                tell("ended", told)

            while line := await requests.readline():
                episode = asyncio.create_task(played(json.loads(line)["run"]))
                episodes.add(episode)
                episode.add_done_callback(episodes.discard)
            for episode in episodes:  # the trainer has left
                episode.cancel()
            await asyncio.gather(*episodes, return_exceptions=True)
    except Exception as error:
        tell("failed", f"{type(error).__name__}: {error}")
        raise


async def _main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # nothing but answers may use their pipe
    reader = asyncio.StreamReader(limit=2**24)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    await _serve(reader, answers)


if __name__ == "__main__":
    asyncio.run(_main())
