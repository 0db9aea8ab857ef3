"""Reading and writing the options of a run: TOML, the command line, and errors in one line."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from pydantic import BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_SHOWN_ERRORS = 3
_UNSET = (
    "unset"  # `--model.adapter unset` takes back what the file says; "none" is a choice of some
)

_WORDING = {"missing": "needs more values", "model_type": "must be a table of options"}
"""What is said instead of a message of pydantic's that would puzzle a user."""


class Options(BaseModel):
    """One table of the file of options; immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RunOptions(Options):
    """All options of one run: a table of the file for each field."""

    @classmethod
    def parse(cls, arguments: Sequence[str], *, prog: str) -> Self:
        """Read `[FILE.toml] [--section.option VALUE ...]`; flags win over the file.

        Prints help and exits where asked to.

        Raises:
            ValueError: in one line, naming flag and value, if an option is unknown or wrong.
            OSError: if the file cannot be read.
        """
        # Takes a third of a second to import, which `load` need not wait for.
        from pydantic_settings import CliSettingsSource
        from pydantic_settings.exceptions import SettingsError

        parser = _Parser(
            prog=prog,
            usage=f"{prog} [RUN.toml] [--section.option VALUE ...]",
            description=" ".join((cls.__doc__ or "").split()),
            epilog="Lists are written as a,b and a table as key=value,key=value; "
            f"'{_UNSET}' unsets an option.",
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )
        parser.flags = [f"--{name}" for name in _option_names(cls)]
        parser.add_argument("file", nargs="?", metavar="RUN.toml", help="options, by section")
        # Parsed here rather than by the source, which would not hand out `file`.
        try:
            source = CliSettingsSource[argparse.ArgumentParser](
                cls,  # type: ignore[arg-type]  # any model will do; settings would read variables
                root_parser=parser,
                cli_parse_none_str=_UNSET,
                cli_avoid_json=True,
                cli_hide_none_type=True,
                cli_use_class_docs_for_groups=False,
            )
            options = parser.parse_args(list(arguments))
            file = options.file
            del options.file
            overrides = _typed_tables(cls, source(parsed_args=options)())
        except SettingsError as error:
            raise ValueError(_one_line(str(error))) from error
        values = read_toml(file) if file is not None else {}
        return cls._validate(_merge(values, overrides), file)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` or a user wrote.

        Raises:
            ValueError: in one line, if an option is unknown or wrong.
            OSError: if the file cannot be read.
        """
        return cls._validate(read_toml(path), path)

    @classmethod
    def from_options(cls, options: Mapping[str, Any], file: str | Path | None = None) -> Self:
        """Make a run of options by dotted name, such as `given` returns; errors name `file`.

        Raises:
            ValueError: in one line, if an option is wrong.
        """
        tables: dict[str, Any] = {}
        for name, value in options.items():
            section, _, option = name.partition(".")
            tables.setdefault(section, {})[option] = value
        return cls._validate(tables, file)

    def given(self) -> dict[str, Any]:
        """Return by dotted name what was given, not left at its default; unset options are None."""
        return options_of(type(self), self.model_dump(mode="json", exclude_unset=True))

    def save(self, path: str | Path, *, without: Collection[str] = ()) -> None:
        """Write every option, defaults included; replaces the file at once or not at all.

        Args:
            path: the file to write.
            without: names of tables that are left out.
        """
        import tomli_w

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        tables = {name: table for name, table in self.to_dict().items() if name not in without}
        draft.write_text(tomli_w.dumps(tables), encoding="utf-8")
        draft.replace(path)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values; options that are unset are absent, as TOML has no null."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def _validate(cls, values: Mapping[str, Any], file: str | Path | None) -> Self:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = _describe_all(cls, error.errors(include_url=False), file)
            if len(lines) > _SHOWN_ERRORS:
                lines[_SHOWN_ERRORS:] = [f"and {len(lines) - _SHOWN_ERRORS} more"]
            raise ValueError("; ".join(lines)) from error


