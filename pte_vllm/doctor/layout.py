"""Checks of attention as an engine would set it up: backend, block sizes, order of a cache block.

No model is loaded: one real attention layer of vLLM is made for a tiny configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from pte_vllm.doctor.checks import Check, broken, ok
from pte_vllm.method.options import EngineConfig

if TYPE_CHECKING:
    from pte_vllm.engine.trial_attention import TrialAttention

DTYPES = ("float32", "bfloat16", "float16")
BLOCK_SIZES = (32, 64, 128)


def _trial(dtype: str, block_size: int) -> AbstractContextManager[TrialAttention]:
    # A broken installation may fail to import any of these; a check that fails is a finding.
    from pte_vllm.engine.trial_attention import trial_attention
    from pte_vllm.plugin import register
    from pte_vllm.serve import engine_args

    register()
    return trial_attention(engine_args(EngineConfig()), dtype=dtype, block_size=block_size)


def platform_and_backend() -> Iterator[Check]:
    """Tell what vLLM takes this machine for, and which attention it would use with our options."""
    from pte_vllm.engine.trial_attention import platform_name

    yield ok("platform", platform_name())
    with _trial("float32", BLOCK_SIZES[0]) as trial:
        if not trial.is_ours:
            yield broken(
                "attention backend",
                f"{trial.backend}: it is not ours",
                "another plugin took its place: see VLLM_PLUGINS and --attention-backend",
            )
            return
        yield ok("attention backend", trial.backend)
        if trial.other_manager is None:
            yield ok("KV cache manager", "PTEManager")
        else:
            yield broken(
                "KV cache manager",
                f"{trial.other_manager} in place of PTEManager",
                "see VLLM_PLUGINS: another plugin?",
            )
        yield ok("block sizes", f"{', '.join(trial.block_sizes)} (--block-size)")


def kv_layout() -> Iterator[Check]:
    """Find the order of a block as an engine does at its start, and read random values back."""
    for dtype in DTYPES:
        works: dict[str, list[int]] = {}
        for block_size in BLOCK_SIZES:
            try:
                with _trial(dtype, block_size) as trial:
                    trial.check_round_trip()
            # All three mean that vLLM's layer, or our reading of it, cannot do this size.
            except (RuntimeError, ValueError, NotImplementedError) as error:
                yield broken(
                    f"KV layout {dtype}",
                    f"blocks of {block_size}: {error}",
                    "serve with another --dtype or --block-size, and report this",
                )
            else:
                works.setdefault(trial.isa, []).append(block_size)
        for isa, sizes in works.items():
            yield ok(f"KV layout {dtype}", f"{isa}: blocks of {sizes} tokens read back exactly")
