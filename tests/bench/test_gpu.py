"""What only a GPU can show: `python -m pytest -m gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pte_vllm.engine.folding import EvictedBlocks
from pte_vllm.engine.paged import PagedCaches
from pte_vllm.engine.ranks import Ranks
from pte_vllm.engine.sequences import LoadedEncoder
from pte_vllm.engine.state import StatePool
from pte_vllm.engine.thoughts import ThoughtStore
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.plan import FoldPlan
from tests.kernels.fold_cases import SMALL, make_caches, make_encoder, plain_layout, rope_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def never_waits() -> object:
    """Raises where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def _pool(rule: str, rank: int) -> tuple[StatePool, LoadedEncoder]:
    store = ThoughtStore(max_count=4, max_bytes=2**20)
    device = torch.device("cuda")
    pool = StatePool(num_layers=3, max_num_seqs=4, max_rank=rank, device=device, store=store)
    config = PTEConfig(rank=rank, global_tokens=rank, rule=rule, init="random")
    encoder = make_encoder(2, rank, SMALL[0].heads * SMALL[0].dim, "cuda")
    return pool, LoadedEncoder(config=config, layers=[0, 2], encoder=encoder)


@pytest.mark.parametrize("rule", ["paper", "sum", "ridge"])
@pytest.mark.parametrize("native", ["0", "1"])
def test_folds_agree_and_never_wait(
    rule: str, native: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("PTE_NATIVE", native)
    case = SMALL[0]
    torch.manual_seed(0)
    caches = {layer: make_caches(case, 9, "cuda")[0] for layer in (0, 2)}
    evicted = EvictedBlocks(
        paged=PagedCaches(caches, plain_layout(case.block_size, case.dim, "cuda"), scales=None),
        rope=rope_table(case.dim, 1000, "cuda"),
        ranks=Ranks(num_heads=case.heads, head_dim=case.dim),
    )
    pool, loaded = _pool(rule, case.rank)
    plan = FoldPlan(pin_tokens=16, window_tokens=64, block_size=case.block_size)
    sequences = [pool.start(str(i), plan, loaded=loaded) for i in range(2)]
    evicted.warm_up(loaded, rule)
    first, second = _folds("cuda")
    evicted.fold_into(pool, sequences, *first)  # compiles and allocates
    request.getfixturevalue("never_waits")
    evicted.fold_into(pool, sequences, *second)
    torch.cuda.set_sync_debug_mode("default")
    found = torch.stack([pool.state_of(s) for s in sequences])

    on_cpu = _reference(rule, caches, loaded, case.block_size, case.dim)
    torch.testing.assert_close(found.cpu(), on_cpu, rtol=1e-3, atol=1e-4)


def _folds(device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks and first positions of two folds of two sequences."""
    return [
        (torch.tensor(blocks, device=device), torch.tensor(first, device=device))
        for blocks, first in (([[1], [2]], [1, 1]), ([[3], [4]], [2, 2]))
    ]


def _reference(
    rule: str, caches: dict[int, torch.Tensor], loaded: LoadedEncoder, size: int, dim: int
) -> torch.Tensor:
    cpu = torch.device("cpu")
    store = ThoughtStore(max_count=4, max_bytes=2**20)
    rank = loaded.config.rank
    pool = StatePool(num_layers=3, max_num_seqs=4, max_rank=rank, device=cpu, store=store)
    moved = LoadedEncoder(
        config=loaded.config, layers=loaded.layers, encoder=loaded.encoder.map(lambda t: t.cpu())
    )
    evicted = EvictedBlocks(
        paged=PagedCaches(
            {layer: cache.cpu() for layer, cache in caches.items()},
            plain_layout(size, dim, "cpu"),
            scales=None,
        ),
        rope=rope_table(dim, 1000, "cpu"),
        ranks=Ranks(num_heads=SMALL[0].heads, head_dim=dim),
    )
    plan = FoldPlan(pin_tokens=16, window_tokens=64, block_size=size)
    sequences = [pool.start(str(i), plan, loaded=moved) for i in range(2)]
    for fold in _folds("cpu"):
        evicted.fold_into(pool, sequences, *fold)
    return torch.stack([pool.state_of(s) for s in sequences])


def test_modulation_in_a_captured_graph_follows_states_and_slots() -> None:
    from pte_vllm.engine.lora.slots import TokenSlots
    from pte_vllm.kernels.modulate_triton import modulate_slices_
    from pte_vllm.method import reference

    device, rank, slices, size = torch.device("cuda"), 24, 3, 8
    states = torch.randn(5, rank, rank, device=device)
    states[0] = torch.eye(rank)
    squared = torch.arange(5, device=device) == 2
    tokens = TokenSlots.allocate(32, device)
    a, given = (torch.empty(slices, size, rank, device=device) for _ in range(2))
    modulate_slices_(a, states, squared, tokens.slots)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.copy_(given)
        modulate_slices_(a, states, squared, tokens.slots)
    for slots in ([1, 2, 3, 4, 0], [4] * 8, []):
        states[1:].normal_()
        given.normal_()
        tokens.publish([(i, i + 1, slot) for i, slot in enumerate(slots)])
        graph.replay()
        for t, slot in enumerate([*slots, *[0] * (size - len(slots))]):
            features = "squared" if slot == 2 else "linear"
            wanted = reference.modulate(given[:, t], states[slot], "key", features)
            torch.testing.assert_close(a[:, t], wanted, rtol=1e-4, atol=1e-4)


def test_engine_with_cuda_graphs_against_the_replay(tmp_path: Path) -> None:
    """Every rule in one batch, in a process of its own as engines are."""
    spec = json.dumps({"part": "parity", "scratch": str(tmp_path)})
    command = [sys.executable, "-m", "pte_vllm.bench.gpu.part", spec]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])["result"]
    print(found)
    assert min(found["folds"].values()) >= 8
    assert max(found["largest_difference"].values()) <= found["tolerance"]
