"""8-bit caches: every byte, folds, scores, copies, and how the format and the order are found."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pte_vllm.kernels import keep_torch, native
from pte_vllm.kernels.cache_layout import BlockLayout, RopeTable, read_evicted
from pte_vllm.kernels.cache_numbers import FLOAT8, layer_scales, raw, stored_dtype
from pte_vllm.kernels.fold_cpu import can_fold, moments_cpu
from pte_vllm.kernels.keep_cpu import can_keep, expected_scores_cpu, put_cpu, take_cpu
from pte_vllm.method import keep
from tests.harness.float8 import stored
from tests.kernels.fold_cases import make_encoder

LAYERS, HEADS, BLOCKS, SIZE, DIM = 2, 2, 11, 16, 32
both_formats = pytest.mark.parametrize("dtype", FLOAT8, ids=lambda d: str(d).rpartition("_")[2])


def _caches(dtype: torch.dtype) -> tuple[list[Tensor], BlockLayout, Tensor]:
    """Caches of random numbers in any order of a block, with scales `[L, 2]`."""
    g = torch.Generator().manual_seed(1)
    shape = (BLOCKS, HEADS, SIZE, 2 * DIM)
    caches = [torch.randn(shape, generator=g).to(dtype) for _ in range(LAYERS)]
    order = torch.randperm(2 * SIZE * DIM, generator=g).view(2, SIZE, DIM)
    scales = torch.tensor([[0.37, 2.9], [1.7, 0.11]])
    return caches, BlockLayout(key_index=order[0], value_index=order[1]), scales


def _restored(caches: list[Tensor], layout: BlockLayout, scales: Tensor) -> list[Tensor]:
    """The same caches as float32, the scales multiplied in."""
    of_cell = torch.empty(LAYERS, 2 * SIZE * DIM)
    of_cell[:, layout.key_index.flatten()] = scales[:, :1]
    of_cell[:, layout.value_index.flatten()] = scales[:, 1:]
    return [c.float() * s.view(SIZE, 2 * DIM) for c, s in zip(caches, of_cell, strict=True)]


def _rope() -> RopeTable:
    angle = torch.rand(300, DIM // 2, generator=torch.Generator().manual_seed(2)) * 6
    return RopeTable(cos=1.3 * angle.cos(), sin=1.3 * angle.sin())


@both_formats
@pytest.mark.parametrize("side", ["keys", "values"])
def test_every_byte_as_torch_reads_it(dtype: torch.dtype, side: str) -> None:
    """Of 256 sequences each folds one token of one number: Σ kᵀv is that number."""
    every = torch.arange(256).to(torch.uint8)
    one = torch.ones(256).to(dtype).view(torch.uint8)
    both = (every, one) if side == "keys" else (one, every)
    cache = torch.stack(both, -1).view(256, 1, 1, 2).view(dtype)
    layout = BlockLayout(key_index=torch.tensor([[0]]), value_index=torch.tensor([[1]]))
    encoder = make_encoder(1, 1, 1, "cpu").map(lambda t: torch.zeros_like(t))
    encoder.w_k.fill_(1)
    encoder.w_v.fill_(1)
    ids, zero = torch.arange(256)[:, None], torch.zeros(256, 1, dtype=torch.int64)
    where = [cache], layout, ids, zero, None
    found = moments_cpu(native.load(), *where, encoder, with_kk=False).kv.flatten()
    wanted = every.view(dtype).float()
    torch.testing.assert_close(found, wanted, atol=0, rtol=0, equal_nan=True)
    assert wanted.isnan().sum() == (2 if dtype == torch.float8_e4m3fn else 6)
    read = read_evicted(*where)[0 if side == "keys" else 1].flatten()
    torch.testing.assert_close(read, wanted, atol=0, rtol=0, equal_nan=True)


@both_formats
def test_folds(dtype: torch.dtype) -> None:
    """The same as of a float32 cache that holds what these mean, to the bit."""
    caches, layout, scales = _caches(dtype)
    plain, rope = _restored(caches, layout, scales), _rope()
    ids, positions = torch.tensor([[3, 9], [0, 7]]), torch.tensor([[40, 72], [0, 201]])
    found = read_evicted(caches, layout, ids, positions, rope, scales)
    wanted = read_evicted(plain, layout, ids, positions, rope)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert found[0].abs().max() > 1e-3
    encoder = make_encoder(LAYERS, 24, HEADS * DIM, "cpu", "squared")
    assert can_fold(caches, 24)
    found, wanted, unscaled = (
        moments_cpu(
            *(native.load(), of, layout, ids, positions, rope, encoder),
            with_kk=True,
            scales=by,
        )
        for of, by in ((caches, scales), (plain, None), (caches, None))
    )
    assert torch.equal(found.kv, wanted.kv) and torch.equal(found.kk, wanted.kk)
    assert not torch.allclose(unscaled.kv, wanted.kv, rtol=0.1)


@both_formats
def test_scores(dtype: torch.dtype) -> None:
    """The same as of a float32 cache that holds what these mean."""
    caches, layout, scales = _caches(dtype)
    plain = _restored(caches, layout, scales)
    queries = 2 * torch.randn(LAYERS, HEADS, 21, DIM, generator=torch.Generator().manual_seed(3))
    sides = [
        keep_torch.ProbedCache(queries=queries, rope=_rope(), scale=DIM**-0.5, scales=by)
        for by in (scales, None)
    ]
    ids = torch.tensor([[3, 9], [0, 7]]), torch.tensor([[5], [2]]), torch.tensor([120, 250])
    found, wanted = (
        keep_torch.expected_scores(of, layout, probed, *ids)
        for of, probed in zip((caches, plain), sides, strict=True)
    )
    assert torch.equal(found, wanted)
    assert can_keep(caches)
    found, exact = (
        expected_scores_cpu(native.load(), of, layout, probed, *ids)
        for of, probed in zip((caches, plain), sides, strict=True)
    )
    assert torch.equal(found, exact)
    assert torch.allclose(found, wanted, rtol=3e-5, atol=1e-7)


@both_formats
def test_kept_cells_move_as_they_are(dtype: torch.dtype) -> None:
    """All 256 bytes, those that are no numbers among them, by compiled code and by torch."""
    caches, layout, _ = _caches(dtype)
    g = torch.Generator().manual_seed(4)
    for cache in caches:
        raw(cache).copy_(torch.randint(0, 256, cache.shape, generator=g))
    assert len(raw(caches[0]).unique()) == 256
    candidates, own = torch.tensor([[3, 9], [0, 7]]), torch.tensor([[5], [2]])
    scores = torch.rand(LAYERS, 2, HEADS, 2 * SIZE, generator=g)
    kept = keep.best(scores, SIZE)
    other = [cache.view(torch.uint8).clone().view(dtype) for cache in caches]
    taken = keep_torch.take(caches, layout, candidates, kept)
    assert taken.dtype == dtype
    by_code = take_cpu(native.load(), other, layout, candidates, kept)
    assert by_code.dtype == dtype and torch.equal(raw(by_code), raw(taken))
    keep_torch.put(caches, layout, own, taken)
    put_cpu(native.load(), other, layout, own, by_code)
    assert all(torch.equal(raw(a), raw(b)) for a, b in zip(caches, other, strict=True))
    for layer, s, h, i in ((0, 0, 0, 0), (1, 1, 1, SIZE - 1)):
        place = int(kept[layer, s, h, i])
        source = raw(caches[layer])[candidates[s, place // SIZE], h].flatten()
        target = raw(caches[layer])[own[s, 0], h].flatten()
        for index in (layout.key_index, layout.value_index):
            assert torch.equal(target[index[i]], source[index[place % SIZE]])


class _Backend:
    """Stores 8 bits in a given order of a head's part of a block, `[2 * bs * D]` places."""

    def __init__(self, order: Tensor, dtype: torch.dtype, *, nearest: bool) -> None:
        self.order, self.dtype, self.nearest = order, dtype, nearest

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots) -> None:
        heads, size = kv_cache.shape[1:3]
        both = torch.stack(
            [
                stored(numbers, scale, self.dtype, nearest=self.nearest)
                for numbers, scale in ((key, layer._k_scale), (value, layer._v_scale))
            ]
        )  # [2, tokens, heads, D]
        for i, slot in enumerate(slots.tolist()):
            places = self.order.view(2, size, -1)[:, slot % size].flatten()
            for h in range(heads):
                cells = kv_cache[slot // size, h].view(-1)
                cells[places] = both[:, i, h].flatten().view(torch.uint8)


def _layer(impl: object, scales: tuple[float, float] = (1.0, 1.0)) -> SimpleNamespace:
    cache = torch.full((5, HEADS, SIZE, 2 * DIM), 0x7F, dtype=torch.uint8)
    k, v = map(torch.tensor, scales)
    numbers = {"_k_scale": k, "_v_scale": v, "_k_scale_float": k.item(), "_v_scale_float": v.item()}
    return SimpleNamespace(kv_cache=cache, impl=impl, dtype=torch.bfloat16, **numbers)


def _orders() -> dict[str, Tensor]:
    cells = torch.arange(SIZE * DIM)
    transposed = cells.view(DIM, SIZE).T.flatten()
    paired = cells.view(DIM // 2, SIZE, 2).transpose(0, 1).flatten()
    return {
        "token by token": torch.arange(2 * SIZE * DIM).view(SIZE, 2, DIM).transpose(0, 1).flatten(),
        "keys transposed": torch.cat((transposed, cells + SIZE * DIM)),
        "keys in pairs": torch.cat((paired, cells + SIZE * DIM)),
        "any": torch.randperm(2 * SIZE * DIM, generator=torch.Generator().manual_seed(5)),
    }


@both_formats
@pytest.mark.parametrize("nearest", [True, False], ids=["nearest", "toward zero"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.3, 0.0071), (1.19, 13.7)], ids=str)
@pytest.mark.parametrize("order", _orders())
def test_order_and_format_are_found(
    order: str, scales: tuple[float, float], nearest: bool, dtype: torch.dtype
) -> None:
    """Whatever is stored how; the scales change nothing, and the numbers read back."""
    layer = _layer(_Backend(_orders()[order], dtype, nearest=nearest), scales)
    assert stored_dtype(layer) == dtype
    layout = BlockLayout.probe(layer)
    found = torch.cat((layout.key_index.flatten(), layout.value_index.flatten()))
    assert torch.equal(found, _orders()[order])
    slots = torch.arange(SIZE) + 3 * SIZE
    k, v = torch.randn(2, SIZE, HEADS, DIM, generator=torch.Generator().manual_seed(6))
    layer.impl.do_kv_cache_update(layer, k, v, layer.kv_cache, slots)
    by = torch.tensor([layer_scales(layer)])
    read = layout.gather([layer.kv_cache.view(dtype)], torch.tensor([3]), by)
    for numbers, scale, (back,) in zip((k, v), scales, read, strict=True):
        assert torch.equal(back, stored(numbers, scale, dtype, nearest=nearest).float() * scale)


def test_other_forms_are_refused() -> None:
    cells = torch.arange(2 * SIZE * DIM)
    backend = _Backend(cells, torch.float8_e4m3fn, nearest=True)
    per_head = _layer(backend)
    per_head._k_scale = torch.ones(HEADS)
    with pytest.raises(ValueError, match=f"each of {HEADS} heads"):
        stored_dtype(per_head)
    integers = _layer(backend)
    backend.do_kv_cache_update = lambda layer, key, value, cache, slots: cache.fill_(83)
    with pytest.raises(RuntimeError, match="--kv-cache-dtype auto"):
        BlockLayout.probe(integers)
    backend.do_kv_cache_update = lambda *args: None
    with pytest.raises(RuntimeError, match="--kv-cache-dtype auto"):
        stored_dtype(integers)
