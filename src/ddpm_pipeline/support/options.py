"""Options of the commands. Every fact of an option stands with its field: default, help, allowed values, its role in a run.

A group of options is a frozen dataclass; flags, YAML keys, `--help`, checks, the resume rule, the recipe in a model card and
the tables of the docs all follow from its fields. Imports the standard library alone.
"""

import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from .errors import ConfigError


@dataclass(frozen=True)
class Allowed:
    """The values that an option may have; `words` complete "must be"."""

    words: str
    holds: Callable[[Any], bool]


def at_least(low: int) -> Allowed:
    return Allowed(f"at least {low}", lambda value: low <= value < math.inf)


def one_of(names: Sequence[Any]) -> Allowed:
    return Allowed(f"one of {', '.join(map(str, names))}", lambda value: value in names)


SEED = Allowed("at least 0 and below 2^63", lambda value: 0 <= value < 2**63)
POSITIVE = Allowed("a number above 0", lambda value: 0 < value < math.inf)
FINITE = Allowed("a finite number", math.isfinite)
BELOW_ONE = Allowed("at least 0 and below 1", lambda value: 0 <= value < 1)


def option(
    default: Any = MISSING,
    help: str = "",
    allowed: Allowed | None = None,
    *,
    on_resume: Literal["refuse", "tell", "allow"] = "refuse",
    in_recipe: bool = True,
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """A field of an option group.

    Args:
        default: its value if not given; without one the option is required.
        help: for `--help` and the docs; a sentence.
        allowed: its values, besides a default of None.
        on_resume: what a changed value means to a resumed run: another run ("refuse"), a log line ("tell"), nothing ("allow").
        in_recipe: whether the trained model depends on it, so that the command in the model card repeats it.
        parse: of an option written as text, what it becomes; raises ValueError for what it cannot read.
    """
    facts = {"help": help, "allowed": allowed, "on_resume": on_resume, "in_recipe": in_recipe, "parse": parse}
    return field(default=default, metadata=facts)


def _truth(value: Any) -> bool:
    if str(value) not in ("True", "False"):  # of Python or numpy
        raise TypeError
    return bool(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _number(value: Any) -> float:
    if isinstance(value, bool | str):
        raise TypeError
    return float(value)


def _text(value: Any) -> str:
    """With the home folder, which shells put in place of ~ on command lines but not in YAML files or Python."""
    text = os.fspath(value)
    return os.path.expanduser(text) if text.startswith("~/") else text


# The values that Python code may give for an option of each type, and what they become. Flags are of the type already.
KINDS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bool: ("True or False", _truth),
    int: ("a whole number", _whole),
    float: ("a number", _number),
    str: ("text", _text),
}


class OptionGroup:
    """Base of the groups; `title` is their heading in `--help`. Raises ConfigError for a value that is not allowed."""

    title: ClassVar[str]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            value, allowed, parse = getattr(self, entry.name), entry.metadata["allowed"], entry.metadata["parse"]
            kind = kind_of(hints[entry.name])
            if value is None and entry.default is None:
                continue
            try:
                value = KINDS[kind][1](value) if parse is None else parse(value)
            except TypeError as error:
                raise ConfigError(f"--{entry.name} {value!r} must be {_told(entry, kind, _words(kind, allowed))}.") from error
            except ValueError as error:
                raise ConfigError(f"--{entry.name} {value} must be {error}.") from error
            if allowed is not None and not allowed.holds(value):
                raise ConfigError(f"--{entry.name} {value} must be {_told(entry, kind, allowed.words)}.")
            object.__setattr__(self, entry.name, value)
        self.check()

    def check(self) -> None:
        """Raises ConfigError where options of this group exclude each other."""


def kind_of(hint: Any) -> type:
    """The type of an option that may be None too."""
    return next(kind for kind in get_args(hint) or (hint,) if kind is not NoneType)


def _words(kind: type, allowed: Allowed | None) -> str:
    """What a value of another type must be."""
    words = "" if allowed is None else allowed.words
    return words if words.startswith(("a ", "one of ")) else ", ".join(filter(None, (KINDS[kind][0], words)))


def _told(entry: Field, kind: type, words: str) -> str:
    """The same; of a number also the first sentence of its help, which has the unit."""
    return f"{words}. {entry.metadata['help'].split('. ')[0].removesuffix('.')}" if kind in (int, float) else words


def option_fields(groups: Iterable[Any]) -> dict[str, Field]:
    """The fields of groups, or of instances of groups, by name in their order."""
    return {entry.name: entry for group in groups for entry in fields(group)}


def options_table(groups: Sequence[type[OptionGroup]]) -> str:
    """The options as Markdown tables under the groups' titles, for the docs."""
    lines = []
    for group in groups:
        lines += [f"### {group.title.capitalize()}", "", "| option | default | meaning |", "|---|---|---|"]
        for entry in fields(group):
            default = "" if entry.default in (None, MISSING) else f"`{entry.default}`"
            meaning = entry.metadata["help"].replace("|", r"\|")  # a bar ends the cell
            lines.append(f"| `--{entry.name}` | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)
