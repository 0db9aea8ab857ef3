"""Thought states of the sequences on a worker: who owns which slot, and what is in it.

Slot 0 is the identity and belongs to nobody: tokens without a thought state use it. A sequence
gets a slot when it is first scheduled with a PTE adapter, loses it when it finishes or is
preempted, and starts from S_0 again when it resumes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pte_vllm.config import PTEConfig, check_rule_fits
from pte_vllm.counters import FoldCounters
from pte_vllm.ops.reference import RULES, LayerEncoder, Sums, relative_update
from pte_vllm.plan import FoldPlan

IDENTITY_SLOT = 0


@dataclass(frozen=True)
class LoadedEncoder:
    """An adapter's encoder on the device, all its layers stacked."""

    config: PTEConfig
    layers: list[int]  # [L] indices of decoder layers, ascending
    encoder: LayerEncoder  # every tensor [L, ...]


@dataclass(kw_only=True)
class Sequence:
    """One request on the worker."""

    plan: FoldPlan
    adapter: str | None = None
    rule: str | None = None
    """None where the request has no thought state."""
    loaded: LoadedEncoder | None = None
    slot: int = IDENTITY_SLOT
    sums: Sums = field(default_factory=dict)
    folded_blocks: int = 0
    num_tokens: int = 0
    held_blocks: int = 0
    peak_blocks: int = 0

    def summary(self, request_id: str) -> dict[str, Any]:
        """What the API shows of it."""
        plan = self.plan
        return {
            "request_id": request_id,
            "adapter": self.adapter,
            "rule": self.rule,
            "num_tokens": self.num_tokens,
            "pinned_blocks": plan.pinned_blocks,
            "window_blocks": plan.window_blocks,
            "folds": self.folded_blocks // plan.evict_blocks,
            "folded_tokens": self.folded_blocks * plan.block_size,
            "held_blocks": self.held_blocks,
            "peak_blocks": self.peak_blocks,
        }


class StatePool:
    """`states[layer]: [slots, R, R]`, what A x is multiplied by, and the sequences that own them.

    Args:
        num_layers: decoder layers of the model.
        max_num_seqs: most sequences that run at once.
        max_rank: R, the engine's `--max-lora-rank`; smaller states are padded with zeros.
        device: the model's.
    """

    KEPT_FINISHED = 64

    def __init__(
        self, *, num_layers: int, max_num_seqs: int, max_rank: int, device: torch.device
    ) -> None:
        self.states = torch.zeros(num_layers, max_num_seqs + 1, max_rank, max_rank, device=device)
        self.states[:, IDENTITY_SLOT] = torch.eye(max_rank, device=device)
        self.free_slots = list(range(max_num_seqs, 0, -1))
        self.sequences: dict[str, Sequence] = {}
        self.finished: deque[dict[str, Any]] = deque(maxlen=self.KEPT_FINISHED)
        self.counters = FoldCounters(device)

    def start(
        self,
        request_id: str,
        plan: FoldPlan,
        *,
        adapter: str | None = None,
        rule: str | None = None,
        loaded: LoadedEncoder | None = None,
    ) -> Sequence:
        """(Re)start a sequence from S_0, with a slot if it has a thought state."""
        previous = self.sequences.get(request_id)
        peak = previous.peak_blocks if previous is not None else 0
        self.stop(request_id)
        sequence = Sequence(plan=plan, adapter=adapter, peak_blocks=peak)
        if loaded is not None:
            sequence.loaded, sequence.rule = loaded, rule or loaded.config.rule
            check_rule_fits(sequence.rule, loaded.config.rank, loaded.config.global_tokens)
            sequence.slot = self.free_slots.pop()
            self.states[:, sequence.slot] = 0.0
            sequence.sums = RULES[sequence.rule].start(loaded.encoder, loaded.config.normalize)
            self._write(sequence)
        self.sequences[request_id] = sequence
        return sequence

    def stop(self, request_id: str) -> Sequence | None:
        """Give the slot back; unknown requests are ignored, as aborts may come before any step."""
        sequence = self.sequences.pop(request_id, None)
        if sequence is not None and sequence.slot != IDENTITY_SLOT:
            self.free_slots.append(sequence.slot)
        return sequence

    def finish(self, request_id: str) -> None:
        """Stop for good and remember the summary."""
        sequence = self.stop(request_id)
        if sequence is not None:
            sequence.held_blocks = 0
            self.finished.append(sequence.summary(request_id))

    def fold(self, sequence: Sequence, k_e: Tensor, v_e: Tensor) -> None:
        """Fold `K_e, V_e: [L, m, d_kv]` into the sequence's state."""
        assert sequence.loaded is not None and sequence.rule is not None
        loaded, rule = sequence.loaded, RULES[sequence.rule]
        how = loaded.config.normalize
        before = self.states[loaded.layers, sequence.slot]  # [L, R, R], a copy
        sequence.sums = rule.fold(sequence.sums, loaded.encoder, k_e, v_e, how)
        self._write(sequence)
        moved = self.states[loaded.layers, sequence.slot] - before
        self.counters.add_rho(relative_update(before, moved))

    def _write(self, sequence: Sequence) -> None:
        """Put what the rule reads, `[L, G, r]`, into the slot."""
        assert sequence.loaded is not None and sequence.rule is not None
        loaded = sequence.loaded
        state = RULES[sequence.rule].read(sequence.sums, loaded.encoder, loaded.config.normalize)
        stored = state if loaded.config.read == "key" else state.mT
        rows, columns = stored.shape[-2:]
        self.states[loaded.layers, sequence.slot, :rows, :columns] = stored

    def check_integrity(self) -> None:
        """Raise AssertionError unless every slot is free or owned by exactly one sequence."""
        owned = [s.slot for s in self.sequences.values() if s.slot != IDENTITY_SLOT]
        everything = sorted(owned + self.free_slots)
        assert everything == list(range(1, self.states.shape[1])), "slots leaked or shared"
        identity = torch.eye(self.states.shape[-1], device=self.states.device)
        assert (self.states[:, IDENTITY_SLOT] == identity).all(), "slot 0 was written"
