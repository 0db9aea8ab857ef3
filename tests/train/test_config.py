"""Options of training runs."""

from __future__ import annotations

import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pte_vllm.train.options.parsing import RunOptions, _option_names
from pte_vllm.train.options.runs import DistillRun, GrpoRun

PROG = "pte-vllm train grpo"
BASE = """
[model]
base = "some/model"
adapter = "start"

[optimizer]
lr = 1e-4
steps = 20

[data]
source = "reasoning-gym"
task = "chain_sum"
task_options = {max_terms = 3}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text(BASE)
    return str(path)


def fails(cls: type[RunOptions], *arguments: str) -> str:
    with pytest.raises(ValueError) as caught:
        cls.parse(arguments, prog=PROG)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_flags_win_over_the_file_and_the_file_over_defaults(file: str) -> None:
    run = GrpoRun.parse(
        [file, "--optimizer.lr", "1e-5", "--grpo.clip_high=0.28", "--run.resume", "false"],
        prog=PROG,
    )
    assert run.optimizer.lr == 1e-5
    assert run.optimizer.steps == 20
    assert run.grpo.clip_high == 0.28
    assert run.grpo.clip_low == 0.2
    assert run.run.resume is False
    assert run.run.out == "out/grpo"


def test_a_run_needs_no_file() -> None:
    flags = ["--model.base", "m", "--data.source", "gsm8k"]
    assert GrpoRun.parse(flags, prog=PROG).data.source == "gsm8k"
    run = DistillRun.parse(["--model.base", "m"], prog=PROG)
    assert run.data is None
    assert run.optimizer.lr == 1e-3


def test_a_partial_table_keeps_the_defaults_of_its_run(tmp_path: Path) -> None:
    """The learning rate of distillation is not GRPO's."""
    path = tmp_path / "run.toml"
    path.write_text('[model]\nbase = "m"\n[optimizer]\nsteps = 5\n[run]\nseed = 1\n')
    run = DistillRun.load(path)
    assert (run.optimizer.lr, run.run.out) == (1e-3, "out/distill")


def test_lists_tables_and_unset_on_the_command_line(file: str) -> None:
    run = GrpoRun.parse(
        [
            *(file, "--adapter.target_modules", "q_proj,v_proj", "--optimizer.betas", "0.8,0.9"),
            *("--data.task_options", "min_terms=2,name=x", "--model.adapter", "unset"),
        ],
        prog=PROG,
    )
    assert run.adapter.target_modules == ("q_proj", "v_proj")
    assert run.optimizer.betas == (0.8, 0.9)
    assert run.data.task_options == {"max_terms": 3, "min_terms": 2, "name": "x"}
    assert run.model.adapter is None


def test_none_is_a_choice(file: str) -> None:
    flags = ["--adapter.rule", "none", "--grpo.is_mode", "none", "--grpo.scale_rewards", "none"]
    run = GrpoRun.parse([file, *flags], prog=PROG)
    assert (run.adapter.rule, run.grpo.is_mode, run.grpo.scale_rewards) == ("none",) * 3


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--model.adapter", "unset", "--adapter.alpha", "3.5", "--optimizer.lr", "1e-07"],
        ["--data.prompt_template", 'Q: {prompt}\n"A" \\boxed{} é', "--data.seed", "7"],
        ["--data.task_options", '{"a": [1, 2.5], "b": {"c": "d"}}'],
    ],
)
def test_what_is_saved_is_loaded_again(file: str, tmp_path: Path, flags: list[str]) -> None:
    run = GrpoRun.parse([file, *flags], prog=PROG)
    out = tmp_path / "new" / "resolved.toml"
    run.save(out)
    assert GrpoRun.load(out) == run
    written = tomllib.loads(out.read_text(encoding="utf-8"))
    assert written["grpo"]["clip_low"] == 0.2, "defaults are written too"
    assert list(out.parent.iterdir()) == [out], "no draft is left"


