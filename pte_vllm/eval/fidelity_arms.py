"""What is compared: windows, adapters, and controls, each as a plan and what it holds in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pte_vllm.adapter.format import ModelShape
from pte_vllm.eval.arms import with_sinks
from pte_vllm.eval.weights import in_kv_tokens
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.weight import kv_token_bytes

Kind = Literal["window", "adapter", "equal-bytes", "evict", "keep", "sinks"]


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """How the window of any size evicts."""

    block_size: int
    evict_ratio: float = 0.25
    """Part of a full window that one fold frees."""
    evict_tokens: int | None = None
    """Tokens that one fold frees, whatever the window; in place of `evict_ratio`."""

    def plan(self, pin_tokens: int, window_tokens: int, **more: Any) -> FoldPlan:
        """Return the plan of a sequence.

        Raises:
            ValueError: naming the flag, if the numbers do not go together.
        """
        ratio = self.evict_ratio
        if self.evict_tokens is not None:
            if self.evict_tokens % self.block_size or not 0 < self.evict_tokens < window_tokens:
                raise ValueError(
                    f"--evict-tokens {self.evict_tokens}: it must be a multiple of the block size, "
                    f"{self.block_size}, and less than each window, of which one is {window_tokens}"
                )
            ratio = self.evict_tokens / window_tokens
        try:
            return FoldPlan(
                pin_tokens=pin_tokens,
                window_tokens=window_tokens,
                evict_ratio=ratio,
                block_size=self.block_size,
                **more,
            )
        except ValueError as error:
            keep = ", --keep" if more.get("keep_tokens") else ""
            raise ValueError(f"--window, --block-size, --evict-ratio{keep}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class FidelityArm:
    """One way to answer with less than the whole cache."""

    name: str
    kind: Kind
    window_tokens: int
    eviction: Eviction
    adapter: str | None = None
    """The name of the adapter that is on; None: the base model."""
    evict: str = "oldest"
    """Which blocks of a full window a fold takes."""
    keep_tokens: int = 0
    """How many evicted tokens each KV head keeps."""
    keep_score: str = "expected"
    """By which score they are chosen."""
    baseline: str | None = None
    """The plain window of the same size, with which the arm is compared; None: it is one."""
    state_bytes: int = 0
    """What its thought state holds of one sequence."""

    def plan(self, pin_tokens: int) -> FoldPlan:
        """Return the plan of a sequence whose question has `pin_tokens`."""
        if self.kind == "sinks":
            return self._sinks(pin_tokens)
        more: dict[str, Any] = {} if self.evict == "oldest" else {"evict": self.evict}
        if self.keep_tokens:
            more |= {"keep_tokens": self.keep_tokens, "keep_score": self.keep_score}
        return self.eviction.plan(pin_tokens, self.window_tokens, **more)

    def _sinks(self, pin_tokens: int) -> FoldPlan:
        """Pin the first tokens only, and free as much at a fold as the plain window.

        The first fold, the tokens between two folds, and the blocks that are held are those of the
        plain window: only what is forgotten differs.
        """
        like = self.eviction.plan(pin_tokens, self.window_tokens)
        plan = with_sinks(like)
        return replace(plan, evict_ratio=like.stride / plan.window_tokens)

    @property
    def does(self) -> tuple[Any, ...]:
        """What it computes: arms for which this is the same have the same numbers."""
        keeps = (self.keep_tokens, self.keep_score)
        return self.kind == "sinks", self.window_tokens, self.adapter, self.evict, keeps


def kv_bytes_per_token(model: ModelShape, dtype: str) -> int:
    """Return what one token holds in the KV cache of all layers."""
    return kv_token_bytes(model.num_layers, model.d_kv, dtype)


def build_arms(
    windows: Sequence[int],
    adapters: Mapping[str, int],
    *,
    eviction: Eviction,
    bytes_per_token: int,
    adapter_keep: Sequence[int] = (0,),
    evict: Sequence[str] = ("oldest",),
    sinks: bool = False,
    keep: Sequence[int] = (),
    keep_scores: Sequence[str] = ("expected",),
) -> list[FidelityArm]:
    """List what is compared; adapters and controls have the first of the windows, keeps have all.

    Args:
        windows: sizes of plain windows, in tokens.
        adapters: by name, what the thought state of a sequence holds, in bytes.
        adapter_keep: how many evicted tokens are kept beside an adapter; each has an arm.
        eviction: how a window of any size evicts.
        bytes_per_token: what one token holds in the KV cache.
        evict: which blocks a fold may take; `oldest` adds no arm.
        sinks: whether there is an arm that pins the first tokens and not the question.
        keep: how many evicted tokens arms keep, which the base model does under each window.
        keep_scores: by which scores these are chosen; each has an arm.

    Raises:
        ValueError: naming the flag, if the numbers do not go together.
    """
    first = windows[0]
    baseline = _window_name(first)
    arms = [
        FidelityArm(name=_window_name(w), kind="window", window_tokens=w, eviction=eviction)
        for w in dict.fromkeys(windows)
    ]
    arms += [
        FidelityArm(
            name=f"{window.name} keep {tokens}{'' if score == 'expected' else f' {score}'}",
            kind="keep",
            window_tokens=window.window_tokens,
            eviction=eviction,
            keep_tokens=tokens,
            keep_score=score,
            baseline=window.name,
        )
        for window in arms
        for tokens in dict.fromkeys(keep)
        for score in dict.fromkeys(keep_scores)
    ]
    for how in evict:
        if how != "oldest":
            arms.append(
                FidelityArm(
                    name=f"evict {how}",
                    kind="evict",
                    window_tokens=first,
                    eviction=eviction,
                    evict=how,
                    baseline=baseline,
                )
            )
    if sinks:
        arms.append(
            FidelityArm(
                name="sinks",
                kind="sinks",
                window_tokens=first,
                eviction=eviction,
                baseline=baseline,
            )
        )
    for name, size in adapters.items():
        arms += [
            FidelityArm(
                name=f"{name} keep {tokens}" if tokens else name,
                kind="adapter",
                window_tokens=first,
                eviction=eviction,
                adapter=name,
                keep_tokens=tokens,
                baseline=baseline,
                state_bytes=size,
            )
            for tokens in dict.fromkeys(adapter_keep)
        ]
        if size:
            blocks = -(-in_kv_tokens(size, bytes_per_token) // eviction.block_size)
            more = blocks * eviction.block_size + max(adapter_keep)
            arms.append(
                FidelityArm(
                    name=f"bytes of {name}",
                    kind="equal-bytes",
                    window_tokens=first + more,
                    eviction=eviction,
                    baseline=baseline,
                )
            )
    for arm in arms:
        arm.plan(0)  # a number that does not fit shows before anything is loaded
    return arms


def _window_name(window_tokens: int) -> str:
    return f"window {window_tokens}"
