"""`pte-vllm plan`: what a window buys on given hardware, from a roofline.

A decoding step reads the weights once and every sequence's keys and values once, and computes two
operations for each weight and sequence; it takes as long as the slower of both. Rollouts are at all
stages at once, so under full attention a sequence holds half its final length on average. Standard
library only.

    tokens/s ≤ n / max((weights + n · (cache + S)) / bandwidth, n · operations / peak)

What a rule keeps beside S takes memory, but only folds read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pte_vllm.method.options import PTEConfig
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.weight import NO_STATE, StateWeight, weigh_state


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device; vendors' figures, dense bf16."""

    name: str
    memory_bytes: float
    bandwidth: float
    """Bytes per second."""
    peak: float
    """Operations per second."""


def _gpu(name: str, gigabytes: float, terabytes_s: float, teraflops: float) -> Hardware:
    return Hardware(
        name=name,
        memory_bytes=gigabytes * 1e9,
        bandwidth=terabytes_s * 1e12,
        peak=teraflops * 1e12,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 80, 2.039, 312),
        _gpu("h100", 80, 3.35, 989),
        _gpu("h200", 141, 4.8, 989),
        _gpu("b200", 180, 8.0, 2250),
        _gpu("l40s", 48, 0.864, 362),
        _gpu("rtx4090", 24, 1.008, 165),
    )
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the sizes depend on."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def load(cls, source: str) -> Model:
        """Read a `config.json`, or the one in a directory.

        Raises:
            ValueError: if it lacks a size, or is no dense decoder built like Llama or Qwen.
        """
        path = Path(source)
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"--model: {file} cannot be read: {error}") from error
        config = config.get("text_config", config)
        if "num_local_experts" in config or "num_experts" in config:
            raise ValueError("--model: mixtures of experts are not planned for")
        try:
            heads = config["num_attention_heads"]
            return cls(
                layers=config["num_hidden_layers"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings")),
            )
        except KeyError as error:
            raise ValueError(f"--model: {file} lacks {error}") from error

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """In and out of each linear of a layer."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (d, q),
            "k_proj": (d, kv),
            "v_proj": (d, kv),
            "o_proj": (q, d),
            "gate_proj": (d, f),
            "up_proj": (d, f),
            "down_proj": (f, d),
        }

    @property
    def parameters(self) -> int:
        """Biases and norms aside."""
        layer = sum(a * b for a, b in self.linears.values())
        return self.layers * layer + self.vocabulary * self.hidden_size * (1 if self.tied else 2)

    def kv_bytes(self, itemsize: float) -> float:
        """Of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize

    def state_weight(self, rank: int, rule: str, itemsize: float) -> StateWeight:
        """Of one sequence; a model whose numbers take at most two bytes is run in bfloat16."""
        config = PTEConfig(rank=rank, global_tokens=rank, rule=rule)
        return weigh_state(config, self.layers, "bfloat16" if itemsize <= 2 else "float32")

    def adapter_bytes(self, rank: int, itemsize: float) -> float:
        """Of one push: LoRA on all linears, and the encoder in fp32 (q_g, h_g, three W)."""
        lora = sum(rank * (a + b) for a, b in self.linears.values()) * itemsize
        return self.layers * (lora + 4 * 5 * rank * self.kv_heads * self.head_dim)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bounds for one way to hold the past."""

    window_tokens: int
    """0: full attention."""
    kv_tokens: float
    """That a sequence holds, on average; a window: at most."""
    sequences: int
    """That fit at once."""
    step_s: float
    tokens_per_s: float
    limit: str
    """`memory`: bandwidth; `compute`: operations."""
    ratio: float = 1.0
    """Against full attention."""


def plan_rows(
    model: Model,
    hardware: Hardware,
    *,
    rollout_tokens: int,
    prompt_tokens: int,
    windows: Sequence[int],
    block_size: int = 16,
    rank: int = 32,
    rule: str = "ridge",
    itemsize: float = 2,
    kv_memory_bytes: float | None = None,
    max_sequences: int | None = None,
) -> list[Row]:
    """Full attention, then each window.

    Args:
        kv_memory_bytes: the pool; None: 0.9 of the device, less weights and 4 GB to work in.
        max_sequences: `--max-num-seqs`, if it binds.

    Raises:
        ValueError: if the weights leave no room, or a window does not fit the block size.
    """
    weights = model.parameters * itemsize
    pool = kv_memory_bytes
    if pool is None:
        pool = 0.9 * hardware.memory_bytes - weights - 4e9
    if pool <= 0:
        raise ValueError(
            f"{weights / 1e9:.0f} GB of weights leave no room on {hardware.name} "
            f"({hardware.memory_bytes / 1e9:.0f} GB)"
        )
    per_token = model.kv_bytes(itemsize)

    def row(window_tokens: int) -> Row:
        if window_tokens:
            plan = FoldPlan(
                pin_tokens=prompt_tokens, window_tokens=window_tokens, block_size=block_size
            )
            blocks = plan.pinned_blocks + plan.window_blocks + 1
            tokens = min(float(blocks * block_size), prompt_tokens + float(rollout_tokens))
            state = model.state_weight(rank, rule, itemsize)
        else:
            tokens, state = prompt_tokens + rollout_tokens / 2, NO_STATE
        cache = tokens * per_token
        count = max(1, math.floor(pool / (cache + state.total)))
        if max_sequences is not None:
            count = min(count, max_sequences)
        memory_s = (weights + count * (cache + state.read)) / hardware.bandwidth
        compute_s = count * 2 * model.parameters / hardware.peak
        step = max(memory_s, compute_s)
        return Row(
            window_tokens=window_tokens,
            kv_tokens=tokens,
            sequences=count,
            step_s=step,
            tokens_per_s=count / step,
            limit="compute" if compute_s > memory_s else "memory",
        )

    rows = [row(window_tokens) for window_tokens in (0, *windows)]
    base = rows[0].tokens_per_s
    return [Row(**{**asdict(r), "ratio": r.tokens_per_s / base}) for r in rows]


def parse_tokens(text: str) -> int:
    """`32k` → 32768, `2000` → 2000."""
    number = text.strip().lower()
    factor = 1024 if number.endswith("k") else 1
    digits = number.removesuffix("k")
    if not digits.isdigit() or int(digits) < 1:
        raise ValueError(f"{text!r} is no number of tokens such as 2000 or 32k")
    return int(digits) * factor


def hardware_of(name: str, given: Mapping[str, float | None]) -> Hardware:
    """A GPU of the table, or one given by `memory_gb`, `bandwidth_gb_s` and `tflops`.

    Raises:
        ValueError: naming the flag.
    """
    known = GPUS.get(name.lower())
    values = {
        "memory_bytes": (given.get("memory_gb"), 1e9),
        "bandwidth": (given.get("bandwidth_gb_s"), 1e9),
        "peak": (given.get("tflops"), 1e12),
    }
    if known is None and any(value is None for value, _ in values.values()):
        raise ValueError(
            f"--gpu {name}: known are {', '.join(GPUS)}; for another give --memory-gb, "
            "--bandwidth-gb-s and --tflops"
        )
    found = {k: v * unit for k, (v, unit) in values.items() if v is not None}
    base = asdict(known) if known is not None else {}
    return Hardware(**{**base, "name": name, **found})


def show(
    model: Model, hardware: Hardware, rows: Sequence[Row], *, rank: int, rule: str, itemsize: float
) -> dict[str, Any]:
    """Print a table; returns all of it for JSON."""
    from rich.console import Console
    from rich.table import Table

    table = Table("window", "KV tokens", "sequences", "ms/step", "tok/s at most", "limit", "ratio")
    for row in rows:
        table.add_row(
            f"{row.window_tokens:,}" if row.window_tokens else "full attention",
            f"{row.kv_tokens:,.0f}",
            f"{row.sequences:,}",
            f"{1e3 * row.step_s:.1f}",
            f"{row.tokens_per_s:,.0f}",
            row.limit,
            f"{row.ratio:.1f}",
        )
    state = model.state_weight(rank, rule, itemsize).total
    about = {
        "parameters": model.parameters,
        "weights_bytes": model.parameters * itemsize,
        "kv_bytes_per_token": model.kv_bytes(itemsize),
        "state_bytes_per_sequence": state,
        "state_kv_tokens": state / model.kv_bytes(itemsize),
        "adapter_push_bytes": model.adapter_bytes(rank, itemsize),
    }
    console = Console()
    console.print(table)
    console.print(
        f"{hardware.name}: {model.parameters / 1e9:.2f} B parameters, "
        f"{about['kv_bytes_per_token'] / 1024:.0f} KiB of cache a token; a thought state (rank "
        f"{rank}, {rule}) takes {state / 2**20:.2f} MiB, as much as "
        f"{about['state_kv_tokens']:.0f} tokens; a push sends "
        f"{about['adapter_push_bytes'] / 2**20:.0f} MiB. Bounds, not promises: see "
        "`pte-vllm bench throughput` for what a machine does.",
        highlight=False,
        soft_wrap=True,
    )
    return {"hardware": asdict(hardware), **about, "rows": [asdict(row) for row in rows]}
