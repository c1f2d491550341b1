"""The files of a pipeline: which ones of a folder go to the Hub, and which ones of a repository a push makes stale.

Imports the standard library alone. Called by `upload` and `card`.
"""

import json
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")
# pushed from the top of a folder
EXTRA_FILES = ("README.md", "modular_config.json", "evaluation.json", "*.png", "*.gif", "*.jpg")

# What saving a pipeline writes into the folder of a component, besides weights
CONFIGS = frozenset((
    "config.json", "generation_config.json", "scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json",
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model",
))  # fmt: skip
SHARD = re.compile(r"-\d{5}-of-\d{5}")
WEIGHTS = re.compile(
    r"(?:(?:diffusion_)?pytorch_)?model(?:\.(?P<variant>[\w-]+))?\.(?:safetensors|bin)"
    r"(?:\.index(?:\.(?P<variant_of_index>[\w-]+))?\.json)?"
)


def files_to_push(folder: Path, include: Sequence[str] = ()) -> dict[str, Path]:
    """The files of a pipeline folder by their paths in the repository; no checkpoints, logs or hidden files.

    `include` are patterns of further files, relative to the folder. Raises ValueError if the folder is not a pipeline,
    contains pickled weights, or links to files outside of it.
    """
    chosen = [folder / INDEX]
    for name in sorted(components_of(read_object(folder / INDEX))):
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} has no folder {name!r}, which its {INDEX} names; export the pipeline again.")
        chosen += [path for path in sorted((folder / name).rglob("*")) if path.is_file()]
    if (code := folder / "pipeline.py").is_file():
        modules = re.findall(r"^from \.(\w+) import", code.read_text("utf-8"), flags=re.MULTILINE)
        chosen += [code, *(folder / f"{name}.py" for name in modules)]
    for pattern in (*EXTRA_FILES, *include):
        try:
            chosen += [path for path in sorted(folder.glob(pattern)) if path.is_file()]
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"the pattern {pattern!r} must name files relative to {folder}, such as logs/*.") from error
    files = {path.relative_to(folder).as_posix(): path for path in chosen}
    for name, path in files.items():
        if path.suffix in PICKLE_SUFFIXES:
            raise ValueError(f"{path} is a pickle, which can run any code when it is opened; save it as safetensors.")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is a link to a file outside of {folder}; to push it, copy it into the folder.")
        if any(part.startswith(".") for part in Path(name).parts):
            raise ValueError(f"{path} is hidden, so probably not meant to be pushed; remove or rename it.")
    return files


def components_of(index: Mapping[str, Any]) -> set[str]:
    """The components that a `model_index.json` names; each has a folder of its name."""
    return {name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None}


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object in a pipeline's folder. Raises ValueError if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path.parent} is not a pipeline folder: {path.name}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def stale_files(present: Mapping[str, str | None], pushed: Mapping[str, str], old: Set[str], new: Set[str]) -> list[str]:
    """The files of a repository that belong to an earlier model and would be loaded, or mislead, beside what is pushed.

    In the folder of a component that the index no longer names, that is everything that saving wrote; in the others, what
    saving wrote then and did not write now. Weights of another variant stay as long as the weights without a variant are
    pushed unchanged, or not at all. Files with names that no pipeline writes always stay, and so does everything outside of
    the components' folders.

    Args:
        present: SHA-256 of the repository's files by their paths; None if it is unknown.
        pushed: SHA-256 of what is pushed.
        old, new: the components in the repository's index, and those in the index that is pushed.
    """
    places = {path: _component_and_variant(path) for path in (*present, *pushed)}
    written = {places[path] for path in pushed}
    changed = {places[path][0] for path in pushed if places[path][1] == "" and present.get(path) != pushed[path]}
    stale = []
    for path in sorted(present.keys() - pushed.keys()):
        component, variant = places[path]
        if component not in old | new or (variant is None and Path(path).name not in CONFIGS):
            continue
        of_other_variant = component in new and variant is not None and (component, variant) not in written
        if not of_other_variant or component in changed:
            stale.append(path)
    return stale


def _component_and_variant(path: str) -> tuple[str, str | None]:
    """The folder of a file and the variant in its name: "fp16" for model.fp16-00001-of-00002.safetensors, "" for
    model.safetensors and its index, None for what are not weights.
    """
    component, _, name = path.rpartition("/")
    weights = WEIGHTS.fullmatch(SHARD.sub("", name))
    return component, weights and (weights["variant"] or weights["variant_of_index"] or "")
