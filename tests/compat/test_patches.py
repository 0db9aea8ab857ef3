"""Patches notice a changed upstream, and apply once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vllm.v1.sample import rejection_sampler

from pte_vllm.patches import all_patches
from pte_vllm.patches.base import MARK, Patch, PatchError, apply_all
from pte_vllm.plugin import register


def test_every_patch_fits_the_installed_vllm() -> None:
    for patch in all_patches():
        patch.check()


def test_registering_twice_patches_once() -> None:
    register()
    before = [patch._live() for patch in all_patches()]
    register()
    assert [patch._live() for patch in all_patches()] == before
    for patch in all_patches():
        patch.verify()
        assert not hasattr(getattr(patch._live(), MARK), MARK)


@pytest.mark.parametrize("patch", all_patches(), ids=lambda patch: patch.name)
def test_drift_is_named(patch: Patch) -> None:
    with pytest.raises(PatchError, match=patch.target):
        replace(patch, sha256="0" * 64).check()
    with pytest.raises(PatchError, match="process_gone"):
        replace(patch, target=patch.target.rpartition(".")[0] + ".process_gone").check()


def test_nothing_is_applied_if_one_check_fails() -> None:
    good = all_patches()[0]
    applied = []
    spy = replace(good, name="spy", wrap=lambda original: applied.append(original) or original)
    with pytest.raises(PatchError):
        apply_all([spy, replace(good, sha256="0" * 64)])
    assert not applied


def test_drafts_are_verified_at_the_temperature_of_their_request() -> None:
    register()
    given = torch.tensor([0.7, 0.0, 0.3])
    upto = torch.tensor([2, 3, 3], dtype=torch.int32)  # the last request has no draft
    expand = rejection_sampler.expand_batch_to_tokens
    assert expand(given, upto, 3, replace_from=0, replace_to=1).tolist() == [
        *given[[0, 0]].tolist(),
        1.0,
    ]
    assert expand(torch.tensor([5, 6, 7], dtype=torch.int32), upto, 3).tolist() == [5, 5, 6]
