"""The Triton kernel against the definition, run by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

_CODE = """
import torch
from pte_vllm.method import reference
from pte_vllm.kernels.modulate_triton import modulate_slices_

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
for rank, num_slices, lengths, dtype in (
    (8, 3, [1, 4, 1], torch.float32),
    (12, 1, [7], torch.bfloat16),
    (32, 2, [1] * 5, torch.bfloat16),
    (64, 3, [2, 1], torch.float32),
    (16, 2, [], torch.float32),
):
    states = torch.randn(6, rank, rank, device=device).to(dtype)
    states[0] = torch.eye(rank)
    squared = torch.arange(6, device=device) == 2
    per_token = [(2 * i) % 6 for i, n in enumerate(lengths) for _ in range(n)]
    slots = torch.tensor(per_token, dtype=torch.int64)
    a = torch.randn(num_slices, len(slots), rank, device=device)
    wanted = a.clone()
    for t, slot in enumerate(slots.tolist()):
        features = "squared" if slot == 2 else "linear"
        wanted[:, t] = reference.modulate(a[:, t], states[slot].float(), "key", features)
    modulate_slices_(a, states, squared, slots.to(device))
    torch.testing.assert_close(a, wanted)
print("ok")
"""


def test_against_reference() -> None:
    # In a process of its own: the interpreter is chosen when Triton is imported.
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, "-c", _CODE], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr[-2000:]
