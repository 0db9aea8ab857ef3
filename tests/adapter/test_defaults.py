"""Options of a new adapter: one definition behind flags, run files and the adapter's file."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from pte_vllm.adapter.defaults import OPTIONS, NewAdapter
from pte_vllm.adapter.flags import add_flags, new_adapter
from pte_vllm.method.options import PTEConfig
from pte_vllm.train.options.sections import AdapterOptions

GIVEN = NewAdapter(
    rank=8,
    global_tokens=4,
    rule="sum",
    read="key",
    normalize="row",
    keys="rotated",
    features="squared",
    init="random",
    b="random",
    layers="1-2",
    target_modules=("q_proj", "v_proj"),
    alpha=3.5,
    text="sample.txt",
)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser


def test_every_option_of_the_file_can_be_given() -> None:
    assert {f.name for f in fields(PTEConfig)} - {"format_version"} <= OPTIONS.keys()
    stored = GIVEN.pte().to_dict()
    for name in OPTIONS.keys() & stored.keys():
        assert stored[name] == getattr(GIVEN, name), name


def test_flags_say_what_the_options_are() -> None:
    words = []
    for name in OPTIONS:
        value = getattr(GIVEN, name)
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    assert new_adapter(flags().parse_args(words)) == GIVEN
    assert new_adapter(flags().parse_args([])) == NewAdapter()


def test_a_table_of_a_run_has_the_same_options_and_defaults() -> None:
    table = AdapterOptions.model_fields
    assert table.keys() == OPTIONS.keys() | {"plain"}
    for name, option in OPTIONS.items():
        assert table[name].default == option.default
        assert table[name].description == option.metadata["about"]
    values = {name: getattr(GIVEN, name) for name in OPTIONS}
    assert AdapterOptions(**values).pte() == GIVEN.pte()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "0"], "rank must be positive, got 0"),
        (["--alpha", "-1"], "alpha must be positive, got -1"),
        (["--layers", "5-3"], "--layers: 5-3 runs backwards"),
    ],
)
def test_mistakes_name_the_option(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_adapter(flags().parse_args(words))
