"""Measures the arms by a running server: the same answers, scored under each arm's options.

A server names the k most probable tokens in each place and their log-probs, not the whole
distribution. Losses and most probable tokens are exact. Of a KL that gives a lower bound: the least
one that agrees with what is known of full attention and of the arm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pte_vllm.adapter.hashes import content_hash, file_hashes
from pte_vllm.eval.fidelity_arms import FidelityArm
from pte_vllm.eval.fidelity_parts import OnDone, Parts
from pte_vllm.eval.fidelity_tokens import MeasuredTokens
from pte_vllm.train.distill.examples import Example
from pte_vllm.train.distill.step import of_like_length
from pte_vllm.wire.client import RolloutClient
from pte_vllm.wire.rollout import Rollout

_LEAST = 1e-9
"""What is left for all other tokens, where rounding leaves less."""


def push_adapters(client: RolloutClient, directories: Mapping[str, Path]) -> dict[str, str]:
    """Push adapters unless the server's newest version has the same files; return their names.

    Raises:
        ServerError: if the server refuses or stays away.
    """
    known, names = client.adapters(), {}
    for name, directory in directories.items():
        digest = content_hash(file_hashes(directory))
        newest = known[name]["versions"][-1] if name in known else None
        if newest is None or newest["sha256"] != digest:
            names[name] = f"{name}@{client.push(directory, name)}"
        else:
            names[name] = f"{name}@{newest['version']}"
    return names


def measure(
    client: RolloutClient,
    examples: Sequence[Example],
    arms: Sequence[FidelityArm],
    adapters: Mapping[str, str],
    *,
    batch_sequences: int,
    top_logprobs: int,
    on_done: OnDone = lambda name: None,
) -> MeasuredTokens:
    """Measure all arms on the tokens that `examples` want; arms that do the same run once.

    Args:
        client: a server that folds as the arms' plans say.
        examples: answers, with the plan of the smallest window, which says the tokens.
        arms: what is compared; not the control with sinks, whose folds are as large as the plain
            window's, which no request can ask for.
        adapters: the server's names of the arms' adapters, by theirs.
        batch_sequences: how many answers a request has.
        top_logprobs: how many tokens are named in each place, k.
        on_done: hears `batches × (1 + different arms)` times of a part.

    Raises:
        ServerError: if the server refuses or stays away.
    """
    parts = Parts(arms)
    done = 0
    for chosen in of_like_length(examples, batch_sequences):
        wanted = [np.flatnonzero(example.wanted) for example in chosen]
        rows = np.concatenate([np.full(len(own), b) for b, own in enumerate(wanted)])
        tokens = np.concatenate(wanted)
        places = list(zip(rows.tolist(), tokens.tolist(), strict=True))
        parts.place(chosen, rows, tokens, first=done)
        full = _score(client, chosen, top_logprobs=top_logprobs, window_tokens=0)
        parts.add_full(-np.array([_own(full[b], t) for b, t in places]))
        on_done("full attention")
        for arm in parts.different:
            adapter = None if arm.adapter is None else adapters[arm.adapter]
            found = _score(
                client,
                chosen,
                top_logprobs=top_logprobs,
                window_tokens=arm.window_tokens,
                adapter=adapter,
                evict=None if arm.evict == "oldest" else arm.evict,
            )
            parts.add(
                arm,
                losses=-np.array([_own(found[b], t) for b, t in places]),
                kls=np.array([_kl_of(full[b], found[b], t) for b, t in places]),
                same_top=np.array([_top(full[b], t) == _top(found[b], t) for b, t in places]),
            )
            on_done(arm.name)
        done += len(chosen)
    return parts.together(kl_is_bound=True)


def _score(
    client: RolloutClient,
    examples: Sequence[Example],
    *,
    top_logprobs: int,
    **policy: Any,
) -> list[Rollout]:
    """Score everything behind what each answer pins; records come in the order of `examples`.

    Args:
        policy: the memory, in the words of `RolloutClient.score`.
    """
    # A question that is not pinned whole is thoughts to the plan; one of no tokens has the first.
    unpinned = [i for i, e in enumerate(examples) if not e.plan.pin_tokens]
    records: dict[int, Rollout] = {}
    for chosen, pin_tokens in (
        ([i for i in range(len(examples)) if i not in unpinned], None),
        (unpinned, 0),
    ):
        found = client.score(
            [examples[i].tokens for i in chosen],
            [max(1, examples[i].plan.pin_tokens) for i in chosen],
            pin_tokens=pin_tokens,
            top_logprobs=top_logprobs,
            **policy,
        )
        records.update(zip(chosen, found, strict=True))
    return [records[i] for i in range(len(examples))]


def _own(record: Rollout, token: int) -> float:
    """Return the log-prob of the token in this place of the sequence."""
    return record.logprobs[token - len(record.prompt_ids)]


def _top(record: Rollout, token: int) -> int:
    """Return the most probable token in this place."""
    assert record.top_ids is not None
    return record.top_ids[token - len(record.prompt_ids)][0]


def _known(record: Rollout, token: int) -> dict[int, float]:
    """Return what a record says of this place: log-probs by token id."""
    assert record.top_ids is not None and record.top_logprobs is not None
    i = token - len(record.prompt_ids)
    named = dict(zip(record.top_ids[i], record.top_logprobs[i], strict=True))
    return {**named, record.completion_ids[i]: record.logprobs[i]}


def _kl_of(full: Rollout, arm: Rollout, token: int) -> float:
    """Return the bound of KL(full ‖ arm) in one place."""
    assert arm.top_logprobs is not None
    least = arm.top_logprobs[token - len(arm.prompt_ids)][-1]
    return kl_at_least(_known(full, token), _known(arm, token), most=least)


def kl_at_least(p: Mapping[int, float], q: Mapping[int, float], *, most: float) -> float:
    """Return the least KL(p ‖ q), in nats, that agrees with what is known of both.

    All tokens that p does not name are one class. Those that p names and q does not are shared out
    so that the KL is least: in proportion to p, but none gets more than q's least token has.

    Args:
        p: log-probs of some tokens, by token.
        q: those of some tokens of another distribution.
        most: the most that a token not named by q can have, as a log-prob.
    """
    both = p.keys() & q.keys()
    found = sum(math.exp(p[i]) * (p[i] - q[i]) for i in both)
    mass = max(_LEAST, 1.0 - sum(math.exp(q[i]) for i in both))  # of q, to be shared out
    others = max(_LEAST, 1.0 - sum(map(math.exp, p.values())))
    open_ = sorted((math.exp(p[i]) for i in p.keys() - both), reverse=True)
    weight, cap = others + sum(open_), math.exp(most)
    for share in open_:  # once one is below the cap, so are all that are smaller
        if share * mass <= cap * weight:
            break
        found += share * math.log(share / cap)
        mass, weight = max(_LEAST, mass - cap), weight - share
    return found + weight * math.log(weight / mass)
