"""All options of a command as one object of option groups, and how flags and YAML files become one. Imports nothing heavy."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, replace
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self, get_type_hints

import yaml

from .errors import ConfigError
from .options import OptionGroup, kind_of, option_fields
from .yaml_files import read_yaml

_NOT_GIVEN = object()
_TRUTHS = dict.fromkeys(("true", "t", "yes", "y", "1"), True) | dict.fromkeys(("false", "f", "no", "n", "0"), False)


class OptionSet:
    """Base of a command's options. A subclass declares its groups as annotated fields:

        @dataclass(frozen=True, init=False)
        class CopyOptions(OptionSet):
            data: DataOptions
            output: OutputOptions

        CopyOptions(dataset="photos", output_dir="copies")  # by the names of the flags
        CopyOptions(data=DataOptions("photos"), output_dir="copies")  # or by groups
        CopyOptions(config="copy.yaml", split="test")  # from a YAML file, which the others override

    Raises ConfigError for an unknown or missing option, a value that is not allowed, and options that exclude each other.
    """

    def __init__(self, *, config: str | Path | None = None, **options: Any):
        groups, known = self.groups(), self.declared()
        given = {name: options.pop(name) for name in groups if isinstance(options.get(name), OptionGroup)}
        if config is not None:
            kept = option_fields(given.values())  # what a group says goes before what the file says
            stored = self._of_file(config)
            options = self.merged({name: value for name, value in stored.items() if name not in kept}, options)
        if unknown := [name for name in options if name not in known]:
            raise ConfigError(_unknown_option(f"--{unknown[0]}", known))
        for name, group in groups.items():
            mine = {entry.name: options[entry.name] for entry in fields(group) if entry.name in options}
            missing = [entry.name for entry in fields(group) if entry.default is MISSING and entry.name not in mine]
            if missing and name not in given:
                raise ConfigError(f"--{missing[0]} is required: {known[missing[0]].metadata['help']}")
            object.__setattr__(self, name, replace(given[name], **mine) if name in given else group(**mine))
        self.check()

    def check(self) -> None:
        """Raises ConfigError if options of different groups exclude each other."""

    @classmethod
    def merged(cls, stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """What a file says, overridden by what is said beside it."""
        return {**stored, **given}

    @classmethod
    @cache
    def groups(cls) -> dict[str, type[OptionGroup]]:
        """The groups by the names of their fields."""
        hints = get_type_hints(cls).items()
        return {name: hint for name, hint in hints if isinstance(hint, type) and issubclass(hint, OptionGroup)}

    @classmethod
    @cache
    def declared(cls) -> dict[str, Field]:
        """The fields of all options, by name."""
        return option_fields(cls.groups().values())

    @classmethod
    def config_file(cls, config: str | Path) -> Path:
        """The YAML file that `config` names."""
        return Path(config)

    @classmethod
    def parse(cls, argv: Sequence[str], description: str, file: str | Path | None = None, **flags: str) -> Self:
        """The options that a command line asks for, on top of the entries of a `file`. Raises ConfigError if it cannot be
        understood. `flags` are further flags by name with their help, such as `config`, which are accepted and left out.
        """
        given = cls._parsed(argv, description, **flags)
        return cls(**cls.merged({} if file is None else cls._of_file(file), given))

    @classmethod
    def _of_file(cls, config: str | Path) -> dict[str, Any]:
        return cls._parsed(_entries_of_file(cls.config_file(config), cls.declared()), "")

    @classmethod
    def _parsed(cls, argv: Sequence[str], description: str, **flags: str) -> dict[str, Any]:
        """What is said by words of a command line, by name."""
        known = cls.declared()
        spec = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
        how = {"prog": spec and f"python -m {spec.parent}", "usage": "%(prog)s --option value ...", "formatter_class": _Help}
        parser = argparse.ArgumentParser(description=description, allow_abbrev=False, exit_on_error=False, **how)
        parser._negative_number_matcher = re.compile(r"-[\d.]")  # no flag begins so: -1000,3000 is a value too
        for group in cls.groups().values():
            _add_flags(parser, group)
        for name, help in flags.items():
            parser.add_argument(f"--{name}", metavar=name.upper(), help=help)
        try:  # argparse itself ends with status 0 after --help
            nothing = argparse.Namespace(**dict.fromkeys(known, _NOT_GIVEN))  # in place of defaults
            namespace, unknown = parser.parse_known_args([*argv], nothing)
        except Exception as error:
            raise ConfigError(str(error)) from error
        if unknown:
            raise ConfigError(_unknown_option(unknown[0].split("=")[0], [*known, *flags]))
        return {name: value for name in known if (value := getattr(namespace, name)) is not _NOT_GIVEN}

    def flat(self) -> dict[str, Any]:
        """Every option with its value, by the name of its flag."""
        return {name: value for group in self.groups() for name, value in asdict(getattr(self, group)).items()}

    def with_values(self, **options: Any) -> Self:
        """The same options with other values for some, by the names of the flags."""
        return type(self)(**(self.flat() | options))

    def to_yaml(self) -> str:
        """Every option with its value, as a file that `config` takes."""
        return yaml.safe_dump(self.flat(), sort_keys=False, allow_unicode=True)


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """The last value given for a flag, as `--flag value` or `--flag=value`."""
    pairs = zip_longest(argv, argv[1:])
    given = [after if word == flag else word.split("=", 1)[1] for word, after in pairs if word.split("=")[0] == flag]
    return given[-1] if given else None


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Each option under one name, and its default if it has one that is not that of every flag."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = "" if action.nargs in (0, "?") else f" {action.metavar}"
        return (action.option_strings[0] if action.dest != "help" else ", ".join(action.option_strings)) + value


def _add_flags(parser: argparse.ArgumentParser, group: type[OptionGroup]) -> None:
    """The flags of a group, with hyphens too. None is required here, since argparse would end the process."""
    hints, section = get_type_hints(group), parser.add_argument_group(group.title)
    for entry in fields(group):
        required, kind = entry.default is MISSING, kind_of(hints[entry.name]) if entry.metadata["parse"] is None else str
        facts: dict[str, Any] = {
            "dest": entry.name, "default": None if required else entry.default,
            "help": entry.metadata["help"].replace("%", "%%") + (" Required." if required else ""),
        }  # fmt: skip
        how: dict[str, Any] = {"type": _READERS[kind], "metavar": _METAVARS.get(kind, "VALUE")}
        if kind is bool:
            how |= {"nargs": "?", "const": True}
        section.add_argument(*_spellings(entry.name), **facts, **how)
        if entry.default is True:
            facts |= {"default": False, "help": f"Turns --{entry.name} off."}
            section.add_argument(*_spellings(f"no_{entry.name}"), **facts, action="store_false")


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _number(word: str, kind: type) -> Any:
    """The word itself if it is no number, which the option's group then refuses."""
    try:
        return kind(word)
    except ValueError:
        return word


