"""Several turns of one conversation as one record, which the trainer replays at once.

A turn's prompt is the turn before it, question and answer, and then tokens of the environment: what
a tool returned, or the next question. They come as token ids and stay token ids, so nothing is
tokenised twice. A later question changes no fold before it, so the last turn's plan says of all
turns what they were sampled from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pte_vllm.wire.rollout import Rollout, WeightSpan


def join_turns(turns: Sequence[Rollout]) -> Rollout:
    """Return one record of a whole episode: its prompt is the first turn's, the rest is completion.

    Tokens of the environment have mask 0 and log-prob 0; they count to the version that answered
    them. `kept`, `rho` and the reason of the end are those of the last turn.

    Args:
        turns: The records of the turns in order, each of one sample.

    Raises:
        ValueError: If there are none, if a turn does not begin with the tokens of the one before,
            or if its adapter or its plan is another; the message names the turn.
    """
    if not turns:
        raise ValueError("an episode has at least one turn")
    first, last = turns[0], turns[-1]
    completion: list[int] = []
    logprobs: list[float] = []
    mask: list[int] = []
    versions: list[WeightSpan] = []
    for number, turn in enumerate(turns):
        before = first.prompt_ids + tuple(completion)
        if turn.prompt_ids[: len(before)] != before:
            raise ValueError(
                f"turn {number} does not begin with the {len(before)} tokens of the turns before it"
            )
        _check_goes_on(turns, number)
        told = turn.prompt_ids[len(before) :]
        start = len(completion)
        completion += told + turn.completion_ids
        logprobs += (*(0.0 for _ in told), *turn.logprobs)
        mask += (*(0 for _ in told), *turn.mask)
        for span in turn.weight_versions:
            end = start + len(told) + span.end
            begin = versions[-1].end if versions else 0
            versions.append(WeightSpan(version=span.version, start=begin, end=end))
    return replace(
        first,
        completion_ids=tuple(completion),
        logprobs=tuple(logprobs),
        mask=tuple(mask),
        weight_versions=tuple(versions),
        plan=last.plan,
        finish_reason=last.finish_reason,
        kept=last.kept,
        rho=last.rho,
        num_preempted=_sum([turn.num_preempted for turn in turns]),
    )


def join_episodes(records: Sequence[Rollout]) -> list[Rollout]:
    """Return the records of one or several conversations, each joined as far as it goes on.

    A record continues the conversation whose tokens it begins with, the longest such. Where a chat
    template or a harness rewrote what was said, or another agent speaks, a new one begins; all that
    comes before its answer is then its prompt, so that no token counts twice.

    Args:
        records: in the order in which the answers ended, each of one sample.
    """
    found: list[Rollout] = []
    for record in records:
        if not record.completion_ids:
            continue
        fitting = [
            place
            for place, before in enumerate(found)
            if record.prompt_ids[: len(before.token_ids)] == before.token_ids
        ]
        for place in sorted(fitting, key=lambda at: len(found[at].token_ids), reverse=True):
            try:
                found[place] = join_turns([found[place], record])
                break
            except ValueError:  # another plan: what was pinned is not what it pins
                continue
        else:
            found.append(record)
    return found


def _check_goes_on(turns: Sequence[Rollout], number: int) -> None:
    """Raise ValueError unless a turn has the adapter and the plan of the last one."""
    turn, last = turns[number], turns[-1]
    name, own = (None if t.adapter is None else t.adapter.partition("@")[0] for t in (last, turn))
    if name != own or turn.rule != last.rule:
        raise ValueError(f"turn {number} ran with {own or 'no adapter'}, the last with {name}")
    known = len(turn.plan.pin_spans)
    if replace(turn.plan, pin_spans=()) != replace(last.plan, pin_spans=()) or (
        turn.plan.pin_spans != last.plan.pin_spans[:known]
    ):
        raise ValueError(f"turn {number} has another plan than the last: {turn.plan}")
    later = last.plan.pin_spans[known:]
    length = len(turn.token_ids)
    if later and later[0][0] < length:
        raise ValueError(
            f"turn {number} ran without the question at {later[0][0]}, within its {length} tokens"
        )
    if not turn.completion_ids:
        raise ValueError(f"turn {number} ended before its first token")


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
