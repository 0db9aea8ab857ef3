"""The endpoint plugin `pte` adds our routes to vLLM's FastAPI app.

The routes reach the engine by RPC only.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.datastructures import State
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.renderers.chat_utils import load_chat_template
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from pte_vllm import __version__
from pte_vllm.engine.chat_pins import use_template
from pte_vllm.method.names import FEATURES, RULE_NAMES
from pte_vllm.method.options import EngineConfig
from pte_vllm.method.requests import REQUEST_OPTIONS
from pte_vllm.server import (
    adapter_routes,
    kept_routes,
    page,
    record_routes,
    text_only,
    thought_routes,
)
from pte_vllm.server.access.auth import Keys, admit_admin
from pte_vllm.server.access.guard import Guard
from pte_vllm.server.access.limits import BodyLimit
from pte_vllm.server.access.option_headers import OptionHeaders
from pte_vllm.server.beam_search import refuse_beam_search
from pte_vllm.server.before_streams import check_before_streams
from pte_vllm.server.client_errors import mend_client_errors
from pte_vllm.server.ending import Ending, answer_at_shutdown
from pte_vllm.server.options import ServiceConfig
from pte_vllm.server.rollouts import routes as rollout_routes
from pte_vllm.server.scrape import COLLECTOR, RefreshOnScrape
from pte_vllm.server.service import make_service, service
from pte_vllm.server.told import FoldsInStreams, tell_folds
from pte_vllm.server.trainers import control
from pte_vllm.server.trainers import routes as trainer_routes
from pte_vllm.server.trainers.tokens import serving_tokens

router = APIRouter()

BOUNDED_ROUTES = (
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    *("/inference/v1/generate", "/inference/v1/abort_requests"),
)
"""Routes of vLLM whose bodies are bounded as those of ours are."""


def _kv_bytes_per_token(config: VllmConfig) -> int:
    """Return what the keys and values of one token weigh in all layers, on all devices."""
    model, parallel = config.model_config, config.parallel_config
    name: str = config.cache_config.cache_dtype
    if name == "auto" and getattr(config.quant_config, "kv_cache_scheme", None) is not None:
        name = "fp8"  # as vLLM's layers choose, in the worker
    dtype = kv_cache_dtype_str_to_dtype(name, model)
    numbers = 2 * model.get_total_num_kv_heads() * model.get_head_size()
    return numbers * dtype.itemsize * model.get_num_layers(parallel)


@router.get("/info")
async def info(request: Request) -> dict[str, Any]:
    """Tell the method, the default plan and the limits of this server."""
    state = service(request)
    config, engine, catalog = state.engine.vllm_config, state.config, state.registry.catalog
    return {
        "version": __version__,
        "paper": "arXiv 2602.16839",
        "plan": {
            "window_tokens": engine.window_tokens,
            "evict_ratio": engine.evict_ratio,
            "max_prompt_tokens": engine.max_prompt_tokens,
            "pin_tokens": engine.pin_tokens,
            "block_size": config.cache_config.block_size,
            "keep_tokens": engine.keep_tokens,
            "keep_score": engine.keep_score,
        },
        "engines": state.engines.count,
        "api_servers": state.others.count + 1,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv_bytes_per_token": _kv_bytes_per_token(config),
        "reserve_windows": engine.reserve_windows,
        "keep_thoughts": engine.keep_thoughts,
        "keep_thoughts_mib": engine.keep_thoughts_mib,
        "request_options": list(REQUEST_OPTIONS),
        "rules": list(RULE_NAMES),
        "features": list(FEATURES),
        "logprobs_mode": config.model_config.logprobs_mode,
        "adapters": {name: catalog.versions(name)[-1].number for name in catalog.names()},
        "max_model_len": config.model_config.max_model_len,
        "max_lora_rank": config.lora_config.max_lora_rank if config.lora_config else None,
    }


@router.get("/requests")
async def requests(request: Request) -> dict[str, Any]:
    """List running and recently finished requests: tokens, folds and KV blocks; see docs/api.md."""
    return await service(request).engines.requests()


class PTEEndpointPlugin:
    """Adds our routes to vLLM's app, as `vllm/plugins/endpoint_plugins/interface.py` asks."""

    name = "pte"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and what bounds and guards them."""
        before = len(app.routes)
        parts = (adapter_routes, rollout_routes, thought_routes, kept_routes, record_routes)
        for ours in (router, *(part.router for part in parts)):
            app.include_router(ours, prefix="/pte/v1", tags=["pte"])
        app.include_router(page.router)
        is_ours = EngineConfig.from_vllm(app.state.args) is not None
        if is_ours:  # else plain vLLM stays as it is
            control.attach(app, info)
            trainer_routes.attach(app)
            text_only.attach(app)
        # Last, so that they see every route of ours. vLLM's loads by path are bounded as ours are.
        bounded = [r for r in app.routes[:before] if getattr(r, "path", None) in BOUNDED_ROUTES]
        options: ServiceConfig = getattr(app.state.args, "pte_service", None) or ServiceConfig()
        admit_admin(app.state.args)
        app.add_middleware(
            BodyLimit,
            routes=[*bounded, *app.routes[before:]],
            max_bytes=options.max_body_bytes,
            exempt=[adapter_routes.put_adapter],
        )
        app.add_middleware(RefreshOnScrape)
        app.add_middleware(OptionHeaders)
        app.add_middleware(FoldsInStreams)
        app.add_middleware(Guard, only_below="/" if is_ours else "/pte")

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Make what the routes share, and serve the adapters that were pushed before."""
        state.pte_keys = Keys(args)
        config = EngineConfig.from_vllm(engine_client.vllm_config) if engine_client else None
        if engine_client is not None and config is not None:
            use_template(load_chat_template(args.chat_template))
            found = make_service(engine_client, config, state.openai_serving_models, args)
            await found.registry.restore()
            found.others.follow()
            state.serving_tokens = serving_tokens(
                engine_client, state, args, found.registry.catalog
            )
            refuse_beam_search(state)
            mend_client_errors(state)
            tell_folds(engine_client, config, found.block_size)
            check_before_streams(engine_client, state)
            state.pte_service = found
            COLLECTOR.watch(found)
            answer_at_shutdown(engine_client, getattr(args, "pte_ending", None) or Ending())
