"""Options of the commands. Every fact of an option stands with its field: default, help, allowed values, its role in a run.

A group of options is a frozen dataclass; flags, YAML keys, `--help`, checks, the resume rule, the recipe in a model card and
the tables of the docs all follow from its fields. Imports transformers' argument parser and yaml, no torch.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

from .errors import ConfigError

Resume = Literal["refuse", "tell", "allow"]


@dataclass(frozen=True)
class Allowed:
    """The values that an option may have; `words` complete "must be"."""

    words: str
    holds: Callable[[Any], bool]


def at_least(low: int) -> Allowed:
    return Allowed(f"at least {low}", lambda value: low <= value < math.inf)


def one_of(names: Sequence[Any]) -> Allowed:
    return Allowed(f"one of {', '.join(map(str, names))}", lambda value: value in names)


POSITIVE = Allowed("a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Allowed("a number of at least 0", lambda value: 0 <= value < math.inf)
FINITE = Allowed("a finite number", math.isfinite)
BELOW_ONE = Allowed("at least 0 and below 1", lambda value: 0 <= value < 1)


def option(
    default: Any = MISSING,
    help: str = "",
    allowed: Allowed | None = None,
    *,
    on_resume: Resume = "refuse",
    in_recipe: bool = True,
) -> Any:
    """A field of an option group.

    Args:
        default: its value if not given; without one the option is required.
        help: for `--help` and the docs; a sentence.
        allowed: its values, besides a default of None.
        on_resume: what a changed value means to a resumed run: another run ("refuse"), a log line ("tell"), nothing ("allow").
        in_recipe: whether the trained model depends on it, so that the command in the model card repeats it.
    """
    facts = {"help": help, "allowed": allowed, "on_resume": on_resume, "in_recipe": in_recipe}
    return field(default=default, metadata=facts)


class OptionGroup:
    """Base of the groups; `title` is their heading in `--help`. Raises ConfigError for a value that is not allowed."""

    title: ClassVar[str]

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, allowed = getattr(self, entry.name), entry.metadata["allowed"]
            if allowed is not None and not (value is None and entry.default is None) and not _holds(allowed, value):
                raise ConfigError(f"--{entry.name} {value} must be {allowed.words}.")
        self.check()

    def check(self) -> None:
        """Raises ConfigError where options of this group exclude each other."""


def _holds(allowed: Allowed, value: Any) -> bool:
    try:
        return bool(allowed.holds(value))
    except TypeError:
        return False


# ---- command lines and files ------------------------------------------------------------------------


def parse_flags(
    groups: Sequence[type[OptionGroup]], argv: Sequence[str], description: str, recipe: Path | None = None, **flags: str
) -> dict[str, Any]:
    """The values of all options by name, from the entries of a YAML file, if any, and the flags, which override them.

    `flags` are further flags by name with their help, such as `config`, which are accepted and left out. Raises ConfigError
    where something cannot be understood.
    """
    parser = HfArgumentParser(
        [_for_the_parser(group) for group in groups], description=description, allow_abbrev=False, exit_on_error=False
    )
    for name, help in flags.items():
        parser.add_argument(f"--{name}", metavar=name.upper(), help=help)
    names = [*option_fields(groups), *flags]
    tokens = _tokens_of_file(recipe, option_fields(groups)) if recipe is not None else []
    try:  # argparse itself ends with status 0 after --help
        namespace, unknown = parser.parse_known_args([*tokens, *argv])
    except Exception as error:
        raise ConfigError(str(error)) from error
    if unknown:
        raise ConfigError(unknown_option(unknown[0].split("=")[0], names))
    return {name: value for name, value in vars(namespace).items() if name not in flags}


def _for_the_parser(group: type[OptionGroup]) -> type:
    """The group as HfArgumentParser takes it, which hands all metadata to argparse."""
    hints = get_type_hints(group)
    entries = [
        (entry.name, hints[entry.name], field(default=entry.default, metadata={"help": entry.metadata["help"]}))
        for entry in fields(group)
    ]
    return make_dataclass(group.__name__, entries, namespace={"_argument_group_name": group.title})


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """The last value given for a flag, as `--flag value` or `--flag=value`."""
    value = None
    for index, token in enumerate(argv):
        if token == flag:
            value = argv[index + 1] if index + 1 < len(argv) else None
        elif token.startswith(f"{flag}="):
            value = token.split("=", 1)[1]
    return value


def _tokens_of_file(path: Path, names: Mapping[str, Any]) -> list[str]:
    try:
        entries = yaml.safe_load(path.read_text("utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"--config {path} must hold `option: value` lines, not a {type(entries).__name__}.")
    for name in entries:
        if name not in names:
            raise ConfigError(f"{path}: {unknown_option(f'--{name}', names)}")
    return [f"--{name}={value}" for name, value in entries.items() if value is not None]


def unknown_option(flag: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(flag, [f"--{name}" for name in names], n=1, cutoff=0.5)
    return f"unknown option {flag}.{f' Did you mean {near[0]}?' if near else ''} All options: --help."


# ---- what follows from the fields -------------------------------------------------------------------


def option_fields(groups: Iterable[Any]) -> dict[str, Field]:
    """The fields of groups, or of instances of groups, by name in their order."""
    return {entry.name: entry for group in groups for entry in fields(group)}


def options_table(groups: Sequence[type[OptionGroup]]) -> str:
    """The options as Markdown tables under the groups' titles, for the docs."""
    lines = []
    for group in groups:
        lines += [
            f"### {group.title[0].upper()}{group.title[1:]}",
            "",
            "| option | default | meaning |",
            "|---|---|---|",
        ]
        for entry in fields(group):
            default = "" if entry.default in (None, MISSING) else f"`{entry.default}`"
            lines.append(f"| `--{entry.name}` | {default} | {entry.metadata['help']} |")
        lines.append("")
    return "\n".join(lines)
