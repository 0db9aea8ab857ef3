"""What a sweep is told: presets, defaults, its flags checked together. Standard library only."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pte_vllm.method.names import EVICTS, KEEP_SCORES, RULE_NAMES, Evict, KeepScore

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "benchmark": ["math-500", "aime-2024", "aime-2025", "amc-2023", "olympiadbench", "minerva"],
        "window": [0, 768, 1024, 2048],
        "max_tokens": [3072],
    },
    "paper-length": {
        "benchmark": ["math-500", "aime-2024", "aime-2025"],
        "window": [1024],
        "max_tokens": [3072, 6144, 12288, 24576, 49152, 65536],
    },
}
"""Settings of arXiv 2602.16839 as far as it gives them; flags override them."""

JUDGES = ("auto", "math", "reasoning-gym", "exact")
"""Reward functions of the trainer that judge text."""

DEFAULTS: dict[str, Any] = {
    "benchmark": None,
    "window": [0, 256, 1024],
    "max_tokens": [3072],
}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """One sweep, its flags read and checked."""

    model: str | None
    url: str | None
    api_key_env: str | None
    adapters: dict[str, str | None]
    """By name: the directory, or None for one that the server at `url` has."""
    benchmarks: tuple[str, ...]
    data: str | None
    limit: int | None
    template: str | None
    judge: str
    system: str | None
    data_seed: int
    windows: tuple[int, ...]
    plain_windows: tuple[int, ...]
    """Further windows, without memory and controls."""
    adapter_keep: tuple[int, ...]
    """Evicted tokens to keep beside each adapter, by the score `expected`; 0 keeps none."""
    rules: tuple[str | None, ...]
    evict: tuple[Evict, ...]
    sinks: bool
    keep: tuple[int, ...]
    """Evicted tokens to keep, under each of `windows`."""
    keep_scores: tuple[KeepScore, ...]
    probes: str | None
    """File of probes for a server that is started here; None: the server has its own."""
    equal_bytes: bool
    max_tokens: tuple[int, ...]
    seeds: tuple[int, ...]
    epochs: int
    pass_at: tuple[int, ...]
    temperature: float
    top_p: float | None
    concurrency: int
    block_size: int | None
    evict_ratio: float
    out: Path
    server_flags: tuple[str, ...]

    def server_arguments(self) -> tuple[str, ...]:
        """Return the flags of our server that follow from others, and those given for it."""
        found: list[str] = []
        wanted = [*self.adapter_keep, *(self.keep if "expected" in self.keep_scores else ())]
        if any(wanted):
            # Without a file of probes a server makes some if it keeps tokens by default.
            if self.probes is not None:
                found += ["--pte-probes", self.probes]
            else:
                found += ["--pte-keep", str(max(wanted))]
        return (*found, *self.server_flags)


def read_options(given: argparse.Namespace) -> RunOptions:
    """Check the flags together, and fill in presets and defaults.

    Raises:
        ValueError: naming the flag.
    """
    import shlex

    chosen = {**DEFAULTS, **PRESETS.get(given.preset or "", {})}
    for name in chosen:
        value = getattr(given, name)
        if value is not None:
            chosen[name] = value
    if not chosen["benchmark"]:
        raise ValueError("--benchmark is missing: what is asked? For example gsm_symbolic")
    if (given.model is None) == (given.url is None):
        raise ValueError("give either --model, to start a server, or --url, to ask one")
    adapters = dict(_adapter(text, needs_path=given.url is None) for text in given.adapter)
    for name in given.rule:
        if name not in RULE_NAMES:
            raise ValueError(f"--rule must be among {', '.join(RULE_NAMES)}, got {name!r}")
    for how in given.evict:
        if how not in EVICTS:
            raise ValueError(f"--evict must be among {', '.join(EVICTS)}, got {how!r}")
    if given.rule and not adapters:
        raise ValueError("--rule needs an --adapter whose folds follow it")
    _check_sampling(given)
    _check_keep(given)
    if given.equal_bytes:
        missing = [name for name, path in adapters.items() if path is None]
        if missing or not adapters:
            raise ValueError("--equal-bytes needs --adapter NAME=DIR, to weigh the state")
    if min(chosen["max_tokens"]) < 1:
        raise ValueError("--max-tokens must be positive")
    if given.url is not None and not given.url.startswith(("http://", "https://")):
        raise ValueError(f"--url must start with http:// or https://, got {given.url}")
    if given.out.exists() and not given.out.is_dir():
        raise ValueError(f"--out: {given.out} is a file; name a directory")
    if given.template is not None and "{prompt}" not in given.template:
        raise ValueError(f"--template must contain {{prompt}}, got {given.template!r}")
    if given.url is not None and (given.server_flags or given.block_size):
        raise ValueError("--server-flags and --block-size are for a server that is started here")
    return RunOptions(
        model=given.model,
        url=given.url,
        api_key_env=given.api_key_env,
        adapters=adapters,
        benchmarks=tuple(dict.fromkeys(chosen["benchmark"])),
        data=given.data,
        limit=given.limit,
        template=given.template,
        judge=given.judge,
        system=given.system,
        data_seed=given.data_seed,
        windows=tuple(dict.fromkeys(chosen["window"])),
        plain_windows=tuple(dict.fromkeys(given.plain_window)),
        adapter_keep=tuple(dict.fromkeys(given.adapter_keep or [0])),
        rules=(None, *given.rule),
        evict=tuple(dict.fromkeys(given.evict)),
        sinks=given.sinks,
        keep=tuple(dict.fromkeys(given.keep)),
        keep_scores=tuple(dict.fromkeys(given.keep_score or ["expected"])),
        probes=None if given.probes is None else str(given.probes),
        equal_bytes=given.equal_bytes,
        max_tokens=tuple(dict.fromkeys(chosen["max_tokens"])),
        seeds=tuple(dict.fromkeys(given.seeds)),
        epochs=given.epochs,
        pass_at=tuple(dict.fromkeys(given.pass_at)),
        temperature=given.temperature,
        top_p=given.top_p,
        concurrency=given.concurrency,
        block_size=given.block_size,
        evict_ratio=given.evict_ratio,
        out=given.out,
        server_flags=tuple(shlex.split(given.server_flags)),
    )


def _check_keep(given: argparse.Namespace) -> None:
    for score in given.keep_score or ():
        if score not in KEEP_SCORES:
            raise ValueError(f"--keep-score must be among {', '.join(KEEP_SCORES)}, got {score!r}")
    if 0 in given.keep:
        raise ValueError("--keep must be positive; windows that keep nothing are there anyway")
    if given.adapter_keep and not given.adapter:
        raise ValueError("--adapter-keep needs --adapter; for windows without memory it is --keep")
    if not given.keep and given.keep_score is not None:
        raise ValueError("--keep-score needs --keep: nothing is kept")
    if not (given.keep or any(given.adapter_keep or ())) and given.probes is not None:
        raise ValueError("--probes needs --keep or --adapter-keep: nothing is kept")
    if given.probes is None:
        return
    if given.url is not None:
        raise ValueError("--probes is for a server that is started here")
    if not given.probes.is_file():
        raise ValueError(f"--probes: {given.probes} does not exist")


def _check_sampling(given: argparse.Namespace) -> None:
    if given.top_p is not None and not 0 < given.top_p <= 1:
        raise ValueError(f"--top-p must lie in (0, 1], got {given.top_p}")
    if not 0 < given.evict_ratio < 1:
        raise ValueError(f"--evict-ratio must lie in (0, 1), got {given.evict_ratio}")
    if given.temperature < 0:
        raise ValueError(f"--temperature must not be negative, got {given.temperature}")
    if given.temperature == 0 and (given.epochs > 1 or len(given.seeds) > 1):
        raise ValueError(
            "--epochs and --seeds: greedy answers are all alike; give a --temperature such as 0.6"
        )
    for k in given.pass_at:
        if not 1 <= k <= given.epochs:
            raise ValueError(f"--pass-at {k} needs --epochs {k} or more, got {given.epochs}")


def _adapter(text: str, *, needs_path: bool) -> tuple[str, str | None]:
    name, mark, path = text.partition("=")
    if not name or (needs_path and not path) or (mark and not path):
        raise ValueError(f"--adapter must be NAME=DIR, got {text!r}")
    if path and not (Path(path) / "adapter_config.json").is_file():
        raise ValueError(f"--adapter: {path} holds no adapter (adapter_config.json is missing)")
    return name, path or None
