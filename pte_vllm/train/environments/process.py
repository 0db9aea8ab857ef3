"""The trainer's end of the process that plays episodes (`worker/play.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pte_vllm.train.options.environments import EnvironmentOptions

PROGRAM = Path(__file__).parent / "worker" / "play.py"
_END_S = 20.0
"""How long the process may take to end the servers of its tools."""


class EnvironmentFailed(RuntimeError):
    """The process that plays cannot load the environment, or has ended."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an episode ended."""

    reward: float
    turns: int
    """How often the model answered."""
    error: str | None
    """Why it failed; None if it was played to its end."""


class EnvironmentWorker:
    """A process with one environment; `close` it.

    Args:
        options: what it plays.
        log: file that takes what the environment prints.
        hidden: names of environment variables that it must not see.

    Raises:
        EnvironmentFailed: if it cannot load the environment; the message says why.
    """

    def __init__(
        self, options: EnvironmentOptions, *, log: Path, hidden: Collection[str] = ()
    ) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as printed:
            try:
                self._process = subprocess.Popen(
                    [options.python or sys.executable, str(PROGRAM)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=printed,
                    env={k: v for k, v in os.environ.items() if k not in hidden},
                    start_new_session=True,  # Ctrl-C is the trainer's to handle
                )
            except OSError as error:
                raise EnvironmentFailed(f"--environment.python: {error}") from error
        try:
            self._tell({"load": _load(options)})
            self.num_tasks: int | None = self._hear()["loaded"]["tasks"]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Have the process end, which ends the servers of its tools; kill it if it does not."""
        try:
            if self._process.stdin is not None:
                self._process.stdin.close()
        except OSError:  # it has ended
            pass
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def play(self, episodes: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Ended]]:
        """Play episodes, and yield the `id` of each as it ends.

        Args:
            episodes: requests as `worker/play.py` tells, with different ids.

        Raises:
            EnvironmentFailed: if the process ends.
        """
        for episode in episodes:
            self._tell({"run": episode})
        for _ in episodes:
            ended = self._hear()["ended"]
            yield ended.pop("id"), Ended(**ended)

    def _tell(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failure(None) from None

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"failed": None}
        if "failed" in answer:
            raise self._failure(answer["failed"])
        return answer

    def _failure(self, why: str | None) -> EnvironmentFailed:
        if why is None:
            self._process.wait()
            why = f"its process ended with status {self._process.returncode}"
        hint = ""
        if "No module named 'verifiers'" in why:
            hint = ' (pip install "verifiers>=0.4,<0.5", or give --environment.python)'
        return EnvironmentFailed(f"the environment failed: {why}{hint}; see {self._log}")


def _load(options: EnvironmentOptions) -> dict[str, Any]:
    """Return the first request; `config` may have the same tables, and adds to them."""
    env = {**options.config}
    taskset = {"id": options.taskset, **options.taskset_options}
    env["taskset"] = {**taskset, **env.get("taskset", {})}
    if not any(isinstance(value, dict) and "harness" in value for value in env.values()):
        agent = {
            "harness": {"id": options.harness},
            "runtime": {"type": "subprocess"},
            "max_turns": options.max_turns,
        }
        env["agent"] = {**agent, **env.get("agent", {})}
    path = [str(Path(folder).resolve()) for folder in options.path]
    return {
        "env": env,
        "path": [*path, str(PROGRAM.parent)],
        "max_concurrent": options.max_concurrent,
    }
