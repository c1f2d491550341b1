"""Captions of images: sampled at each use from a text column, or from templates over class labels.

Imports numpy, yaml and the text pipeline's tokenizing; called by conditions.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..data.mapped import ImageData
from ..data.streamed import StreamData
from ..pipeline_alpha_ddpm_text import prepare_prompt
from ..support.draws import BatchSlice, RandomStream
from ..support.errors import ConfigError
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
        for names in self.names:
            for name in names:
                for template in self.templates:
                    yield template.replace("{name}", name)


def read_templates(file: str | None, class_names: Sequence[str]) -> Templates:
    """The templates in a YAML file (docs/conditions.md), or plain ones over the class names.

    A file that is not found as named is looked for among the package's recipes. Raises ConfigError if it cannot be used.
    """
    if file is None:
        return Templates(DEFAULT_TEMPLATES, [[name] for name in class_names])
    path = Path(file)
    path = path if path.exists() or path.is_absolute() else RECIPES / path
    option = f"--caption_templates {path}"
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} cannot be read: {error}") from error
    known = {"templates", "names", "held_out"}
    if not isinstance(content, dict) or set(content) - known or not content.get("templates"):
        raise ConfigError(f"{option} must hold `templates`, a list, and may hold `names` and `held_out`.")
    templates, held_out = ([str(text) for text in content.get(key) or []] for key in ("templates", "held_out"))
    if strange := [template for template in templates + held_out if "{name}" not in template]:
        raise ConfigError(f"{option}: {strange[0]!r} has no {{name}}; put it where the class name belongs.")
    names = _class_names(content.get("names") or {}, class_names, option)
    never = frozenset(
        prepare_prompt(template.replace("{name}", name)) for values in names for name in values for template in held_out
    )
    result = Templates(templates, names, never)
    if clash := [caption for caption in result.all() if prepare_prompt(caption) in never]:
        raise ConfigError(f"{option}: {clash[0]!r} is held out and also made by a template; remove one of them.")
    return result


def _class_names(given: dict[Any, Any], class_names: Sequence[str], option: str) -> list[list[str]]:
    """The names that captions use for each class: its own unless the file gives others."""
    given = {str(name): values for name, values in given.items()}
    if unknown := sorted(set(given) - set(class_names)):
        raise ConfigError(f"{option}: {unknown[0]!r} is not a class; the classes are {', '.join(class_names[:10])}.")
    names = [[str(value) for value in given.get(name, [name])] for name in class_names]
    if empty := [name for name, values in zip(class_names, names, strict=True) if not values]:
        raise ConfigError(f"{option}: the class {empty[0]!r} has an empty list of names; name it, or leave it out.")
    return names


def without_words(text: str, rng: np.random.Generator, share: float) -> str:
    """The text with a share of its words dropped, except one with {name}; unchanged if no word would remain."""
    words = text.split()
    kept = rng.random(len(words)) >= share
    chosen = [word for word, keep in zip(words, kept, strict=True) if keep or "{name}" in word]
    return " ".join(chosen) if chosen else text


class Captions:
    """A caption for each image, sampled at each use. Raises ConfigError if the data have no column to make them from."""

    def __init__(self, options: ConditionOptions, data: ImageData | StreamData):
        self.options, self.data = options, data
        self.column = data.text_column or data.label_column
        self.templates = None
        if data.text_column is None:
            if data.label_column is None:
                raise ConfigError(
                    f"--condition text: {data.name} has no captions; name one of its columns {data.columns} with "
                    "--text_column, or one with class labels with --label_column."
                )
            self.templates = read_templates(options.caption_templates, data.class_names)
        elif options.caption_templates is not None:
            raise ConfigError("--caption_templates makes captions from class labels; drop it, or --text_column.")

    def draw(self, values: Sequence[Any], where: BatchSlice, dropped: Sequence[bool]) -> list[str]:
        """A caption per value, "" for those whose condition is dropped; a function of the value, seed, step and position."""
        return [
            "" if drop else self._caption(value, np.random.default_rng(caption_seed))
            for value, caption_seed, drop in zip(
                values, where.seeds(RandomStream.CONDITION).tolist(), dropped, strict=True
            )
        ]

    def _caption(self, value: Any, rng: np.random.Generator) -> str:
        if self.templates is not None:
            return self.templates.caption(int(value), rng, self.options.word_dropout)
        texts = [text for text in (value if isinstance(value, list) else [value]) if text]
        return without_words(texts[rng.integers(len(texts))], rng, self.options.word_dropout) if texts else ""

    def all(self) -> Iterator[str]:
        """Every caption with all words, in the data's order; of a stream those of the first rows."""
        if self.templates is not None:
            yield from self.templates.all()
            return
        for texts in self.data.values(self.data.text_column):
            yield from (text for text in (texts if isinstance(texts, list) else [texts]) if text)

    def examples(self, count: int) -> list[str]:
        """A fixed set for previews: one caption per class, or the first distinct ones of the data."""
        if self.templates is not None:
            return [self.templates.templates[0].replace("{name}", names[-1]) for names in self.templates.names][:count]
        return list(islice(dict.fromkeys(self.all()), count))
