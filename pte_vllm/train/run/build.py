"""The model of a run: the frozen base, the adapter that it starts from, and the probes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pte_vllm.adapter.calibration import sample_sequences
from pte_vllm.adapter.defaults import parse_layers
from pte_vllm.adapter.format import Adapter, ModelShape
from pte_vllm.adapter.init import init_adapter
from pte_vllm.adapter.probes import Probes, ProbesError
from pte_vllm.adapter.sample_text import SAMPLE_TEXT
from pte_vllm.method.options import PTEConfig
from pte_vllm.train.options.sections import AdapterOptions, ModelOptions, PlanOptions
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel


def build_model(
    model: ModelOptions,
    adapter: AdapterOptions,
    *,
    seed: int = 0,
    start: str | Path | Adapter | None = None,
) -> PTEModel:
    """Load the base and put an adapter on it.

    Args:
        model: what base to load, and how.
        adapter: what a new adapter is like.
        seed: the seed of a new adapter.
        start: the adapter to put on the base, such as a checkpoint's; None: the one that
            `model.adapter` names, or else a new one.

    Raises:
        ValueError: naming the option, if one does not fit.
        OSError: if a file cannot be read.
    """
    model = model.resolve(cuda=torch.cuda.is_available())
    start = start if start is not None else model.adapter
    base = PTEModel.from_pretrained(
        model.base, dtype=model.dtype, device=model.device, attention=model.attention
    ).base
    if start is None:
        start = new_adapter(base, AutoTokenizer.from_pretrained(model.base), adapter, seed=seed)
    elif not isinstance(start, Adapter):
        start = Adapter.load(start, ModelShape.from_hf(base.config))
    return PTEModel(base, start, gradient_checkpointing=model.gradient_checkpointing)


def new_adapter(base: Any, tokenizer: Any, options: AdapterOptions, *, seed: int = 0) -> Adapter:
    """Make an untrained adapter for a transformers model, calibrated on sample text.

    Raises:
        ValueError: naming the option, if one does not fit.
        OSError: if the text cannot be read.
    """
    file = options.text
    text = SAMPLE_TEXT if file is None else Path(file).read_text(encoding="utf-8")
    # A plain LoRA is what is left of the random start without its encoder; no key is encoded, so
    # that it does not matter whether RoPE can be undone.
    config = PTEConfig(rank=options.rank, global_tokens=options.rank, init="random", keys="rotated")
    adapter = init_adapter(
        base,
        sample_sequences(tokenizer, text, seed=seed),
        config if options.plain else options.pte(),
        layers=parse_layers(options.layers),
        target_modules=options.target_modules,
        b=options.b,
        alpha=options.alpha,
        seed=seed,
    )
    return replace(adapter, pte=None, encoders={}) if options.plain else adapter


def build_keeper(model: PTEModel, plan: PlanOptions) -> Keeper | None:
    """Read the probes by which a run's plan chooses the tokens that are kept; None: it needs none.

    Raises:
        ValueError: naming the option, if they cannot be read or are for another model.
    """
    if plan.probes is None or plan.keep_score != "expected":
        return None
    try:
        return Keeper(model, Probes.load(plan.probes))
    except ProbesError as error:
        raise ValueError(f"--plan.probes: {error}") from error
