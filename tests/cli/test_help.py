"""Every command answers a call for help, or a mistake, before it imports anything heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMANDS = (
    *("", "serve", "demo", "doctor", "plan", "model fetch"),
    *("adapter init", "adapter inspect", "adapter calibrate"),
    *("adapter fetch", "adapter push-hub", "adapter pull"),
    *("bench", "bench throughput", "bench soak", "bench gpu", "bench train"),
    *("train", "train grpo", "train distill", "train memory-curve"),
    *("train experiment memory", "train experiment recall", "train experiment turns"),
    *("eval", "eval thoughts", "eval fidelity", "eval turns"),
)
_CODE = """
import sys
from pte_vllm.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
heavy = {"torch", "transformers", "vllm", "datasets", "matplotlib", "huggingface_hub"}
heavy &= set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _CODE, *words], capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    done = _run(*command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train nothing", "there is no such command"),
        ("train grpo --optimizer.lrr 3", "did you mean --optimizer.lr?"),
        ("train distill --distill.texts a", "did you mean --distill.text?"),
        ("train experiment memory --steps none", "--steps"),
        ("adapter init MODEL OUT --rule ridges", "--rule"),
        ("bench lora --model nowhere", "--model nowhere does not exist"),
        ("serve M --pte-windw 64", "there is no flag --pte-windw; did you mean --pte-window?"),
        ("serve ./nowhere", "MODEL: the model directory ./nowhere does not exist"),
        ("adapter init ./nowhere OUT", "MODEL: the model directory ./nowhere does not exist"),
        ("adapter calibrate ./nowhere OUT", "MODEL: the model directory ./nowhere does not exist"),
        ("adapter calibrate M OUT --probes none", "argument --probes: invalid int value: 'none'"),
        ("adapter inspect A --model ./nowhere", "--model: the model directory ./nowhere does not"),
        ("bench gpu --model ./nowhere", "--model: the model directory ./nowhere does not exist"),
        (
            "train grpo --model.base ./nowhere --data.source gsm8k",
            "--model.base: the model directory ./nowhere does",
        ),
        ("train distill --model.base ./nowhere", "--model.base: the model directory ./nowhere"),
        ("train experiment turns --jobs 0", "--jobs must be positive, got 0"),
        ("eval nothing", "there is no such command"),
        ("eval turns --url http://a --turns 5", "5 turns have no room"),
        ("eval thoughts ./nowhere OUT", "MODEL: the model directory ./nowhere does not exist"),
        ("eval fidelity ./nowhere THOUGHTS", "MODEL: the model directory ./nowhere does not exist"),
        ("eval fidelity M T --window 64,x", "'x' is not a number from 1"),
        ("eval fidelity M T --adapter DIR", "'DIR' must be NAME=DIR"),
        ("eval fidelity M T --sinks --url http://a", "a server folds the part"),
        ("train memory-curve ./nowhere", "MODEL: the model directory ./nowhere does not exist"),
        (
            "train experiment recall ./nowhere",
            "MODEL: the model directory ./nowhere does not exist",
        ),
    ],
)
def test_mistakes(command: str, message: str) -> None:
    done = _run(*command.split())
    assert done.returncode == 2 and message in done.stderr, done.stderr
