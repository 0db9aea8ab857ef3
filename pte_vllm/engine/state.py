"""Thought states of the sequences on a worker: who owns which slot, and what is in it.

Slot 0 is the identity and belongs to nobody: tokens without a thought state use it. A sequence
gets a slot when it is first scheduled with a PTE adapter, loses it when it finishes or is
preempted, and starts from S_0 again when it resumes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from pte_vllm.engine.counters import FoldCounters
from pte_vllm.engine.request_ids import find_id
from pte_vllm.engine.thoughts import Thoughts, ThoughtStore, to_host
from pte_vllm.method.options import PTEConfig, check_rule_fits
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.reference import (
    UPDATE_RULES,
    LayerEncoder,
    Moments,
    Sums,
    moments,
    relative_update,
)

IDENTITY_SLOT = 0


@dataclass(frozen=True)
class LoadedEncoder:
    """An adapter's encoder on the device, all its layers stacked."""

    config: PTEConfig
    layers: list[int]  # [L] indices of decoder layers, ascending
    encoder: LayerEncoder  # every tensor [L, ...]

    @cached_property
    def layer_index(self) -> Tensor:
        """`layers` on the device, `[L]`; indexing by the list would wait for it at every fold."""
        return torch.tensor(self.layers, device=self.encoder.gain.device)


@dataclass(kw_only=True)
class FoldingSequence:
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
    state: Tensor | None = None  # [L, G, r] what the rule reads from `sums`
    rho: list[Tensor] = field(default_factory=list)
    """Of each fold, a scalar on the device; nobody waits for it until it is asked for."""

    def thoughts(self, request_id: str, *, with_rho: bool = True) -> Thoughts:
        """What the API shows of it now."""
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
            layers=tuple(self.loaded.layers) if self.loaded is not None else (),
            features=config.features if config is not None else None,
            read=config.read if config is not None else None,
            state=self.state,
            rho=self._rho() if with_rho else None,
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
    rho: Tensor | None  # [folds]


