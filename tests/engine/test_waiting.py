"""Engine and worker wait for each other asleep, over vLLM's own queue between processes."""

from __future__ import annotations

import threading
import time

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

from pte_vllm.engine import waiting
from pte_vllm.plugin import register

PAUSE_S = 0.4
"""Between two messages: less than the second that vLLM polls for."""
MESSAGES = 4


def _cpu_seconds_of_waiting() -> float:
    """Return the CPU time of a thread that reads messages which come at intervals."""
    writer = MessageQueue(n_reader=1, n_local_reader=1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    got: list[int] = []
    used_s = 0.0

    def read() -> None:
        nonlocal used_s
        reader.wait_until_ready()
        began = time.thread_time()
        got.extend(reader.dequeue(timeout=60) for _ in range(MESSAGES))
        used_s = time.thread_time() - began

    thread = threading.Thread(target=read)
    thread.start()
    writer.wait_until_ready()
    for number in range(MESSAGES):
        time.sleep(PAUSE_S)
        writer.enqueue(number)
    thread.join()
    assert got == list(range(MESSAGES))
    return used_s


def test_waiting_takes_little_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.setattr(waiting._Switch, "on", False)
    # Of several tries each, as a thread that polls gets little of a CPU that others want too.
    polling_s = max(_cpu_seconds_of_waiting() for _ in range(3))  # as vLLM does
    waiting.sleep_while_waiting()
    assert min(_cpu_seconds_of_waiting() for _ in range(3)) < polling_s / 3


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
