"""Command line of `pte-vllm doctor`; imports neither torch nor vLLM before a check needs them."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from pte_vllm import __version__
from pte_vllm.cli.serve import configs, parse

if TYPE_CHECKING:
    from pte_vllm.compat.upstream import SourceTree
    from pte_vllm.doctor.checks import Section
    from pte_vllm.doctor.subject import Subject

_EPILOG = """\
Exit status: 0 if all works or works with warnings, 1 if something is broken, 2 for a mistake on the
command line. Paste the output into a bug report: keys and your home directory are left out of it.
examples:
    pte-vllm doctor
    pte-vllm doctor MODEL --adapter ADAPTER --pte-window 512 --enable-lora --max-lora-rank 32
    pte-vllm doctor --vllm-source DIR --diff    what another vLLM would need (docs/compatibility.md)
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pte-vllm doctor",
        usage="pte-vllm doctor [MODEL [any flag of pte-vllm serve ...]] [--adapter DIR] [--json]\n"
        "       pte-vllm doctor --vllm-source DIR [--diff | --json]",
        description="Check this installation and machine, and a model and an adapter if named.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--adapter", metavar="DIR", help="also check an adapter")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--vllm-source",
        metavar="DIR",
        help="check only whether the vLLM in DIR (not imported) is what our hooks rely on",
    )
    parser.add_argument("--diff", action="store_true", help="with --vllm-source: show what changed")
    return parser


def main(args: list[str]) -> int:
    """Run `pte-vllm doctor ...`; returns the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(args)
    serve, rest = parse(rest)
    model = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if rest and model is None:
        parser.error(f"{rest[0]} is no flag of doctor; flags of a server come after MODEL")
    if options.diff and (options.vllm_source is None or options.json):
        parser.error("--diff needs --vllm-source, and goes without --json")
    if options.vllm_source is not None and (model or options.adapter):
        parser.error("--vllm-source checks nothing else: leave out MODEL and --adapter")
    engine, service = configs(serve)

    from rich.console import Console

    from pte_vllm.doctor.checks import Report

    console = Console(file=sys.stdout, highlight=False)
    report = Report(console, as_json=options.json, environ=dict(os.environ))
    tree = None
    if options.vllm_source is not None:
        tree = _source_tree(options.vllm_source)
        sections = _sections_of_source(tree)
    else:
        # vLLM and torch log what is repeated here in plain words.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from pte_vllm.doctor.subject import Subject

        subject = Subject(model, options.adapter, engine, rest)
        sections = _sections(subject, service.spool)
    if not options.json:
        console.print(f"pte-vllm {__version__}\n", style="bold")
    with redirect_stdout(sys.stderr):  # only what we say goes to stdout
        for section in sections:
            report.add(section)
    status = report.finish()
    if tree is not None and options.diff:
        _print_diffs(tree)
    return status


def _sections(subject: Subject, spool: str | None) -> list[Section]:
    from pte_vllm.doctor import layout, machine, software
    from pte_vllm.doctor.checks import Section
    from pte_vllm.doctor.subject import model_runner

    runner = model_runner(os.environ.get("VLLM_USE_V2_MODEL_RUNNER"))
    return [
        Section(title="Packages", checks=[software.python_and_packages]),
        Section(
            title="Machine",
            checks=[
                *(machine.processor, machine.memory, machine.gpus),
                *(machine.compiled_lora, machine.spool(spool)),
            ],
        ),
        Section(
            title="Plugins",
            checks=[software.entry_points, software.keys, runner, software.registration],
        ),
        Section(title="Drift", checks=[software.drift_of_patches, software.drift_of_hooks]),
        Section(title="Attention", checks=[layout.platform_and_backend, layout.kv_layout]),
        Section(title="Model", checks=subject.checks()),
    ]


def _source_tree(path: str) -> SourceTree:
    from pte_vllm.compat.upstream import SourceTree

    try:
        return SourceTree.of(path)
    except LookupError as error:
        raise ValueError(f"--vllm-source: {error}") from error


def _sections_of_source(tree: SourceTree) -> list[Section]:
    from pte_vllm.doctor import software
    from pte_vllm.doctor.checks import Section

    return [Section(title=f"Drift of {tree.root}", checks=[lambda: software.drift(tree)])]


def _print_diffs(after: SourceTree) -> None:
    from pte_vllm.compat.hooks import check_hooks, diff
    from pte_vllm.compat.upstream import SourceTree

    before = SourceTree.installed()
    for found in check_hooks(after):
        if not found.missing:
            print(diff(found.hook.symbol, before, after), end="\n\n")
