"""Adapters pushed over HTTP are checked whole, kept on disk, and served under `name@version`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from pte_vllm.adapter.files import read_pte_config
from pte_vllm.adapter.format import ModelShape
from pte_vllm.adapter.hashes import content_hash
from pte_vllm.method.options import PTEConfig
from pte_vllm.server.adapters.catalog import Catalog, ConflictError
from pte_vllm.server.adapters.in_use import AdapterUse
from pte_vllm.server.adapters.reasons import reason_of
from pte_vllm.server.adapters.spool import Incoming, Spool, Version, check_name
from pte_vllm.server.adapters.upload import MAX_ADAPTER_BYTES, check_servable
from pte_vllm.server.engines import Engines
from pte_vllm.server.metrics import timed_load
from pte_vllm.server.sharing.directory import Sharing

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes

_LOOK_S = 2.0
"""Time between two looks whether old versions may be retired or deleted, while there are any."""


class AdapterRegistry:
    """Versions of pushed adapters, over vLLM's own list of LoRAs.

    A version is never changed. Of each name the newest `keep` stay. An older one is retired, which
    means that no new request finds it, once no rollout uses it. Its files are deleted later still,
    as `AdapterUse` tells.

    Args:
        engine: vLLM's client of the engines.
        engines: what asks them which adapters their requests use.
        models: vLLM's list, which also hands out ids; from now on it knows pushed names too.
        spool: where versions live.
        sharing: what this API server shares with others.
        keep: how many versions of a name stay.
        refusal: why this server takes no adapters; None where it does.
    """

    def __init__(
        self,
        engine: EngineClient,
        engines: Engines,
        models: OpenAIServingModels,
        spool: Spool,
        sharing: Sharing,
        *,
        keep: int,
        refusal: str | None = None,
    ) -> None:
        self._engine = engine
        # vLLM's own: what routes call asks this registry first (`loads.py`).
        self._load, self._unload = models.load_lora_adapter, models.unload_lora_adapter
        self._shared = sharing.versions()
        self.catalog = Catalog(models, self._shared)
        self._spool = spool
        self.use = AdapterUse(
            engines, spool, sharing.counts("rollouts"), on_idle=self._retire_and_delete_soon
        )
        self.catalog.on_new = self.use.announce
        self._looking: asyncio.Task[None] | None = None
        self._keep = keep
        self._refusal = refusal
        self.shape = ModelShape.from_hf(engine.vllm_config.model_config.hf_config.get_text_config())
        lora = engine.vllm_config.lora_config
        self.max_rank = lora.max_lora_rank if lora is not None else 0
        self.lora_dtype = lora.lora_dtype if lora is not None else engine.model_config.dtype
        self._lock = sharing.exclusive("versions")

    async def restore(self) -> None:
        """Serve what the spool holds again; what does not fit this model is left out, and logged.

        Of several API servers the first does so for all.

        Raises:
            ValueError: if another server uses the spool, or it is damaged.
        """
        if self._refusal is not None:
            return
        async with self._lock:
            if self._shared is not None and not self._shared.first("restore"):
                return
            for version in await asyncio.to_thread(self._spool.versions):
                try:
                    pte = await asyncio.to_thread(read_pte_config, version.path)
                    await self._serve(version, pte)
                except ValueError as error:
                    logger.warning("spooled adapter %s is left out: %s", version.engine_name, error)

    async def push(
        self, name: str, incoming: Incoming, *, sha256: str, number: int | None
    ) -> tuple[Version, bool]:
        """Make files a version and serve it; the same version with the same files is no error.

        Returns:
            The version, and whether it is new.

        Raises:
            ConflictError: if `number` exists with other files, or is not above the newest.
            ValueError: if the files are not what `sha256` says, or cannot be served.
        """
        if self._refusal is not None:
            raise ValueError(self._refusal)
        check_name(name)
        self.catalog.check_is_free(name)
        found = content_hash(incoming.hashes)
        if found != sha256.lower():
            raise ValueError(f"sha256 is {sha256}, but the files that arrived have {found}")
        async with self._lock:
            served = self.catalog.versions(name) if name in self.catalog.names() else []
            mine = {version.number: version for version in served}
            newest = max(mine, default=0)
            if number in mine and mine[number].sha256 == found:
                return mine[number], False
            if number is None:
                number = newest + 1
            elif number <= newest:
                what = "has other files" if number in mine else "is not above the newest"
                raise ConflictError(f"version {number} of {name} {what}; the newest is {newest}")
            pte = await asyncio.to_thread(
                check_servable, incoming.path, self.shape, self.max_rank, self.lora_dtype
            )
            version = await asyncio.to_thread(
                self._spool.commit,
                incoming,
                name=name,
                number=number,
                sha256=found,
                rule=pte.rule if pte is not None else None,
            )
            try:
                await self._serve(version, pte)
            except (ValueError, EngineDeadError):
                await asyncio.to_thread(self._spool.retire, version)
                await asyncio.to_thread(self._spool.delete, version)
                raise
            self.use.announce(version)
            await self._retire_old()
            self._retire_and_delete_soon()
            return version, True

    async def push_directory(self, name: str, path: Path) -> Version:
        """Make a copy of an adapter directory the next version, unless the newest has its files.

        Raises:
            ValueError: if it is no adapter directory, or one that cannot be served.
        """
        check_name(name)
        incoming = await asyncio.to_thread(self._spool.incoming)
        try:
            await asyncio.to_thread(incoming.copy_adapter, path, max_bytes=MAX_ADAPTER_BYTES)
            sha256 = content_hash(incoming.hashes)
            newest = self.catalog.newest(name)
            if newest is not None and newest.sha256 == sha256:
                return newest
            return (await self.push(name, incoming, sha256=sha256, number=None))[0]
        finally:
            await asyncio.to_thread(incoming.delete)

    async def retire(self, spec: str) -> list[Version]:
        """Stop serving `name` (all versions) or `name@version`; requests that run finish.

        Raises:
            LookupError: if there is no such adapter.
        """
        async with self._lock:
            retired = self.catalog.versions(spec)
            for version in retired:
                await self._retire(version)
            self._retire_and_delete_soon()
            return retired

    def summary(self, name: str) -> dict[str, Any]:
        """Return what the API shows of `name`, or of `name@version`.

        Raises:
            LookupError: if there is no such adapter.
        """
        versions = self.catalog.versions(name)
        return {
            "name": versions[-1].name,
            "newest": versions[-1].number,
            "versions": [
                {
                    "version": v.number,
                    "engine_name": v.engine_name,
                    "sha256": v.sha256,
                    "bytes": v.num_bytes,
                    "created_s": v.created_s,
                    "rule": v.rule,
                    "features": self.catalog.features(v),
                    "rollouts": self.use.rollouts(v.engine_name),
                }
                for v in versions
            ],
        }

    def _retire_and_delete_soon(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._retire_and_delete())

    async def _retire_and_delete(self) -> None:
        """Retire old versions and delete files of retired ones, until none is left that must go."""
        left = True
        while left:
            async with self._lock:
                await self._retire_old()
                left = await self.use.delete_unused()
            await asyncio.sleep(_LOOK_S)

    async def _retire_old(self) -> None:
        for name in self.catalog.names():
            for version in self.catalog.versions(name)[: -self._keep]:
                if not self.use.rollouts(version.engine_name):
                    await self._retire(version)

    async def _serve(self, version: Version, pte: PTEConfig | None) -> None:
        """Register with vLLM, which also loads it.

        Args:
            version: the version, whose files are in the spool.
            pte: what its config says of the method; None of a plain LoRA.

        Raises:
            ValueError: if the engine cannot load it.
            EngineDeadError: if the engine has died.
        """
        result = await timed_load(
            self._load,
            LoadLoRAAdapterRequest(lora_name=version.engine_name, lora_path=version.path),
        )
        if isinstance(result, ErrorResponse):
            if self._engine.errored:
                raise EngineDeadError()
            raise ValueError(reason_of(result).replace(f"{version.path}/", ""))
        self.catalog.add(version, pte.features if pte is not None else None)

    async def _retire(self, version: Version) -> None:
        """Have no new request find a version, and no restart bring it back."""
        self.catalog.retire(version)
        await self._unload(UnloadLoRAAdapterRequest(lora_name=version.engine_name))
        await asyncio.to_thread(self._spool.retire, version)
        self.use.retire(version)
