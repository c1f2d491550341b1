"""READMEs that several hands write: our sections, and the front matter, change in place; all else stays as it is.

Sections stand between marks, each on a line of its own outside of code blocks. In the front matter, keys are changed one by
one, so that comments, order and unknown keys stay. Imports huggingface_hub and yaml. Called by `card` and `upload`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

MARK = re.compile(r" {0,3}<!-- (?P<end>/?)ddpm-pipeline: (?P<name>[\w-]+) -->(?=\s*$)")
FENCE = re.compile(r" {0,3}(?P<fence>`{3,}(?=[^`]*$)|~{3,})")  # the beginning of a code block, CommonMark 4.5
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


class Section(NamedTuple):
    """Where the text between two marks lies."""

    name: str
    start: int
    end: int


def decoded(content: bytes) -> str:
    """The text of a README, with its line ends as they are: UTF-8 or UTF-16, maybe with a byte order mark, or else Latin-1."""
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError:
        return content.decode("latin-1")


def sections(readme: str) -> list[Section]:
    """Our sections in their order. A mark without its partner is none, and neither are marks in code blocks."""
    found, fence, opened = [], "", None
    front = REGEX_YAML_BLOCK.match(readme)
    position = front.end() if front else 0
    for line in readme[position:].split("\n"):
        mark = None if fence else MARK.match(line)
        if fence and re.fullmatch(rf" {{0,3}}{fence[0]}{{{len(fence)},}}\s*", line):
            fence = ""
        elif not fence and (code := FENCE.match(line)):
            fence = code["fence"]
        elif mark and not mark["end"]:
            opened = Section(mark["name"], position + mark.end(), 0)
        elif mark and opened is not None:
            if mark["name"] == opened.name:
                found.append(opened._replace(end=position + mark.start()))
            opened = None
        position += len(line) + 1
    return found


def section_texts(readme: str) -> dict[str, str]:
    return {name: readme[start:end] for name, start, end in sections(readme)}


def with_sections(readme: str, texts: Mapping[str, str]) -> str:
    """The README with these texts, whose lines end in a line feed, between its marks."""
    for name, start, end in reversed(sections(readme)):
        if name in texts:
            readme = readme[:start] + with_line_ends_of(readme, texts[name]) + readme[end:]
    return readme


def with_line_ends_of(readme: str, text: str) -> str:
    """A text whose lines end in a line feed, with those that the README begins with."""
    return text.replace("\n", "\r\n") if re.match(r"[^\n]*\r\n", readme) else text


def metadata(readme: str) -> dict[str, Any]:
    """The front matter; {} if there is none. Raises ValueError if it is not a YAML mapping."""
    front = REGEX_YAML_BLOCK.match(readme)
    try:
        content = yaml.safe_load(f"{front[2]}\n") if front else None  # a text block ends in the line end
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates such as 2024-13-45
        raise ValueError(f"its front matter is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict | None):
        raise ValueError(f"its front matter must hold `key: value` lines, not a {type(content).__name__}")
    return content or {}


def with_metadata(readme: str, changes: Mapping[str, Any]) -> str:
    """The README with these keys of its front matter set, or removed where the value is None; other lines stay as they are."""
    front, before = REGEX_YAML_BLOCK.match(readme), metadata(readme)
    if all(before.get(key) == value for key, value in changes.items()):
        return readme
    after = {key: value for key, value in (before | changes).items() if value is not None or key not in changes}
    if front is None:
        return f"---\n{yaml_dump(after, sort_keys=False)}---\n\n{readme}"
    for block in (_edited(front[2], changes), yaml_dump(after, sort_keys=False)):
        edited = front[1] + with_line_ends_of(readme, block.rstrip("\n")) + front[3] + readme[front.end() :]
        try:
            if yaml_dump(metadata(edited), sort_keys=False) == yaml_dump(after, sort_keys=False):  # == would take aliases apart
                return edited
        except ValueError:
            pass  # in place it cannot be done: the front matter is a single line, has anchors, ...
    raise ValueError("its front matter cannot be changed")


def _edited(block: str, changes: Mapping[str, Any]) -> str:
    """YAML lines with the lines of some top-level keys replaced, and those of new keys at the end."""
    lines = block.replace("\r\n", "\n").split("\n")
    root = yaml.compose("\n".join(lines), Loader=yaml.SafeLoader)
    starts = {key.value: key.start_mark.line for key, _ in root.value} if isinstance(root, yaml.MappingNode) else {}
    for key, start in sorted(starts.items(), key=lambda item: -item[1]):
        if key in changes:
            end = min((other for other in starts.values() if other > start), default=len(lines))
            while not lines[end - 1].strip() or lines[end - 1].startswith("#"):  # these belong to the key that follows
                end -= 1
            lines[start:end] = _yaml_lines(key, changes[key])
    for key, value in changes.items():
        if key not in starts:
            lines += _yaml_lines(key, value)
    return "\n".join(lines)


def _yaml_lines(key: str, value: Any) -> list[str]:
    return [] if value is None else yaml_dump({key: value}, sort_keys=False).splitlines()


def private_lines(text: str) -> dict[int, str]:
    """What in a text should not leave the machine: by number of the line, what it looks like."""
    home = str(Path.home())
    # of a home such as /train the name alone is no secret, and common in prose
    follows = r"(?![\w.-])" if home.count("/") + home.count("\\") > 1 else r"(?=[/\\][\w.])"
    local = re.compile(rf"(?:(?<![\w./~:-])|(?<=file://)){re.escape(home)}{follows}")
    found = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if TOKEN.search(line):
            found[number] = "a Hub token (hf_...)"
        elif home != "/" and local.search(line):
            found[number] = "a path in the home folder"
    return found
