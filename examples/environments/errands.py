"""An environment of the verifiers library that needs memory over many turns, with tools.

The user tells facts, one a turn, among other talk, and asks for one at the end. A calculator
is there as a tool, which the talk between asks for. See examples/environment.toml.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["ErrandsEnv", "ErrandsTaskset"]

_THINGS = ("key", "umbrella", "passport", "bicycle", "letter", "camera", "ladder", "kettle")
_PLACES = ("attic", "cellar", "garage", "garden", "kitchen", "library", "office", "stable")


class Calculator(vf.Toolset[vf.SharedToolsetConfig, vf.State]):
    """One server of tools for all episodes; it keeps nothing between calls."""

    TOOL_PREFIX = "calculator"

    @vf.tool
    async def add(self, a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)


class ErrandsConfig(vf.TasksetConfig):
    """Options: `environment.taskset_options`."""

    size: int = 1000
    """How many tasks there are."""
    facts: int = 2
    """Facts that are told, each in a turn of its own."""
    between: int = 3
    """Turns of other talk between the last fact and the question."""
    tools: bool = True
    """Whether there is a calculator."""


class ErrandsData(vf.TaskData):
    """One conversation."""

    turns: list[str]
    answer: str


class ErrandsTask(vf.Task[ErrandsData]):
    """What one conversation says."""


class ErrandsTaskset(vf.Taskset[ErrandsTask, ErrandsConfig]):
    """Conversations, the same ones in every process."""

    def load(self) -> Iterator[ErrandsTask]:
        for number in range(self.config.size):
            rng = random.Random(f"errands/{number}")
            things = rng.sample(_THINGS, self.config.facts)
            places = rng.sample(_PLACES, self.config.facts)
            turns = [
                f"I put the {thing} in the {place}. Please remember it; answer only: noted."
                for thing, place in zip(things, places, strict=True)
            ]
            for _ in range(self.config.between):
                a, b = rng.randrange(100), rng.randrange(100)
                turns.append(f"What is {a} + {b}? Answer in a few words.")
            asked = rng.randrange(self.config.facts)
            turns.append(f"Where did I put the {things[asked]}? Answer with one word.")
            prompt, *rest = turns
            data = ErrandsData(prompt=prompt, turns=rest, answer=places[asked])
            yield ErrandsTask(data, self.config.task)

    @classmethod
    def toolsets(cls, config: ErrandsConfig) -> list[vf.Toolset]:
        return [Calculator(vf.SharedToolsetConfig())] if config.tools else []


class ErrandsEnvConfig(vf.EnvConfig):
    """One seat: the model."""

    agent: vf.AgentConfig = vf.AgentConfig()


class ErrandsEnv(vf.Env[ErrandsEnvConfig]):
    """The user, who says the turns one after another and judges the last answer."""

    async def run(self, task: ErrandsTask, agents: vf.Agents) -> None:
        async with agents.agent.interaction(task) as talk:
            segment = await talk.turn()
            for said in task.data.turns:
                if segment.terminated:
                    break
                segment = await talk.turn(said)
        right = not segment.terminated and task.data.answer in segment.last_reply.lower()
        talk.trace.record_reward("remembered", float(right), 1.0)


if __name__ == "__main__":
    Calculator.run()