class _Parser(argparse.ArgumentParser):
    """A parser that raises instead of exiting, and suggests the flag that was meant."""

    flags: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown == message:
            raise ValueError(message)
        flag = unknown.split()[0].partition("=")[0]
        if not flag.startswith("-"):
            raise ValueError(f"unexpected argument {flag!r}: one file, then flags")
        raise ValueError(f"unknown flag {flag}{_suggest(flag, self.flags)}")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        for default in ("None", _UNSET, "dict"):
            text = text.removesuffix(f" (default: {default})")
            text = text.removesuffix(f" (default factory: {default})")
        return text


def options_of(cls: type[BaseModel], tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return by dotted name the options that `tables` hold; what is unknown is left out."""
    found = {}
    for name in _option_names(cls):
        section, _, option = name.partition(".")
        table = tables.get(section)
        if isinstance(table, Mapping) and option in table:
            found[name] = table[option]
    return found


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read the tables of a file.

    Raises:
        ValueError: if it is no TOML.
        OSError: if it cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file of options")
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Put `above` over `below`: tables merge, everything else is replaced."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[name] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _typed_tables(cls: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn numbers into numbers in free tables from the command line, such as `a=1,b=x`.

    Where an option has a type, pydantic reads the text; here nothing says what it should be.
    """
    typed: dict[str, Any] = {}
    for name, value in values.items():
        field = cls.model_fields[name]
        section = _section_of(field.annotation)
        if isinstance(value, Mapping) and section is not None:
            typed[name] = _typed_tables(section, value)
        elif isinstance(value, Mapping):
            typed[name] = {key: _read_json(item) for key, item in value.items()}
        else:
            typed[name] = value
    return typed


def _read_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _option_names(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all options."""
    for name, field in cls.model_fields.items():
        section = _section_of(field.annotation)
        if section is None:
            yield prefix + name
        else:
            yield from _option_names(section, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return `Model` if the annotation is `Model` or `Model | None`, else None."""
    for part in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _describe_all(
    cls: type[BaseModel], errors: Sequence[ErrorDetails], file: str | Path | None
) -> list[str]:
    """Write a line for each option that is wrong: the flag, what is wrong, the value, the fix."""
    known = list(_option_names(cls))
    lines: list[str] = []
    wrong: dict[str, tuple[list[str], Any]] = {}  # flag → what it should be, what it is
    for error in errors:
        name = ".".join(str(part) for part in error["loc"])
        # The place goes on below an option: the member of a union, the element of a list.
        option = next((k for k in known if f"{name}.".startswith(f"{k}.")), None)
        if error["type"] == "value_error":  # ours; names the flag itself
            lines.append(str(error["ctx"]["error"]))
        elif error["type"] == "extra_forbidden":
            where = f"{file}: " if file is not None else ""
            lines.append(f"{where}unknown option {name}{_suggest(name, known)}")
        elif error["type"] == "missing" and (option is None or option == name):
            below = [k for k in known if k == name or k.startswith(f"{name}.")]
            flag = next((k for k in below if _field(cls, k).is_required()), name)
            about = _one_line(_field(cls, flag).description or "").rstrip(".")
            lines.append(f"--{flag} is missing: {about}")
        else:
            message = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
            message = _WORDING.get(error["type"], message)
            value = None if error["type"] == "missing" else error["input"]
            wrong.setdefault(option or name, ([], value))[0].append(message)
    for flag, (messages, value) in wrong.items():
        got = "" if value is None else f", got {_one_line(repr(value))}"
        lines.append(f"--{flag} {' or '.join(messages)}{got}")
    return lines


def _field(cls: type[BaseModel], dotted: str) -> Any:
    section, _, rest = dotted.partition(".")
    field = cls.model_fields[section]
    inner = _section_of(field.annotation)
    return field if not rest or inner is None else _field(inner, rest)


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if not close:  # the right option in the wrong section
        close = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean {close[0]}?" if close else "; --help lists them all"


def _one_line(text: str) -> str:
    return " ".join(text.split())
