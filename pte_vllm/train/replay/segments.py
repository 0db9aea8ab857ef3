"""The replay: log-probs of given tokens under a plan, in plain transformers, and their gradients.

It does not know vLLM, and everything else is measured by it. Sequences are cut at the plan's
boundaries; at each of them the blocks of the window that the plan names are folded into the thought
states (`method.reference`) and dropped from the KV cache, but for the tokens that the plan keeps.

Two ways to back-propagate a loss that adds up over tokens:

    segments  each segment back-propagates on its own, keys and values of earlier segments count as
              constants, kept ones too, and what reaches a state is collected and sent once through
              the chain of folds. Activations are held of one segment; what grows with the length
              are evicted keys and values, 2 d_kv numbers of the cache's dtype a token and layer
              with an encoder
    full      through everything, keys and values included; memory grows with the length

Shapes: B sequences in T columns (`AlignedBatch`), n columns of a segment, N tokens that are scored
at once, V vocabulary, L layers with an encoder, H KV heads, D head size, m evicted tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.attention_kernels import attention_mask
from pte_vllm.train.replay.fold_chain import FoldChain, ThoughtStates
from pte_vllm.train.replay.folding import Folding
from pte_vllm.train.replay.keeping import Keeper, Keeping, Marks
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import Fold, ReplayResult, Scores, TokenLoss
from pte_vllm.train.replay.window_cache import WindowCache

Backward = Literal["none", "segments", "full"]
SCORED_AT_ONCE = 1024
"""Most tokens whose logits are held at once, unless the backward is `full`."""


@dataclass(kw_only=True)
class _Run:
    """Everything that the parts of one replay share while it is under way."""

    model: PTEModel
    batch: AlignedBatch
    backward: Backward
    temperature: float
    loss: TokenLoss | None
    memory: ThoughtStates | None
    folding: Folding
    cache: WindowCache = field(default_factory=WindowCache)
    chain: FoldChain = field(default_factory=FoldChain)
    total: Tensor | None = None  # of the losses: with a graph in mode full


def replay(
    model: PTEModel,
    batch: AlignedBatch,
    *,
    rule: str | None = None,
    temperature: float = 1.0,
    backward: Backward = "none",
    loss: TokenLoss | None = None,
    chunk_tokens: int | None = None,
    before_fold: WindowCache | None = None,
    keep_cache: bool = False,
    keeper: Keeper | None = None,
    marks: Sequence[Marks] | None = None,
) -> ReplayResult:
    """Replay a batch; gradients are added to the model's trainable parameters.

    Args:
        rule: the rule to fold by; None: the adapter's. Without an encoder it has no effect.
        temperature: the temperature of the sampler whose log-probs are wanted; logits are divided
            by it.
        backward: how the loss is back-propagated, as the module says; `none` keeps no graph.
        loss: a function of scored tokens, called for each segment or for parts of it.
        chunk_tokens: most columns of one forward, with backward `none` only; None: whole segments.
            It bounds memory and does not change the result.
        before_fold: what the cache holds at the first fold, by column, where that is known; taken
            over. No token is scored then that is predicted before a fold. With backward `none`.
        keep_cache: whether the result has the cache.
        keeper: the model's probes; needed where the plan keeps tokens by the score `expected`.
        marks: what each sequence is made to keep at its first folds, as a run recorded it, and as
            `Fold.marks` says it; at later folds the replay chooses.

    Raises:
        ValueError: if an option does not fit the model or another option.
    """
    if before_fold is not None and backward != "none":
        raise ValueError("before_fold works without backward only")
    if backward != "none" and loss is None:
        raise ValueError(f"backward {backward!r} needs a loss")
    if backward == "full" and model.gradient_checkpointing:
        raise ValueError("gradient checkpointing works with backward 'segments' only")
    if chunk_tokens is not None and (chunk_tokens < 1 or backward != "none"):
        raise ValueError(f"chunk_tokens must be positive and without backward, got {chunk_tokens}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if marks is not None and not batch.plan.keep_tokens:
        raise ValueError("marks of kept tokens, and a plan that keeps none")
    batch = batch.to(model.device)
    with torch.set_grad_enabled(backward != "none"):
        memory = None
        if model.layers:
            assert model.config is not None
            memory = ThoughtStates(
                model.encoder, model.config, rule, len(batch.ids), model.base.dtype
            )
        keeping = Keeping(model, batch, keeper, marks) if batch.plan.keep_tokens else None
        run = _Run(
            model=model,
            batch=batch,
            backward=backward,
            temperature=temperature,
            loss=loss,
            memory=memory,
            folding=Folding(model, batch, memory, keeping),
        )
        start = 0
        if before_fold is not None:
            run.cache, start = before_fold, batch.plan.first_fold
        try:
            found = _replay(run, chunk_tokens, start)
            found.cache = run.cache if keep_cache else None
            return found
        finally:
            model.states = None


def log_probs(
    model: PTEModel, tokens: Sequence[int], plan: FoldPlan, **options: Any
) -> ReplayResult:
    """Replay one sequence without gradients; `options` are `replay`'s."""
    return replay(model, AlignedBatch.align([tokens], [plan]), **options)


