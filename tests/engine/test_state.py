"""Thought states' slots: who owns them, and what they leave to the next."""

from __future__ import annotations

import pytest
import torch

from pte_vllm.engine.sequences import IDENTITY_SLOT, LoadedEncoder
from pte_vllm.engine.state import StatePool
from pte_vllm.engine.thoughts import ThoughtStore
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.reference import UPDATE_RULES
from tests.kernels.fold_cases import make_encoder

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
        kept=ThoughtStore(max_count=4, max_bytes=2**20),
    )
    loaded = _loaded("linear", 4, read)
    sequence = pool.start("a", PLAN, loaded=loaded)
    rule = UPDATE_RULES[loaded.config.rule]
    wanted = rule.read(sequence.sums, loaded.encoder, loaded.config.normalize)
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
        kept=ThoughtStore(max_count=4, max_bytes=2**20),
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