def test_unset_options_are_unset_by_default() -> None:
    """TOML has no null: an option that is unset is absent, so absent must mean unset."""
    for cls in (GrpoRun, DistillRun):
        for name, field in cls.model_fields.items():
            if not isinstance(field.annotation, type):
                continue  # DistillRun.data
            for option, inner in field.annotation.model_fields.items():
                if type(None) in getattr(inner.annotation, "__args__", ()):
                    assert inner.default is None, f"{cls.__name__}: {name}.{option}"


def test_every_option_is_described() -> None:
    for cls in (GrpoRun, DistillRun):
        for name, field in cls.model_fields.items():
            assert field.description, name
            section = next(
                part
                for part in (field.annotation, *getattr(field.annotation, "__args__", ()))
                if hasattr(part, "model_fields")
            )
            for option, inner in section.model_fields.items():
                assert inner.description, f"{name}.{option}"


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--optimizer.lr", "-1"], ["--optimizer.lr", "greater than or equal to 0", "-1"]),
        (["--optimizer.steps", "1.5"], ["--optimizer.steps", "integer", "1.5"]),
        (["--optimizer.betas", "0.9"], ["--optimizer.betas needs more values"]),
        (["--optimizer.lr", "nan"], ["--optimizer.lr", "finite", "nan"]),
        (["--optimizer.warmup_steps", "20"], ["--optimizer.warmup_steps 20", "less than"]),
        (["--optimzer.lr", "1"], ["unknown flag --optimzer.lr", "did you mean --optimizer.lr?"]),
        (["--clip_high", "1"], ["unknown flag --clip_high", "--grpo.clip_high"]),
        (["--optimizer.l", "1"], ["unknown flag --optimizer.l"]),
        (["--optimizer.lr"], ["--optimizer.lr", "expected one argument"]),
        (["other.toml"], ["unexpected argument 'other.toml'"]),
        (["--model.dtype", "fp16"], ["--model.dtype", "'float32'", "'fp16'"]),
        (["--grpo.max_logprob_drift", "-3"], ["'auto' or should be greater than 0", "'-3'"]),
        (["--plan.window_tokens", "100"], ["--plan.window_tokens", "100", "block size, 16"]),
        (["--plan.window_tokens", "16"], ["--plan.window_tokens", "less than two blocks"]),
        (["--plan.window_tokens", "promt"], ["--plan.window_tokens", "'prompt'", "'promt'"]),
        (["--plan.evict_seed", "3"], ["--plan.evict: evict seed 3 needs evict random"]),
        (
            ["--plan.evict", "random", "--plan.window_tokens", "0"],
            ["--plan.evict: evict random needs a window"],
        ),
        (["--plan.keep_tokens", "24"], ["--plan.keep_tokens: keep of 24 tokens is not a multiple"]),
        (["--plan.keep_tokens", "16"], ["--plan.probes is missing"]),
        (["--plan.keep_score", "random"], ["--plan.keep_score random needs --plan.keep_tokens"]),
        (["--plan.probes", "p"], ["--plan.probes needs --plan.keep_tokens"]),
        (
            ["--plan.keep_tokens", "16", "--plan.probes", "p", "--plan.window_tokens", "0"],
            ["--plan.keep_tokens: keep needs a window"],
        ),
        (["--adapter.layers", "5-3"], ["--adapter.layers: 5-3 runs backwards"]),
        (["--adapter.target_modules", "[]"], ["--adapter.target_modules", "at least one"]),
        (
            ["--adapter.read", "value", "--adapter.global_tokens", "3"],
            ["--adapter.read", "got 3 and 32"],
        ),
        (["--grpo.overlong_tokens", "9999"], ["--grpo.overlong_tokens 9999", "max_tokens 2048"]),
        (["--data.task", "unset"], ["--data.task is missing"]),
        (["--data.source", "jsonl"], ["--data.path is missing"]),
        (["--data.prompt_template", "Solve"], ["--data.prompt_template", "{prompt}", "'Solve'"]),
        (["--server.url", "localhost"], ["--server.url", "http://", "'localhost'"]),
    ],
)
def test_errors_name_flag_value_and_fix(file: str, flags: list[str], parts: list[str]) -> None:
    message = fails(GrpoRun, file, *flags)
    for part in parts:
        assert part in message


