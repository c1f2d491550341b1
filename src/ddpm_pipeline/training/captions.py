"""Captions of images: sampled at each use from a text column, or from templates over class labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ..conditioning_alpha_ddpm import prepare_prompt
from ..data.mapped import ImageSet
from ..support.draws import BatchSlice, RandomStream
from ..support.errors import ConfigError
from ..support.yaml_files import read_yaml
from .options import RECIPES, ConditionOptions

DEFAULT_TEMPLATES = ("{name}", "a {name}", "a picture of {name}", "an image of a {name}", "this is a {name}")


@dataclass(frozen=True)
class Templates:
    """Caption templates with {name}, the names of each class, and captions that training must never use."""

    templates: Sequence[str]
    names: Sequence[Sequence[str]]  # one list per class
    held_out: frozenset[str] = frozenset()

    def caption(self, label: int, rng: np.random.Generator, word_dropout: float) -> str:
        template = self.templates[rng.integers(len(self.templates))]
        names = self.names[label]
        name = names[rng.integers(len(names))]
        shortened = without_words(template, rng, word_dropout).replace("{name}", name)
        return template.replace("{name}", name) if prepare_prompt(shortened) in self.held_out else shortened

    def all(self) -> Iterator[str]:
        """Every caption of every class, with all words."""
        names = chain.from_iterable(self.names)
        return (template.replace("{name}", name) for name in names for template in self.templates)


def read_templates(file: str | None, class_names: Sequence[str]) -> Templates:
    """The templates in a YAML file (docs/conditions.md), by its path or its name among the package's recipes, or plain ones
    over the class names. Raises ConfigError if it cannot be used.
    """
    if file is None:
        return Templates(DEFAULT_TEMPLATES, [[name] for name in class_names])
    path = Path(file)
    path = path if path.exists() or path.is_absolute() else RECIPES / path
    option = f"--caption_templates {path}"
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} cannot be read: {error}") from error
    known = {"templates", "names", "held_out"}
    if not isinstance(content, dict) or set(content) - known or not content.get("templates"):
        raise ConfigError(f"{option} must hold `templates`, a list, and may hold `names` and `held_out`.")
    templates, held_out = (_words(content.get(key), key, option) for key in ("templates", "held_out"))
    if strange := [template for template in templates + held_out if "{name}" not in template]:
        raise ConfigError(f"{option}: {strange[0]!r} has no {{name}}; put it where the class name belongs.")
    given = content.get("names") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{option}: names must have a line per class, `class: [name, another name]`.")
    if unknown := sorted(set(given) - set(class_names)):
        raise ConfigError(f"{option}: {unknown[0]!r} is not a class; the classes are {', '.join(class_names[:10])}.")
    names = [_words(given.get(name, [name]), name, option) for name in class_names]
    if empty := [name for name, values in zip(class_names, names, strict=True) if not values]:
        raise ConfigError(f"{option}: the class {empty[0]!r} has an empty list of names; name it, or leave it out.")
    never = frozenset(map(prepare_prompt, Templates(held_out, names).all()))
    if clash := [caption for caption in Templates(templates, names).all() if prepare_prompt(caption) in never]:
        raise ConfigError(f"{option}: {clash[0]!r} is held out and also made by a template; remove one of them.")
    return Templates(templates, names, never)


def _words(value: Any, key: str, option: str) -> list[str]:
    """A list of texts. Raises ConfigError for anything else, of which YAML makes it where a text has a colon or a bracket."""
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        odd = next((text for text in value if not isinstance(text, str)), value) if isinstance(value, list) else value
        raise ConfigError(f"{option}: {key} must be a list of texts, and {odd!r} is none; put a text with a colon in quotes.")
    return value


def without_words(text: str, rng: np.random.Generator, share: float) -> str:
    """The text with a share of its words dropped, except one with {name}; unchanged if no word would remain."""
    words = text.split()
    kept = rng.random(len(words)) >= share
    chosen = [word for word, keep in zip(words, kept, strict=True) if keep or "{name}" in word]
    return " ".join(chosen) if chosen else text


class Captions:
    """A caption for each image, sampled at each use. Raises ConfigError if the data have no column to make them from."""

    def __init__(self, options: ConditionOptions, data: ImageSet):
        self.options, self.data = options, data
        self.column = data.text_column or data.label_column
        if self.column is None:
            raise ConfigError(
                f"--condition text: {data.name} has no captions; name one of its columns {data.columns} with --text_column, or "
                "one with class labels with --label_column."
            )
        has_texts = data.text_column is not None
        if has_texts and options.caption_templates is not None:
            raise ConfigError("--caption_templates makes captions from class labels; drop it, or --text_column.")
        self.templates = None if has_texts else read_templates(options.caption_templates, data.class_names)

    def draw(self, values: Sequence[Any], where: BatchSlice, dropped: Sequence[bool]) -> list[str]:
        """A caption per value, "" for those whose condition is dropped; a function of the value, seed, step and position."""
        seeds = where.seeds(RandomStream.CONDITION).tolist()
        each = zip(values, seeds, dropped, strict=True)
        return ["" if drop else self._caption(value, np.random.default_rng(seed)) for value, seed, drop in each]

    def _caption(self, value: Any, rng: np.random.Generator) -> str:
        if self.templates is not None:
            return self.templates.caption(int(value), rng, self.options.word_dropout)
        texts = _texts(value)
        return without_words(texts[rng.integers(len(texts))], rng, self.options.word_dropout) if texts else ""

    def identity(self) -> dict[str, Any] | None:
        """The templates, as JSON; None for a column of texts, which belongs to the data."""
        if self.templates is None:
            return None
        held_out = sorted(self.templates.held_out)
        return {"templates": list(self.templates.templates), "names": self.templates.names, "held out": held_out}

    def all(self) -> Iterator[str]:
        """Every caption with all words, in the data's order; of a stream those of the first rows."""
        if self.templates is not None:
            return self.templates.all()
        return chain.from_iterable(map(_texts, self.data.values(self.data.text_column)))

    def examples(self, count: int) -> list[str]:
        """A fixed set for previews: one caption per class, or the first distinct ones of the data."""
        if self.templates is not None:
            return [self.templates.templates[0].replace("{name}", names[-1]) for names in self.templates.names][:count]
        return list(islice(dict.fromkeys(self.all()), count))


def _texts(value: Any) -> list[str]:
    """The captions of an image, of which a column holds one, a list or none."""
    return [text for text in (value if isinstance(value, list) else [value]) if text]
