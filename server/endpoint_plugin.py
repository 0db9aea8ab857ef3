"""The endpoint plugin `pte` adds our routes to vLLM's FastAPI app.

The routes reach the engine by RPC only.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.datastructures import State
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.api_router import models
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.lora.utils import get_adapter_absolute_path

from pte_vllm import __version__
from pte_vllm.adapter.files import AdapterError
from pte_vllm.adapter.format import ModelShape, load_for_engine
from pte_vllm.method.names import FEATURES, RULE_NAMES
from pte_vllm.method.options import REQUEST_OPTIONS, EngineConfig
from pte_vllm.server import adapter_routes, page, thought_routes
from pte_vllm.server.access.auth import Keys, admit_admin, may_change, may_use
from pte_vllm.server.access.limits import BodyLimit
from pte_vllm.server.ending import answer_at_shutdown
from pte_vllm.server.metrics import timed_load
from pte_vllm.server.options import ServiceConfig
from pte_vllm.server.rollouts import routes as rollout_routes
from pte_vllm.server.scrape import COLLECTOR, RefreshOnScrape
from pte_vllm.server.service import make_service, service
from pte_vllm.server.trainers import control
from pte_vllm.server.trainers import routes as trainer_routes
from pte_vllm.server.trainers.tokens import serving_tokens

router = APIRouter()


def _engine(request: Request) -> EngineClient:
    return service(request).engine


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
            "block_size": config.cache_config.block_size,
        },
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
    return (await _engine(request).collective_rpc("pte_requests"))[0]


async def load_lora_adapter(body: LoadLoRAAdapterRequest, request: Request) -> Response:
    """Check a PTE adapter before vLLM's route loads it, so that a broken one gets 400, not 500."""
    config = _engine(request).vllm_config
    if config.lora_config is not None:
        try:
            await run_in_threadpool(
                load_for_engine,
                get_adapter_absolute_path(body.lora_path),
                model=ModelShape.from_hf(config.model_config.hf_config.get_text_config()),
                max_lora_rank=config.lora_config.max_lora_rank,
                load_inplace=body.load_inplace,
            )
        except AdapterError as error:
            raise HTTPException(400, str(error)) from error
    return _answer(await timed_load(models(request), body))


async def unload_lora_adapter(body: UnloadLoRAAdapterRequest, request: Request) -> Response:
    """Retire a pushed adapter as `DELETE /pte/v1/adapters/{name}` does; vLLM unloads others."""
    state = getattr(request.app.state, "pte_service", None)
    if state is not None and state.registry.catalog.is_pushed(body.lora_name):
        await state.registry.retire(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
    return _answer(await models(request).unload_lora_adapter(body))


def _answer(result: ErrorResponse | str) -> Response:
    if isinstance(result, ErrorResponse):
        return JSONResponse(result.model_dump(), status_code=result.error.code)
    return PlainTextResponse(result)


class PTEEndpointPlugin:
    """Adds our routes to vLLM's app, as `vllm/plugins/endpoint_plugins/interface.py` asks."""

    name = "pte"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and what bounds and guards them."""
        before = len(app.routes)
        for ours in (router, adapter_routes.router, rollout_routes.router, thought_routes.router):
            app.include_router(
                ours, prefix="/pte/v1", tags=["pte"], dependencies=[Depends(may_use)]
            )
        app.include_router(page.router)
        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            for route in (load_lora_adapter, unload_lora_adapter):
                app.post(
                    f"/v1/{route.__name__}",
                    dependencies=[Depends(may_change), Depends(validate_json_request)],
                    response_class=PlainTextResponse,
                )(route)
        if EngineConfig.from_vllm(app.state.args) is not None:  # else plain vLLM stays as it is
            control.attach(app, info)
            trainer_routes.attach(app)
        # Last, so that it sees every route of ours.
        options: ServiceConfig = getattr(app.state.args, "pte_service", None) or ServiceConfig()
        admit_admin(app.state.args)
        app.add_middleware(
            BodyLimit,
            routes=app.routes[before:],
            max_bytes=options.max_body_bytes,
            exempt=[adapter_routes.put_adapter],
        )
        app.add_middleware(RefreshOnScrape)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Make what the routes share, and serve the adapters that were pushed before."""
        state.pte_keys = Keys(args)
        config = EngineConfig.from_vllm(engine_client.vllm_config) if engine_client else None
        if engine_client is not None and config is not None:
            found = make_service(engine_client, config, state.openai_serving_models, args)
            await found.registry.restore()
            state.serving_tokens = serving_tokens(
                engine_client, state, args, found.registry.catalog
            )
            state.pte_service = found
            COLLECTOR.watch(found)
            answer_at_shutdown(engine_client)
