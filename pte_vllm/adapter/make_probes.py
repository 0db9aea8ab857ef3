"""`pte-vllm adapter calibrate`: load a model, let it think, write its probes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from pte_vllm.adapter.counter import counter, counters
from pte_vllm.adapter.format import ModelShape
from pte_vllm.adapter.probe_options import ProbeOptions, read_prompts, read_thoughts
from pte_vllm.adapter.probe_prompts import PROMPTS
from pte_vllm.adapter.probe_sampling import draw_probes, sample_thoughts
from pte_vllm.adapter.probe_training import TooFewAnswers, train_probes
from pte_vllm.adapter.probes import Probes
from pte_vllm.method.plan import FoldPlan
from pte_vllm.models.location import local_directory, model_hash
from pte_vllm.models.rope_check import check_unrotation

TRAINING_PLAN = FoldPlan(
    pin_tokens=0, window_tokens=64, evict_ratio=0.5, block_size=32, keep_tokens=32
)
"""When tokens leave in training: early, as thoughts are short. What lies further apart than they
are long is not learned (docs/benchmarks/memory.md)."""


def make_probes(
    model: str,
    out: str | Path,
    options: ProbeOptions,
    *,
    prompts_file: str | None = None,
    thoughts_file: str | None = None,
) -> Probes:
    """Write the probes of `model`, a name or directory, to the file `out`; shows its progress.

    The file appears whole or not at all, in the place of one that is there.

    Args:
        model: The base model.
        out: The file; directories above it are made.
        options: What is sampled, and on what.
        prompts_file: Replaces the package's prompts.
        thoughts_file: Further thoughts of the model, as `read_thoughts` takes them, to train on.

    Raises:
        ValueError: Naming the flag, if one does not fit, or if RoPE of the model cannot be undone.
        OSError: If the model or the prompts cannot be read.
    """
    console, out, began = Console(stderr=True, highlight=False), Path(out), time.monotonic()
    _check_writable(out)
    texts = options.choose(PROMPTS if prompts_file is None else read_prompts(prompts_file))
    more = [] if thoughts_file is None else read_thoughts(thoughts_file)
    path = local_directory(model, download=True)
    name = model_hash(path)  # of the files that are loaded next
    config = AutoConfig.from_pretrained(path)
    shape = ModelShape.from_hf(config)
    _check_enough(shape, options)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [_token_ids(tokenizer, text) for text in texts]
    _check_vocabulary(more, config)
    _check_room(prompts, config, options)
    device, dtype = _device(options.device), options.dtype
    if dtype == "auto" and device.type == "cpu" and not _multiplies_bf16():
        dtype = "float32"
    disable_progress_bar()  # ours are enough
    network: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    network.to(device)
    _check_rope(network, model)
    console.print(
        f"sampling {len(prompts)} thoughts of up to {options.max_tokens} tokens from {model} "
        f"({str(network.dtype).removeprefix('torch.')} on {device.type}), and from these "
        f"{options.num_probes} probes for each KV head ({shape.num_layers} layers of "
        f"{shape.num_kv_heads})",
        soft_wrap=True,
    )
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        sampled = counter(progress, "tokens sampled", len(prompts) * options.max_tokens)
        read = counter(progress, "thoughts read", len(prompts))
        thoughts = sample_thoughts(
            network,
            prompts,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            batch_size=options.batch_size,
            end_ids=_end_ids(network, tokenizer),
            seed=options.seed,
            progress=sampled,
        )
        queries = draw_probes(
            network,
            thoughts,
            options.num_probes,
            seed=options.seed,
            progress=lambda: read(1),
        )
        if options.train_steps:
            answers = [(t.token_ids.tolist(), t.prompt_tokens) for t in thoughts] + more
            queries = _trained(network, answers, queries, options, progress)
    probes = Probes.of(rounded(queries, options.store), name)
    probes.save(out)
    shape.check_probes(Probes.load(out))  # what was written is what an engine will accept
    console.print(
        f"wrote {out}: {out.stat().st_size / 2**20:.1f} MiB, from "
        f"{sum(thought.num_tokens for thought in thoughts)} tokens of thought, in "
        f"{time.monotonic() - began:.0f} s",
        soft_wrap=True,
    )
    return probes


def _trained(
    network: Any,
    thoughts: Sequence[tuple[list[int], int]],
    queries: Tensor,
    options: ProbeOptions,
    bar: Progress,
) -> Tensor:
    """Train probes on thoughts, token ids and the length of the prompt; says what that gave.

    Where none is long enough for that, it says so, and they stay as they are.
    """
    answers = [(ids, replace(TRAINING_PLAN, pin_tokens=prompt)) for ids, prompt in thoughts]
    try:
        trained, report = train_probes(
            network,
            answers,
            queries,
            steps=options.train_steps,
            seed=options.seed,
            progress=counters(bar, "probes"),
        )
    except FloatingPointError as error:
        raise ValueError(f"--train-steps: {error}; try --dtype float32") from error
    except TooFewAnswers as error:
        bar.console.print(f"the probes stay as sampled: {error}", soft_wrap=True)
        return queries
    bar.console.print(report.in_words(), soft_wrap=True)
    return trained


def rounded(queries: Tensor, store: str) -> Tensor:
    """Return queries in the dtype that `--store` names.

    Raises:
        ValueError: If some are too large for it.
    """
    numbers = queries.to(getattr(torch, store))
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"--store {store} cannot hold these probes; bfloat16 can")
    return numbers


def _check_writable(out: Path) -> None:
    """Refuse a file that cannot be written before minutes are spent on it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise OSError(f"OUT: {out} cannot be written: {error}") from error


