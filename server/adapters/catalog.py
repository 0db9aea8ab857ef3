"""The versions of pushed adapters that are served, and which of them a request's name means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest

from pte_vllm.server.adapters.served_names import ServedNames
from pte_vllm.server.adapters.spool import Version
from pte_vllm.server.sharing.versions import AdapterNumbers, ServedVersion, SharedVersions


class ConflictError(ValueError):
    """The request contradicts versions that are there or not yet there; it gets HTTP 409."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The adapter that a request's name means."""

    version: int
    """Its number; 0 for the base model, or a LoRA that was not pushed."""
    lora: LoRARequest | None
    """What the engine is told; None is the base model."""
    pushed_name: str | None = None
    """Its name without the version; None unless it was pushed."""
    rule: str | None = None
    """The rule of a pushed adapter; None without a thought state."""

    @property
    def engine_name(self) -> str | None:
        """The name that the engine knows it by; None is the base model."""
        return self.lora.lora_name if self.lora is not None else None


class Catalog:
    """The served versions, over vLLM's own list of LoRAs.

    Args:
        models: vLLM's list. From now on it knows the plain names of pushed adapters too.
        shared: the versions that all API servers serve; None for the only one.
    """

    def __init__(self, models: OpenAIServingModels, shared: SharedVersions | None = None) -> None:
        self._names = ServedNames(models.lora_requests, refresh=self.refresh)
        self._shared = shared
        if shared is not None:
            after = models.lora_id_counter.value
            models.lora_id_counter = AdapterNumbers(shared, after=after)
        models.lora_requests = self._names
        self._is_base_model = models.is_base_model
        self._versions: dict[str, dict[int, Version]] = {}
        self._features: dict[str, str | None] = {}
        self.on_new: Callable[[Version], None] = lambda version: None
        """Called with each version that another API server added."""

    def refresh(self) -> None:
        """Take in what other API servers have done; every method that reads does so first."""
        if self._shared is None or not self._shared.changed():
            return
        rows = {row.engine_name: row for row in self._shared.rows()}
        served = {v.engine_name: v for family in self._versions.values() for v in family.values()}
        for name, version in served.items():
            row, number = rows.get(name), dict.__getitem__(self._names, name).lora_int_id
            if row is None or row.adapter_id != number:  # deleted; it may have been pushed again
                self._drop(version)
                del self._names[name]
        for name in rows.keys() - self._names.keys():
            version = Version(**rows[name].about["version"])
            lora = LoRARequest(name, rows[name].adapter_id, version.path)
            dict.__setitem__(self._names, name, lora)
            self._take(version, rows[name].about["features"])
            self.on_new(version)

    def names(self) -> list[str]:
        """Return the names of pushed adapters, sorted."""
        self.refresh()
        return sorted(self._versions)

    def features(self, version: Version) -> str | None:
        """Return the features of a served version; None of a plain LoRA."""
        return self._features[version.engine_name]

    def versions(self, spec: str) -> list[Version]:
        """Return the versions of `name`, oldest first, or the one of `name@version`.

        Raises:
            LookupError: if there is none.
        """
        self.refresh()
        if spec in self._versions:
            return [self._versions[spec][number] for number in sorted(self._versions[spec])]
        name, _, number = spec.rpartition("@")
        if number.isdecimal() and int(number) in self._versions.get(name, {}):
            return [self._versions[name][int(number)]]
        raise LookupError(f"there is no adapter {spec}")

    def newest(self, name: str) -> Version | None:
        """Return the newest version of a pushed name; None if there is none."""
        self.refresh()
        versions = self._versions.get(name)
        return versions[max(versions)] if versions else None

    def is_pushed(self, spec: str) -> bool:
        """Return whether `name` or `name@version` was pushed, rather than told to vLLM."""
        try:
            return bool(self.versions(spec))
        except LookupError:
            return False

    def check_is_free(self, name: str) -> None:
        """Raise ValueError if `name` is the base model's, or that of a LoRA not pushed."""
        taken = name in self._names and name not in self._versions  # the former refreshes
        if self._is_base_model(name) or taken:
            raise ValueError(f"{name} is served already, and was not pushed; choose another name")

    def add(self, version: Version, features: str | None) -> None:
        """Take in a version that vLLM serves.

        Args:
            version: the version.
            features: of its adapter; None of a plain LoRA.
        """
        self._take(version, features)
        if self._shared is not None:
            number = self._names[version.engine_name].lora_int_id
            about = {"version": asdict(version), "features": features}
            self._shared.put(
                ServedVersion(engine_name=version.engine_name, adapter_id=number, about=about)
            )

    def retire(self, version: Version) -> None:
        """Let no new request find a version, of this API server or another."""
        self._drop(version)
        if self._shared is not None:
            self._shared.remove(version.engine_name)

    def _take(self, version: Version, features: str | None) -> None:
        versions = self._versions.setdefault(version.name, {})
        versions[version.number] = version
        self._features[version.engine_name] = features
        self._names.newest[version.name] = versions[max(versions)].engine_name

    def _drop(self, version: Version) -> None:
        del self._features[version.engine_name]
        versions = self._versions[version.name]
        del versions[version.number]
        if versions:
            self._names.newest[version.name] = versions[max(versions)].engine_name
        else:
            del self._versions[version.name], self._names.newest[version.name]

    def resolve(
        self,
        spec: str | None,
        *,
        min_version: int | None = None,
        max_staleness: int | None = None,
    ) -> Resolved:
        """Return the adapter that a request names; `name` means its newest version.

        Args:
            spec: `name`, `name@version`, or None for the base model.
            min_version: the lowest version that will do; None takes any.
            max_staleness: how many versions it may be behind the newest; None takes any.

        Raises:
            LookupError: if there is no such adapter.
            ConflictError: if its version is below `min_version`, or more than `max_staleness`
                behind the newest.
        """
        if spec is None:
            resolved = Resolved(version=0, lora=None)
        elif spec in self._names and not self.is_pushed(spec):
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
