"""`pte-vllm adapter init`: load a model, calibrate on text, write the adapter."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from pte_vllm.adapter.calibration import sample_sequences
from pte_vllm.adapter.counter import counter
from pte_vllm.adapter.defaults import TARGET_MODULES
from pte_vllm.adapter.format import Adapter, ModelShape
from pte_vllm.adapter.hashes import CONFIG_FILE
from pte_vllm.adapter.init import choose_layers, init_adapter
from pte_vllm.adapter.sample_text import SAMPLE_TEXT
from pte_vllm.adapter.starts import LayerReport
from pte_vllm.method.options import PTEConfig


def make_adapter(
    model: str,
    out: str | Path,
    config: PTEConfig,
    *,
    layers: Collection[int] | None = None,
    target_modules: Sequence[str] = TARGET_MODULES,
    b: str = "zero",
    alpha: float | None = None,
    seed: int = 0,
    text_file: str | None = None,
) -> Adapter:
    """Write an untrained adapter for `model`, a name or directory, to `out`; shows its progress.

    The other arguments are `init_adapter`'s; `text_file` replaces the sample text.

    Raises:
        ValueError: naming the option, if one does not fit.
        OSError: if the model or the text cannot be read.
    """
    console, out = Console(stderr=True, highlight=False), Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG_FILE).exists():
        raise ValueError(f"{out} holds other files; give a new directory or that of an adapter")
    text = SAMPLE_TEXT if text_file is None else Path(text_file).read_text(encoding="utf-8")
    shape = ModelShape.from_hf(AutoConfig.from_pretrained(model))
    chosen = choose_layers(layers, shape.num_layers)
    token_ids = sample_sequences(AutoTokenizer.from_pretrained(model), text, seed=seed)
    if config.init == "aligned" and config.rank > shape.head_dim:
        which = "W_V" if config.features == "squared" else "W_K, W_V and A"
        console.print(
            f"rank {config.rank} exceeds the head size {shape.head_dim}: the "
            f"{config.rank - shape.head_dim} rows of {which} beyond it start random"
        )
    console.print(f"loading {model}", soft_wrap=True)
    disable_progress_bar()  # one bar is enough
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.eval()
    reports: list[LayerReport] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        advance = counter(progress, "layers calibrated", len(chosen))

        def report(layer: LayerReport) -> None:
            reports.append(layer)
            advance(1)

        adapter = init_adapter(
            network,
            token_ids,
            config,
            layers=chosen,
            target_modules=target_modules,
            b=b,
            alpha=alpha,
            seed=seed,
            base_model=model,
            progress=report,
        )
    adapter.save(out)
    Adapter.load(out, shape)  # what was written is what a server will accept
    _summary(console, out, adapter, reports, token_ids.numel())
    return adapter


def _summary(
    console: Console, out: Path, adapter: Adapter, reports: list[LayerReport], num_tokens: int
) -> None:
    rho = [value for report in reports for value in report.rho]
    heads = [f"{r.layer}.{r.query_head}" for r in reports if r.query_head is not None]
    if heads:
        console.print(f"each layer starts from one attention head (layer.head): {', '.join(heads)}")
    if adapter.pte is not None and adapter.pte.rule in ("paper", "sum"):  # others have no gain
        console.print(
            f"gain calibrated on {num_tokens} tokens: a fold changes the state by "
            f"{statistics.median(rho):.3f} of its size ({min(rho):.3f} to {max(rho):.3f})"
        )
    console.print(f"wrote {out}: {len(adapter.layers)} layers, {len(adapter.lora_a)} linears")
