"""Every way into and out of vLLM's list of LoRAs: whatever route asks, the same checks hold.

vLLM's list has one method to load by path and one to unload. `/v1/load_lora_adapter`, SageMaker's
`/adapters` and whatever vLLM adds next call these two, so that is where ours stand.
"""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path

from fastapi.concurrency import run_in_threadpool
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.lora.utils import get_adapter_absolute_path

from pte_vllm.adapter.for_engine import load_for_engine
from pte_vllm.adapter.hashes import CONFIG_FILE, LORA_FILE
from pte_vllm.engine.loads import loaded_in_place
from pte_vllm.server.adapters.families import Families
from pte_vllm.server.adapters.reasons import reason_of
from pte_vllm.server.adapters.registry import AdapterRegistry
from pte_vllm.server.adapters.spool import SpoolError
from pte_vllm.server.adapters.upload import not_stored
from pte_vllm.server.engines import Engines
from pte_vllm.server.metrics import timed_load


class Loads:
    """Takes the place of two methods of vLLM's list of LoRAs.

    Args:
        models: vLLM's list.
        registry: the pushed versions. It has to be made before, as it loads by vLLM's own methods.
        engines: those that know what adapters requests use.
        keep: how many of the adapters `name-v1`, `name-v2`, ... stay; 0 keeps all.
    """

    def __init__(
        self,
        models: OpenAIServingModels,
        registry: AdapterRegistry,
        engines: Engines,
        *,
        keep: int,
    ) -> None:
        self._models, self._registry = models, registry
        self._load, self._unload = models.load_lora_adapter, models.unload_lora_adapter
        self._families = Families(models, engines, keep=keep, rollouts=registry.use.rollouts)

    def install(self) -> None:
        """Have whatever calls vLLM's list call this from now on."""
        self._models.load_lora_adapter = self.load  # type: ignore[method-assign]
        self._models.unload_lora_adapter = self.unload  # type: ignore[method-assign]

    async def load(
        self, request: LoadLoRAAdapterRequest, base_model_name: str | None = None
    ) -> ErrorResponse | str:
        """Load a directory as vLLM does, after a check of a PTE adapter: so a broken one gets 400.

        With `load_inplace` a PTE adapter, or a directory under a pushed name, becomes the name's
        next version, as if it were pushed: no sequence ever runs on a mixture of two.
        """
        if not request.lora_name or not request.lora_path:
            return await self._load(request, base_model_name)  # which says what is missing
        name, path = request.lora_name, get_adapter_absolute_path(request.lora_path)
        missing = await run_in_threadpool(_missing, Path(path))
        if missing is not None:  # vLLM's 404 means to clients that there is no such route
            return _bad_request(f"lora_path {request.lora_path} {missing}, as this server sees it")
        try:
            adapter = await run_in_threadpool(
                load_for_engine,
                path,
                model=self._registry.shape,
                max_lora_rank=self._registry.max_rank,
                dtype=self._registry.lora_dtype,
                load_inplace=False,
            )
            if request.load_inplace and (adapter or self._registry.catalog.is_pushed(name)):
                return await self._push(name, Path(path))
        except SpoolError as error:
            raise not_stored("--pte-spool", error) from error
        except ValueError as error:
            return _bad_request(str(error).replace(f"{path}/", ""))
        result = await timed_load(self._load, request, base_model_name)
        if isinstance(result, ErrorResponse):
            # With a live engine it is the adapter that is wrong, and vLLM says 500.
            failed = result.error.code == HTTPStatus.INTERNAL_SERVER_ERROR
            alive = not self._models.engine_client.errored
            return _bad_request(reason_of(result)) if failed and alive else result
        if request.load_inplace:
            loaded = self._models.lora_requests[name]
            loaded.load_inplace = False  # else vLLM 0.32 reads the files again in every step
            loaded_in_place(loaded.lora_int_id)
        await self._families.loaded(name)
        return result

    async def _push(self, name: str, path: Path) -> str:
        """Make the directory the next version of `name`, in place of a LoRA loaded by path.

        Raises:
            ValueError: if it cannot be served, or `name` is one version of a pushed adapter.
        """
        catalog = self._registry.catalog
        if catalog.is_pushed(name) and name not in catalog.names():
            raise ValueError(
                f"{name} is a version, which does not change: load under the name without its "
                "version, and it becomes the next one"
            )
        replaced = None if catalog.is_pushed(name) else self._models.lora_requests.pop(name, None)
        try:
            version = await self._registry.push_directory(name, path)
        except BaseException:
            if replaced is not None:
                self._models.lora_requests[name] = replaced
            raise
        return f"Success: LoRA adapter '{name}' is now version {version.number}."

    async def unload(self, request: UnloadLoRAAdapterRequest) -> ErrorResponse | str:
        """Retire a pushed adapter, `name` or `name@version`; vLLM unloads others."""
        name = request.lora_name
        if not self._registry.catalog.is_pushed(name):
            return await self._unload(request)
        try:
            await self._registry.retire(name)
        except LookupError as error:  # somebody else was faster
            return create_error_response(str(error), "NotFoundError", HTTPStatus.NOT_FOUND)
        return f"Success: LoRA adapter '{name}' removed successfully."


def _missing(path: Path) -> str | None:
    """Return what is wrong with a directory that holds no adapter at all."""
    if not path.is_dir():
        return "is no directory"
    if not (path / CONFIG_FILE).is_file():
        return f"has no {CONFIG_FILE}"
    weights = Path(LORA_FILE).stem  # of a plain LoRA, vLLM also reads what torch saved
    found = any((path / f"{weights}.{kind}").is_file() for kind in ("safetensors", "bin", "pt"))
    return None if found else f"has no {LORA_FILE}"


def _bad_request(message: str) -> ErrorResponse:
    return create_error_response(message, "BadRequestError", HTTPStatus.BAD_REQUEST)
