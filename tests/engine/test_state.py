"""Thought states' slots: who owns them, and what they leave to the next."""

from __future__ import annotations

import pytest
import torch

from pte_vllm.engine.sequences import IDENTITY_SLOT, LoadedEncoder
from pte_vllm.engine.state import StatePool
from pte_vllm.engine.thoughts import ThoughtStore
from pte_vllm.method.held import rounded
from pte_vllm.method.names import RULE_NAMES
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.reference import UPDATE_RULES, Moments, initial_state, moments
from pte_vllm.method.weight import weigh_state
from tests.kernels.fold_cases import make_encoder

RULES_AND_DTYPES = [
    (rule, dtype) for rule in RULE_NAMES for dtype in (torch.float32, torch.bfloat16)
]
PLAN = FoldPlan(pin_tokens=16, window_tokens=64, block_size=16)


def _loaded(features: str, rank: int, read: str = "key") -> LoadedEncoder:
    config = PTEConfig(rank=rank, global_tokens=rank, features=features, read=read, init="random")
    encoder = make_encoder(2, rank, 24, "cpu", features)
    return LoadedEncoder(config=config, layers=[0, 2], encoder=encoder)


@pytest.mark.parametrize("read", ["key", "value"])
def test_a_finished_state_outlives_its_slot(read: str) -> None:
    pool = StatePool(
        num_layers=3,
        max_num_seqs=1,
        max_rank=8,
        device=torch.device("cpu"),
        store=ThoughtStore(max_count=4, max_bytes=2**20),
    )
    loaded = _loaded("linear", 4, read)
    pool.start("a", PLAN, loaded=loaded)
    wanted = initial_state(loaded.encoder, loaded.config.normalize)  # the rule is `paper`
    shown = pool.thoughts("a")
    assert shown is not None and shown.state is not None and torch.equal(shown.state, wanted)
    pool.finish("a")
    again = pool.start("b", PLAN, loaded=loaded)
    pool.states[:, again.slot] = 7.0
    kept = pool.thoughts("a")
    assert kept is not None and kept.state is not None and torch.equal(kept.state, wanted)
    assert torch.equal(shown.state, wanted)


def test_a_slot_forgets_the_features_and_the_state_of_its_last_owner() -> None:
    pool = StatePool(
        num_layers=3,
        max_num_seqs=1,
        max_rank=8,
        device=torch.device("cpu"),
        store=ThoughtStore(max_count=4, max_bytes=2**20),
    )
    for name, features, rank in (("a", "squared", 8), ("b", "linear", 4), ("c", "squared", 4)):
        sequence = pool.start(name, PLAN, loaded=_loaded(features, rank))
        assert pool.squared.tolist() == [False, features == "squared"]
        assert not pool.states[1, sequence.slot].any()  # a layer without a state
        assert not pool.states[:, sequence.slot, rank:].any()
        assert pool.states[0, sequence.slot, :rank, :rank].any()
        pool.check_integrity()
        pool.finish(name)
    assert pool.start("d", PLAN).slot == IDENTITY_SLOT  # without an adapter none is taken
    assert not pool.squared[IDENTITY_SLOT]
    assert pool.start("e", PLAN, loaded=_loaded("linear", 4)).slot != IDENTITY_SLOT


def _pool(dtype: torch.dtype, rank: int, max_num_seqs: int = 3) -> StatePool:
    return StatePool(
        num_layers=3,
        max_num_seqs=max_num_seqs,
        max_rank=rank,
        device=torch.device("cpu"),
        store=ThoughtStore(max_count=4, max_bytes=2**20),
        dtype=dtype,
    )


def _evicted(rule: str, loaded: LoadedEncoder, sequences: int) -> Moments:
    encoder = loaded.encoder.map(lambda t: t[:, None])
    k, v = torch.randn(2, len(loaded.layers), sequences, 16, 24)
    return moments(encoder, k, v, with_kk=UPDATE_RULES[rule].reads_kk)


@pytest.mark.parametrize(("rule", "dtype"), RULES_AND_DTYPES)
def test_a_sequence_takes_the_memory_that_is_said(rule: str, dtype: torch.dtype) -> None:
    """Every tensor of a sequence and its part of the pool, before and after folds."""
    pool, loaded = _pool(dtype, 8), _loaded("linear", 8)
    sequences = [pool.start(name, PLAN, rule=rule, loaded=loaded) for name in "ab"]
    said = weigh_state(loaded.config, 2, str(dtype).removeprefix("torch."), rule=rule)
    for _ in range(2):
        for sequence in sequences:
            # Of the slot, the layers that have a state.
            slot = pool.states[loaded.layers, sequence.slot]
            assert slot.numel() * slot.itemsize == said.read == sequence.weight.read
            held = sequence.sums.values()
            assert sum(t.untyped_storage().nbytes() for t in held) == said.sums
        if rule != "none":  # which never folds
            pool.fold_moments(sequences, _evicted(rule, loaded, 2))


@pytest.mark.parametrize("read", ["key", "value"])
@pytest.mark.parametrize(("rule", "dtype"), RULES_AND_DTYPES)
def test_folds_are_the_definition_s(rule: str, dtype: torch.dtype, read: str) -> None:
    """Also after a copy to the host and back; what is read is rounded, what is kept is not."""
    if rule == "none":
        return
    pool, loaded = _pool(dtype, 8), _loaded("linear", 6, read)
    about, encoder = UPDATE_RULES[rule], loaded.encoder.map(lambda t: t[:, None])
    sums = about.start(encoder, "matrix")
    sequences = [pool.start(name, PLAN, rule=rule, loaded=loaded) for name in "ab"]
    for fold in range(6):
        evicted = _evicted(rule, loaded, 2)
        sums = about.add(sums, encoder, evicted, "matrix")
        pool.fold_moments(sequences, evicted)
        if fold == 2:
            snapshots = [pool.snapshot(name) for name in "ab"]
            for name in "ab":
                pool.finish(name)
            sequences = [pool.start(name, PLAN, rule=rule, loaded=loaded) for name in "ab"]
            for sequence, snapshot in zip(sequences, snapshots, strict=True):
                pool.restore(sequence, snapshot)
    wanted = rounded(about.read(sums, encoder, "matrix"), dtype)
    for i, sequence in enumerate(sequences):
        found = pool.state_of(sequence)
        assert found is not None and found.dtype == dtype
        # A number that fp32 rounds elsewhere may fall to bfloat16's other neighbour.
        near = 1e-4 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(found.float(), wanted[:, i], rtol=near, atol=1e-4)
