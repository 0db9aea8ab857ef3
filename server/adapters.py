"""Adapters pushed over HTTP: validated whole, kept on disk, served by vLLM under `name@version`."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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

from pte_vllm.adapter import FILES, Adapter, AdapterError, ModelShape, content_hash
from pte_vllm.server.spool import Incoming, Spool, Version, check_name

logger = init_logger(__name__)

GRACE_S = 10.0
"""Time between an adapter's last use by name and its first step in the engine, amply."""


class ConflictError(ValueError):
    """The request contradicts versions that are there (or not yet there): HTTP 409."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What a request's `adapter` names."""

    version: int
    """0: the base model, or a LoRA that was not pushed."""
    lora: LoRARequest | None
    """None: the base model."""

    @property
    def engine_name(self) -> str | None:
        return self.lora.lora_name if self.lora is not None else None


class AdapterRegistry:
    """Versions of pushed adapters, over vLLM's own list of LoRAs.

    A version is never changed. Of each name the newest `keep` stay; an older one leaves with the
    next push, unless a rollout uses it. Its files go later still, when no request of any route
    reads them: vLLM may load them again in the middle of a step, and would die without.

    Args:
        engine: the engine, asked which adapters its requests use.
        models: vLLM's list, which also hands out ids.
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
        self._spool = spool
        self._keep = keep
        self._refusal = refusal
        self._shape = ModelShape.from_hf(
            engine.vllm_config.model_config.hf_config.get_text_config()
        )
        self._versions: dict[str, dict[int, Version]] = {}
        self._users: Counter[str] = Counter()  # by engine name
        self._retired: list[tuple[float, Version]] = []  # when, by the monotonic clock
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
            await self._remove_unused()
            mine = self._versions.get(name, {})
            newest = max(mine, default=0)
            if number in mine and mine[number].sha256 == found:
                return mine[number], False
            if number is None:
                number = newest + 1
            elif number <= newest:
                what = "has other files" if number in mine else "is not above the newest"
                raise ConflictError(f"version {number} of {name} {what}; the newest is {newest}")
            rule = await asyncio.to_thread(self._validate, incoming)
            version = await asyncio.to_thread(
                self._spool.commit, incoming, name=name, number=number, sha256=found, rule=rule
            )
            try:
                await self._serve(version)
            except (ValueError, EngineDeadError):
                await asyncio.to_thread(self._spool.forget, version)
                await asyncio.to_thread(self._spool.remove, version)
                raise
            for old in sorted(self._versions[name])[: -self._keep]:
                if not self._users[self._versions[name][old].engine_name]:
                    await self._retire(self._versions[name][old])
            return version, True

    async def push_directory(self, name: str, path: Path) -> Version:
        """Make a copy of an adapter directory the next version, unless the newest has its files.

        Raises:
            ValueError: if it is no adapter directory, or one that cannot be served.
        """
        check_name(name)
        incoming = await asyncio.to_thread(self._spool.incoming)
        try:
            for file in FILES:
                if (path / file).is_file():
                    with (path / file).open("rb") as stream:
                        await asyncio.to_thread(incoming.write, file, stream)
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
            await self._remove_unused()
            gone = self.versions(spec)
            for version in gone:
                await self._retire(version)
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

    def resolve(self, spec: str | None, *, min_version: int | None = None) -> Resolved:
        """The adapter that a request names: `name` is its newest version.

        Raises:
            LookupError: if there is none.
            ConflictError: if its version is below `min_version`.
        """
        if spec is None:
            resolved = Resolved(version=0, lora=None)
        else:
            served = self._models.lora_requests
            if spec in served and spec not in self._versions and not self._is_pushed(spec):
                resolved = Resolved(version=0, lora=served[spec])
            else:
                version = self.versions(spec)[-1]
                resolved = Resolved(version=version.number, lora=served[version.engine_name])
        if min_version is not None and resolved.version < min_version:
            raise ConflictError(
                f"min_weight_version is {min_version}, but {spec or 'the base model'} is at "
                f"version {resolved.version}"
            )
        return resolved

    @contextmanager
    def using(self, resolved: Resolved) -> Iterator[None]:
        """Keep the version for the length of the block."""
        name = resolved.engine_name
        if name is None:
            yield
            return
        self._users[name] += 1
        try:
            yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]

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
                    "rollouts": self._users.get(v.engine_name, 0),
                }
                for v in versions
            ],
        }

    def _is_pushed(self, engine_name: str) -> bool:
        name, _, number = engine_name.rpartition("@")
        return number.isdecimal() and int(number) in self._versions.get(name, {})

    def _check_name_is_free(self, name: str) -> None:
        check_name(name)
        if self._models.is_base_model(name) or name in self._models.lora_requests:
            raise ValueError(f"{name} is served already, and was not pushed; choose another name")

    def _validate(self, incoming: Incoming) -> str | None:
        """The rule of an adapter that this engine can serve; AdapterError for any other."""
        path, lora = incoming.path, self._engine.vllm_config.lora_config
        try:
            adapter = Adapter.load(path, self._shape)
            rank = max(a.shape[0] for a in adapter.lora_a.values())
            if adapter.pte is not None:
                rank = max(rank, adapter.pte.rank)
            if rank > lora.max_lora_rank:
                raise AdapterError(
                    f"rank {rank} exceeds this server's --max-lora-rank {lora.max_lora_rank}"
                )
        except AdapterError as error:
            raise AdapterError(str(error).replace(f"{path}/", "")) from error
        return adapter.pte.rule if adapter.pte is not None else None

    async def _serve(self, version: Version) -> None:
        """Register with vLLM, which also loads it; ValueError if it does not load."""
        result = await self._models.load_lora_adapter(
            LoadLoRAAdapterRequest(lora_name=version.engine_name, lora_path=version.path)
        )
        if isinstance(result, ErrorResponse):
            if self._engine.errored:
                raise EngineDeadError()
            raise ValueError(result.error.message.replace(f"{version.path}/", ""))
        self._versions.setdefault(version.name, {})[version.number] = version

    async def _retire(self, version: Version) -> None:
        """No new request finds it; a restart does not bring it back."""
        await self._models.unload_lora_adapter(
            UnloadLoRAAdapterRequest(lora_name=version.engine_name)
        )
        del self._versions[version.name][version.number]
        if not self._versions[version.name]:
            del self._versions[version.name]
        await asyncio.to_thread(self._spool.forget, version)
        self._retired.append((time.monotonic(), version))

    async def _remove_unused(self) -> None:
        """Remove files of retired versions that no request, running or waiting, uses.

        The worker knows the requests of its last step. One that named the version just before it
        was retired may not be among them yet, hence the time of grace.
        """
        due = [r for r in self._retired if time.monotonic() - r[0] > GRACE_S]
        if not due:
            return
        report = (await self._engine.collective_rpc("pte_requests"))[0]
        in_use = {*report["adapters_in_use"], *self._users}
        for retired in due:
            if retired[1].engine_name not in in_use:
                await asyncio.to_thread(self._spool.remove, retired[1])
                self._retired.remove(retired)
