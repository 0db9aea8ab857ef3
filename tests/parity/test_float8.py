"""8-bit KV caches: folds and kept tokens against the replay of the same numbers, and no folds.

vLLM's kernels for them need AVX-512 or AMX. Where they are missing, torch stands in for the two
operators that know of 8 bits (`tests/harness/float8.py`); all else is the real engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from vllm.model_executor.layers.attention import attention

from pte_vllm.train.replay.window_cache import WindowCache
from tests.engine.kept import assert_selected
from tests.harness import float8
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import difference

WINDOW = 4 * BLOCK
LENGTH = WINDOW + 4 * BLOCK + 7
SCALES = {"k": (0.25, 0.5, 0.125), "v": (0.03125, 0.0625, 0.25)}
"""By layer. Powers of two, so that what was read is stored again as it was."""
TYPICAL, RARE = 2e-3, 0.2
"""Largest |Δ log p| of half the tokens, and of all. A key whose last digit differs may be stored
as another number of 8 bits, and a state that reads it carries that on."""


@pytest.fixture(params=["stand-in", pytest.param("vllm", marks=float8.needs_kernels)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose operators store 8 bits and read them; every layer has scales of its own."""
    if request.param == "stand-in":
        float8.install(monkeypatch)
    reset = attention.set_default_quant_scales

    def with_scales(layer: torch.nn.Module, register_buffer: bool = False) -> None:
        reset(layer, register_buffer)
        i = int(layer.layer_name.split(".")[2])
        for side, values in SCALES.items():
            getattr(layer, f"_{side}_scale").fill_(values[i])
            setattr(layer, f"_{side}_scale_float", values[i])

    monkeypatch.setattr(attention, "set_default_quant_scales", with_scales)
    return str(request.param)


@pytest.fixture
def replay_stores(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let replays read keys and values as a cache of 8 bits has them."""

    def store(kind: str) -> None:
        dtype, update = float8.DTYPES[kind], WindowCache.update

        def rounded(self, keys, values, layer, *args, **kwargs):
            found = (
                float8.restored(numbers, SCALES[side][layer], dtype)
                for side, numbers in (("k", keys), ("v", values))
            )
            return update(self, *found, layer, *args, **kwargs)

        monkeypatch.setattr(WindowCache, "update", rounded)

    return store


@pytest.fixture
def start(
    kernels: str, tiny: Callable[[str], Path], probes: Path
) -> Iterator[Callable[[str], Engine]]:
    engines = []

    def make(kind: str) -> Engine:
        engines.append(
            Engine(
                tiny("llama"),
                window_tokens=WINDOW,
                lora_rank=8,
                probes=probes,
                num_blocks=120,
                max_model_len=2048,
                kv_cache_dtype=kind,
            )
        )
        assert engines[0].runner.pte_evicted.paged.caches[0].dtype == float8.DTYPES[kind]
        return engines[0]

    yield make
    for engine in engines:
        engine.check_idle()
        engine.close()


@pytest.mark.parametrize("kind", ["fp8", "fp8_e5m2"])
def test_folds_and_kept_tokens(
    kind: str,
    start: Callable[[str], Engine],
    replay_stores: Callable[[str], None],
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
) -> None:
    model = tiny("llama")
    ridge = lora("ridge", adapters(model, rank=8, rule="ridge", features="squared"), 1)
    paper = lora("paper", adapters(model, rank=8, rule="paper", layers=[0, 2]), 2)
    jobs = [
        Job(random_tokens(9 + 17 * i, 500, i), LENGTH, adapter, options)
        for i, (adapter, options) in enumerate(
            [(None, {}), (ridge, {}), (paper, {}), (None, {"pte_keep": BLOCK})]
            + [(ridge, {"pte_keep": BLOCK})]
        )
    ]
    start(kind).run(jobs)
    assert assert_selected([job for job in jobs if job.keeps], WINDOW) > 4
    unlike = torch.cat([difference(model, job, WINDOW) for job in jobs if not job.keeps])
    replay_stores(kind)
    for job in jobs:
        found = difference(model, job, WINDOW)
        print(f"{kind}: max |Δ log p| {found.max():.1e}, median {found.median():.1e}")
        assert found.median() < TYPICAL and found.max() < RARE
    print(f"{kind}: a replay in fp32: max {unlike.max():.1e}, median {unlike.median():.1e}")
    assert unlike.median() > 10 * TYPICAL  # the cache has 8 bits


def test_against_the_same_cache_without_folds(start: Callable[[str], Engine]) -> None:
    """Where all that leaves is kept, folds change nothing; else this reports what they change."""
    engine = start("fp8")
    sequence = random_tokens(40, 500, 0) + random_tokens(LENGTH, 500, 1)
    folds_at = 2 * BLOCK + WINDOW  # 40 pinned tokens fill two blocks

    def score(**options: object) -> torch.Tensor:
        given = {"pte_pin_tokens": 40, **options}
        (job,) = engine.run([Job(sequence, 1, options=given, prompt_logprobs=True)])
        return torch.tensor(job.prompt_scores)

    whole = score(pte_window=0)
    kept = score(pte_keep=4 * BLOCK + WINDOW)
    delta = (kept - whole).abs()
    assert delta.median() < TYPICAL and delta.max() < RARE
    some, nothing = score(pte_keep=BLOCK), score()
    for name, found in (("a block is kept", some), ("nothing is kept", nothing)):
        delta = (found - whole).abs()
        assert delta[: folds_at - 1].max() < RARE  # tokens that come before the first fold
        after = delta[folds_at:]
        print(f"fp8, {name}: |Δ log p| against no folds {after.mean():.1e}, max {after.max():.1e}")
        assert after.max() > RARE
    assert (some - nothing).abs().max() > RARE
