"""Pipeline folders that load with diffusers alone, and carry our code for those who want it.

A folder's `model_index.json` names stock classes; `pipeline.py` and the modules it imports lie beside it. On loading, its
configs are checked before anything is built from them. Travels inside model repositories.
"""

import inspect
import json
import math
import os
import re
import sys
import tempfile
import threading
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from torch.nn.modules.module import register_module_parameter_registration_hook

from .tables_alpha_ddpm import warn

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}  # of components that need no custom code
INDEX = "model_index.json"
LOADED_BY_NAME = {"pipeline.py", "modular_alpha_ddpm.py"}
MAX_CONFIG_BYTES = 32 * 2**20
MAX_INTEGER = 2**24
# Larger values, by a part of their name, would hang or exhaust the memory long before they are compared with the weights
LIMITS = {"num_train_timesteps": 100_000, "layers": 1_000, "sample_size": 16_384, "channels": 2**16, "groups": 2**16}
POSITIVE = ("sample_size", "in_channels", "out_channels")
# What a model may have for each byte of its weights, and in addition: a number takes at least one byte, and a tensor about 64
# in the header. Weights that are shared, which are stored once, stay within.
MOST_NUMBERS, MOST_TENSORS = (4, 2**20), (1 / 16, 1_000)

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_REFUSED = (
    "only safetensors weights are loaded and saved, because a pickle (.bin, .pt, .ckpt) can run any code when it is opened. If "
    "you trust the file, convert it once with diffusers: DDPMPipeline.from_pretrained(..., use_safetensors=False)"
    ".save_pretrained(folder)"
)


