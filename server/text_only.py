"""Routes that OpenAI's clients know and this server lacks say so, where others get a bare 404."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import Response

ROUTES = (
    # Of vLLM, for models that make no text.
    *("/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score"),
    *("/rerank", "/v1/rerank", "/v2/rerank", "/v1/audio/transcriptions", "/v1/audio/translations"),
    # Of OpenAI.
    *("/v1/audio/speech", "/v1/images/generations", "/v1/images/edits", "/v1/moderations"),
)
_SCORES = ("/score", "/v1/score")


async def refuse(request: Request) -> Response:
    """Answer 404 and say what this server does."""
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    hint = ""
    if path in _SCORES:
        hint = "; log-probabilities of given tokens: POST /pte/v1/score"
    raise HTTPException(
        404,
        f"{path}: this server generates text only (POST /v1/chat/completions, /v1/completions, "
        f"/v1/responses){hint}",
    )


def attach(app: FastAPI) -> None:
    """Register the routes that vLLM has not."""
    there = {getattr(route, "path", None) for route in app.routes}
    router = APIRouter(include_in_schema=False)
    for path in ROUTES:
        if path not in there:
            router.post(path)(refuse)
    app.include_router(router)
