"""Requests that a later one may continue by `pte_state_id`: what the API server remembers of them.

How a sequence folds has to stay the same for its continuation to be the same sequence, and a client
need not know the numbers. The thoughts themselves are the client's to send, as tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pte_vllm.engine.request_ids import find_external, find_id
from pte_vllm.engine.shared_log import SharedLog
from pte_vllm.method.names import Evict, KeepScore
from pte_vllm.method.options import EngineConfig
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.requests import RequestOptions
from pte_vllm.method.spans import Spans

MAX_EARLIER = 4096
"""How many requests are remembered; each takes a few hundred bytes."""

ONLY_CHECKED = "pte-validation"
"""The id of requests that are checked and never run; none of them is remembered."""


@dataclass(frozen=True, kw_only=True)
class EarlierRequest:
    """The plan of a request, its adapter, and what its continuations begin with."""

    pin_tokens: int
    window_tokens: int
    evict: Evict
    evict_seed: int
    keep_tokens: int
    keep_score: KeepScore
    rule: str | None
    """The rule that the request gave; None is the adapter's."""
    adapter: str | None
    """Name in the engine, version included."""
    adapter_path: str | None
    choices: int
    num_prompt_tokens: int
    prompt_hash: int
    pin_spans: Spans = ()
    is_told: bool = False
    """Whether its answer tells what was pinned and folded."""

    def __post_init__(self) -> None:
        spans = tuple((first, end) for first, end in self.pin_spans)  # JSON knows lists only
        object.__setattr__(self, "pin_spans", spans)

    @classmethod
    def of(
        cls,
        options: RequestOptions,
        *,
        plan: FoldPlan,
        adapter: tuple[str, str] | None,
        choices: int,
        prompt: Sequence[int],
        is_told: bool = False,
    ) -> EarlierRequest:
        """Make what is remembered of a request that was accepted; `adapter` is name and path."""
        return cls(
            pin_tokens=plan.pin_tokens,
            window_tokens=plan.window_tokens,
            evict=plan.evict,
            evict_seed=plan.evict_seed,
            keep_tokens=plan.keep_tokens,
            keep_score=plan.keep_score,
            rule=options.rule,
            adapter=adapter[0] if adapter is not None else None,
            adapter_path=adapter[1] if adapter is not None else None,
            choices=choices,
            num_prompt_tokens=len(prompt),
            prompt_hash=hash(tuple(prompt)),
            pin_spans=plan.pin_spans,
            is_told=is_told,
        )

    def plan(self, engine: EngineConfig, block_size: int) -> FoldPlan:
        """Return its plan again; of the engine it has the part of a window that a fold takes."""
        return FoldPlan(
            pin_tokens=self.pin_tokens,
            window_tokens=self.window_tokens,
            evict_ratio=engine.evict_ratio,
            block_size=block_size,
            evict=self.evict,
            evict_seed=self.evict_seed,
            keep_tokens=self.keep_tokens,
            keep_score=self.keep_score,
            pin_spans=self.pin_spans,
        )

    def check(
        self,
        options: RequestOptions,
        *,
        adapter: tuple[str, str] | None,
        adapter_rule: str | None,
        prompt: Sequence[int],
    ) -> None:
        """Refuse a continuation that contradicts it.

        Args:
            options: The options that the continuation sends.
            adapter: The name and path of the continuation's adapter.
            adapter_rule: The rule of that adapter; None without a thought state.
            prompt: The tokens of the continuation's prompt.

        Raises:
            ValueError: If something differs; the message names it.
        """
        name, path = adapter if adapter is not None else (None, None)
        if name == self.adapter and path != self.adapter_path:
            raise ValueError(
                f"pte_state_id: {options.state_id} ran with other files of {name} than it has now: "
                "leave pte_state_id out"
            )
        if name != self.adapter:
            raise ValueError(
                f"pte_state_id: {options.state_id} ran with {self.adapter or 'no adapter'}, this "
                f"request with {name or 'none'}: name {self.adapter or 'the base model'} as model"
            )
        for option, given, before in (
            ("pte_window", options.window_tokens, self.window_tokens),
            ("pte_pin_tokens", options.pin_tokens, self.pin_tokens),
            ("pte_update", options.rule, self.rule or adapter_rule),
            ("pte_evict", options.evict, self.evict),
            ("pte_evict_seed", options.evict_seed, self.evict_seed),
            ("pte_keep", options.keep_tokens, self.keep_tokens),
            ("pte_keep_score", options.keep_score, self.keep_score),
        ):
            if given is not None and given != before:
                raise ValueError(
                    f"{option} is {given}, but {options.state_id} ran with {before}: leave it out, "
                    "or leave out pte_state_id"
                )
        told = options.pin_spans[: len(self.pin_spans)]
        if options.pin_spans and told != self.pin_spans:
            raise ValueError(
                f"pte_pin_spans begin with {list(told)}, but {options.state_id} ran with "
                f"{list(self.pin_spans)}: send these first and new ones after them, or leave out "
                "pte_pin_spans or pte_state_id"
            )
        count = self.num_prompt_tokens
        later = options.pin_spans[len(self.pin_spans) :]
        if later and later[0][0] < count:
            raise ValueError(
                f"pte_pin_spans: [{later[0][0]}, {later[0][1]}) begins within the {count} tokens "
                f"of the prompt of {options.state_id}, which ran without it: leave it out, or "
                "leave out pte_state_id"
            )
        if len(prompt) < count or hash(tuple(prompt[:count])) != self.prompt_hash:
            raise ValueError(
                f"pte_state_id: the prompt must begin with the {count} tokens of the prompt of "
                f"{options.state_id}, followed by its thoughts"
            )

    def apply(self, options: RequestOptions) -> RequestOptions:
        """Return the continuation's options with the plan of this request spelled out."""
        drawn = "random" in (self.evict, self.keep_score)
        return replace(
            options,
            state_id=None,
            window_tokens=self.window_tokens,
            pin_tokens=self.pin_tokens,
            pin_spans=options.pin_spans or self.pin_spans,
            rule=self.rule,
            evict=None if self.evict == "oldest" else self.evict,
            evict_seed=self.evict_seed if drawn else None,
            keep_tokens=self.keep_tokens if self.window_tokens else None,
            keep_score=self.keep_score if self.keep_tokens else None,
        )


