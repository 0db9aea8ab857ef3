"""A model's name that vLLM looks up in a directory of adapters: a client hears why it gets none.

vLLM's resolvers (VLLM_LORA_RESOLVER_CACHE_DIR) say only that a name was not found, or could not be
loaded; the reason is in the log, or nowhere.
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi.concurrency import run_in_threadpool
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora.request import LoRARequest
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

from pte_vllm.adapter.hashes import CONFIG_FILE
from pte_vllm.server.adapters.spool import check_name

_REASONS: ContextVar[list[str] | None] = ContextVar("pte_reasons", default=None)
"""Why loads failed in the lookup that runs in this task; None outside of one."""


class _TellingEngine:
    """The engine as vLLM's list of LoRAs sees it; a lookup hears why a load failed."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def add_lora(self, lora_request: LoRARequest) -> Any:
        try:
            return await self._engine.add_lora(lora_request)
        except Exception as error:
            if (reasons := _REASONS.get()) is not None:
                reasons.append(str(error).replace(f"{lora_request.lora_path}/", ""))
            raise


class Resolving:
    """Takes the place of `resolve_lora` of vLLM's list of LoRAs.

    Args:
        models: vLLM's list.
    """

    def __init__(self, models: OpenAIServingModels) -> None:
        self._models, self._resolve = models, models.resolve_lora

    def install(self) -> None:
        """Have whatever calls vLLM's list call this from now on; without resolvers do nothing."""
        if self._models.lora_resolvers:
            telling: Any = _TellingEngine(self._models.engine_client)
            self._models.engine_client = telling
            self._models.resolve_lora = self.resolve  # type: ignore[method-assign]

    async def resolve(self, lora_name: str) -> LoRARequest | ErrorResponse:
        """Look a name up as vLLM does; an adapter that is there and refused gets 400 and why."""
        reason = await run_in_threadpool(self._refused, lora_name)
        if reason is None:
            reasons: list[str] = []
            token = _REASONS.set(reasons)
            try:
                found = await self._resolve(lora_name)
            finally:
                _REASONS.reset(token)
            if not reasons or not isinstance(found, ErrorResponse):
                return found
            reason = "; ".join(reasons)
        return create_error_response(
            f"adapter {lora_name} is refused: {reason}", "BadRequestError", HTTPStatus.BAD_REQUEST
        )

    def _refused(self, name: str) -> str | None:
        """Say why vLLM's resolver of directories would overlook one; None if it would not."""
        try:
            check_name(name)
        except ValueError:
            return None
        if name in self._models.lora_requests:
            return None
        base = self._models.model_config.model
        for resolver in self._models.lora_resolvers:
            if isinstance(resolver, FilesystemResolver):
                directory = Path(resolver.lora_cache_dir, name)
                if directory.is_dir() and (reason := _overlooked(directory, base)):
                    return reason
        return None


def _overlooked(directory: Path, base: str) -> str | None:
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
    except OSError as error:
        return f"{CONFIG_FILE} cannot be read: {error.strerror}"
    except ValueError as error:
        return f"{CONFIG_FILE} is not valid JSON: {error}"
    if not isinstance(config, dict):
        return f"{CONFIG_FILE} must hold a JSON object"
    if (kind := config.get("peft_type")) != "LORA":
        return f"peft_type in {CONFIG_FILE} must be LORA, got {kind!r}"
    if (made_for := config.get("base_model_name_or_path")) != base:
        return (
            f"base_model_name_or_path in {CONFIG_FILE} is {made_for!r}, and this server was "
            f"started with the model {base!r}: make them the same"
        )
    return None
