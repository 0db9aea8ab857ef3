"""Adapters pushed over HTTP: validated whole, kept on disk, served by vLLM under `name@version`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from pte_vllm.adapter.files import read_pte_config
from pte_vllm.adapter.format import ModelShape
from pte_vllm.adapter.hashes import content_hash
from pte_vllm.server.adapters.in_use import AdapterUse
from pte_vllm.server.adapters.served_names import ServedNames
from pte_vllm.server.adapters.spool import Incoming, Spool, Version, check_name
from pte_vllm.server.adapters.upload import MAX_ADAPTER_BYTES, servable_rule
from pte_vllm.server.metrics import timed_load

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes

_TIDY_S = 2.0
"""How often it is looked whether old versions may leave, while there are any."""


class ConflictError(ValueError):
    """The request contradicts versions that are there (or not yet there): HTTP 409."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What a request's `adapter` names."""

    version: int
    """0: the base model, or a LoRA that was not pushed."""
    lora: LoRARequest | None
    """None: the base model."""
    pushed_name: str | None = None
    """Without the version; None: not a pushed adapter."""
    rule: str | None = None
    """Of a pushed adapter; None without a thought state."""

    @property
    def engine_name(self) -> str | None:
        return self.lora.lora_name if self.lora is not None else None


class AdapterRegistry:
    """Versions of pushed adapters, over vLLM's own list of LoRAs.

    A version is never changed. Of each name the newest `keep` stay; an older one leaves once no
    rollout uses it. Its files go later still (see `AdapterUse`).

    Args:
        engine: the engine, asked which adapters its requests use.
        models: vLLM's list, which also hands out ids; from now on it knows pushed names too.
        spool: where versions live.
        keep: versions of a name that stay.
        refusal: why this server takes no adapters; None: it does.
    """

    def __init__(
        self,
        engine: EngineClient,
        models: OpenAIServingModels,
        spool: Spool,
        *,
        keep: int,
        refusal: str | None = None,
    ) -> None:
        self._engine = engine
        self._models = models
        self._names = ServedNames(models.lora_requests)
        models.lora_requests = self._names
        self._spool = spool
        self.use = AdapterUse(engine, spool, on_idle=self._tidy_soon)
        self._tidying: asyncio.Task[None] | None = None
        self._keep = keep
        self._refusal = refusal
        self._shape = ModelShape.from_hf(
            engine.vllm_config.model_config.hf_config.get_text_config()
        )
        lora = engine.vllm_config.lora_config
        self._max_rank = lora.max_lora_rank if lora is not None else 0
        self._versions: dict[str, dict[int, Version]] = {}
        self._features: dict[str, str | None] = {}
        """By engine name; None: a plain LoRA."""
        self._lock = asyncio.Lock()

    async def restore(self) -> None:
        """Serve what the spool holds again; what does not fit this model is left out, and logged.

        Raises:
            ValueError: if another server uses the spool, or it is damaged.
        """
        if self._refusal is not None:
            return
        async with self._lock:
            for version in await asyncio.to_thread(self._spool.versions):
                try:
                    await self._serve(version)
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
        self._check_name_is_free(name)
        found = content_hash(incoming.hashes)
        if found != sha256.lower():
            raise ValueError(f"sha256 is {sha256}, but the files that arrived have {found}")
        async with self._lock:
            mine = self._versions.get(name, {})
            newest = max(mine, default=0)
            if number in mine and mine[number].sha256 == found:
                return mine[number], False
            if number is None:
                number = newest + 1
            elif number <= newest:
                what = "has other files" if number in mine else "is not above the newest"
                raise ConflictError(f"version {number} of {name} {what}; the newest is {newest}")
            rule = await asyncio.to_thread(
                servable_rule, incoming.path, self._shape, self._max_rank
            )
            version = await asyncio.to_thread(
                self._spool.commit, incoming, name=name, number=number, sha256=found, rule=rule
            )
            try:
                await self._serve(version)
            except (ValueError, EngineDeadError):
                await asyncio.to_thread(self._spool.forget, version)
                await asyncio.to_thread(self._spool.remove, version)
                raise
            self.use.announce(version)
            await self._retire_old()
            self._tidy_soon()
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
            newest = self.versions(name)[-1] if name in self._versions else None
            if newest is not None and newest.sha256 == sha256:
                return newest
            return (await self.push(name, incoming, sha256=sha256, number=None))[0]
        finally:
            await asyncio.to_thread(incoming.discard)

    async def delete(self, spec: str) -> list[Version]:
        """Stop serving `name` (all versions) or `name@version`; requests that run finish.

        Raises:
            LookupError: if there is no such adapter.
        """
        async with self._lock:
            gone = self.versions(spec)
            for version in gone:
                await self._retire(version)
            self._tidy_soon()
            return gone

    def names(self) -> list[str]:
        return sorted(self._versions)

    def versions(self, spec: str) -> list[Version]:
        """Versions of `name`, oldest first, or the one of `name@version`.

        Raises:
            LookupError: if there is none.
        """
        if spec in self._versions:
            return [self._versions[spec][number] for number in sorted(self._versions[spec])]
        name, _, number = spec.rpartition("@")
        if number.isdecimal() and int(number) in self._versions.get(name, {}):
            return [self._versions[name][int(number)]]
        raise LookupError(f"there is no adapter {spec}")

    def newest(self, name: str) -> Version | None:
        """Of a pushed name."""
        versions = self._versions.get(name)
        return versions[max(versions)] if versions else None

    def resolve(
        self,
        spec: str | None,
        *,
        min_version: int | None = None,
        max_staleness: int | None = None,
    ) -> Resolved:
        """The adapter that a request names: `name` is its newest version.

        Raises:
            LookupError: if there is none.
            ConflictError: if its version is below `min_version`, or more than `max_staleness`
                behind the newest.
        """
        if spec is None:
            resolved = Resolved(version=0, lora=None)
        else:
            if spec in self._names and not self.is_pushed(spec):
                resolved = Resolved(version=0, lora=self._names[spec])
            else:
                version = self.versions(spec)[-1]
                resolved = Resolved(
                    version=version.number,
                    lora=self._names[version.engine_name],
                    pushed_name=version.name,
                    rule=version.rule,
                )
                behind = self.versions(version.name)[-1].number - version.number
                if max_staleness is not None and behind > max_staleness:
                    raise ConflictError(
                        f"max_staleness is {max_staleness}, but {spec} is {behind} versions old"
                    )
        if min_version is not None and resolved.version < min_version:
            raise ConflictError(
                f"min_weight_version is {min_version}, but {spec or 'the base model'} is at "
                f"version {resolved.version}"
            )
        return resolved

    def summary(self, name: str) -> dict[str, Any]:
        """What the API shows of an adapter."""
        versions = self.versions(name)
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
                    "features": self._features[v.engine_name],
                    "rollouts": self.use.rollouts(v.engine_name),
                }
                for v in versions
            ],
        }

    def is_pushed(self, spec: str) -> bool:
        """Whether `name` or `name@version` is ours, and not a LoRA that vLLM was told of."""
        try:
            return bool(self.versions(spec))
        except LookupError:
            return False

    def _check_name_is_free(self, name: str) -> None:
        check_name(name)
        taken = name in self._names and name not in self._versions
        if self._models.is_base_model(name) or taken:
            raise ValueError(f"{name} is served already, and was not pushed; choose another name")

    def _tidy_soon(self) -> None:
        if self._tidying is None or self._tidying.done():
            self._tidying = asyncio.create_task(self._tidy())

    async def _tidy(self) -> None:
        """Let old versions leave, until none is left that must."""
        left = True
        while left:
            async with self._lock:
                await self._retire_old()
                left = await self.use.remove_unused()
            await asyncio.sleep(_TIDY_S)

    async def _retire_old(self) -> None:
        for versions in list(self._versions.values()):
            for number in sorted(versions)[: -self._keep]:
                if not self.use.rollouts(versions[number].engine_name):
                    await self._retire(versions[number])

    async def _serve(self, version: Version) -> None:
        """Register with vLLM, which also loads it; ValueError if it does not load."""
        pte = await asyncio.to_thread(read_pte_config, version.path)
        result = await timed_load(
            self._models,
            LoadLoRAAdapterRequest(lora_name=version.engine_name, lora_path=version.path),
        )
        if isinstance(result, ErrorResponse):
            if self._engine.errored:
                raise EngineDeadError()
            raise ValueError(result.error.message.replace(f"{version.path}/", ""))
        versions = self._versions.setdefault(version.name, {})
        versions[version.number] = version
        self._features[version.engine_name] = pte.features if pte is not None else None
        self._names.newest[version.name] = versions[max(versions)].engine_name

    async def _retire(self, version: Version) -> None:
        """No new request finds it; a restart does not bring it back."""
        versions = self._versions[version.name]
        del versions[version.number], self._features[version.engine_name]
        if versions:
            self._names.newest[version.name] = versions[max(versions)].engine_name
        else:
            del self._versions[version.name], self._names.newest[version.name]
        await self._models.unload_lora_adapter(
            UnloadLoRAAdapterRequest(lora_name=version.engine_name)
        )
        await asyncio.to_thread(self._spool.forget, version)
        self.use.retire(version)