class StatePool:
    """`states[layer]: [slots, R, R]`, what φ(A x) is multiplied by, and the sequences that own it.

    `squared: [slots]` says whose φ squares.

    Args:
        num_layers: decoder layers of the model.
        max_num_seqs: most sequences that run at once.
        max_rank: R, the engine's `--max-lora-rank`; smaller states are padded with zeros.
        device: the model's.
        kept: where the thoughts of finished requests go.
    """

    SHOWN_FINISHED = 64

    def __init__(
        self,
        *,
        num_layers: int,
        max_num_seqs: int,
        max_rank: int,
        device: torch.device,
        kept: ThoughtStore,
    ) -> None:
        self.states = torch.zeros(num_layers, max_num_seqs + 1, max_rank, max_rank, device=device)
        self.states[:, IDENTITY_SLOT] = torch.eye(max_rank, device=device)
        self.squared = torch.zeros(max_num_seqs + 1, dtype=torch.bool, device=device)
        self.free_slots = list(range(max_num_seqs, 0, -1))
        self.sequences: dict[str, FoldingSequence] = {}
        self.kept = kept
        # Without states; enough that a rollout still finds its own when many end at once.
        self.finished: deque[Thoughts] = deque(maxlen=max(self.SHOWN_FINISHED, 4 * max_num_seqs))
        self.counters = FoldCounters(device)

    def start(
        self,
        request_id: str,
        plan: FoldPlan,
        *,
        adapter: str | None = None,
        rule: str | None = None,
        loaded: LoadedEncoder | None = None,
    ) -> FoldingSequence:
        """(Re)start a sequence from S_0, with a slot if it has a thought state."""
        previous = self.sequences.get(request_id)
        peak = previous.peak_blocks if previous is not None else 0
        self.stop(request_id)
        sequence = FoldingSequence(plan=plan, adapter=adapter, peak_blocks=peak)
        if loaded is not None:
            sequence.loaded, sequence.rule = loaded, rule or loaded.config.rule
            check_rule_fits(sequence.rule, loaded.config.rank, loaded.config.global_tokens)
            sequence.slot = self.free_slots.pop()
            self.states[:, sequence.slot] = 0.0
            self.squared[sequence.slot] = loaded.config.features == "squared"
            sequence.sums = UPDATE_RULES[sequence.rule].start(
                loaded.encoder, loaded.config.normalize
            )
            self._write_own(sequence)
        self.sequences[request_id] = sequence
        return sequence

    def stop(self, request_id: str) -> FoldingSequence | None:
        """Give the slot back; unknown requests are ignored, as aborts may come before any step."""
        sequence = self.sequences.pop(request_id, None)
        if sequence is not None and sequence.slot != IDENTITY_SLOT:
            self.free_slots.append(sequence.slot)
        return sequence

    def finish(self, request_id: str) -> None:
        """Stop for good and remember its thoughts."""
        sequence = self.stop(request_id)
        if sequence is not None:
            sequence.held_blocks = 0
            thoughts = sequence.thoughts(request_id).kept()
            self.finished.append(thoughts.without_state())
            self.kept.add(thoughts)

    def snapshot(self, request_id: str) -> Snapshot:
        """Of a running sequence; its tensors may still be on their way to the host."""
        sequence = self.sequences[request_id]
        return Snapshot(
            rule=sequence.rule,
            folded_blocks=sequence.folded_blocks,
            sums={name: to_host(sums) for name, sums in sequence.sums.items()},
            rho=to_host(torch.stack(sequence.rho)) if sequence.rho else None,
        )

    def restore(self, sequence: FoldingSequence, snapshot: Snapshot) -> None:
        """Let a sequence that has just started go on from an earlier one's memory."""
        assert sequence.rule == snapshot.rule and not sequence.folded_blocks
        device = self.states.device
        sequence.folded_blocks = snapshot.folded_blocks
        if sequence.loaded is not None:
            sequence.sums = {k: v.to(device, non_blocking=True) for k, v in snapshot.sums.items()}
            if snapshot.rho is not None:
                sequence.rho = list(snapshot.rho.to(device, non_blocking=True))
            self._write_own(sequence)

    def thoughts(self, name: str) -> Thoughts | None:
        """Of the running or finished request that a client calls `name`; the newest of several."""
        request_id = find_id(name, self.sequences)
        if request_id is not None:
            return self.sequences[request_id].thoughts(request_id)
        return self.kept.find(name)

    def rho(self, name: str) -> list[float] | None:
        """ρ of each fold so far, also after the state has left; None if nothing is known."""
        request_id = find_id(name, self.sequences)
        if request_id is not None:
            return self.sequences[request_id].thoughts(request_id).rho_list()
        finished = {thoughts.request_id: thoughts for thoughts in self.finished}
        request_id = find_id(name, finished)
        return None if request_id is None else finished[request_id].rho_list()

    def fold(self, sequences: list[FoldingSequence], k_e: Tensor, v_e: Tensor) -> None:
        """Fold `K_e, V_e: [L, S, m, d_kv]` into S sequences of one adapter and one rule."""
        loaded, rule = sequences[0].loaded, sequences[0].rule
        assert loaded is not None and rule is not None
        encoder = loaded.encoder.map(lambda t: t[:, None])  # [L, 1, ...], over sequences
        evicted = moments(encoder, k_e, v_e, with_kk=UPDATE_RULES[rule].reads_kk)
        self.fold_moments(sequences, evicted)

    def fold_moments(self, sequences: list[FoldingSequence], evicted: Moments) -> None:
        """The same from sums over the keys and values, `[L, S, r, r]`."""
        loaded, rule = sequences[0].loaded, sequences[0].rule
        assert loaded is not None and rule is not None
        assert all(s.loaded is loaded and s.rule == rule for s in sequences)
        encoder = loaded.encoder.map(lambda t: t[:, None])
        sums = {
            name: torch.stack([s.sums[name] for s in sequences], 1) for name in sequences[0].sums
        }
        sums = UPDATE_RULES[rule].add(sums, encoder, evicted, loaded.config.normalize)
        for i, sequence in enumerate(sequences):
            # A copy of its own: a view would keep the others' alive.
            sequence.sums = {name: both[:, i].contiguous() for name, both in sums.items()}
        before = torch.stack([s.state for s in sequences if s.state is not None], 1)
        after = self._write(sequences, sums)
        rho = relative_update(before, after - before)  # [L, S]
        self.counters.add_rho(rho.flatten())
        for sequence, own in zip(sequences, rho.mean(0), strict=True):
            sequence.rho.append(own)

    def _write(self, sequences: list[FoldingSequence], sums: Sums) -> Tensor:
        """Put what the rule reads from `sums`, `[L, S, ...]`, into the slots; returns the states.

        States are `[L, S, G, r]`; every sequence gets its own, `[L, G, r]`.
        """
        loaded, rule = sequences[0].loaded, sequences[0].rule
        assert loaded is not None and rule is not None
        encoder = loaded.encoder.map(lambda t: t[:, None])
        states = UPDATE_RULES[rule].read(sums, encoder, loaded.config.normalize)
        states = states.expand(-1, len(sequences), -1, -1)  # the rule `none` knows no sequences
        stored = states if loaded.config.read == "key" else states.mT
        rows, columns = stored.shape[-2:]
        slots = async_tensor_h2d(
            [sequence.slot for sequence in sequences], device=self.states.device
        )
        self.states[loaded.layer_index[:, None], slots, :rows, :columns] = stored
        for i, sequence in enumerate(sequences):
            sequence.state = states[:, i].contiguous()
        return states

    def _write_own(self, sequence: FoldingSequence) -> None:
        """`_write` of one sequence, from its own sums."""
        self._write([sequence], {name: own[:, None] for name, own in sequence.sums.items()})

    def check_integrity(self) -> None:
        """Raise AssertionError unless every slot is free or owned by exactly one sequence."""
        owned = [s.slot for s in self.sequences.values() if s.slot != IDENTITY_SLOT]
        everything = sorted(owned + self.free_slots)
        assert everything == list(range(1, self.states.shape[1])), "slots leaked or shared"
        identity = torch.eye(self.states.shape[-1], device=self.states.device)
        assert (self.states[:, IDENTITY_SLOT] == identity).all(), "slot 0 was written"
