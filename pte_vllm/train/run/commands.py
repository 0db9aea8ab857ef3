"""`pte-vllm train grpo` and `distill`: their options first, then what runs them.

torch and what trains with it take seconds to import; help and mistakes do not wait for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pte_vllm.train.run.config import DistillRun, GrpoRun


def grpo(arguments: Sequence[str]) -> int:
    """Run `pte-vllm train grpo [RUN.toml] [--section.option VALUE ...]`; the exit status."""
    run = GrpoRun.parse(arguments, prog="pte-vllm train grpo")
    from pte_vllm.train.grpo.loop import main

    return main(run)


def distill(arguments: Sequence[str]) -> int:
    """Run `pte-vllm train distill [RUN.toml] [--section.option VALUE ...]`; the exit status."""
    run = DistillRun.parse(arguments, prog="pte-vllm train distill")
    from pte_vllm.train.distill.loop import main

    return main(run)
