"""What the demo serves, and the flags of its server."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pte_vllm.demo.view import BLOCK_SIZE, full_blocks
from pte_vllm.engine.cpu_defaults import choose_dtype, on_cpu
from pte_vllm.launch import LaunchError

PROMPT_ROOM = 512
"""`--pte-max-prompt-tokens` of the demo's server."""
MAX_STREAMS = 16
ADAPTER_NAME = "thoughts"


def pool_blocks(*, streams: int, full_streams: int, tokens: int, window: int) -> int:
    """Count the KV blocks of the demo's server: enough that no stream waits for another."""
    bounded = full_blocks(PROMPT_ROOM + window) + 2
    unbounded = full_blocks(PROMPT_ROOM + tokens) + 1
    return streams * bounded + full_streams * unbounded + 1


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


def serve_args(options: argparse.Namespace, model: Path, adapter: Path) -> list[str]:
    """Return what follows `pte-vllm serve`."""
    blocks = pool_blocks(
        streams=options.streams,
        full_streams=options.full_streams,
        tokens=options.tokens,
        window=options.window,
    )
    config = json.loads((model / "config.json").read_text())
    dtype = serving_dtype(model)
    itemsize = 4 if dtype == "float32" else 2
    max_model_len = max(4096, BLOCK_SIZE * full_blocks(options.tokens + PROMPT_ROOM))
    limit = config.get("max_position_embeddings", max_model_len)
    if options.tokens + PROMPT_ROOM > limit:
        raise LaunchError(f"--tokens {options.tokens}: {model} knows {limit} positions only")
    arguments = {
        "--pte-window": options.window,
        "--pte-max-prompt-tokens": PROMPT_ROOM,
        "--dtype": dtype,
        "--block-size": BLOCK_SIZE,
        "--max-model-len": min(max_model_len, limit),
        "--max-lora-rank": 32,
        "--lora-modules": f"{ADAPTER_NAME}={adapter}",
        "--kv-cache-memory-bytes": blocks * block_bytes(config, itemsize),
        "--max-num-seqs": MAX_STREAMS,
    }
    flags = ["--enable-lora", "--disable-uvicorn-access-log"]
    if on_cpu():
        flags.append("--enforce-eager")  # a minute of torch.compile would gain little here
    modules = json.loads((adapter / "adapter_config.json").read_text()).get("target_modules")
    if isinstance(modules, list):
        # Else vLLM also computes a LoRA of the output layer, which on CPU takes a third of a step.
        flags += ["--lora-target-modules", *modules]
    return [str(model), *(str(part) for pair in arguments.items() for part in pair), *flags]
