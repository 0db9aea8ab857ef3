"""Options of environments: what is played, and by which process."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pte_vllm.train.options.parsing import Options
from pte_vllm.train.options.sections import Count, Share


class EnvironmentOptions(Options):
    """An environment of the verifiers library, for data.source verifiers."""

    taskset: str | None = None
    """Its taskset: an installed package, or a module in one of environment.path."""
    taskset_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the taskset, by its own names."""
    path: tuple[str, ...] = ()
    """Folders with tasksets and harnesses that are not installed."""
    python: str | None = None
    """Interpreter that has verifiers, such as envs/bin/python; the trainer's own without it."""
    harness: str = "pte-chat"
    """Program that plays; pte-chat is a chat with tools that runs in the worker."""
    max_turns: Count = 16
    """Most answers of the model in one episode."""
    renderer: dict[str, Any] = Field(default_factory=dict)
    """What writes messages as tokens; without name it is the model's chat template, and
    tool_parser=qwen3 reads calls of tools. Models that the library knows need nothing."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Anything else of the library's env table, such as id and timeout."""
    max_concurrent: Count = 64
    """Most episodes that are played at once."""
    max_failed: Share = 0.5
    """The run stops where a larger part of a step's episodes fails."""
