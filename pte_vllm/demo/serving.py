"""What the demo serves, and the flags of its server."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pte_vllm.demo.answers import BLOCK_SIZE
from pte_vllm.engine.cpu_defaults import choose_dtype, on_cpu
from pte_vllm.launch import LaunchError

MAX_MODEL_LEN = 2048
"""More than any question and its answer have."""
ARMS = 3
STEP_TOKENS = 64
"""Most tokens of a step: questions are read slowly enough to see how the blocks grow."""


def serving_dtype(model: Path) -> str:
    """Name the dtype to serve a model in, which the KV pool is sized for: 16 bits if possible."""
    chosen = choose_dtype(model)[0] if on_cpu() else "auto"
    return "bfloat16" if chosen == "auto" else chosen


def block_bytes(config: dict[str, Any], itemsize: int) -> int:
    """Return the bytes of one KV block of all layers, from a model's `config.json`."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    d_kv = int(config.get("num_key_value_heads") or heads) * int(head_dim)
    return 2 * int(config["num_hidden_layers"]) * d_kv * itemsize * BLOCK_SIZE


def cache_dir() -> Path:
    """Return `.cache` of the checkout this runs from, else of the current directory."""
    checkout = Path(__file__).resolve().parents[2]
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / ".cache"


def serve_args(options: argparse.Namespace, model: Path) -> list[str]:
    """Return what follows `pte-vllm serve`.

    Raises:
        LaunchError: if the model has too few positions.
    """
    config = json.loads((model / "config.json").read_text())
    limit = config.get("max_position_embeddings", MAX_MODEL_LEN)
    if limit < MAX_MODEL_LEN:
        raise LaunchError(f"--model {model} knows {limit} positions only, fewer than the demo asks")
    dtype = serving_dtype(model)
    itemsize = 4 if dtype == "float32" else 2
    blocks = ARMS * (MAX_MODEL_LEN // BLOCK_SIZE) + 1  # no arm ever waits for another
    arguments = {
        "--pte-window": options.window,
        "--pte-keep": options.keep,
        "--pte-keep-score": options.keep_score,
        "--dtype": dtype,
        "--block-size": BLOCK_SIZE,
        "--max-model-len": MAX_MODEL_LEN,
        "--kv-cache-memory-bytes": blocks * block_bytes(config, itemsize),
        "--max-num-seqs": ARMS,
        "--max-num-batched-tokens": STEP_TOKENS,
    }
    if options.probes is not None:
        arguments["--pte-probes"] = options.probes
    flags = ["--disable-uvicorn-access-log"]
    if on_cpu():
        flags.append("--enforce-eager")  # a minute of torch.compile would gain little here
    return [str(model), *(str(part) for pair in arguments.items() for part in pair), *flags]
