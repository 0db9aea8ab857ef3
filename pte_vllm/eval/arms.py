"""Arms of a sweep: what one of them asks the server for, and how much cache an answer then takes.

An arm is a memory: the full cache, a window and nothing else, a window with an adapter's thought
state, or one of the controls. Every arm answers the same problems.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pte_vllm.method.names import Evict, KeepScore
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.spans import Spans

FULL = "full"
"""The key of the arm with the full cache, which all others are compared with."""
SINK_TOKENS = 4
"""Pinned tokens of the control with attention sinks (StreamingLLM, arXiv 2309.17453)."""


@dataclass(frozen=True, kw_only=True)
class Pins:
    """What a server pins of a prompt that says nothing of it, where that is not the whole of it."""

    pin_tokens: int
    """How many tokens at the start."""
    pin_spans: Spans = ()
    """The tokens of later questions, each pinned until the next one begins."""
    by_questions: bool = True
    """Whether user messages tell it; none are looked for where blocks leave at random."""

    def __post_init__(self) -> None:
        spans = tuple((first, end) for first, end in self.pin_spans)  # JSON knows lists only
        object.__setattr__(self, "pin_spans", spans)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One memory under which all problems are answered."""

    window_tokens: int
    """KV room for thoughts; 0 is the full cache."""
    adapter: str | None = None
    """Name of an adapter; None is the base model, which forgets what leaves the window."""
    rule: str | None = None
    """Update rule in place of the adapter's."""
    evict: Evict = "oldest"
    """Which blocks leave a full window: `oldest` or `random`."""
    sinks: bool = False
    """Whether only the first tokens are pinned, and the question is a thought like any other."""
    keep_tokens: int = 0
    """How many evicted tokens each KV head keeps."""
    keep_score: KeepScore = "expected"
    """By which score they are chosen."""
    equal_to: str | None = None
    """The adapter whose state this arm holds as a longer window; its own `adapter` is None."""

    @property
    def key(self) -> str:
        """A short name without spaces, unique within a sweep."""
        if not self.window_tokens:
            return FULL if self.adapter is None else f"{FULL}-{self.adapter}"
        parts = [f"w{self.window_tokens}"]
        if self.equal_to is not None:
            parts.append(f"as-{self.equal_to}")
        if self.sinks:
            parts.append("sinks")
        if self.evict != "oldest":
            parts.append(self.evict)
        if self.keep_tokens:
            parts.append(f"keep{self.keep_tokens}")
            if self.keep_score != "expected":
                parts.append(self.keep_score)
        if self.adapter is not None:
            parts.append(self.adapter)
        if self.rule is not None:
            parts.append(self.rule)
        return "-".join(parts)

    @property
    def title(self) -> str:
        """What a table calls it."""
        if not self.window_tokens:
            return "full cache" if self.adapter is None else f"full cache, {self.adapter}"
        memory = self.adapter or "no memory"
        if self.rule is not None:
            memory += f", rule {self.rule}"
        if self.equal_to is not None:
            memory = f"no memory, bytes of {self.equal_to}"
        if self.sinks:
            memory = "attention sinks"
        if self.evict != "oldest":
            memory += f", evicting at {self.evict}"
        if self.keep_tokens:
            keeping = f"keeping {self.keep_tokens}"
            if self.keep_score != "expected":
                keeping += f" at {self.keep_score}"
            memory = keeping if self.adapter is None else f"{memory}, {keeping}"
        return f"window {self.window_tokens}, {memory}"

    def plan(
        self,
        prompt_tokens: int,
        *,
        block_size: int,
        evict_ratio: float,
        seed: int = 0,
        pins: Pins | None = None,
    ) -> FoldPlan:
        """Return the plan of one answer.

        Args:
            prompt_tokens: length of the question.
            block_size: tokens in a block of the server's KV cache.
            evict_ratio: part of a full window that one fold frees.
            seed: of what this answer draws, for the controls that evict or keep at random.
            pins: what the server pins of the prompt; None: the whole of it.
        """
        if pins is None or (pins.by_questions and self.evict == "random"):
            pins = Pins(pin_tokens=prompt_tokens)
        plan = FoldPlan(
            pin_tokens=pins.pin_tokens,
            pin_spans=pins.pin_spans if self.window_tokens else (),
            window_tokens=self.window_tokens,
            evict_ratio=evict_ratio,
            block_size=block_size,
            evict=self.evict,
            evict_seed=seed if "random" in (self.evict, self.keep_score) else 0,
            keep_tokens=self.keep_tokens,
            keep_score=self.keep_score,
        )
        return with_sinks(plan) if self.sinks else plan

    def draws(self, *, block_size: int, evict_ratio: float) -> bool:
        """Say whether blocks that leave at random can differ from the oldest.

        The newest block never leaves, so a window of two blocks has one candidate only.
        """
        if self.evict == "oldest":
            return False
        plan = self.plan(0, block_size=block_size, evict_ratio=evict_ratio)
        return plan.window_blocks - 1 > plan.evict_blocks

    def request_args(self, plan: FoldPlan, *, knows_keep: bool = True) -> dict[str, Any]:
        """Return the request options of an answer with this plan, as `vllm_xargs` takes them.

        Args:
            plan: the plan of this arm.
            knows_keep: whether the server knows `pte_keep`. What it keeps where a request does not
                say is up to its flags, so each request says.
        """
        args: dict[str, Any] = {"pte_window": plan.window_tokens}
        if self.sinks:
            args["pte_pin_tokens"] = plan.pin_tokens
        if self.rule is not None:
            args["pte_update"] = self.rule
        if plan.evict != "oldest":
            args |= {"pte_evict": plan.evict, "pte_evict_seed": plan.evict_seed}
        if knows_keep:
            args["pte_keep"] = plan.keep_tokens
        if plan.keep_tokens:
            args["pte_keep_score"] = plan.keep_score
            if plan.keep_score == "random":
                args["pte_evict_seed"] = plan.evict_seed
        return args


