"""YAML files that people write: recipes of options, caption templates. Imports pyyaml alone.

YAML guesses what a word is: `no` a truth value, `010` the number 8, `12:30` the number 750, `2024-05-01` a date, `1e3` text.
Here every word stays as it is written, and whoever knows what it stands for reads it, as from a command line. Only an entry
without a value, or with null, is None.
"""

from pathlib import Path
from typing import Any

import yaml

DEEPEST, LARGEST = 8, 2**20  # levels, bytes


class _Loader(yaml.BaseLoader):
    """All scalars are strings, but for an entry's unquoted null; entries are written once, and in full."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not supported", problem_mark=event.start_mark)
        if self.depth >= DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"it is nested more than {DEEPEST} deep", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        is_entry = isinstance(index, yaml.Node)  # otherwise it is in a list, or a key
        if is_entry and isinstance(node, yaml.ScalarNode) and node.style is None and node.value in ("null", "~", ""):
            node.tag = "tag:yaml.org,2002:null"
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be one word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def read_yaml(path: str | Path) -> Any:
    """What a file holds, as dicts, lists, strings and None. Raises OSError if it cannot be read, and ValueError, with the line,
    if it is not YAML or more than such a file needs.
    """
    content = Path(path).read_bytes()
    if len(content) > LARGEST:
        raise ValueError(f"it has {len(content):,} bytes, more than {LARGEST:,}")
    try:
        return yaml.load(content.decode("utf-8-sig"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
