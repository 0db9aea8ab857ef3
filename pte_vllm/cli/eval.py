"""`pte-vllm eval ...`: its commands."""

from __future__ import annotations

from pte_vllm.cli.groups import Group, later

GROUP = Group(
    name="eval",
    about="Measure accuracy and fidelity under a cache budget.",
    commands={
        ("run",): (
            later("pte_vllm.eval.flags"),
            "accuracy under windows, adapters and controls",
        ),
        ("thoughts",): (
            later("pte_vllm.eval.thoughts"),
            "sample a model's own answers under full attention",
        ),
        ("fidelity",): (
            later("pte_vllm.eval.fidelity"),
            "how well windows and adapters predict such answers",
        ),
        ("turns",): (
            later("pte_vllm.eval.turns"),
            "what chats of many turns remember, and the KV blocks that they hold",
        ),
    },
)
main = GROUP.main
