"""Engine and worker wait for each other asleep, over vLLM's own queue between processes."""

from __future__ import annotations

import threading
import time

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from pte_vllm.engine import waiting
from pte_vllm.plugin import register

PAUSE_S = 0.4
"""Between two messages: less than the second that vLLM polls for."""
MESSAGES = 4


def test_a_waiting_reader_looks_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks are counted, as the CPU time of a poll depends on who else wants the CPU."""
    register()
    monkeypatch.setattr(waiting._Switch, "on", False)
    waiting.sleep_while_waiting()
    writer = MessageQueue(n_reader=1, n_local_reader=1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    looks = 0
    wait = SpinCondition.wait

    def counted(self: SpinCondition, timeout_ms: int | None = None) -> None:
        nonlocal looks
        looks += 1
        wait(self, timeout_ms)

    monkeypatch.setattr(SpinCondition, "wait", counted)
    got: list[int] = []
    waited_s = 0.0

    def read() -> None:
        nonlocal waited_s
        reader.wait_until_ready()
        began = time.monotonic()
        got.extend(reader.dequeue(timeout=60) for _ in range(MESSAGES))
        waited_s = time.monotonic() - began

    thread = threading.Thread(target=read)
    thread.start()
    writer.wait_until_ready()
    for number in range(MESSAGES):
        time.sleep(PAUSE_S)
        writer.enqueue(number)
    thread.join()
    assert got == list(range(MESSAGES))
    # A sleep may end a little early, and a message ends one. A poll looks 100 times as often.
    assert looks <= 2 * waited_s * 1000 / waiting.RECHECK_MS + MESSAGES


def test_no_message_is_lost_or_late(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.setattr(waiting._Switch, "on", False)
    waiting.sleep_while_waiting()
    queues = []
    for _ in range(2):  # there and back
        writer = MessageQueue(n_reader=1, n_local_reader=1)
        queues.append((writer, MessageQueue.create_from_handle(writer.export_handle(), 0)))
    (there, hears), (back, answered) = queues

    def echo() -> None:
        hears.wait_until_ready()
        back.wait_until_ready()
        for _ in range(2000):
            back.enqueue(hears.dequeue(timeout=60))

    thread = threading.Thread(target=echo)
    thread.start()
    there.wait_until_ready()
    answered.wait_until_ready()
    for number in range(2000):
        there.enqueue(number)
        assert answered.dequeue(timeout=60) == number
    thread.join()
