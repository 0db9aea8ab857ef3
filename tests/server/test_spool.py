"""Pushed adapters are stored whole or not at all, and found again."""

from __future__ import annotations

import gc
import io
from pathlib import Path

import pytest

from pte_vllm.adapter.hashes import content_hash, file_hashes
from pte_vllm.server.adapters.spool import Spool, Version, check_name


def _add(spool: Spool, name: str, number: int, content: bytes) -> Version:
    incoming = spool.incoming()
    incoming.write("adapter_model.safetensors", io.BytesIO(content))
    digest = content_hash(incoming.hashes)
    return spool.commit(incoming, name=name, number=number, sha256=digest, rule="paper")


def test_versions_survive_and_leftovers_do_not(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    assert spool.versions() == [] and not spool.root.exists()
    kept = [_add(spool, "a", 10, b"x"), _add(spool, "a", 9, b"y"), _add(spool, "..", 1, b"z")]
    assert all(Path(v.path).parent == spool.root for v in kept)
    assert content_hash(file_hashes(kept[0].path)) == kept[0].sha256
    forgotten = _add(spool, "b", 1, b"x")
    spool.retire(forgotten)
    half_written = spool.incoming()
    half_written.write("adapter_config.json", io.BytesIO(b"{"))
    root = spool.root
    with pytest.raises(ValueError, match="used by another server"):
        Spool(root).open()
    del spool
    gc.collect()  # nobody holds it open any more, as when its process has ended
    again = Spool(root)
    assert again.versions() == [kept[2], kept[1], kept[0]]
    assert not Path(forgotten.path).exists() and not half_written.path.exists()


def test_other_weights_under_the_same_version_have_another_path(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    first = _add(spool, "a", 1, b"x")
    spool.retire(first)
    second = _add(spool, "a", 1, b"y")
    assert first.engine_name == second.engine_name == "a@1" and first.path != second.path
    spool.delete(first)
    assert spool.versions() == [second]
    # Pushed again while its files still wait to be removed: they stay.
    spool.retire(second)
    assert _add(spool, "a", 1, b"y").path == second.path
    spool.delete(second)
    assert [v.path for v in spool.versions()] == [second.path]


@pytest.mark.parametrize("name", ["", "a/b", "a@1", "x" * 65, "ä", "a\n"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="adapter name"):
        check_name(name)
