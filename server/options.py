"""Options of the server's own routes; standard library only, so that help answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """Options of the routes under `/pte/v1`; they stay in the API server's process."""

    spool: str | None = None
    """`--pte-spool`: directory that keeps pushed adapters; None: one in the user's cache."""
    keep_versions: int = 3
    """`--pte-keep-versions`: newest versions of a pushed adapter that stay; older ones leave."""
    keep_loaded: int = 16
    """`--pte-keep-loaded`: newest adapters `name-vN`, loaded by path, that stay; 0: all of them."""
    admin_key: str | None = field(default=None, repr=False)
    """`--pte-admin-key` or its file; None: PTE_ADMIN_KEY, if that is set."""
    max_body_bytes: int = 64 << 20
    """`--pte-max-body-bytes`: largest body of our routes, pushed adapters aside."""
    max_rollouts: int = 4096
    """`--pte-max-rollouts`: samples in flight beyond which a new request gets HTTP 429."""

    def __post_init__(self) -> None:
        if self.keep_versions < 1:
            raise ValueError(f"--pte-keep-versions must be positive, got {self.keep_versions}")
        if self.keep_loaded < 0:
            raise ValueError(f"--pte-keep-loaded must not be negative, got {self.keep_loaded}")
        if self.admin_key is not None and not self.admin_key.strip():
            raise ValueError("--pte-admin-key is empty")
        if self.max_body_bytes < 1:
            raise ValueError(f"--pte-max-body-bytes must be positive, got {self.max_body_bytes}")
        if self.max_rollouts < 1:
            raise ValueError(f"--pte-max-rollouts must be positive, got {self.max_rollouts}")
