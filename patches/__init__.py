"""Changes to vLLM that no plugin point reaches; installed as `pte_vllm.patches`.

Each patch has a module of its own, and `README.md` says why it is there and when it can go.
`pte_vllm.plugin` and the doctor import this folder; it imports the engine and what is below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pte_vllm.patches.base import Patch


def all_patches() -> list[Patch]:
    """Return every patch, in the order of application."""
    from pte_vllm.patches import p01_request_options, p02_waits_on_cpu, p03_drafts_on_cpu

    return [p01_request_options.PATCH, p02_waits_on_cpu.PATCH, p03_drafts_on_cpu.PATCH]
