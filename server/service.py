"""What our routes share, made once when the server starts."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field

from fastapi import HTTPException, Request
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels

from pte_vllm.engine.earlier import EARLIER
from pte_vllm.method.kept_record import KeptRecord
from pte_vllm.method.options import EngineConfig
from pte_vllm.server.access.admission import Admission
from pte_vllm.server.adapters.loads import Loads
from pte_vllm.server.adapters.registry import AdapterRegistry
from pte_vllm.server.adapters.resolving import Resolving
from pte_vllm.server.adapters.spool import Spool
from pte_vllm.server.early import open_spool
from pte_vllm.server.engines import Engines
from pte_vllm.server.failures import say_why
from pte_vllm.server.finished import FinishedReader
from pte_vllm.server.options import ServiceConfig
from pte_vllm.server.others import Others
from pte_vllm.server.recorder import Recorder
from pte_vllm.server.sharing.directory import Sharing, num_api_servers
from pte_vllm.server.sharing.totals import Totals
from pte_vllm.server.written import MAX_BYTES, Written


@dataclass
class Listeners:
    """Counts the clients that follow the thoughts of a request now."""

    count: int = 0


@dataclass(frozen=True, kw_only=True)
class Service:
    """Holds the engine, its options, and the adapters that were pushed."""

    engine: EngineClient
    engines: Engines
    config: EngineConfig
    spool: Spool
    registry: AdapterRegistry
    admission: Admission
    rho: FinishedReader[list[float]]
    """Reads ρ of each fold."""
    kept: FinishedReader[KeptRecord]
    """Reads what each fold kept, of rollouts that keep tokens."""
    recorder: Recorder
    """Has records of answers whose requests asked for it."""
    written: Written
    """Has the tokens of requests that keep some."""
    others: Others
    """Follows what other API servers do."""
    totals: Totals
    """What the workers counted, as of the last scrape."""
    listeners: Listeners = field(default_factory=Listeners)

    @property
    def block_size(self) -> int:
        """Tokens in one block of the KV cache."""
        return self.engine.vllm_config.cache_config.block_size


def make_service(
    engine: EngineClient, config: EngineConfig, models: OpenAIServingModels, args: Namespace
) -> Service:
    """Make the service of a server with these command-line arguments."""
    options: ServiceConfig = getattr(args, "pte_service", None) or ServiceConfig()
    spool: Spool = getattr(args, "pte_spool", None) or open_spool(args, options)
    refusal = None
    if engine.vllm_config.lora_config is None:
        refusal = "this server takes no adapters: start it with --enable-lora"
    engines, sharing = Engines(engine), Sharing.of(args)
    if (log := sharing.request_log()) is not None:
        EARLIER.share(log)
    registry = AdapterRegistry(
        *(engine, engines, models, spool, sharing), keep=options.keep_versions, refusal=refusal
    )
    if refusal is None:
        Loads(models, registry, engines, keep=options.keep_loaded).install()
        Resolving(models).install()
    say_why(engine)
    rho: FinishedReader[list[float]] = FinishedReader(engines, "pte_rho")
    kept: FinishedReader[KeptRecord] = FinishedReader(engines, "pte_kept")
    return Service(
        engine=engine,
        engines=engines,
        config=config,
        spool=spool,
        registry=registry,
        admission=Admission(options.max_rollouts, sharing.counts("admission")),
        rho=rho,
        kept=kept,
        recorder=Recorder(engine, config, registry.catalog, kept, rho, sharing.records()),
        written=Written(
            engine, sharing.ended_tokens(max_count=config.keep_thoughts, max_bytes=MAX_BYTES)
        ),
        totals=sharing.totals(),
        others=Others(engine, registry.catalog, sharing.aborts(), count=num_api_servers(args) - 1),
    )


def service(request: Request) -> Service:
    """Return the service of the app that a request came to.

    Raises:
        HTTPException: 503 where vLLM was started without PTE.
    """
    found: Service | None = getattr(request.app.state, "pte_service", None)
    if found is None:
        raise HTTPException(503, "this server runs without PTE; start it with `pte-vllm serve`")
    return found