def test_errors_of_several_options_come_together(file: str) -> None:
    message = fails(GrpoRun, file, "--optimizer.lr", "x", "--plan.evict_ratio", "2")
    assert "--optimizer.lr" in message and "--plan.evict_ratio" in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["--model.base is missing", "--data.source is missing"]),
        ("[plan]\nwindow = 3", ["unknown option plan.window", "did you mean plan.window_tokens?"]),
        ("[nonsense]\na = 1", ["unknown option nonsense"]),
        ("model = 3", ["--model must be a table"]),
        ("[model\n", ["is not TOML"]),
    ],
)
def test_errors_of_a_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    message = fails(GrpoRun, str(path))
    for part in parts:
        assert part in message


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        GrpoRun.parse(["nowhere.toml"], prog=PROG)


def test_distilling_samples_needs_questions() -> None:
    message = fails(DistillRun, "--model.base", "m", "--distill.data", "samples")
    assert "--data.source is missing" in message


def test_environment_variables_are_not_options(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", '{"base": "other"}')
    monkeypatch.setenv("SERVER", "{}")
    assert GrpoRun.parse([file], prog=PROG).model.base == "some/model"


def test_auto_follows_the_device(file: str) -> None:
    model = GrpoRun.load(file).model
    assert (model.resolve(cuda=True).device, model.resolve(cuda=True).dtype) == ("cuda", "bfloat16")
    assert (model.resolve(cuda=False).device, model.resolve(cuda=False).dtype) == ("cpu", "float32")
    kept = model.model_copy(update={"device": "cpu", "dtype": "bfloat16"})
    assert kept.resolve(cuda=True) == kept


def test_the_drift_limit_follows_the_dtype(file: str) -> None:
    grpo = GrpoRun.load(file).grpo
    found = [grpo.drift_limit(dtype) for dtype in ("float32", "float16", "bfloat16")]
    assert found == [1e-4, 3e-2, 0.15]
    run = GrpoRun.parse([file, "--grpo.max_logprob_drift", "0.5"], prog=PROG)
    assert run.grpo.drift_limit("float32") == 0.5


def test_a_window_of_the_longest_question(file: str) -> None:
    flags = ["--plan.window_tokens", "prompt"]
    plan = GrpoRun.parse([file, *flags], prog=PROG).plan
    found = [plan.window_for(longest) for longest in (0, 1, 32, 33, 48, 49, 1000)]
    assert found == [32, 32, 32, 48, 48, 64, 1008]
    number = GrpoRun.parse([file, "--plan.window_tokens", "64"], prog=PROG).plan
    assert (number.window_for(1000), GrpoRun.load(file).plan.window_for(7)) == (64, 1024)
    message = fails(DistillRun, "--model.base", "m", *flags)
    assert "--plan.window_tokens prompt" in message and "512" in message


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = f"""
import sys
from pte_vllm.train.options.runs import GrpoRun
try:
    GrpoRun.parse(["--help"], prog={PROG!r})
except SystemExit:
    pass
heavy = {{"torch", "transformers", "vllm", "datasets", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    for part in (PROG, "--optimizer.lr", "DAPO's clip-higher is 0.28", "RUN.toml"):
        assert part in done.stdout
    # Processor time, as the machine may be busy with other tests.
    assert after.ru_utime - before.ru_utime < 1.0


def test_the_manual_lists_every_option_in_its_section() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    _, *parts = text.split("**`[")
    tables = {part.partition("]")[0]: part for part in parts}
    for cls in (GrpoRun, DistillRun):
        for dotted in _option_names(cls):
            section, _, option = dotted.partition(".")
            assert f"\n| `{option}` |" in tables[section], dotted
