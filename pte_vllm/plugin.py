"""The one place that registers with vLLM; runs in every process vLLM starts.

Without `additional_config["pte"]` (a plain `vllm serve`) everything registered stays inert.
"""

from __future__ import annotations

import os

from pte_vllm.compat.versions import MAIN, SUPPORTED, base, in_words


def register() -> None:
    """Entry point of `vllm.general_plugins`; safe to call repeatedly.

    Raises:
        RuntimeError: on another version of vLLM, or if its source differs from what patches expect.
    """
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from pte_vllm.engine.cache import register_spec
    from pte_vllm.engine.orphans import ENABLED, end_with_parent
    from pte_vllm.patches import all_patches
    from pte_vllm.patches.base import apply_all

    if base(vllm.__version__) not in SUPPORTED:
        raise RuntimeError(
            f"pte-vllm supports vLLM {in_words()}, found {vllm.__version__}: install "
            f"vllm=={MAIN}, or remove pte-vllm"
        )
    if os.environ.get(ENABLED):
        end_with_parent()  # first: to load a model takes long
    register_spec()
    if current_platform.is_cpu():
        # The CPU platform takes CPU_ATTN's path whatever backend is selected.
        register_backend(
            AttentionBackendEnum.CPU_ATTN, "pte_vllm.engine.attention.PTECPUAttentionBackend"
        )
    else:
        register_backend(
            AttentionBackendEnum.CUSTOM, "pte_vllm.engine.attention.PTECUDAAttentionBackend"
        )
    apply_all(all_patches())
