"""What several API servers share: each test has two of a thing, as two processes would."""

from __future__ import annotations

import asyncio
import pickle
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.utils.counter import AtomicCounter

from pte_vllm.engine.earlier import EarlierRequest, EarlierRequests
from pte_vllm.engine.shared_log import SharedLog
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.requests import RequestOptions
from pte_vllm.server.access.admission import Admission, BusyError
from pte_vllm.server.adapters.catalog import Catalog
from pte_vllm.server.adapters.spool import Spool, Version
from pte_vllm.server.sharing.aborts import Abort, Aborts
from pte_vllm.server.sharing.counts import Counts
from pte_vllm.server.sharing.ended_tokens import EndedTokens
from pte_vllm.server.sharing.exclusive import Exclusive
from pte_vllm.server.sharing.totals import Totals
from pte_vllm.server.sharing.versions import AdapterNumbers, ServedVersion, SharedVersions


def _request(pin_tokens: int, keep_tokens: int = 0) -> EarlierRequest:
    plan = FoldPlan(pin_tokens=pin_tokens, window_tokens=64, block_size=16, keep_tokens=keep_tokens)
    return EarlierRequest.of(
        RequestOptions(), plan=plan, adapter=("a@1", "/a"), choices=1, prompt=range(100)
    )


def _two_tables(directory: Path) -> tuple[EarlierRequests, EarlierRequests]:
    tables = EarlierRequests(), EarlierRequests()
    for table in tables:
        table.share(SharedLog(directory / "requests.db"))
    return tables


def test_earlier_requests_of_all(tmp_path: Path) -> None:
    one, other = _two_tables(tmp_path)
    one.add("cmpl-a-0", _request(1, keep_tokens=16))
    one.place("cmpl-a-0-0123abcd", 1)
    assert other.get("cmpl-a") == one.get("cmpl-a") == _request(1, keep_tokens=16)
    assert other.engine_of("cmpl-a") == one.engine_of("cmpl-a") == 1
    assert other.keeps_tokens("cmpl-a-0") and not other.keeps_tokens("cmpl-b-0")
    other.forget("cmpl-a")
    with pytest.raises(ValueError, match="forgotten"):
        one.get("cmpl-a")


def test_a_name_may_have_other_files_by_now() -> None:
    request, options = _request(1), RequestOptions()
    request.check(options, adapter=("a@1", "/a"), adapter_rule=None, prompt=range(120))
    with pytest.raises(ValueError, match="ran with other files of a@1 than it has now"):
        request.check(options, adapter=("a@1", "/b"), adapter_rule=None, prompt=range(120))
    with pytest.raises(ValueError, match="ran with a@1, this request with b@1"):
        request.check(options, adapter=("b@1", "/b"), adapter_rule=None, prompt=range(120))


def test_the_newest_of_a_name_counts(tmp_path: Path) -> None:
    """A table that reads late still has the order in which the requests came."""
    one, other = _two_tables(tmp_path)
    one.add("cmpl-a-0", _request(1))
    other.add("cmpl-a-0", _request(2))
    for table in (one, other):
        assert table.get("cmpl-a").pin_tokens == 2
    one.add("cmpl-a-0", _request(3))
    other.add("cmpl-b-0", _request(4))
    for table in (one, other):
        assert table.get("cmpl-a").pin_tokens == 3
        assert table.get("cmpl-b").pin_tokens == 4


def test_old_notes_leave(tmp_path: Path) -> None:
    log = SharedLog(tmp_path / "requests.db", keep=1000)
    numbers = [log.append(i) for i in range(1600)]
    assert numbers == list(range(1, 1601))
    notes = SharedLog(tmp_path / "requests.db").unread()
    assert 1000 <= len(notes) < 1600
    assert notes[-1] == (1600, 1599)


def test_samples_are_counted_together(tmp_path: Path) -> None:
    one, other = (Admission(4, Counts(tmp_path / "counts.db")) for _ in range(2))
    one.enter(3)
    assert other.in_flight == 3
    with pytest.raises(BusyError, match="3 samples are in flight, and 2 more"):
        other.enter(2)
    one.leave()
    other.enter(2)
    for _ in range(2):
        one.leave()
        other.leave()
    assert one.in_flight == other.in_flight == 0
    one.enter(9)  # alone, it is not turned away


def test_counts_that_are_zero_leave(tmp_path: Path) -> None:
    for counts in (Counts(None), Counts(tmp_path / "counts.db")):
        counts.add("a@1", 1)
        counts.add("a@2", 1)
        counts.add("a@1", -1)
        counts.clean()
        assert counts.keys() == {"a@2"}
        assert (counts.get("a@1"), counts.get("a@2")) == (0, 1)


