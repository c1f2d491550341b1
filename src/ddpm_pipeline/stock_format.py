"""Pipeline folders that load with diffusers alone, and carry our code for those who want it.

A folder's `model_index.json` names stock classes; `pipeline.py` and the modules it imports lie beside it. On loading, its
configs are checked before anything is built from them. Travels inside model repositories; imports no sibling.
"""

import inspect
import json
import math
import os
import re
import shutil
import sys
import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import diffusers
from diffusers.utils.dynamic_modules_utils import get_relative_imports

LIBRARIES = ("diffusers", "transformers")  # where a folder's components may come from without custom code
MAX_CONFIG_BYTES = 32 * 2**20
MAX_INTEGER = 2**24
# Larger values, by a part of their name, would hang or exhaust the memory long before they are compared with the weights
LIMITS = {"num_train_timesteps": 100_000, "layers": 1_000, "sample_size": 16_384, "channels": 2**16, "groups": 2**16}

PICKLE_REFUSED = (
    "only safetensors weights are loaded and saved, because a pickle (.bin, .pt, .ckpt) can run any code when it is opened. If "
    "you trust the file, convert it once with diffusers: DDPMPipeline.from_pretrained(..., use_safetensors=False)"
    ".save_pretrained(folder)"
)


class StockFormatMixin:
    """Saving and loading for pipelines of this package; goes before `DiffusionPipeline` among the bases."""

    _stock_class: ClassVar[str]  # stands for the pipeline in its index
    _scheduler_class: ClassVar[type]  # replaces stock's
    _stock_components: ClassVar[dict[str, Any]] = {}  # what else the stock class wants in the index

    @classmethod
    def shipped_files(cls) -> dict[str, Path]:
        """The code that goes into a repository, by its name there: the pipeline's file and the siblings that it imports."""
        package = __name__.rpartition(".")[0]
        ours = (base for base in cls.__mro__ if base.__module__.rpartition(".")[0] == package)  # not a user's subclass
        source = Path(inspect.getfile(next(ours)))
        names = sorted(f"{name}.py" for name in get_relative_imports(source))  # as diffusers' loader follows them
        return {"pipeline.py": source} | {name: source.with_name(name) for name in names}

    def to_json_string(self) -> str:
        """`model_index.json` with the names of the stock classes."""
        index = json.loads(super().to_json_string())
        for private in ("_module", "_name_or_path"):  # the latter may be a local path
            index.pop(private, None)
        index |= {"_class_name": self._stock_class, **self._stock_components}
        if hasattr(self.scheduler, "p_mean_variance"):
            index["scheduler"] = ["diffusers", "DDPMScheduler"]
        if index.get("tokenizer") == ["transformers", "TokenizersBackend"]:
            index["tokenizer"][1] = "PreTrainedTokenizerFast"  # its name before transformers 5, still an alias
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json`, which diffusers does last of all, and the code of this pipeline beside it."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name, source in self.shipped_files().items():
            target = Path(save_directory, name)
            if source.resolve() != target.resolve():
                shutil.copyfile(source, target)
        _tidy_configs(Path(save_directory))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a folder that loads with diffusers alone, and push it if asked; ValueError unless `safe_serialization`."""
        if not safe_serialization:
            raise ValueError(f"safe_serialization=False: {PICKLE_REFUSED}")
        names = kwargs.keys() & {"repo_id", "private", "token", "commit_message", "create_pr"}
        hub_options = {name: kwargs.pop(name) for name in names}
        super().save_pretrained(str(save_directory), True, variant, max_shard_size, **kwargs)
        if push_to_hub:
            repo_id = hub_options.pop("repo_id", None) or Path(save_directory).resolve().name
            self.push_to_hub(repo_id, variant=variant, **hub_options)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Push with a model card that keeps manual edits, or as diffusers does where the package is not installed.

        Raises ValueError unless `safe_serialization`.
        """
        options = {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        if not safe_serialization:
            raise ValueError(f"safe_serialization=False: {PICKLE_REFUSED}")
        push_pipeline = getattr(sys.modules.get(__package__), "push_pipeline", None)  # this package's own, or none
        if subfolder is not None or push_pipeline is None:
            return super().push_to_hub(repo_id, variant=variant, subfolder=subfolder, **options)
        return push_pipeline(self, repo_id, variant=variant, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load safetensors. Raises ValueError for a malformed or absurd config, OSError if there are no safetensors weights."""
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError(f"use_safetensors={kwargs['use_safetensors']!r}: {PICKLE_REFUSED}")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            raise OSError(f"{pretrained_model_name_or_path} cannot be loaded: {PICKLE_REFUSED}. ({error})") from error

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """diffusers reads the index of a repository with this, before it downloads the rest."""
        return read_json(Path(json_file))

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """The index; that of a folder only after all its configs have been checked."""
        if os.path.isdir(pretrained_model_name_or_path):
            check_folder(pretrained_model_name_or_path, cls._scheduler_class)
        return super().load_config(pretrained_model_name_or_path, **kwargs)


def _tidy_configs(folder: Path) -> None:
    """Drop where components came from, maybe a local path, and the precision saved last, in which transformers would load."""
    for path in [*folder.glob("*/config.json"), *folder.glob("*/tokenizer_config.json")]:
        config = json.loads(path.read_text("utf-8"))
        tidy = {name: value for name, value in config.items() if name not in ("_name_or_path", "name_or_path")}
        tidy |= dict.fromkeys(tidy.keys() & {"dtype", "torch_dtype"}, "float32")
        if tidy != config:
            path.write_text(json.dumps(tidy, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def check_folder(folder: str | os.PathLike, scheduler_class: type | None = None) -> None:
    """Raise ValueError if the index or a config of a pipeline folder is malformed, has wrong types, or is absurd."""
    folder, index_path = Path(folder), Path(folder, "model_index.json")
    if not index_path.is_file():
        return  # diffusers says what is missing
    for name, value in read_json(index_path).items():
        if name.startswith("_") or not isinstance(value, list | str | dict):
            continue  # an option of the pipeline rather than a component
        _check_component(index_path, folder, name, value)
        if value[0] is None:
            continue
        place = folder / name if (folder / name).is_dir() else folder  # early repositories have all files at the top
        config_file = place / ("scheduler_config.json" if name == "scheduler" else "config.json")
        if config_file.is_file():
            _check_config(config_file, value, scheduler_class)


def read_json(path: Path) -> dict[str, Any]:
    """A config file's object. Raises ValueError if it is too large, not JSON, holds NaN, or is not an object."""
    if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {size} bytes; the largest config that is read has {MAX_CONFIG_BYTES}.")

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, which is not a JSON number")

    try:
        content = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a valid config: {error}. Download or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _check_component(index_path: Path, folder: Path, name: str, value: Any) -> None:
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(f"{index_path} has a component called {name!r}; names are letters, digits and underscores.")
    strings = isinstance(value, list) and len(value) == 2 and all(isinstance(entry, str | None) for entry in value)
    if not strings or (value[0] is None) != (value[1] is None):
        raise ValueError(f"{index_path}: {name} must be [library, class], not {value!r}.")
    if value[0] is None or value[0] in LIBRARIES:
        return
    if not (re.fullmatch(r"\w+", value[0]) and (folder / name / f"{value[0]}.py").is_file()):  # or custom code
        raise ValueError(f"{index_path}: {name} comes from {value[0]!r}; known libraries are {', '.join(LIBRARIES)}.")


def _check_config(path: Path, component: list[str], scheduler_class: type | None) -> None:
    config = read_json(path)
    for name, value in _leaves(config):
        limit = min((limit for part, limit in LIMITS.items() if part in name), default=MAX_INTEGER)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not (math.isfinite(value) and abs(value) <= limit):
            raise ValueError(f"{path}: {name}={value!r} exceeds the largest supported value, {limit}.")
    model = getattr(diffusers, component[1], None) if component[0] == "diffusers" else None
    if model is not None:
        for name, parameter in inspect.signature(model.__init__).parameters.items():
            if name in config and not _fits(config[name], parameter.annotation):
                wanted = inspect.formatannotation(parameter.annotation)
                raise ValueError(f"{path}: {name}={config[name]!r} has the wrong type; {component[1]} takes {wanted}.")
    if scheduler_class is not None and component == ["diffusers", "DDPMScheduler"]:
        try:  # it checks its settings
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they come when the scheduler is built for use
                scheduler_class.from_config(config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of all in a config that is no container; a list yields its length and its items."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, str(key))
    elif isinstance(value, list):
        yield name, len(value)
        for entry in value:
            yield from _leaves(entry, name)
    else:
        yield name, value


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a JSON value fits an annotation, such as `int | tuple[int, ...] | None`; True if unsure."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(annotation))
    if annotation in (None, types.NoneType, bool, str):
        return isinstance(value, annotation or types.NoneType)
    if annotation in (int, float):
        return isinstance(value, int if annotation is int else int | float) and not isinstance(value, bool)
    if annotation in (list, tuple) or typing.get_origin(annotation) in (list, tuple):
        items = [argument for argument in typing.get_args(annotation) if argument is not Ellipsis]
        return isinstance(value, list) and all(any(_fits(entry, item) for item in items or [Any]) for entry in value)
    return True
