"""Engines that take turns at a workload, and the adapters that benchmarks give them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.progress import Progress

from pte_vllm.adapter.defaults import NewAdapter
from pte_vllm.bench import report
from pte_vllm.bench.arm import Arm, ArmSpec, Workload

BLOCK_TOKENS = 32
Results = dict[str, list[dict[str, Any]]]


class Turns:
    """The adapters of a benchmark, and engines that run workloads in turn."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self._args, self._scratch = args, scratch

    @cached_property
    def _adapters(self) -> tuple[str, str]:
        """Made when first asked for, as it takes long for a large model."""
        return make_adapters(self._args, self._scratch)

    @property
    def thoughts(self) -> str:
        """The PTE adapter."""
        return self._adapters[0]

    @property
    def plain(self) -> str:
        """The same LoRA without its encoder."""
        return self._adapters[1]

    def spec(self, name: str, **options: Any) -> ArmSpec:
        args = self._args
        common = {
            **{"model": args.model, "dtype": args.dtype, "rank": args.rank},
            "compiled": not args.eager,
            "ranks": getattr(args, "tensor_parallel_size", 1),
        }
        return ArmSpec(name=name, block_size=BLOCK_TOKENS, **{**common, **options})

    def pte(self, name: str = "window, PTE", **options: Any) -> ArmSpec:
        """The arm with everything: a window, and an adapter with states."""
        return self.spec(name, window_tokens=self._args.window, adapter=self.thoughts, **options)

    def run(
        self,
        specs: Sequence[ArmSpec],
        workloads: Sequence[Workload],
        *,
        own: Mapping[str, Workload] | None = None,
    ) -> list[Results]:
        """Every arm runs every workload `--repeats` times in turn, after one short unmeasured one.

        Args:
            specs: The arms.
            workloads: What they run.
            own: By the name of an arm, what it runs in place of each of these.

        Returns:
            For each workload, by arm what its runs gave.
        """
        repeats = self._args.repeats
        own = own or {}
        results: list[Results] = [{spec.name: [] for spec in specs} for _ in workloads]
        arms: list[Arm] = []
        total = len(specs) * (2 + repeats * len(workloads))
        try:
            with Progress(console=report.console, transient=True) as progress:
                task = progress.add_task("starting engines", total=total)
                for i, spec in enumerate(specs):
                    log = self._scratch / f"arm{i}.log"
                    arms.append(Arm(spec, log))
                    arms[-1].wait_ready()  # one by one: loading uses the whole machine
                    progress.advance(task)
                for arm in arms:
                    progress.update(task, description=f"warming up: {arm.spec.name}")
                    first = own.get(arm.spec.name, workloads[0])
                    arm.run(replace(first, output_tokens=min(16, first.output_tokens), seed=0))
                    progress.advance(task)
                for turn in range(1, repeats + 1):
                    for workload, found in zip(workloads, results, strict=True):
                        for arm in arms:
                            progress.update(task, description=f"turn {turn}: {arm.spec.name}")
                            chosen = own.get(arm.spec.name, workload)
                            found[arm.spec.name].append(arm.run(replace(chosen, seed=turn)))
                            progress.advance(task)
        finally:
            for arm in arms:
                arm.close()
        return results


def make_adapters(
    args: argparse.Namespace, scratch: Path, *, seed: int = 0, b_scale: float = 1.0
) -> tuple[str, str]:
    """A PTE adapter with random B, and the same LoRA without its encoder.

    Speed does not depend on what B holds; where answers matter a small `b_scale` keeps a real model
    from being sure of nonsense.
    """
    from pte_vllm.adapter.make import make_adapter

    scratch.mkdir(parents=True, exist_ok=True)
    thoughts, plain = scratch / "thoughts", scratch / "plain"
    options = NewAdapter(rank=args.rank, rule=args.rule, features=args.features, init="random")
    adapter = make_adapter(args.model, thoughts, options.pte(), b="random", seed=seed)
    if b_scale != 1.0:
        lora_b = {module: b_scale * weight for module, weight in adapter.lora_b.items()}
        adapter = replace(adapter, lora_b=lora_b)
        adapter.save(thoughts)
    replace(adapter, pte=None, encoders={}).save(plain)
    return str(thoughts), str(plain)


def tokens_per_second(results: Results) -> dict[str, list[float]]:
    return {
        name: [r["output_tokens"] / r["seconds"] for r in runs] for name, runs in results.items()
    }
