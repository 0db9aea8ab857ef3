"""An environment of the verifiers library: a few turns of talk, and a reward for plain letters.

It is loaded by its name from this folder, by a process of its own.
"""

import string
from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["TalkEnv", "TalkTaskset"]


class TalkConfig(vf.TasksetConfig):
    size: int = 4
    turns: int = 3
    failing: int = -1
    """The number of a task whose episodes fail."""


class TalkData(vf.TaskData):
    turns: int
    fails: bool


class TalkTask(vf.Task[TalkData]):
    pass


class TalkTaskset(vf.Taskset[TalkTask, TalkConfig]):
    def load(self) -> Iterator[TalkTask]:
        for number in range(self.config.size):
            data = TalkData(
                prompt=f"Tell me about the number {number}. " * 2,
                turns=self.config.turns,
                fails=number == self.config.failing,
            )
            yield TalkTask(data, self.config.task)


class TalkEnvConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()


class TalkEnv(vf.Env[TalkEnvConfig]):
    async def run(self, task: TalkTask, agents: vf.Agents) -> None:
        said = ""
        async with agents.agent.interaction(task) as talk:
            segment = await talk.turn()
            for turn in range(1, task.data.turns):
                said += segment.last_reply
                if task.data.fails:
                    raise ValueError("this one fails")
                segment = await talk.turn(f"And what of {turn}? " * turn)
            said += segment.last_reply
        letters = sum(character in string.ascii_letters for character in said)
        talk.trace.record_reward("letters", letters / max(1, len(said)), 1.0)