def test_tokens_within_bounds(tmp_path: Path) -> None:
    for file in (None, tmp_path / "tokens.db"):
        ended = EndedTokens(file, max_count=3, max_bytes=40)
        for i in range(5):
            ended.put(f"r{i}", array("i", range(i)))
        assert ended.names() == ["r2", "r3", "r4"]  # by number
        ended.put("r5", array("i", range(7)))
        assert ended.names() == ["r5"]  # by size: with r4 it were 44 bytes
        ended.put("r6", array("i", [1]))
        ended.put("r5", array("i", [2]))
        assert ended.names() == ["r6", "r5"]
        assert ended.get("r5") == array("i", [2])
        ended.drop("r5")
        assert ended.get("r5") is None


def test_only_one_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0

    async def enter(lock: Exclusive) -> None:
        nonlocal inside, most
        for _ in range(5):
            async with lock:
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0.001)
                inside -= 1

    async def crowd() -> None:
        locks = [Exclusive(tmp_path / "lock") for _ in range(2)]
        await asyncio.gather(*(enter(lock) for lock in locks for _ in range(3)))

    asyncio.run(crowd())
    assert most == 1


def test_versions_and_their_numbers(tmp_path: Path) -> None:
    one, other = (SharedVersions(tmp_path / "versions.db") for _ in range(2))
    assert one.first("restore") and not other.first("restore")
    numbers = [AdapterNumbers(table, after=2) for table in (one, other)]
    assert [numbers[i % 2].inc(1) for i in range(4)] == [3, 4, 5, 6]
    assert other.changed() and not other.changed()
    row = ServedVersion(engine_name="a@1", adapter_id=3, about={"features": None})
    one.put(row)
    assert other.changed() and other.rows() == [row]
    one.remove("a@1")
    assert other.changed() and not other.changed()
    assert other.rows() == []


def _catalog(file: Path) -> Catalog:
    """Return the catalog of one process, over what it reads of vLLM's list of LoRAs."""
    models: Any = SimpleNamespace(
        lora_requests={}, lora_id_counter=AtomicCounter(0), is_base_model=lambda name: False
    )
    return Catalog(models, SharedVersions(file))


def _version(digest: str) -> Version:
    return Version(
        name="zed",
        number=1,
        sha256=digest,
        num_bytes=1,
        created_s=0.0,
        rule=None,
        path=f"/zed@1-{digest}",
    )


def test_a_version_that_was_deleted_and_pushed_again(tmp_path: Path) -> None:
    """The other process may look only once, when the name has other files already."""
    one, other = (_catalog(tmp_path / "versions.db") for _ in range(2))

    def serve(catalog: Catalog, version: Version, number: int) -> None:
        catalog._names[version.engine_name] = LoRARequest("zed@1", number, version.path)
        catalog.add(version, None)

    serve(one, _version("old"), 1)
    lora = other.resolve("zed").lora
    assert lora is not None and lora.lora_path == "/zed@1-old"
    one.retire(_version("old"))
    del one._names["zed@1"]
    serve(one, _version("new"), 2)
    for catalog in (one, other):
        for name in ("zed", "zed@1"):
            found = catalog.resolve(name).lora
            assert found is not None
            assert (found.lora_int_id, found.lora_path) == (2, "/zed@1-new")
    other.retire(_version("new"))
    with pytest.raises(LookupError):
        one.resolve("zed")


def test_totals_never_go_back(tmp_path: Path) -> None:
    one, other = (Totals(tmp_path / "totals.db") for _ in range(2))
    assert one.get() == (float("-inf"), None)
    one.put(2.0, {"folds": {"ridge": 2}})
    other.put(1.0, {"folds": {"ridge": 1}})  # it was asked for first, and came last
    assert one.get() == other.get() == (2.0, {"folds": {"ridge": 2}})
    other.put(3.0, {"folds": {"ridge": 3}})
    assert one.get() == (3.0, {"folds": {"ridge": 3}})


def test_aborts_reach_the_others_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def be(pid: int) -> None:
        monkeypatch.setattr("os.getpid", lambda: pid)

    be(1)
    one = Aborts(tmp_path / "aborts.db")
    before = one.ask(["cmpl-a-0"])
    be(2)
    other = Aborts(tmp_path / "aborts.db")
    assert other.unread() == []  # it has no requests of that time
    be(1)
    number = one.ask(None)
    assert one.unread() == []
    be(2)
    assert other.unread() == [Abort(number=number, request_ids=None)]
    assert other.unread() == []
    other.done(number, 4)
    assert one.answers(number) == [4] and one.answers(before) == []


def test_a_spool_that_was_sent_relies_on_the_senders_lock(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.open()
    sent = pickle.loads(pickle.dumps(spool))
    left = spool.incoming()
    assert sent.versions() == []
    assert sent.incoming().path.parent == left.path.parent
    assert left.path.exists()
    with pytest.raises(ValueError, match="used by another server"):
        Spool(tmp_path / "spool").open()
