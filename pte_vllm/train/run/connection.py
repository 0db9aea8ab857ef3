"""The connection of a run to the server that samples for it."""

from __future__ import annotations

import os

from pte_vllm.train.options.runs import ServerOptions
from pte_vllm.wire.client import RolloutClient


def connect(options: ServerOptions) -> RolloutClient:
    """Make a client of the run's server, with its keys from the environment.

    Raises:
        ValueError: if a variable that should hold a key is not set.
    """

    def key(flag: str, name: str | None) -> str | None:
        if name is not None and not os.environ.get(name):
            raise ValueError(f"--server.{flag} {name}: there is no such environment variable")
        return os.environ[name] if name is not None else None

    return RolloutClient(
        options.url,
        api_key=key("api_key_env", options.api_key_env),
        admin_key=key("admin_key_env", options.admin_key_env),
        timeout_s=options.timeout_s,
        retry_s=options.retry_s,
    )
