"""What is held of sums between folds: the same numbers come back, from fewer bytes."""

from __future__ import annotations

import math

import pytest
import torch

from pte_vllm.method import held
from pte_vllm.method.names import RULE_NAMES
from pte_vllm.method.reference import UPDATE_RULES, moments
from tests.kernels.fold_cases import make_encoder

LAYERS, RANK, D_KV = 2, 6, 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_held_sums_make_the_same_fold(rule: str, dtype: torch.dtype) -> None:
    about = UPDATE_RULES[rule]
    encoder = make_encoder(LAYERS, RANK, D_KV, "cpu")
    whole = about.start(encoder, "matrix")
    kept, state = None, None
    for _ in range(4):
        k, v = torch.randn(2, LAYERS, 16, D_KV)
        evicted = moments(encoder, k, v, with_kk=about.reads_kk)
        if kept is not None:
            again = held.whole_sums(rule, kept, state)
            for name, value in whole.items():
                if about.changes or dtype == torch.float32:
                    # A product of keys with themselves may differ from its mirror in the last bits.
                    near = 1e-5 if name in about.symmetric else 0.0
                    torch.testing.assert_close(again[name], value, rtol=near, atol=near)
        whole = about.add(whole, encoder, evicted, "matrix")
        kept = held.held_sums(rule, whole, dtype)
        state = held.as_read(about.read(whole, encoder, "matrix"), dtype)


def test_split_and_join_are_exact() -> None:
    odd = [0.0, -0.0, 1.0, 3.4028234e38, -1e-45, math.inf, -math.inf, 1.00390625, -1.01171875]
    numbers = torch.cat(
        (torch.tensor(odd), torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)))
    )
    high, rest = held.split(numbers)
    assert high.dtype == torch.bfloat16 and rest.dtype == torch.int16
    assert torch.equal(held.join(high, rest).view(torch.int32), numbers.view(torch.int32))
    nearest = (numbers.to(torch.bfloat16).float() - numbers).abs()
    assert torch.equal((high.float() - numbers).abs()[9:], nearest[9:])
    # A GPU's NaN has all bits set: rounded as a number it would become -0.
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert held.split(nan)[0].isnan().all() and held.join(*held.split(nan)).isnan().all()


def test_rounding_lets_gradients_pass() -> None:
    state = torch.randn(3, 4, 4, requires_grad=True)
    found = held.rounded(state, torch.bfloat16)
    assert torch.equal(found, held.split(state.detach())[0].float())
    found.sum().backward()
    assert torch.equal(state.grad, torch.ones_like(state))
    assert held.rounded(state, torch.float32) is state
