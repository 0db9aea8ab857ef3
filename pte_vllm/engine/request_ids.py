"""The ids that vLLM gives to requests, and which of them a client means.

A route of vLLM makes an id for each prompt, the external id: that of the response, and for
completions `{response}-{prompt}`, and `{response}_{step}` of `/v1/responses`. The engine's id is
`[{choice}_]{external}[-{8 hex digits}]`, with a choice where a prompt has several, and random
digits unless the server is told to leave them out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

_RANDOM = re.compile(r"-[0-9a-f]{8}$")
_CHOICE = re.compile(r"^(\d+)_(.+)$", re.DOTALL)
_NUMBERS = re.compile(r"(-\d+){0,2}$")
_RESPONSE = re.compile(r"^(resp_.+)_\d+$", re.DOTALL)
_PROMPT = re.compile(r"^(cmpl-.+)-(\d+)$", re.DOTALL)


@dataclass(frozen=True)
class RequestId:
    """The parts of an id of the engine, its random digits aside."""

    external: str
    """The id that the route gave to the prompt."""
    choice: int | None = None
    """The number of the choice; None where the prompt has only one."""

    @classmethod
    def parse(cls, text: str) -> RequestId:
        """Split an id that has no random digits at its end, or whose digits are to stay."""
        found = _CHOICE.match(text)
        return cls(found[2], int(found[1])) if found is not None else cls(text)

    def __str__(self) -> str:
        return self.external if self.choice is None else f"{self.choice}_{self.external}"

    def names(self) -> set[str]:
        """Return what a client may call this request.

        Choice c is `{response}-{c}`, the first also `{response}`, and of a completion's prompt
        p > 0 `{response}-{p}-{c}`. A step of `/v1/responses` is `{response}`.
        """
        choice = self.choice or 0
        names = {str(self), f"{self.external}-{choice}"}
        prompt = _PROMPT.match(self.external)
        response = _RESPONSE.match(self.external)
        if response is not None and choice == 0:  # of several steps the newest is found
            names.add(response[1])
        if prompt is not None and prompt[2] == "0":
            names.add(f"{prompt[1]}-{choice}")
            if choice == 0:
                names.add(prompt[1])
        elif choice == 0 and (prompt is None or self.choice is None):
            names.add(self.external)
        return names


def _spellings(text: str) -> tuple[str, str]:
    """Return an id or a name as it is, and without what may be random digits at its end."""
    return text, _RANDOM.sub("", text)


def names_of(request_id: str) -> set[str]:
    """Return what a client may call the engine's request `request_id`."""
    names = {request_id}
    for text in _spellings(request_id):
        names |= RequestId.parse(text).names()
    return names


def find_id(name: str, request_ids: Collection[str]) -> str | None:
    """Return the engine's id of the newest request that a client calls `name`, or None.

    Args:
        name: What the client sent.
        request_ids: The engine's ids, from old to new.
    """
    if name in request_ids:
        return name
    stem = _NUMBERS.sub("", name)  # in the engine's id whatever is numbered; rules most out fast
    for known in reversed(list(request_ids)):
        if stem in known and name in names_of(known):
            return known
    return None


def find_external(name: str, sent: Iterable[tuple[str, int]]) -> str | None:
    """Return the external id of the newest prompt that a client means by `name`, or None.

    Args:
        name: What the client sent: a name of any choice, or the engine's id.
        sent: External ids with the number of choices of each, from new to old.
    """
    spellings = set(_spellings(name))
    stems = {_NUMBERS.sub("", RequestId.parse(text).external) for text in spellings}
    for external, choices in sent:
        if not any(stem in external for stem in stems):
            continue
        ids = (RequestId(external, c if choices > 1 else None) for c in range(choices))
        if any(spellings & known.names() for known in ids):
            return external
    return None