def _replay(run: _Run, chunk_tokens: int | None, known: int) -> ReplayResult:
    """Fold and run segments from column `known` on, then send gradients through the folds."""
    batch, plan = run.batch, run.batch.plan
    columns = torch.zeros(batch.ids.shape, device=batch.ids.device)
    folds: list[list[Fold]] = [[] for _ in range(len(batch.ids))]
    final = run.memory.states.detach() if run.memory is not None else None
    for start, end in plan.segments(batch.ids.shape[1]):
        if start < known:
            continue
        while plan.folds(start) > run.folding.held.folds:
            for b, fold in run.folding.fold(run.cache, start).items():
                folds[b].append(fold)
            if run.memory is not None and final is not None:
                going_on = batch.left + batch.lengths > start
                final = torch.where(going_on[:, None, None], run.memory.states.detach(), final)
        for first, last in _chunks(start, end, chunk_tokens):
            _segment(run, columns, first, last)
    if run.backward == "full" and run.total is not None:
        run.total.backward()
    run.chain.backward()
    return ReplayResult(
        logprobs=batch.by_token(columns),
        states=final,
        folds=folds,
        loss=float(run.total.detach()) if run.total is not None else 0.0,
    )


def _segment(run: _Run, logprobs: Tensor, start: int, end: int) -> None:
    """Run columns `[start, end)` and score the tokens after each, `[start + 1, end + 1)`."""
    batch, model = run.batch, run.model
    wanted = batch.wanted[:, start + 1 : end + 1]
    rows, offsets = wanted.nonzero(as_tuple=True)
    scored = len(rows) > 0
    # Without a loss in it, a segment only writes keys and values, which are constants.
    graph = run.backward == "full" or (run.backward == "segments" and scored)
    with torch.set_grad_enabled(graph):
        if run.memory is not None:
            states = run.memory.states
            model.states = run.chain.cut(states) if run.backward == "segments" else states
        hidden = _forward(run, start, end)  # [B, n, d]
        if scored:
            targets = start + 1 + offsets
            picked = hidden[rows, offsets]  # [N, d]
            found = _score(run, picked, rows, targets)
            logprobs[rows, targets] = found
    run.cache.commit(detach=run.backward != "full")


def _forward(run: _Run, start: int, end: int) -> Tensor:
    """Compute the last hidden states `[B, n, d]` of columns `[start, end)`.

    A token sees what the cache holds of its own sequence.
    """
    batch, base = run.batch, run.model.base
    device = batch.ids.device
    columns = torch.arange(start, end, device=device)
    size = batch.plan.block_size
    past = ((first * size, min(end * size, start)) for first, end in run.folding.held.spans)
    held = torch.cat([*(torch.arange(*span, device=device) for span in past), columns])
    causal = held[None] <= columns[:, None]  # [n, t]
    own = held[None] >= batch.left[:, None]  # [B, t] padding belongs to nobody
    itself = held[None] == columns[:, None]  # but sees itself, so that no softmax is empty
    visible = (causal & own[:, None]) | itself
    positions = (columns[None] - batch.left[:, None]).clamp(min=0)
    implementation = base.config._attn_implementation
    output = base.model(
        input_ids=batch.ids[:, start:end],
        position_ids=positions,
        attention_mask=attention_mask(visible, implementation, base.dtype),
        past_key_values=run.cache,
        use_cache=True,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _score(run: _Run, hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Compute the log-probs `[N]` of the tokens in columns `targets`, and the loss on them.

    In mode `segments` the output layer runs on parts, each of which back-propagates at once to the
    hidden states `[N, d]`; from there on they go back together.
    """
    segments = run.backward == "segments"
    leaf = hidden.detach().requires_grad_() if segments else hidden
    size = len(rows) if run.backward == "full" else SCORED_AT_ONCE
    found = []
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        logits = run.model.base.get_output_embeddings()(leaf[part]).float() / run.temperature
        ids = run.batch.ids[rows[part], targets[part]]
        logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        found.append(logprobs.detach())
        if run.loss is None:
            continue
        tokens = targets[part] - run.batch.left[rows[part]]
        loss = run.loss(Scores(logits=logits, logprobs=logprobs, rows=rows[part], tokens=tokens))
        if segments:
            loss.backward()
            loss = loss.detach()
        run.total = loss if run.total is None else run.total + loss
    if segments and leaf.grad is not None and hidden.requires_grad:
        hidden.backward(leaf.grad)
    return torch.cat(found)


def _chunks(start: int, end: int, size: int | None) -> Iterator[tuple[int, int]]:
    """Cut `[start, end)` into half-open parts of at most `size`; None: one part."""
    step = end - start if size is None else size
    for first in range(start, end, step):
        yield first, min(first + step, end)