_READERS: dict[type, Any] = {
    str: str, int: partial(_number, kind=int), float: partial(_number, kind=float),
    bool: lambda word: _TRUTHS.get(word.lower(), word),
}  # fmt: skip
_METAVARS = {int: "N", float: "X"}


def _entries_of_file(path: Path, known: Mapping[str, Field]) -> list[str]:
    """The entries of a YAML file as words of a command line."""
    try:
        entries = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"--config {path} is not YAML that can be used: {error}") from error
    entries = {} if entries is None else entries
    if not isinstance(entries, dict):
        raise ConfigError(f"--config {path} must hold `option: value` lines, not a {type(entries).__name__}.")
    words = []
    for name, value in entries.items():
        if name not in known:
            raise ConfigError(f"{path}: {_unknown_option(f'--{name}', known)}")
        if isinstance(value, dict | list):
            raise ConfigError(f"--config {path}: {name} must have one value, not a {type(value).__name__}.")
        if value is not None:
            value = {"on": "true", "off": "false"}.get(value.lower(), value) if known[name].type is bool else value
            words.append(f"--{name}={value}")
    return words


def _unknown_option(flag: str, names: Iterable[str]) -> str:
    near = " or ".join(f"--{name}" for name in _nearest(flag.removeprefix("--"), list(names)))
    return f"unknown option {flag}.{f' Did you mean {near}?' if near else ''} All options: --help."


def _nearest(given: str, names: Sequence[str]) -> list[str]:
    """The options that may have been meant: by initials (lr), by words of their names (steps), or by letters."""
    initials = [name for name in names if "".join(word[0] for word in name.split("_")) == given]
    words = set(given.split("_"))
    shared = [name for name in names if words <= set(name.split("_")) or set(name.split("_")) <= words]
    letters = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return (initials or [name for name in letters if name in shared] or shared or letters)[:3]
