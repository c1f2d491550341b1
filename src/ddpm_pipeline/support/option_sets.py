"""All options of a command as one object that consists of option groups. Imports the support of options alone, no torch."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, fields, make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self, get_type_hints

import yaml

from .errors import ConfigError
from .options import OptionGroup, option, option_fields, parse_flags, unknown_option


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
            stored = self._parsed([], "", config)
            options = {name: value for name, value in stored.items() if name not in kept} | options
        if unknown := [name for name in options if name not in known]:
            raise ConfigError(unknown_option(f"--{unknown[0]}", known))
        for name, group in groups.items():
            mine = {entry.name: options[entry.name] for entry in fields(group) if entry.name in options}
            if name not in given and (missing := [needed for needed in _required(group) if needed not in mine]):
                raise ConfigError(f"--{missing[0]} is required: {known[missing[0]].metadata['help']}")
            object.__setattr__(self, name, replace(given[name], **mine) if name in given else group(**mine))
        self.check()

    def check(self) -> None:
        """Raises ConfigError if options of different groups exclude each other."""

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
        """The options that a command line asks for, on top of the entries of a `file`.

        `flags` are further flags by name with their help, such as `config`, which are accepted and left out. Raises
        ConfigError for a command line that cannot be understood.
        """
        return cls(**cls._parsed(argv, description, file, **flags))

    @classmethod
    def _parsed(cls, argv: Sequence[str], description: str, file: str | Path | None, **flags: str) -> dict[str, Any]:
        """What a file and flags say, by name; required options that they leave out are missing."""
        path = None if file is None else cls.config_file(file)
        values = parse_flags(
            [_all_optional(group) for group in cls.groups().values()], argv, description, path, **flags
        )
        required = [name for group in cls.groups().values() for name in _required(group)]
        return {name: value for name, value in values.items() if not (value is None and name in required)}

    def flat(self) -> dict[str, Any]:
        """Every option with its value, by the name of its flag."""
        return {name: value for group in self.groups() for name, value in asdict(getattr(self, group)).items()}

    def with_values(self, **options: Any) -> Self:
        """The same options with other values for some, by the names of the flags."""
        return type(self)(**(self.flat() | options))

    def to_yaml(self) -> str:
        """Every option with its value, as a file that `config` takes."""
        return yaml.safe_dump(self.flat(), sort_keys=False, allow_unicode=True)


def _required(group: type[OptionGroup]) -> list[str]:
    return [entry.name for entry in fields(group) if entry.default is MISSING]


def _all_optional(group: type[OptionGroup]) -> type[OptionGroup]:
    """The group for the parser, which would end the process where a required option is missing."""
    hints, declared = get_type_hints(group), option_fields([group])
    optional = [(name, hints[name] | None, option(None, declared[name].metadata["help"])) for name in _required(group)]
    return make_dataclass(group.__name__, optional, bases=(group,), frozen=True)
