"""Where the figures of an evaluation go: the terminal, a JSON file and the model card. Files are tried before it begins."""

import glob
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.bundled import BUNDLED
from ..data.options import RESIZE, DataOptions
from ..data.splits import split_word
from ..hub.card import CARD, CLOSEST_PAIRS, card_of_folder, read_card, record_evaluation
from ..support.atomic import check_writable, write_text
from ..support.errors import ConfigError
from ..support.exceptions import describe_exception
from ..support.pictures import save_picture
from ..support.yaml_files import read_yaml
from .figures import measurements
from .options import EvaluationOptions

TRAINING_RECORD = "training_config.yaml"
OF_SHARES = ("validation_split", "resize", "random_crop", "random_resized_crop")  # options that say which images a share is
PAIRS = "the samples nearest to a training image, each above that image: by pixels and, in a second pair of rows, by features"


def json_file(options: EvaluationOptions) -> Path:
    folder, output = Path(options.sampling.model), options.results.output
    return Path(output).resolve() if output else (folder if folder.is_dir() else Path()) / "evaluation.json"


def picture_file(options: EvaluationOptions) -> Path:
    return json_file(options).with_name(CLOSEST_PAIRS)


def card_folder(options: EvaluationOptions) -> Path | None:
    """The model's folder, if its card is to be updated."""
    folder = Path(options.sampling.model)
    return folder if options.results.update_card and (folder / CARD).is_file() else None


def split_name(data: DataOptions) -> str | None:
    """The split, as results name it; None for local files without splits, all of which the default stands for."""
    path = Path(data.dataset).expanduser()
    local = data.dataset not in BUNDLED and (path.exists() or glob.has_magic(data.dataset))
    with_splits = path.is_dir() and any(split_word(entry.stem)[0] for entry in path.iterdir())
    return data.split if data.split != "train" or not local or with_splits else None


def told_otherwise(options: EvaluationOptions) -> str:
    """What the record of the training run in the model's folder says of its images, where an evaluation by held-out images says
    something else; "" if nothing does, or there is no record.
    """
    data, recorded = options.data, _recorded(options)
    if not data.validation_split:
        return ""
    given = {name: str(value) for name, value in vars(data).items() if value is not None}
    names = ("split", *(OF_SHARES if data.held_out_share else ()))  # a share is chosen by the images as they are stored
    differing = [name for name in names if name in recorded and recorded[name] != given.get(name)]
    return ", ".join(f"--{name} {recorded[name] or 'none'}" for name in differing)


def resize_of(options: EvaluationOptions) -> str:
    """How images get the model's size: as asked for, or as the training run says whose record is in the model's folder."""
    recorded = _recorded(options).get("resize")
    return options.data.resize or (recorded if recorded in RESIZE else "crop")


def _recorded(options: EvaluationOptions) -> dict[str, Any]:
    """The options of the training run in the model's folder; none if it has no such record."""
    try:
        found = read_yaml(Path(options.sampling.model) / TRAINING_RECORD)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_destinations(options: EvaluationOptions) -> None:
    """Raises ConfigError if the figures could not be written."""
    path, folder = json_file(options), card_folder(options)
    for file in [path, picture_file(options)][: 2 if options.data.validation_split else 1]:
        _try_to_write(file, "or name another with --output")
    if folder is None:
        return
    advice = "or leave the card as it is with --update_card false"
    _try_to_write(folder / CARD, advice)
    try:
        card_of_folder(folder, folder.name, read_card(folder))
    except ValueError as error:  # a model of the early layout, say
        raise ConfigError(f"{folder / CARD} cannot be updated: {error} Mend it, {advice}.") from error


def _try_to_write(path: Path, advice: str) -> None:
    try:
        check_writable(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; make its folder writable, {advice}.") from error


def write_results(options: EvaluationOptions, results: Mapping[str, Any], pairs: Image.Image | None = None) -> None:
    """Print the figures of samples (those of likelihoods were printed before), and write all figures and the picture of the
    closest pairs; if that fails in spite of all, print the results as JSON and raise ConfigError.
    """
    measured = measurements(results)
    for one in measured:
        if not one.metric.startswith("bits/dim"):
            print(one, file=sys.stderr, flush=True)
    text, path, folder = json.dumps(results, indent=2), json_file(options), card_folder(options)
    try:
        write_text(path, text + "\n")
        if pairs is not None:
            path = picture_file(options)
            save_picture(pairs, path)
        if folder is not None:
            pictures = {path.name: PAIRS} if pairs is not None and path.resolve().parent == folder.resolve() else {}
            path = folder / CARD
            record_evaluation(folder, measured, pictures)
    except Exception as error:
        print(text, flush=True)
        raise ConfigError(f"{path} cannot be written: {describe_exception(error)}. The figures are printed above.") from error