class StockFormatMixin:
    """Saving and loading for pipelines of this package; goes before `DiffusionPipeline` among the bases."""

    _stock_class: ClassVar[str]  # stands for the pipeline in its index
    _scheduler_class: ClassVar[type]  # replaces stock's
    _blocks_class: ClassVar[type]  # its blocks of Modular Diffusers
    _stock_components: ClassVar[dict[str, Any]] = {}  # what else the stock class wants in the index

    @classmethod
    def shipped_files(cls) -> dict[str, Path]:
        """The code that goes into a repository, by its name there: the pipeline's file and the siblings that it imports."""
        package = __name__.rpartition(".")[0]
        ours = (base for base in cls.__mro__ if base.__module__.rpartition(".")[0] == package)  # not a user's subclass
        source = Path(inspect.getfile(next(ours)))
        names = sorted(f"{name}.py" for name in get_relative_imports(source))  # as diffusers' loader follows them
        return {"pipeline.py": source} | {name: source.with_name(name) for name in names}

    @classmethod
    def shipped_code(cls) -> dict[str, str]:
        """The text of these files. diffusers' loader asks the Hub for what a file imports once for every chain of imports that
        leads there, hundreds of times in all. What it loads by name imports all of them, so the others' imports are written
        as `from.name`, which it does not look for.
        """
        texts = {name: source.read_text("utf-8") for name, source in cls.shipped_files().items()}
        return {
            name: text if name in LOADED_BY_NAME else re.sub(r"(?m)^( *)from \.(?=\w)", r"\1from.", text)
            for name, text in texts.items()
        }

    def to_json_string(self) -> str:
        """`model_index.json` with the names of the stock classes."""
        index = json.loads(super().to_json_string())
        for private in ("_module", "_name_or_path"):  # the latter may be a local path
            index.pop(private, None)
        index |= {"_class_name": self._stock_class, **self._stock_components}
        if hasattr(self.scheduler, "p_mean_variance"):
            index["scheduler"] = ["diffusers", "DDPMScheduler"]
        elif hasattr(diffusers, type(self.scheduler).__name__):  # not "deprecated", where diffusers itself finds nothing
            index["scheduler"][0] = "diffusers"
        if index.get("tokenizer") == ["transformers", "TokenizersBackend"]:
            index["tokenizer"][1] = "PreTrainedTokenizerFast"  # its name before transformers 5, still an alias
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json`, which diffusers does last of all, and the code of this pipeline and its blocks."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name, code in self.shipped_code().items():
            Path(save_directory, name).write_text(code, "utf-8")
        _tidy_configs(Path(save_directory))
        self._blocks_class().save_pretrained(save_directory)  # modular_config.json
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
        """Write a folder that loads with diffusers alone, as safetensors whatever `safe_serialization`, and push it if asked.

        Weights of the same variant that were saved there before are replaced, whether they were sharded or not; other files
        stay. ValueError, before anything is written, where a file or a link is in the way.
        """
        _warn_of_pickles(safe_serialization)
        names = kwargs.keys() & {"repo_id", "private", "token", "commit_message", "create_pr"}
        hub_options = {name: kwargs.pop(name) for name in names}
        folder = Path(save_directory)
        _check_place(folder, [name for name, component in self.components.items() if component is not None])
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
            super().save_pretrained(new, True, variant, max_shard_size, **kwargs)
            _replace(folder, Path(new), variant)
        if push_to_hub:
            repo_id = hub_options.pop("repo_id", None) or folder.resolve().name
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

        Weights are pushed as safetensors, whatever `safe_serialization`.
        """
        options = {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        _warn_of_pickles(safe_serialization)
        push_pipeline = getattr(sys.modules.get(__package__), "push_pipeline", None)  # this package's own, or none
        if subfolder is not None or push_pipeline is None:
            return super().push_to_hub(repo_id, variant=variant, subfolder=subfolder, **options)
        return push_pipeline(self, repo_id, variant=variant, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load safetensors. Raises ValueError for a malformed or absurd config, OSError if there are no safetensors weights."""
        if kwargs.get("use_safetensors") is None:  # diffusers' default, under which it may open pickles
            kwargs["use_safetensors"] = True
        if kwargs["use_safetensors"] is not True:
            raise ValueError(f"use_safetensors={kwargs['use_safetensors']!r}: {PICKLE_REFUSED}")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            found = _pickles_of(Path(pretrained_model_name_or_path))
            if not found and "the necessary `safetensors` weights" not in str(error):  # as diffusers says of a repository
                raise
            problem = f"its weights are pickles ({', '.join(found)})" if found else "it has no safetensors weights"
            raise OSError(f"{pretrained_model_name_or_path} cannot be loaded: {problem}; {PICKLE_REFUSED}.") from error

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


def _warn_of_pickles(safe_serialization: bool) -> None:
    if not safe_serialization:
        reason = "a pickle can run any code when it is opened"
        warn(f"safe_serialization=False is ignored: weights are saved as safetensors, because {reason}.", stacklevel=3)


def _pickles_of(folder: Path) -> list[str]:
    """Pickled weights of components that have no safetensors."""
    places = [folder, *folder.glob("*/")] if folder.is_dir() else []
    lacking = [place for place in places if not any(place.glob("*.safetensors"))]
    files = [file for place in lacking for file in place.glob("*model*") if file.suffix in PICKLED]
    return sorted(file.relative_to(folder).as_posix() for file in files)


def _check_place(folder: Path, components: list[str]) -> None:
    """Raise ValueError where saving would meet a file instead of a folder, or change what a link points to."""
    places = [folder / name for name in components]
    for place in (folder, *places):
        if (place.exists() and not place.is_dir()) or (place != folder and place.is_symlink()):
            kind = "link" if place.is_symlink() else "file"
            raise ValueError(f"{place} is a {kind}, where saving needs a folder; remove it, or save to another folder.")


def _replace(folder: Path, new: Path, variant: str | None) -> None:
    """Move a saved pipeline from `new` into `folder`, in place of the weights of this variant; the index last."""
    dotted = re.escape(f".{variant}") if variant else ""
    shard, stem = r"-\d{5}-of-\d{5}", r"(?:diffusion_pytorch_)?model"
    weights = rf"{stem}(?:{dotted}(?:{shard})?|{shard}{dotted})\.safetensors|{stem}\.safetensors\.index{dotted}\.json"
    saved = sorted(
        (path.relative_to(new) for path in new.rglob("*") if path.is_file()), key=lambda path: (str(path) == INDEX, path)
    )
    for component in sorted({path.parent for path in saved} - {Path()}):
        (folder / component).mkdir(parents=True, exist_ok=True)
        for path in (folder / component).iterdir():
            if re.fullmatch(weights, path.name) and component / path.name not in saved:
                path.unlink()
    for path in saved:
        os.replace(new / path, folder / path)


def check_folder(folder: str | os.PathLike, scheduler_class: type | None = None) -> None:
    """Raise ValueError if the index or a config of a pipeline folder is malformed, has wrong types, or is absurd."""
    folder, index_path = Path(folder), Path(folder, INDEX)
    if not index_path.is_file():
        return  # diffusers says what is missing
    for name, value in read_json(index_path).items():
        if name.startswith("_") or not isinstance(value, list | str | dict):
            continue  # an option of the pipeline rather than a component
        component_class = _component_class(index_path, folder, name, value)
        place = folder / name if (folder / name).is_dir() else folder  # early repositories have all files at the top
        config_file = place / ("scheduler_config.json" if name == "scheduler" else "config.json")
        if component_class is not None and config_file.is_file():
            _check_config(config_file, component_class, scheduler_class)


def read_json(path: Path) -> dict[str, Any]:
    """A config file's object. Raises ValueError if it is too large, not JSON, holds NaN, or is not an object."""
    if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {size} bytes; the largest config that is read has {MAX_CONFIG_BYTES}.")

    def constant(name: str) -> float:
        if name == "NaN":
            raise ValueError("it holds NaN, which is not a JSON number")
        return float(name)  # an infinity, which diffusers writes for some of its own defaults

    try:
        content = json.loads(path.read_text("utf-8"), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a valid config: {error}. Download or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _component_class(index_path: Path, folder: Path, name: str, value: Any) -> type | None:
    """The class that an entry of the index names; None if it has none, or is code of the folder. ValueError otherwise."""
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(f"{index_path} has a component called {name!r}; names are letters, digits and underscores.")
    strings = isinstance(value, list) and len(value) == 2 and all(isinstance(entry, str | None) for entry in value)
    if not strings or (value[0] is None) != (value[1] is None):
        raise ValueError(f"{index_path}: {name} must be [library, class], not {value!r}.")
    library, class_name = value
    if library is None or not re.fullmatch(r"\w+", library):
        module = None
    else:  # besides the libraries, a pipeline of diffusers that has models of its own
        module = LIBRARIES.get(library) or getattr(diffusers.pipelines, library, None)
    if not isinstance(module, types.ModuleType):
        if library is None or (re.fullmatch(r"\w+", library) and (folder / name / f"{library}.py").is_file()):
            return None
        raise ValueError(f"{index_path}: {name} comes from {library!r}; known libraries are {', '.join(LIBRARIES)}.")
    component_class = getattr(module, class_name, None)
    if not isinstance(component_class, type):
        raise ValueError(f"{index_path}: {name} is a {class_name!r}, which the installed {library} lacks; upgrade {library}.")
    if issubclass(component_class, diffusers.DiffusionPipeline):
        # whose own components diffusers would load without these checks, and from pickles
        raise ValueError(f"{index_path}: {name} is a pipeline, {class_name}; its parts must be models, each in its own folder.")
    return component_class


def _check_config(path: Path, component_class: type, scheduler_class: type | None) -> None:
    config, name_of_class = read_json(path), component_class.__name__
    _check_numbers(path, config, issubclass(component_class, diffusers.SchedulerMixin))
    parameters = inspect.signature(component_class.__init__).parameters
    known = {name: config[name] for name in parameters if name in config}
    if hasattr(component_class, "load_config"):  # of diffusers
        for name, value in known.items():
            parameter = parameters[name]
            if value != parameter.default and not _fits(value, parameter.annotation):
                wanted = inspect.formatannotation(parameter.annotation)
                raise ValueError(f"{path}: {name}={value!r} has the wrong type; {name_of_class} takes {wanted}.")
    try:  # what is built checks its settings
        if issubclass(component_class, diffusers.ModelMixin):
            _check_size(path, lambda: component_class.from_config(known))
        elif issubclass(component_class, transformers.PreTrainedModel):
            _check_size(path, lambda: component_class(component_class.config_class.from_dict(config)))
        elif scheduler_class is not None and component_class is diffusers.DDPMScheduler:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they come when the scheduler is built for use
                scheduler_class.from_config(config)
    except Exception as error:  # whatever a class raises for settings that do not fit together
        raise ValueError(f"{path}: {error}") from error


def _check_numbers(path: Path, config: dict[str, Any], is_scheduler: bool) -> None:
    of_ddpm = inspect.signature(diffusers.DDPMScheduler.__init__).parameters
    for name, value in _leaves(config):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        limit = min((limit for part, limit in LIMITS.items() if part in name), default=MAX_INTEGER)
        may_be_infinite = is_scheduler and name not in of_ddpm  # such as DPM-Solver's lambda_min_clipped
        if not abs(value) <= limit and not (may_be_infinite and math.isinf(value)):
            raise ValueError(f"{path}: {name}={value!r} exceeds the largest supported value, {limit}.")
        if name in POSITIVE and value < 1:
            raise ValueError(f"{path}: {name}={config.get(name)!r} must be at least 1.")


def _check_size(path: Path, build: Callable[[], Any]) -> None:
    """Build a model without memory for its weights; ValueError as soon as it is out of proportion to those stored beside."""
    stored = sum(file.stat().st_size for file in path.parent.glob("*.safetensors"))
    if stored:  # otherwise diffusers says that there are no weights, before it builds anything
        most = (per_byte * stored + more for per_byte, more in (MOST_NUMBERS, MOST_TENSORS))
        build_within(build, *most, f"go with weights of {stored} bytes")


def build_within(build: Callable[[], Any], most_numbers: float, most_tensors: float, what: str) -> None:
    """Build a model without memory for its weights; ValueError as soon as it has more parameters than `what` says."""
    thread, numbers, tensors = threading.get_ident(), 0, 0

    def count(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
        nonlocal numbers, tensors
        if threading.get_ident() != thread:
            return
        numbers, tensors = numbers + parameter.numel(), tensors + 1
        if numbers > most_numbers or tensors > most_tensors:
            raise ValueError(f"it describes a model with at least {numbers} parameters in {tensors} tensors, more than {what}.")

    with register_module_parameter_registration_hook(count), torch.device("meta"):
        build()


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
        fixed_length = typing.get_origin(annotation) is tuple and len(items) > 1  # one is written where any number is meant
        if not isinstance(value, list) or (fixed_length and len(value) != len(items)):
            return False
        return all(any(_fits(entry, item) for item in items or [Any]) for entry in value)
    return True
