"""This does a server's file work on its spool, for the tests that kill it."""

from __future__ import annotations

import io
from pathlib import Path

from pte_vllm.adapter.hashes import CONFIG_FILE, LORA_FILE, content_hash
from pte_vllm.server.adapters.spool import Spool, Version

KEPT = 1


def content(number: int) -> bytes:
    return b"%d" % number * 50_000


def push(spool: Spool, name: str, number: int) -> Version:
    """Store a version as a push does; what it began is deleted if it fails."""
    incoming = spool.incoming()
    try:
        incoming.write(CONFIG_FILE, io.BytesIO(b"{}"))
        incoming.write(LORA_FILE, io.BytesIO(content(number)))
        digest = content_hash(incoming.hashes)
        return spool.commit(incoming, name=name, number=number, sha256=digest, rule="paper")
    finally:
        incoming.delete()


def push_versions(root: Path, count: int, told: Path) -> None:
    """Push versions 1 to `count`, and retire older ones; `told` gets a file for each push."""
    spool = Spool(root)
    kept = spool.versions()
    for number in range(1, count + 1):
        kept.append(push(spool, "policy", number))
        (told / str(number)).touch()
        while len(kept) > KEPT:
            old = kept.pop(0)
            spool.retire(old)
            spool.delete(old)
