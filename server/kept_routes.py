"""Routes below `/pte/v1/thoughts` tell which tokens a request keeps, and what these tokens are.

A token is kept by each KV head of each layer for itself (`pte_vllm/method/keep.py`).
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

from pte_vllm.method.blocks import HeldBlocks
from pte_vllm.method.kept_positions import held_by, positions_at
from pte_vllm.method.kept_record import KeptRecord
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.spans import Spans, runs, without
from pte_vllm.method.turns import blocks_around
from pte_vllm.server.service import Service, service
from pte_vllm.server.thought_routes import known

router = APIRouter()

MAX_TOKENS = 512
"""Of one answer that tells tokens: each is looked up on its own, while nothing else is served."""

Number = Annotated[int | None, Query(ge=0, lt=2**31)]


@router.get("/thoughts/{id}/kept")
async def get_kept(
    id: str, request: Request, fold: Number = None, layer: Number = None, head: Number = None
) -> dict[str, Any]:
    """Tell which tokens are kept after a fold, by how many heads, and what the fold dropped.

    Without `fold` it is the latest. With `layer`, `head` or both it is these heads only; with
    `layer` their positions are told too. An answer has at most four numbers for each token of the
    sequence, and what the heads of one layer keep.
    """
    state = service(request)
    sizes = _sizes(state)
    for name, given, size in (("layer", layer, sizes[0]), ("head", head, sizes[1])):
        if given is not None and given >= size:
            raise HTTPException(
                400, f"{name} is {given}, and this model has {size}: they count from 0"
            )
    found = known(id, await state.engines.find("pte_kept_folds", id, fold))
    plan = FoldPlan(**found["plan"])
    if not plan.keep_tokens:
        raise HTTPException(
            404, f"request {id} keeps no tokens: it ran without pte_keep, or with pte_keep 0"
        )
    if fold is not None and fold > found["folds"]:
        raise HTTPException(
            404, f"request {id} has no fold {fold}: there are {found['folds']} so far"
        )
    record = tuple(found["record"])
    # In a thread: a long record takes a while.
    told = await asyncio.to_thread(_tell, record, plan, sizes, layer, head)
    return {
        "id": id,
        **{name: found[name] for name in ("request_id", "status", "num_tokens", "folds")},
        "layers": sizes[0],
        "heads_per_layer": sizes[1],
        "keep_tokens": plan.keep_tokens,
        "keep_score": plan.keep_score,
        **told,
    }


@router.get("/thoughts/{id}/tokens")
async def get_tokens(
    id: str, request: Request, first: Annotated[int, Query(ge=0, lt=2**31)] = 0
) -> dict[str, Any]:
    """Tell the tokens of a request that keeps some, from position `first` on, and their texts."""
    state = service(request)
    tokens = state.written.find(id)
    if tokens is None:
        elsewhere = ", or runs by way of another API server" if state.others.count else ""
        raise HTTPException(
            404,
            f"no tokens of a request {id}: it is unknown, keeps no tokens, or finished so long ago "
            f"that they were dropped (--pte-keep-thoughts){elsewhere}",
        )
    part = list(tokens[first : first + MAX_TOKENS])
    tokenizer = state.engine.renderer.tokenizer
    return {
        "id": id,
        "num_tokens": len(tokens),
        "first": first,
        "token_ids": part,
        "texts": None if tokenizer is None else convert_ids_list_to_tokens(tokenizer, part),
    }


def _sizes(state: Service) -> tuple[int, int]:
    """Return the number of layers, and of KV heads in each."""
    config = state.engine.vllm_config
    model, parallel = config.model_config, config.parallel_config
    return model.get_num_layers(parallel), model.get_total_num_kv_heads()


def _tell(
    record: KeptRecord,
    plan: FoldPlan,
    sizes: tuple[int, int],
    layer: int | None,
    head: int | None,
) -> dict[str, Any]:
    """Return what the last fold of a record left, to the heads that were asked for."""
    at = positions_at(record, plan, len(record), *sizes)
    held = held_by(at, layer=layer, head=head)
    pinned_to = plan.pinned_blocks * plan.block_size
    window, questions = _held_besides(plan, at.folds)
    told: dict[str, Any] = {
        "fold": at.folds,
        "at": plan.fold_at(at.folds - 1) if at.folds else None,
        "pinned": [0, pinned_to],
        "questions": questions,
        "window": window,
        "evicted": [at.evicted[0][0], at.evicted[-1][1]] if at.folds else [pinned_to, pinned_to],
        "heads": held.heads,
        "positions": held.positions,
        "before": held.before,
        "after": held.after,
        "dropped": held.dropped,
    }
    if layer is not None:
        chosen = range(sizes[1]) if head is None else [head]
        told["kept"] = [
            {"layer": layer, "head": one, "positions": at.kept[layer, one].tolist()}
            for one in chosen
        ]
    return told


def _held_besides(plan: FoldPlan, folds: int) -> tuple[Spans, Spans]:
    """Return what is held besides kept and first pinned tokens right after a fold, as tokens.

    These are the thoughts of the window, and the newest question of a conversation.
    """
    if not folds:
        return (), ()
    size, at = plan.block_size, plan.fold_at(folds - 1)
    *before, (newest, _) = HeldBlocks(plan, folds).spans
    blocks = (*before, (newest, at // size)) if newest < at // size else tuple(before)
    kept = runs(sorted(plan.kept_places[: plan.kept_blocks(folds)]))
    window = without(without(blocks, kept), ((0, plan.pinned_blocks),) * (plan.pinned_blocks > 0))
    asked = [span for span in plan.pin_spans if span[0] <= at][-1:]
    questions = [blocks_around(span, size) for span in asked]
    own = [(max(first, plan.pinned_blocks), min(end, at // size)) for first, end in questions]
    own = [(first, end) for first, end in own if first < end]
    return (
        tuple((first * size, end * size) for first, end in without(window, tuple(own))),
        tuple((first * size, end * size) for first, end in own),
    )
