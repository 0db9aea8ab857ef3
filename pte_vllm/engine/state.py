"""Thought states of the sequences on a worker: who owns which slot, and what is in it.

Slot 0 is the identity and belongs to nobody: tokens without a thought state use it. A sequence
gets a slot when it is first scheduled with a PTE adapter, loses it when it finishes or is
preempted, and starts from S_0 again when it resumes.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from pte_vllm.engine.counters import FoldCounters
from pte_vllm.engine.kept_records import KeptRecords, to_record
from pte_vllm.engine.request_ids import find_id
from pte_vllm.engine.sequences import IDENTITY_SLOT, FoldingSequence, LoadedEncoder, Snapshot
from pte_vllm.engine.thoughts import Thoughts, ThoughtStore, to_host
from pte_vllm.method.held import as_read, held_sums, whole_sums
from pte_vllm.method.kept_record import KeptRecord
from pte_vllm.method.options import check_rule_fits
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.reference import UPDATE_RULES, Moments, Sums, moments_of, relative_update
from pte_vllm.method.weight import weigh_state


class StatePool:
    """The states of all running sequences, and the sequences that own them.

    `states[layer]: [slots, R, R]` is what φ(A x) is multiplied by from the right: S for read `key`,
    Sᵀ for `value`. It is the only place that holds S while a sequence runs; a sequence's `sums`
    are what its rule keeps besides (`method.held`). `squared: [slots]` says whose φ squares.

    Args:
        num_layers: The number of decoder layers of the model.
        max_num_seqs: The most sequences that run at once.
        max_rank: R, the engine's `--max-lora-rank`; smaller states are padded with zeros.
        device: The device of the model.
        store: Where the thoughts of finished requests go.
        dtype: The type in which tokens read S: float32 or bfloat16.
    """

    SHOWN_FINISHED = 64

    def __init__(
        self,
        *,
        num_layers: int,
        max_num_seqs: int,
        max_rank: int,
        device: torch.device,
        store: ThoughtStore,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.states = torch.zeros(
            *(num_layers, max_num_seqs + 1, max_rank, max_rank), device=device, dtype=dtype
        )
        self.states[:, IDENTITY_SLOT] = torch.eye(max_rank, device=device)
        self.squared = torch.zeros(max_num_seqs + 1, dtype=torch.bool, device=device)
        self.free_slots = list(range(max_num_seqs, 0, -1))
        self.sequences: dict[str, FoldingSequence] = {}
        self.store = store
        # Without states; enough that a rollout still finds its own when many end at once.
        self.finished: deque[Thoughts] = deque(maxlen=max(self.SHOWN_FINISHED, 4 * max_num_seqs))
        self.records = KeptRecords()
        self.counters = FoldCounters(device)

    def start(
        self,
        request_id: str,
        plan: FoldPlan,
        *,
        adapter: str | None = None,
        rule: str | None = None,
        loaded: LoadedEncoder | None = None,
        probes: Tensor | None = None,
        forced: KeptRecord = (),
        return_kept: bool = False,
    ) -> FoldingSequence:
        """Start a sequence from S_0, or start it over, with a slot if it has a thought state.

        Args:
            request_id: The engine's id of its request.
            plan: How it folds.
            adapter: The name of its adapter, to be shown.
            rule: The update rule that the request chose; None: the adapter's.
            loaded: The encoder of its adapter; None where it has no thought state.
            probes: The probes that its adapter brings; None: the engine's score for it.
            forced: What its first folds have to keep; one that starts over keeps what it kept.
            return_kept: Whether to remember what it kept when it has ended.
        """
        previous = self.sequences.get(request_id)
        peak = previous.peak_blocks if previous is not None else 0
        self.stop(request_id)
        sequence = FoldingSequence(
            plan=plan, adapter=adapter, probes=probes, peak_blocks=peak, return_kept=return_kept
        )
        sequence.forced = [
            None if marks is None else torch.frombuffer(bytearray(marks), dtype=torch.uint8)
            for marks in forced
        ]
        if previous is not None:
            sequence.forced = previous.to_force()
            sequence.folds_before = len(previous.record())
            sequence.return_kept |= previous.return_kept
        if loaded is not None:
            sequence.loaded, sequence.rule = loaded, rule or loaded.config.rule
            check_rule_fits(sequence.rule, loaded.config.rank, loaded.config.global_tokens)
            sequence.slot = self.free_slots.pop()
            self.states[:, sequence.slot] = 0.0
            self.squared[sequence.slot] = loaded.config.features == "squared"
            dtype = str(self.states.dtype).removeprefix("torch.")
            sequence.weight = weigh_state(
                loaded.config, len(loaded.layers), dtype, rule=sequence.rule
            )
            sums = UPDATE_RULES[sequence.rule].start(loaded.encoder, loaded.config.normalize)
            self._write_own(sequence, sums)
        self.sequences[request_id] = sequence
        return sequence

    def stop(self, request_id: str) -> FoldingSequence | None:
        """Give the slot back; unknown requests are ignored, as aborts may come before any step."""
        sequence = self.sequences.pop(request_id, None)
        if sequence is not None and sequence.slot != IDENTITY_SLOT:
            self.free_slots.append(sequence.slot)
        return sequence

    def finish(self, request_id: str) -> None:
        """Stop a sequence for good and remember its thoughts; unknown requests are ignored."""
        sequence = self.sequences.get(request_id)
        if sequence is not None:
            sequence.held_blocks = 0
            # Copied before the slot is free: the next owner's numbers come after, in order.
            thoughts = self._thoughts_of(request_id).kept()
            self.stop(request_id)
            self.finished.append(thoughts.without_state())
            self.store.add(thoughts)
            if sequence.return_kept:
                self.records.add(request_id, sequence.record())

    def snapshot(self, request_id: str) -> Snapshot:
        """Copy a running sequence's memory; the tensors may still be on their way to the host."""
        sequence = self.sequences[request_id]
        return Snapshot(
            rule=sequence.rule,
            folded_blocks=sequence.folded_blocks,
            sums={name: to_host(sums) for name, sums in sequence.sums.items()},
            state=None if sequence.sums_say_state else to_host(self._own_state(sequence)),
            rho=to_host(torch.stack(sequence.rho)) if sequence.rho else None,
            survivals=tuple(sequence.survivals),
        )

    def restore(self, sequence: FoldingSequence, snapshot: Snapshot) -> None:
        """Let a sequence that has just started go on from an earlier one's memory."""
        assert sequence.rule == snapshot.rule and not sequence.folded_blocks
        device = self.states.device
        sequence.folded_blocks = snapshot.folded_blocks
        sequence.survivals = list(snapshot.survivals)
        if sequence.loaded is not None:
            sums = {k: v.to(device, non_blocking=True) for k, v in snapshot.sums.items()}
            if snapshot.rho is not None:
                sequence.rho = list(snapshot.rho.to(device, non_blocking=True))
            assert sequence.rule is not None
            # Where the sums say what S is, its shape is all that is needed.
            state = self._own_state(sequence) if snapshot.state is None else snapshot.state
            state = state.to(device, non_blocking=True)
            self._write_own(sequence, whole_sums(sequence.rule, sums, state))

    def thoughts(self, name: str, *, with_state: bool = True) -> Thoughts | None:
        """Return the thoughts of the newest request, running or finished, that is called `name`.

        Without `with_state` the state of a running one is not read.
        """
        request_id = find_id(name, self.sequences)
        if request_id is not None:
            return self._thoughts_of(request_id, with_state=with_state)
        return self.store.find(name)

    def _thoughts_of(self, request_id: str, *, with_state: bool = True) -> Thoughts:
        sequence = self.sequences[request_id]
        state = self.state_of(sequence) if with_state else None
        return sequence.thoughts(request_id, state=state, with_rho=True)

    def reports(self) -> list[dict[str, Any]]:
        """Return a line about each running sequence, as `GET /pte/v1/requests` shows it."""
        return [
            sequence.thoughts(request_id, state=None, with_rho=False).report()
            for request_id, sequence in self.sequences.items()
        ]

    def rho(self, name: str) -> list[float] | None:
        """Return ρ of each fold so far, also after the state has left; None if nothing is known."""
        request_id = find_id(name, self.sequences)
        if request_id is not None:
            sequence = self.sequences[request_id]
            return sequence.thoughts(request_id, state=None, with_rho=True).rho_list()
        finished = {thoughts.request_id: thoughts for thoughts in self.finished}
        request_id = find_id(name, finished)
        return None if request_id is None else finished[request_id].rho_list()

    def take_kept(self, name: str) -> KeptRecord | None:
        """Return what each fold of a request kept that asked for it, once; None if it is unknown.

        Its client may have its last token before the worker hears that it has finished. The device
        must have been waited for.
        """
        request_id = find_id(name, self.sequences)
        if request_id is None or not self.sequences[request_id].return_kept:
            return self.records.take(name)
        self.sequences[request_id].return_kept = False
        return to_record(self.sequences[request_id].record())

    def fold_projected(self, sequences: list[FoldingSequence], k: Tensor, v: Tensor) -> None:
        """Fold what `method.reference.multiply` returns, `k, v: [L, S, m, r]`, into S sequences."""
        loaded, rule = sequences[0].loaded, sequences[0].rule
        assert loaded is not None and rule is not None
        encoder = loaded.encoder.map(lambda t: t[:, None])  # [L, 1, ...], over sequences
        evicted = moments_of(encoder, k, v, with_kk=UPDATE_RULES[rule].reads_kk)
        self.fold_moments(sequences, evicted)

    def fold_moments(self, sequences: list[FoldingSequence], evicted: Moments) -> None:
        """Do the same from sums over the encoded keys and values, each `[L, S, r, r]`."""
        loaded, rule = sequences[0].loaded, sequences[0].rule
        assert loaded is not None and rule is not None
        assert all(s.loaded is loaded and s.rule == rule for s in sequences)
        encoder = loaded.encoder.map(lambda t: t[:, None])
        slots = self._slots_of(sequences)
        before = self._read(loaded, slots)
        held = {
            name: torch.stack([s.sums[name] for s in sequences], 1) for name in sequences[0].sums
        }
        sums = whole_sums(rule, held, before)
        sums = UPDATE_RULES[rule].add(sums, encoder, evicted, loaded.config.normalize)
        after = self._write(sequences, sums, slots)
        rho = relative_update(before.float(), after - before)  # [L, S]
        self.counters.add_rho(rho.flatten())
        for sequence, own in zip(sequences, rho.mean(0), strict=True):
            sequence.rho.append(own)

    def state_of(self, sequence: FoldingSequence) -> Tensor | None:
        """Return a copy of a running sequence's S, `[L, G, r]`; None if it has no thought state."""
        if sequence.loaded is None:
            return None
        return self._own_state(sequence)

    def _own_state(self, sequence: FoldingSequence) -> Tensor:
        assert sequence.loaded is not None
        return self._read(sequence.loaded, self._slots_of([sequence]))[:, 0]

    def _slots_of(self, sequences: list[FoldingSequence]) -> Tensor:
        slots: Tensor = async_tensor_h2d([s.slot for s in sequences], device=self.states.device)
        return slots

    def _read(self, loaded: LoadedEncoder, slots: Tensor) -> Tensor:
        """Copy the states of S sequences of one adapter out of their slots, `[L, S, G, r]`."""
        config = loaded.config
        by_key = config.read == "key"
        shape = config.global_tokens, config.rank
        rows, columns = shape if by_key else reversed(shape)
        stored = self.states[loaded.layer_index[:, None], slots, :rows, :columns]
        return stored if by_key else stored.mT

    def _write(self, sequences: list[FoldingSequence], sums: Sums, slots: Tensor) -> Tensor:
        """Put what the rule reads from `sums`, `[L, S, ...]`, into the slots; hold the rest.

        The states are returned too as tokens read them, `[L, S, G, r]` float32.
        """
        loaded, rule = sequences[0].loaded, sequences[0].rule
        assert loaded is not None and rule is not None
        encoder = loaded.encoder.map(lambda t: t[:, None])
        states = UPDATE_RULES[rule].read(sums, encoder, loaded.config.normalize)
        states = states.expand(-1, len(sequences), -1, -1)  # the rule `none` knows no sequences
        states = as_read(states, self.states.dtype)
        stored = states if loaded.config.read == "key" else states.mT
        rows, columns = stored.shape[-2:]
        self.states[loaded.layer_index[:, None], slots, :rows, :columns] = stored
        held = held_sums(rule, sums, self.states.dtype)
        for i, sequence in enumerate(sequences):
            # A copy of its own: a view would keep the others' alive.
            sequence.sums = {name: both[:, i].contiguous() for name, both in held.items()}
        return states.float()

    def _write_own(self, sequence: FoldingSequence, sums: Sums) -> None:
        """Put one sequence's sums, whole and each `[L, ...]`, where they belong."""
        sums = {name: own[:, None] for name, own in sums.items()}
        self._write([sequence], sums, self._slots_of([sequence]))

    def check_integrity(self) -> None:
        """Raise AssertionError unless every slot is free or owned by exactly one sequence."""
        owned = [s.slot for s in self.sequences.values() if s.slot != IDENTITY_SLOT]
        everything = sorted(owned + self.free_slots)
        assert everything == list(range(1, self.states.shape[1])), "slots leaked or shared"
        identity = torch.eye(self.states.shape[-1], device=self.states.device)
        assert (self.states[:, IDENTITY_SLOT] == identity).all(), "slot 0 was written"
