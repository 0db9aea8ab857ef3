"""The demo's figures, and that the processes it starts never outlive it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from pte_vllm.demo import chats, run, serving, view
from pte_vllm.demo.view import Sample, Stream
from pte_vllm.launch import LaunchError, ProcessGroup, Server, log_tail
from pte_vllm.method.plan import FoldPlan


def record(request_id: str, **changes: object) -> dict:
    values = {
        "adapter": "thoughts",
        "rule": "paper",
        "num_tokens": 400,
        "pinned_blocks": 2,
        "window_blocks": 8,
        "folds": 2,
        "folded_tokens": 128,
        "held_blocks": 9,
        "peak_blocks": 10,
    }
    return {"request_id": request_id, **values, **changes}


def report(*, running: list[dict] = (), finished: list[dict] = ()) -> dict:
    return {
        "block_size": 32,
        "usable_blocks": 200,
        "free_blocks": 100,
        "running": list(running),
        "finished": list(finished),
    }


def stream(**changes: object) -> Stream:
    values = {"name": "chat 1", "prompt": "?", "windowed": True, "seed": 0}
    return Stream(**{**values, **changes})


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (32, 1), (33, 2), (1500, 47)])
def test_full_blocks(tokens, blocks):
    assert view.full_blocks(tokens) == blocks


def test_saved_percent():
    assert view.saved_percent(0, 0) == 0.0
    assert view.saved_percent(10, 40) == 75.0
    assert view.saved_percent(40, 40) == 0.0


def test_tokens_per_s_looks_at_the_last_seconds_only():
    assert view.tokens_per_s([]) == 0.0
    assert view.tokens_per_s([Sample(1.0, 5, 1, 0)]) == 0.0
    samples = [Sample(0.0, 0, 1, 0), Sample(10.0, 10, 1, 0), Sample(12.0, 50, 2, 0)]
    assert view.tokens_per_s(samples) == 20.0
    # Polls further apart than the span still give a rate.
    assert view.tokens_per_s(samples, span_s=0.5) == 20.0


def test_a_response_is_found_by_its_prefix_running_or_finished():
    both = report(running=[record("chatcmpl-aa-1f")], finished=[record("chatcmpl-bb-2e")])
    assert view.find_record(both, "chatcmpl-aa")["request_id"] == "chatcmpl-aa-1f"
    assert view.find_record(both, "chatcmpl-bb")["request_id"] == "chatcmpl-bb-2e"
    assert view.find_record(both, "chatcmpl-cc") is None


def test_samples_of_one_stream():
    s = stream()
    view.take_sample(s, report(running=[record("x-1")]), 1.0)
    assert s.samples == []  # no response yet, so no id to look for
    s.response_id = "x"
    view.take_sample(s, report(running=[record("x-1", num_tokens=40, held_blocks=2)]), 2.0)
    view.take_sample(s, report(running=[record("x-1")]), 3.0)
    ended = record("x-1", num_tokens=410, held_blocks=0, peak_blocks=11)
    view.take_sample(s, report(finished=[ended]), 4.0)
    view.take_sample(s, report(finished=[ended]), 5.0)
    assert s.samples == [Sample(2.0, 40, 2, 2), Sample(3.0, 400, 9, 2), Sample(4.0, 410, 9, 2)]
    assert s.peak_blocks == 11


@pytest.mark.parametrize(("streams", "full"), [(4, 2), (1, 0), (0, 3)])
def test_the_pool_holds_all_streams_at_their_peak(streams, full):
    tokens, window = 1500, 256
    room = serving.pool_blocks(streams=streams, full_streams=full, tokens=tokens, window=window)
    peaks = [
        FoldPlan(pin_tokens=serving.PROMPT_ROOM, window_tokens=w, block_size=32).peak_blocks(
            serving.PROMPT_ROOM + tokens
        )
        for w in [window] * streams + [0] * full
    ]
    assert sum(peaks) < room < 1.2 * sum(peaks) + 4


def test_block_bytes_of_a_grouped_query_model():
    config = {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
        "num_hidden_layers": 30,
    }
    assert serving.block_bytes(config, 2) == 2 * 30 * (3 * 64) * 2 * 32
    assert serving.block_bytes(config | {"head_dim": 128}, 4) == 2 * 30 * (3 * 128) * 4 * 32


def test_streams_windowed_first_with_prompts_in_turn():
    streams = chats.make_streams(3, 7)
    assert [s.windowed for s in streams] == [True] * 3 + [False] * 7
    assert streams[0].prompt == streams[8].prompt != streams[1].prompt
    assert len({s.name for s in streams}) == 10


@pytest.mark.parametrize(
    "argv",
    [
        ["--window", "100"],
        ["--window", "32"],
        ["--streams", "0", "--full-streams", "0"],
        ["--streams", "15"],
        ["--tokens", "0"],
    ],
)
def test_impossible_options_name_the_flag(argv, capsys):
    with pytest.raises(SystemExit):
        run.parse(argv)
    assert argv[0] in capsys.readouterr().err


def test_serve_args_fit_the_model(tmp_path):
    config = {"num_attention_heads": 2, "hidden_size": 64, "num_hidden_layers": 2}
    config["max_position_embeddings"] = 2048
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "adapter").mkdir()
    modules = json.dumps({"target_modules": ["q_proj", "v_proj"]})
    (tmp_path / "adapter" / "adapter_config.json").write_text(modules)
    args = serving.serve_args(run.parse(["--tokens", "1000"]), tmp_path, tmp_path / "adapter")
    assert args[0] == str(tmp_path)
    assert args[args.index("--max-model-len") + 1] == "2048"
    assert args[args.index("--lora-modules") + 1] == f"thoughts={tmp_path / 'adapter'}"
    assert args[args.index("--lora-target-modules") + 1 :] == ["q_proj", "v_proj"]
    with pytest.raises(LaunchError, match="--tokens 1600"):
        serving.serve_args(run.parse(["--tokens", "1600"]), tmp_path, tmp_path / "adapter")


def test_tables_lines_and_plot(tmp_path):
    windowed, full = stream(response_id="a"), stream(name="chat 2", windowed=False)
    windowed.samples = [Sample(1.0, 40, 2, 0), Sample(2.0, 400, 9, 2)]
    full.samples = [Sample(1.0, 40, 2, 0), Sample(2.0, 400, 13, 0)]
    line = view.plain_line([windowed, full], 2.0)
    assert "chat 1 window 400 tok 9/13 blocks" in line
    assert "chat 2 full 400 tok 13/13 blocks" in line
    assert view.live_table([windowed, full], report()).row_count == 3
    assert view.summary_table([windowed, full]).row_count == 2
    view.save_plot([windowed, full, stream(name="silent")], tmp_path / "blocks.png")
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")


# -- processes -------------------------------------------------------------------------------------

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
print(child.pid, flush=True)
time.sleep(60)
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("child", ["import time; time.sleep(60)", STUBBORN])
def test_children_end_with_their_group(tmp_path, child):
    log = tmp_path / "log"
    command = [sys.executable, "-c", PARENT.format(child=child)]
    with pytest.raises(KeyboardInterrupt), ProcessGroup(command, log=log, grace_s=1.0) as process:
        process.wait_until(lambda: bool(log_tail(log, 1)), timeout_s=30)
        pid = int(log_tail(log, 1))
        assert alive(pid)
        time.sleep(0.5)  # the child sets its signal handler
        raise KeyboardInterrupt
    assert not alive(pid)


def test_a_process_that_dies_is_reported_with_its_log(tmp_path):
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with (
        pytest.raises(LaunchError, match=r"(?s)ended with status 3.*no such model"),
        ProcessGroup(command, log=tmp_path / "log") as process,
    ):
        process.wait_until(lambda: False, timeout_s=30)


def test_a_process_that_hangs_is_given_up(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        pytest.raises(LaunchError, match="not ready after 0 s"),
        ProcessGroup(command, log=tmp_path / "log") as process,
    ):
        process.wait_until(lambda: False, timeout_s=0.3)


def test_stop_gives_signals_back(tmp_path):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with ProcessGroup([sys.executable, "-c", ""], log=tmp_path / "log") as process:
        process.wait_exit(timeout_s=30)
    process.stop()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert os.getpgid(0) == os.getpgrp()


def test_a_taken_port_is_refused_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = Server(["model"], port=port, log=tmp_path / "log")
        with pytest.raises(LaunchError, match=f"port {port} is taken"), server:
            pass
    assert not (tmp_path / "log").exists()
