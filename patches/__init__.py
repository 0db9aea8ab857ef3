"""Changes to vLLM that no plugin point reaches; installed as `pte_vllm.patches`.

`README.md` is the ledger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pte_vllm.patches.base import Patch


def all_patches() -> list[Patch]:
    """Every patch, in the order of application."""
    from pte_vllm.patches import p01_request_options

    return [p01_request_options.PATCH]
