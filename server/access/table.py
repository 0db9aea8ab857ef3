"""Who may call which route: every route of the app is named here, vLLM's and ours.

`guard.py` goes by this table. A route that is not in it needs the server's API key, and
tests/server/test_access.py fails until it is named: so a new vLLM opens nothing unseen.
"""

from __future__ import annotations

from enum import Enum


class Access(Enum):
    """What a caller of a route needs."""

    OPEN = "nothing"
    """It tells nothing about users or models, and costs nothing."""
    USE = "an API key"
    CHANGE = "the admin key"
    """It changes what others get, or tells their text. Where no admin key is set, an API key will
    do."""


OPEN = frozenset({"/health", "/metrics", "/ping", "/version", "/pte"})
"""Paths that probes, scrapers and a browser open without a key. The page `/pte` holds no data."""

BASE_WEIGHT_ROUTES = (
    "/update_weights",  # prime-rl's and vLLM's
    "/reload_weights",
    "/init_broadcaster",
    "/init_weight_transfer_engine",
    "/shutdown_weight_transfer_engine",
    "/start_weight_update",
    "/start_draft_weight_update",
    "/finish_weight_update",
    "/areal_update_weights",
    "/areal_init_weights_update_group",
    "/areal_set_update_weight_meta",
    "/areal_set_update_weight_meta_lora",
    "/areal_update_weights_xccl",
    "/areal_update_weights_lora_xccl",
)
"""By which trainers would replace the base weights. They answer 400 and say why: to some trainers a
404 means that there is nothing to update."""

SLEEP_ROUTES = ("/sleep", "/wake_up", "/release_kv_cache_memory")
"""By which trainers would take the accelerator's memory. Outside vLLM's development mode they
answer 400 and say why, as `/collective_rpc` does."""

CHANGE = frozenset(
    {
        "PUT /pte/v1/adapters/{name}",
        "DELETE /pte/v1/adapters/{name}",
        # Loads by path, under vLLM's name and the names of SageMaker and of trainers.
        "POST /v1/load_lora_adapter",
        "POST /v1/unload_lora_adapter",
        "POST /adapters",
        "DELETE /adapters/{adapter_name}",
        "POST /load_lora_adapter",
        "POST /skyrl/v1/load_lora_adapter",
        # They stop or slow down what others run.
        "POST /pause",
        "POST /resume",
        "POST /abort_requests",
        "POST /inference/v1/abort_requests",
        "POST /areal_pause_generation",
        "POST /areal_continue_generation",
        *(f"POST {path}" for path in SLEEP_ROUTES),
        "POST /reset_prefix_cache",
        "POST /reset_mm_cache",
        "POST /reset_encoder_cache",
        "POST /scale_elastic_ep",
        "POST /start_profile",
        "POST /stop_profile",
        # They run code in the engine, or change the weights.
        *(f"POST {path}" for path in BASE_WEIGHT_ROUTES),
        "POST /collective_rpc",
        "POST /update_weight_version",
        "POST /weight_checker",  # action "reset" sets all weights to zero
        # It changes nothing, and tells what others wrote.
        *("GET /pte/v1/thoughts/{id}/tokens", "GET /pte/v1/records/{name}"),
        "DELETE /pte/v1/records/{name}",
        # It changes counters that show faults, and restarts ranks.
        "POST /fault_tolerance/apply",
    }
)
"""Method and path template."""

USE = frozenset(
    {
        *(f"GET {path}" for path in ("/docs", "/docs/oauth2-redirect", "/openapi.json", "/redoc")),
        *("GET /load", "GET /kv_event_sources", "GET /tokenizer_info", "GET /is_sleeping"),
        *("POST /tokenize", "POST /detokenize", "POST /is_scaling_elastic_ep"),
        "GET /fault_tolerance/status",
        # Text or tokens, from a model.
        *("POST /v1/completions", "POST /v1/chat/completions", "POST /v1/chat/completions/batch"),
        *("POST /v1/responses", "GET /v1/responses/{response_id}"),
        *("POST /v1/responses/{response_id}/cancel", "POST /v1/messages"),
        *("POST /v1/messages/count_tokens", "POST /v1/systemone", "GET /v1/models"),
        *("POST /invocations", "POST /generative_scoring", "POST /inference/v1/generate"),
        *("POST /cohere/v2/chat", "POST /cohere/v2/chat/render"),
        *("POST /v1/completions/render", "POST /v1/completions/derender"),
        *("POST /v1/chat/completions/render", "POST /v1/chat/completions/derender"),
        *("POST /v1/messages/render", "POST /v1/responses/render"),
        # Theirs where they have them; else ours, which say that this server makes text only.
        *("POST /v1/embeddings", "POST /v2/embed", "POST /pooling", "POST /classify"),
        *("POST /score", "POST /v1/score", "POST /rerank", "POST /v1/rerank", "POST /v2/rerank"),
        *("POST /v1/audio/transcriptions", "POST /v1/audio/translations"),
        *("POST /v1/audio/speech", "POST /v1/images/generations", "POST /v1/images/edits"),
        "POST /v1/moderations",
        # What ours tell and make.
        *("GET /pte/v1/info", "GET /pte/v1/requests", "GET /pte/v1/adapters"),
        *("GET /pte/v1/adapters/{name}", "POST /pte/v1/rollouts", "POST /pte/v1/score"),
        *("GET /pte/v1/thoughts/{id}", "DELETE /pte/v1/thoughts/{id}"),
        *("GET /pte/v1/thoughts/{id}/events", "GET /pte/v1/thoughts/{id}/kept"),
        *("GET /is_paused", "GET /weight_info", "GET /get_world_size", "GET /server_info"),
    }
)
"""Method and path template."""


def access_of(method: str, template: str) -> Access | None:
    """Return what a caller of a route needs; None where the table does not name the route.

    Args:
        method: HEAD is taken for the GET that it stands for.
        template: the route's path as its app names it, such as `/adapters/{adapter_name}`.
    """
    route = f"{'GET' if method == 'HEAD' else method} {template}"
    if template in OPEN:
        return Access.OPEN
    if route in CHANGE:
        return Access.CHANGE
    return Access.USE if route in USE else None
