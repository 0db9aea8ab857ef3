"""What a worker keeps of one request: its plan, what it has folded, and the adapter's encoder.

The thought state itself lies in a slot of the pool (`state.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pte_vllm.engine.thoughts import Thoughts
from pte_vllm.method.blocks import HeldBlocks
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.reference import UPDATE_RULES, LayerEncoder, Sums
from pte_vllm.method.spans import blocks_of
from pte_vllm.method.weight import NO_STATE, StateWeight

IDENTITY_SLOT = 0
"""The slot of tokens without a thought state; it holds the identity and belongs to nobody."""


@dataclass(frozen=True)
class LoadedEncoder:
    """The encoder of an adapter on the model's device, all its layers stacked."""

    config: PTEConfig
    layers: list[int]  # [L] indices of decoder layers, ascending
    encoder: LayerEncoder  # every tensor [L, ...]
    narrowed: LayerEncoder | None = None
    """The same, its projections narrowed to the KV heads of this rank; None: all lie here."""

    @cached_property
    def layer_index(self) -> Tensor:
        """The same on the device, `[L]`, as indexing by the list would wait at every fold."""
        return torch.tensor(self.layers, device=self.encoder.gain.device)


@dataclass(kw_only=True)
class FoldingSequence:
    """One request on the worker: how it folds, what it has folded, and where its state lies.

    The state itself, S, is in the pool's slot and nowhere else. `sums` are what its rule keeps
    besides, each `[L, ...]`, as `method.held` leaves them.
    """

    plan: FoldPlan
    adapter: str | None = None
    rule: str | None = None
    """The update rule; None where the request has no thought state."""
    loaded: LoadedEncoder | None = None
    probes: Tensor | None = None
    """Its adapter's own, `[L, H, n, D]` float32 on the device; None: the engine's score for it."""
    slot: int = IDENTITY_SLOT
    sums: Sums = field(default_factory=dict)
    weight: StateWeight = NO_STATE
    """The memory that its state takes, the slot included."""
    folded_blocks: int = 0
    num_tokens: int = 0
    held_blocks: int = 0
    peak_blocks: int = 0
    rho: list[Tensor] = field(default_factory=list)
    """ρ of each fold, a scalar on the device; nobody waits for it until it is asked for."""
    survivals: list[Tensor | None] = field(default_factory=list)
    """Which candidates each fold kept, as `keep_marks.packed` has them, on their way to the host;
    None where all stayed."""
    forced: list[Tensor | None] = field(default_factory=list)
    """What the first folds have to keep: what they kept when these tokens ran before."""
    folds_before: int = 0
    """How far it had come when it was preempted: its tokens were sampled from what these kept."""
    return_kept: bool = False
    """Whether `survivals` are remembered when the request has ended."""
    _held: HeldBlocks = field(init=False)

    def __post_init__(self) -> None:
        self._held = HeldBlocks(self.plan)

    @property
    def held(self) -> HeldBlocks:
        """The blocks that it still holds after what it has folded."""
        self._held.fold_to(self.folded_blocks // self.plan.evict_blocks)
        return self._held

    def evict(self) -> list[int]:
        """Fold once more, and return the blocks that leave, ascending."""
        evicted = self.held.fold_to(self._held.folds + 1)
        self.folded_blocks += self.plan.evict_blocks
        return blocks_of(evicted)

    @property
    def folds(self) -> int:
        """How many folds lie behind."""
        return self.folded_blocks // self.plan.evict_blocks

    def to_force(self) -> list[Tensor | None]:
        """Return what another run of the same tokens has to keep, fold by fold."""
        return self.survivals + self.forced[len(self.survivals) :]

    def record(self) -> list[Tensor | None]:
        """Return what its tokens were sampled from, also while it catches up with them."""
        return self.to_force()[: max(self.folds_before, len(self.survivals))]

    @property
    def sums_say_state(self) -> bool:
        """Whether S can be read from `sums` alone; also where there is no state."""
        return self.rule is None or UPDATE_RULES[self.rule].state_sum is None

    def thoughts(self, request_id: str, *, state: Tensor | None, with_rho: bool) -> Thoughts:
        """Return what the API shows of the sequence now.

        Args:
            request_id: The engine's id of its request.
            state: Its thought state as `StatePool.state_of` reads it, `[L, G, r]`; None to leave
                it out.
            with_rho: Whether to gather the ρ of its folds.
        """
        config = self.loaded.config if self.loaded is not None else None
        return Thoughts(
            request_id=request_id,
            finished=False,
            plan=self.plan,
            adapter=self.adapter,
            rule=self.rule,
            num_tokens=self.num_tokens,
            folded_blocks=self.folded_blocks,
            held_blocks=self.held_blocks,
            peak_blocks=self.peak_blocks,
            state_bytes=self.weight.total,
            layers=tuple(self.loaded.layers) if self.loaded is not None else (),
            features=config.features if config is not None else None,
            read=config.read if config is not None else None,
            state=state,
            rho=self._rho() if with_rho else None,
            survivals=tuple(self.survivals),
        )

    def _rho(self) -> Tensor | None:
        if self.rule == "none":  # folds move nothing
            return torch.zeros(self.folded_blocks // self.plan.evict_blocks)
        return torch.stack(self.rho) if self.rho else None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A sequence's memory after its last fold, on the host; another may start from it."""

    rule: str | None
    folded_blocks: int
    sums: Sums
    state: Tensor | None
    """S as tokens read it, `[L, G, r]`; None where `sums` say what it is."""
    rho: Tensor | None  # [folds]
    survivals: tuple[Tensor | None, ...] = ()
    """Of all its folds, as `FoldingSequence` has them."""