def with_sinks(plan: FoldPlan) -> FoldPlan:
    """Return a plan that pins the first tokens only, and gives the window the questions' blocks.

    It holds as many blocks as `plan` does. Folds are `evict_ratio` of the larger window.
    """
    pinned = min(SINK_TOKENS, plan.pin_tokens)
    freed = plan.most_pinned_blocks - -(-pinned // plan.block_size)
    window_tokens = plan.window_tokens + freed * plan.block_size
    return replace(plan, pin_tokens=pinned, pin_spans=(), window_tokens=window_tokens)


def peak_tokens(plan: FoldPlan, num_tokens: int) -> int:
    """Return the most KV room that a sequence of `num_tokens` takes, in tokens."""
    if plan.pin_spans:  # what is pinned changes from question to question
        starts = range(0, num_tokens, plan.block_size)
        return max(map(plan.held_blocks, starts), default=0) * plan.block_size
    # Most is held by the last token, or where the window was full for the last time: what is kept
    # grows up to there.
    last = num_tokens - 1
    full = plan.first_fold + max(0, plan.folds(last) - 1) * plan.stride
    places = (last, min(num_tokens, full) - 1)
    return max(map(plan.held_blocks, places)) * plan.block_size


def make_arms(
    windows: Iterable[int],
    *,
    adapters: Sequence[str] = (),
    adapter_keep: Sequence[int] = (0,),
    rules: Sequence[str | None] = (None,),
    evict: Sequence[Evict] = ("oldest",),
    sinks: bool = False,
    keep: Iterable[int] = (),
    keep_scores: Sequence[KeepScore] = ("expected",),
    plain_windows: Iterable[int] = (),
    state_tokens: Mapping[str, int] | None = None,
    block_size: int = 16,
) -> list[Arm]:
    """Return the arms of a sweep, each once, the full cache first.

    Args:
        windows: windows to try; 0 is the full cache, which is always among the arms.
        adapters: names of adapters; each is tried under every window.
        adapter_keep: how many evicted tokens are kept beside an adapter, by the score `expected`;
            each is tried.
        rules: update rules to try with each adapter; None is the adapter's own.
        evict: which blocks leave, for windows without memory.
        sinks: whether the control with attention sinks is among the arms.
        keep: how many evicted tokens to keep, for windows without memory.
        keep_scores: by which scores these are chosen; each is tried.
        plain_windows: further windows, without memory and controls.
        state_tokens: what the state of an adapter weighs in KV tokens, for windows of equal bytes;
            None leaves these out.
        block_size: tokens in a block of the KV cache, to which such windows are rounded up.
    """
    arms = [Arm(window_tokens=0)]
    for window in windows:
        if not window:
            continue
        arms += [Arm(window_tokens=window, evict=how) for how in evict]
        if sinks:
            arms.append(Arm(window_tokens=window, sinks=True))
        arms += [
            Arm(window_tokens=window, keep_tokens=tokens, keep_score=score)
            for tokens in keep
            for score in keep_scores
        ]
        for name in adapters:
            arms += [
                Arm(window_tokens=window, adapter=name, rule=rule, keep_tokens=tokens)
                for rule in rules
                for tokens in adapter_keep
            ]
            if state_tokens is not None:
                state = -(-state_tokens[name] // block_size) * block_size
                more = state + max(adapter_keep)
                arms.append(Arm(window_tokens=window + more, equal_to=name))
    arms += [Arm(window_tokens=window) for window in plain_windows if window]
    unique = {arm.key: arm for arm in arms}
    return list(unique.values())