class EarlierRequests:
    """The last `MAX_EARLIER` requests of this server, by the id that vLLM's routes give them."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[str, EarlierRequest] = OrderedDict()
        self._engines: OrderedDict[str, int] = OrderedDict()
        self._log: SharedLog | None = None

    def share(self, log: SharedLog) -> None:
        """Remember what all API servers note, from now on, instead of this process's requests."""
        self._log = log

    def place(self, request_id: str, engine: int) -> None:
        """Note which engine got a request, by the engine's id; of one engine nobody has to know."""
        self._note(request_id, engine)

    def engine_of(self, name: str) -> int | None:
        """Return which engine got the newest request that a client calls `name`; None without."""
        self._catch_up()
        request_id = find_id(name, self._engines)
        return None if request_id is None else self._engines[request_id]

    def add(self, request_id: str, request: EarlierRequest) -> None:
        """Remember a request that was accepted, unless it was only to be checked."""
        if request_id != ONLY_CHECKED:
            self._note(request_id, request)

    def get(self, name: str) -> EarlierRequest:
        """Return the request that a client calls `name`, as in `/pte/v1/thoughts`.

        Raises:
            ValueError: If it is unknown or forgotten, with what to send instead.
        """
        request_id = self._find(name)
        if request_id is None:
            raise ValueError(
                f"pte_state_id: there is no request {name} here, or it was forgotten; to continue "
                "from its tokens alone, leave pte_state_id out and send its pte_pin_tokens, "
                "pte_window and pte_update, and pte_evict, pte_evict_seed, pte_keep and "
                "pte_keep_score if it had them"
            )
        return self._by_id[request_id]

    def exactly(self, external: str) -> EarlierRequest | None:
        """Return the request that is remembered by this id, a route's; None without one."""
        self._catch_up()
        return self._by_id.get(external)

    def keeps_tokens(self, external: str) -> bool:
        """Return whether a request that is remembered by this id, a route's, keeps tokens."""
        request = self.exactly(external)
        return request is not None and request.keep_tokens > 0

    def forget(self, name: str) -> None:
        """Forget the request that a client calls `name`; does nothing if there is none."""
        request_id = self._find(name)
        if request_id is not None:
            self._note(request_id, None)

    def _note(self, request_id: str, what: EarlierRequest | int | None) -> None:
        if self._log is None:
            self._take(request_id, what)
        else:  # it comes back from the log, in its place among those of the others
            note = asdict(what) if isinstance(what, EarlierRequest) else what
            self._log.append([request_id, note])

    def _catch_up(self) -> None:
        for _, (request_id, note) in self._log.unread() if self._log is not None else ():
            self._take(request_id, EarlierRequest(**note) if isinstance(note, dict) else note)

    def _take(self, request_id: str, what: EarlierRequest | int | None) -> None:
        """Take a request in, or the number of its engine; None drops the request."""
        if what is None:
            self._by_id.pop(request_id, None)
            return
        table: OrderedDict[str, Any] = self._engines if isinstance(what, int) else self._by_id
        table[request_id] = what
        table.move_to_end(request_id)
        if len(table) > MAX_EARLIER:
            table.popitem(last=False)

    def _find(self, name: str) -> str | None:
        self._catch_up()
        newest_first = reversed(self._by_id.items())
        return find_external(name, ((sent, request.choices) for sent, request in newest_first))


EARLIER = EarlierRequests()
"""The one table of this process, an API server: its routes and its checks share it."""