def _check_enough(shape: ModelShape, options: ProbeOptions) -> None:
    """Refuse to begin where even the longest thoughts would have too few queries."""
    group = shape.num_heads // shape.num_kv_heads
    most = options.num_thoughts * options.max_tokens * group
    if most < options.num_probes:
        raise ValueError(
            f"--probes: {options.num_thoughts} thoughts of {options.max_tokens} tokens have at "
            f"most {most} queries for each KV head, fewer than {options.num_probes}; ask for fewer "
            "probes, or raise --num-thoughts or --max-tokens"
        )


def _check_room(prompts: list[list[int]], config: Any, options: ProbeOptions) -> None:
    """Refuse prompts that leave no room for thoughts in the model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if positions is not None and longest + options.max_tokens > positions:
        raise ValueError(
            f"--max-tokens: the longest prompt has {longest} tokens, and with {options.max_tokens} "
            f"more it exceeds the model's {positions} positions; lower it, or give shorter "
            "--prompts"
        )


def _check_vocabulary(thoughts: Sequence[tuple[list[int], int]], config: Any) -> None:
    """Refuse thoughts of another model, where that shows."""
    highest = max((max(ids, default=0) for ids, _ in thoughts), default=0)
    if highest >= config.vocab_size:
        raise ValueError(
            f"--thoughts: token id {highest} is beyond the model's vocabulary of "
            f"{config.vocab_size}; these are another model's thoughts"
        )
    longest = max((len(ids) for ids, _ in thoughts), default=0)
    positions = getattr(config, "max_position_embeddings", longest)
    if longest > positions:
        raise ValueError(
            f"--thoughts: one has {longest} tokens, and the model {positions} positions"
        )


def _check_rope(network: Any, model: str) -> None:
    """Refuse a model whose queries cannot be turned back to before RoPE, or not in all layers."""
    try:
        if getattr(getattr(network, "model", None), "rotary_emb", None) is None:
            raise ValueError(f"{network.config.model_type} is not built like Llama: no rotary_emb")
        advice = "tokens are kept in all layers of a model or in none"
        check_unrotation(network, range(network.config.num_hidden_layers), advice=advice)
    except ValueError as error:
        raise ValueError(f"MODEL: {model} can have no probes: {error}") from error


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    """Encode a prompt: as a user's message where the tokenizer has a chat template, else as is."""
    if getattr(tokenizer, "chat_template", None):
        ids: list[int] = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
    else:
        ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ValueError(f"--prompts: the model's tokenizer makes nothing of {text[:40]!r}")
    return ids


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer."""
    found: set[int] = set()
    for ids in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        found |= set(ids) if isinstance(ids, list) else {ids}
    return found - {None}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    return torch.device(name)


def _multiplies_bf16() -> bool:
    """Return whether this CPU has bf16 instructions; without them float32 is faster."""
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # since PyTorch 2.13
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
