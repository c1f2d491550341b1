"""Pipeline folders on their way to the Hub: whole on disk, with a card that says only what is known, pushed in one commit.

`python -m ddpm_pipeline.hub push FOLDER REPO` pushes a finished folder. Imports huggingface_hub alone, so that this takes
no seconds to start; pipelines come in as arguments. Called by the training scripts and by `push_to_hub` of the pipelines.
"""

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

CARD_TEMPLATE = Path(__file__).parent / "model_card.md"
INDEX = "model_index.json"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")
EXTRA_FILES = ("README.md", "evaluation.json", "*.png", "*.gif", "*.jpg")  # pushed from the top of a folder
ATTEMPTS = 5
FIRST_WAIT = 2.0  # seconds before the second attempt; doubled before each further one

OUR_SOURCE = "ddpm-pipeline"  # marks evaluation results of ours in a card's metadata
OUR_SOURCE_URL = "https://pypi.org/project/ddpm-pipeline/"
GENERATED = re.compile(
    r"^This is the model card of a .* This model card has been automatically generated\.$", re.MULTILINE
)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")

T = TypeVar("T")


class PushError(RuntimeError):
    """The Hub did not take a push; the message says why, and which command pushes the folder later."""


# ---- folders --------------------------------------------------------------------------------------


def export(pipe: "DiffusionPipeline", folder: str | Path, card: ModelCard | None = None) -> None:
    """Save `pipe` into `folder`, replacing an earlier export; what was there stays whole until the new one is.

    A card is written beside it; of one that is there already, only our sections are refreshed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        pipe.save_pretrained(temporary)
        if card is not None:
            readme = folder / "README.md"
            text = refresh_card(_read_text(readme), card) if readme.is_file() else str(card)
            _write_text(Path(temporary, "README.md"), text)
        for entry in sorted(Path(temporary).iterdir(), key=lambda path: path.name == INDEX):
            target = folder / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(entry, target)  # model_index.json last: with it the folder is a pipeline


def files_to_push(folder: Path, include: Sequence[str] = ()) -> dict[str, Path]:
    """The files of a pipeline folder by their paths in the repository; no checkpoints, logs or hidden files.

    `include` are patterns of further files, relative to the folder. Raises ValueError where the folder is no pipeline,
    holds pickled weights, or links to files outside of it.
    """
    index = _read_object(folder / INDEX)
    components = [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]
    chosen = [folder / INDEX]
    for name in components:
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} has no folder {name!r}, which its {INDEX} names; export the pipeline anew.")
        chosen += [path for path in sorted((folder / name).rglob("*")) if path.is_file()]
    if (folder / "pipeline.py").is_file():
        code = (folder / "pipeline.py").read_text("utf-8")
        modules = re.findall(r"^from \.(\w+) import", code, flags=re.MULTILINE)
        chosen += [folder / f"{name}.py" for name in ["pipeline", *modules]]
    chosen += [path for pattern in (*EXTRA_FILES, *include) for path in sorted(folder.glob(pattern)) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in chosen}
    root = folder.resolve()
    for name, path in files.items():
        if path.suffix in PICKLE_SUFFIXES:
            raise ValueError(f"{path} is a pickle, which can run any code when it is opened; save as safetensors.")
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"{path} is a link to a file outside of {folder}; copy it there if it is to be pushed.")
        if any(part.startswith(".") for part in Path(name).parts):
            raise ValueError(f"{path} is hidden, so probably not meant to be pushed; remove or rename it.")
    return files


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path.parent} is no pipeline folder: {path.name}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8")  # line ends as they are


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(text.encode("utf-8"))
    os.replace(temporary, path)


# ---- the card -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """One measured figure and what it depends on."""

    metric: str  # as it is called: "bits/dim", "FID", "KID"
    value: float
    num_images: int
    dataset: str
    split: str = "train"
    standard_error: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # steps, scheduler, feature extractor, seed, ...

    def as_eval_result(self, task_type: str = "unconditional-image-generation") -> EvalResult:
        return EvalResult(
            task_type=task_type,
            task_name="Image generation",
            dataset_type=self.dataset,
            dataset_name=self.dataset,
            dataset_split=self.split,
            metric_type=re.sub(r"\W+", "-", self.metric.lower()),
            metric_name=self.metric,
            metric_value=self.value,
            metric_args={"num_images": self.num_images, **self.settings},
            source_name=OUR_SOURCE,
            source_url=OUR_SOURCE_URL,
        )


@dataclass(frozen=True)
class _Kind:
    """What a card says of one kind of model."""

    our_class: str
    pipeline_tag: str
    what: str
    example: str  # arguments of a call
    plain_note: str = ""
    plain_draws: bool = True  # whether the stock class can be called


KINDS = {
    "unconditional": _Kind("AlphaDDPMPipeline", "unconditional-image-generation", "", ""),
    "class": _Kind(
        "AlphaDDPMPipeline", "unconditional-image-generation", "class-conditional ",
        "class_labels=[0], guidance_scale=2.0",
        plain_note=" it loads, but cannot be told a class, so it cannot draw", plain_draws=False,
    ),
    "text": _Kind(
        "AlphaDDPMTextToImagePipeline", "text-to-image", "text-conditional ",
        '"what it should show", guidance_scale=2.0',
    ),
}  # fmt: skip


def kind_of(index: Mapping[str, Any], unet: Mapping[str, Any]) -> str:
    """Which of `KINDS` a model is, by its index and its UNet's config."""
    if "text_encoder" in index:
        return "text"
    return "class" if unet.get("num_class_embeds") or unet.get("class_embed_type") else "unconditional"


def build_card(
    pipe: "DiffusionPipeline",
    *,
    name: str,
    repo_id: str | None = None,
    dataset: str | None = None,
    num_images: int | None = None,
    hub_dataset: str | None = None,
    license: str | None = None,
    training: Mapping[str, Any] | None = None,
    command: str | None = None,
    evaluation: Sequence[Measurement] | None = None,
    pictures: Mapping[str, str] | None = None,
    example: str = "",
) -> ModelCard:
    """The card of a model.

    Args:
        name: its title.
        repo_id: where it is loaded from, in the examples; `push` puts in the repository that it pushes to.
        dataset: what it was trained on, `num_images` of them, or a stream; `hub_dataset` if that is the name of one of the Hub.
        license: the model's, as the Hub spells it ("apache-2.0").
        training: facts as a table, and the `command` that trained it.
        evaluation: what was measured; [] says that nothing was, None leaves a card that is refreshed as it is.
        pictures: captions by the names of files in the folder.
        example: arguments of a call of the pipeline, as code: the prompt or label.
    """
    index = json.loads(pipe.to_json_string())
    return _card(
        index, pipe.unet.config, pipe.scheduler.config, name=name, repo_id=repo_id, dataset=dataset,
        num_images=num_images, hub_dataset=hub_dataset, license=license, training=training, command=command,
        evaluation=evaluation, pictures=pictures, example=example,
    )  # fmt: skip


def _card(
    index: Mapping[str, Any],
    unet: Mapping[str, Any],
    schedule: Mapping[str, Any],
    *,
    name: str,
    repo_id: str | None = None,
    dataset: str | None = None,
    num_images: int | None = None,
    hub_dataset: str | None = None,
    license: str | None = None,
    training: Mapping[str, Any] | None = None,
    command: str | None = None,
    evaluation: Sequence[Measurement] | None = None,
    pictures: Mapping[str, str] | None = None,
    example: str = "",
) -> ModelCard:
    kind_name = kind_of(index, unet)
    kind = KINDS[kind_name]
    tags = ["ddpm", OUR_SOURCE, "pytorch", *(["class-conditional"] if kind_name == "class" else [])]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=kind.pipeline_tag,
        tags=tags,
        license=license,
        datasets=[hub_dataset] if hub_dataset else None,
        **_evaluation_metadata(name, kind.pipeline_tag, evaluation),
    )
    channels = unet.get("in_channels", 3)
    colours = {1: "grey", 3: "RGB", 4: "RGBA"}.get(channels, f"{channels}-channel")
    size = unet.get("sample_size")
    width, height = size if isinstance(size, list | tuple) else (size, size)
    resolution = f"{colours} {width}x{height}"
    amount = f"{num_images:,} images" if num_images else "a stream"
    source = f", trained from scratch on {amount} of `{dataset}`" if dataset else ""
    total = schedule.get("num_train_timesteps", 1000)
    facts = dict(training or {})
    if training is not None and license:
        facts["licence"] = license
    table = ["| | |", "|---|---|", *(f"| {fact} | {value} |" for fact, value in facts.items())]
    card = ModelCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        name=name,
        repo_id=repo_id or name,
        summary=(
            f"A {kind.what}denoising diffusion probabilistic model (Ho et al. 2020) of {resolution} images{source}. "
            f"The diffusion process: {_diffusion(schedule)}."
        ),
        pictures=dict(pictures or {}),
        plain_note=kind.plain_note,
        # DDPMPipeline takes 1000 steps by default, however many there are
        plain_call=_example_call(example or kind.example, total) if kind.plain_draws else "",
        our_class=kind.our_class,
        our_call=_example_call(example or kind.example, min(100, total)),
        training_table="\n".join(table) if training else "",
        command=command or "",
        evaluation=_evaluation_text(evaluation),
        resolution=resolution,
    )
    _check_private(str(card))
    return card


def _example_call(arguments: str, steps: int) -> str:
    arguments = ", ".join(filter(None, (arguments, f"num_inference_steps={steps}")))
    return f"image = pipe({arguments}).images[0]"


def _diffusion(schedule: Mapping[str, Any]) -> str:
    """The schedule in words, as far as a scheduler's config tells it."""
    trained = schedule.get("trained_betas") is not None
    parts = [
        f"{schedule['num_train_timesteps']} steps" if "num_train_timesteps" in schedule else None,
        "betas of its own" if trained else f"{schedule.get('beta_schedule', 'linear')} schedule",
        f"{schedule.get('prediction_type', 'epsilon')} prediction",
        f"{schedule['variance_type']} variance" if schedule.get("variance_type") else None,
    ]
    return ", ".join(part for part in parts if part)


def _evaluation_metadata(name: str, task: str, evaluation: Sequence[Measurement] | None) -> dict[str, Any]:
    if not evaluation:
        return {}
    return {"model_name": name, "eval_results": [measurement.as_eval_result(task) for measurement in evaluation]}


def _evaluation_text(evaluation: Sequence[Measurement] | None) -> str:
    if evaluation is None:
        return ""
    if not evaluation:
        return "Not measured yet."
    lines = ["| metric | value | images | data | how |", "|---|---|---|---|---|"]
    for one in evaluation:
        error = "" if one.standard_error is None else f" ± {one.standard_error:.2g}"
        how = ", ".join(f"{name} {value}" for name, value in one.settings.items())
        lines.append(
            f"| {one.metric} | {one.value:.4g}{error} | {one.num_images:,} | {one.dataset} ({one.split}) | {how} |"
        )
    return "\n".join(lines)


def _check_private(text: str) -> None:
    """Raise ValueError where a card gives away what is nobody's business."""
    if TOKEN.search(text):
        raise ValueError("the model card holds what looks like a token of the Hub (hf_...); remove it.")
    if (home := str(Path.home())) != "/" and re.search(rf"{re.escape(home)}(?![\w-])", text):
        raise ValueError(f"the model card holds a local path, {home}; remove it.")


def _section(name: str) -> re.Pattern:
    name = re.escape(name)
    return re.compile(
        rf"(?P<open><!-- ddpm-pipeline: {name} -->)(?P<text>.*?)(?P<close><!-- /ddpm-pipeline: {name} -->)", re.DOTALL
    )


def _sections(text: str) -> Iterator[tuple[str, str]]:
    for name in re.findall(r"<!-- ddpm-pipeline: ([\w-]+) -->", text):
        if found := _section(name).search(text):
            yield name, found["text"]


def refresh_card(existing: str, new: ModelCard, only: Sequence[str] | None = None) -> str:
    """The README `existing` with our sections as in `new`; everything else in it stays, character by character.

    Sections that `new` has nothing to say about stay too, and so does a README without our marks, unless it is diffusers'
    blank form. Evaluation results in the metadata are ours to replace where we put them there. `only` names the
    sections to refresh.
    """
    if not any(_sections(existing)):
        return str(new) if _is_blank_form(existing) else existing
    evaluated = False
    for name, text in _sections(str(new)):
        if text.strip() and (only is None or name in only):
            evaluated |= name == "evaluation"
            existing = _section(name).sub(lambda found, text=text: found["open"] + text + found["close"], existing)
    return _with_results(existing, new) if evaluated else existing


def _is_blank_form(text: str) -> bool:
    """Whether a README is empty, or diffusers' template with nothing filled in."""
    card = ModelCard(text, ignore_metadata_errors=True)
    sentence = GENERATED.search(card.text)
    if sentence is None:
        return not card.text.strip()
    blank = ModelCard.from_template(ModelCardData(), model_description=sentence[0])
    return card.text.strip() == blank.text.strip()


def _with_results(existing: str, new: ModelCard) -> str:
    """`existing` with our evaluation results in its metadata replaced by those of `new`."""
    card = ModelCard(existing, ignore_metadata_errors=True)
    theirs = [result for result in card.data.eval_results or [] if result.source_name != OUR_SOURCE]
    results = theirs + (new.data.eval_results or [])
    if results == (card.data.eval_results or []):
        return existing
    card.data.eval_results = results or None
    if results:
        card.data.model_name = card.data.model_name or new.data.model_name
    return str(card)


def record_evaluation(folder: str | Path, evaluation: Sequence[Measurement]) -> None:
    """Put what was measured into the card of a pipeline folder, in its text and its metadata."""
    folder = Path(folder)
    card = _card_of_folder(folder, folder.resolve().name, evaluation)
    readme = folder / "README.md"
    _write_text(readme, refresh_card(_read_text(readme), card, ["evaluation"]) if readme.is_file() else str(card))


def _card_of_folder(folder: Path, repo_id: str, evaluation: Sequence[Measurement] | None = None) -> ModelCard:
    """What can be said of a folder by its configs alone."""
    pictures = {"samples.png": "samples", "process.png": "from noise to images"}
    return _card(
        _read_object(folder / INDEX),
        _read_object(folder / "unet" / "config.json"),
        _read_object(folder / "scheduler" / "scheduler_config.json"),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        evaluation=evaluation,
        pictures={file: caption for file, caption in pictures.items() if (folder / file).is_file()},
    )


# ---- pushing --------------------------------------------------------------------------------------


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    include: Sequence[str] = (),
    attempts: int = ATTEMPTS,
    first_wait: float = FIRST_WAIT,
    api: HfApi | None = None,
    give_up: threading.Event | None = None,
) -> str:
    """Push a pipeline folder in one commit, and return the commit's address.

    The repository is made if there is none. Of a card that is there already only our sections are refreshed, and if
    somebody commits meanwhile that is seen, and done again on theirs.

    Args:
        private: for a repository that is made.
        include: patterns of files to push besides the pipeline, its card, pictures and evaluation.json.
        attempts: how often to try, waiting `first_wait` seconds after the first time and twice as long after each next.
        api: the client; by default a new one with `token`.
        give_up: once set, there is no further attempt.

    Raises ValueError for a folder or repository name that cannot be pushed, PushError where the Hub did not take it.
    """
    folder = Path(folder)
    files = files_to_push(folder, include)
    api = api or HfApi(token=token)

    def attempt() -> str:
        full_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        parent = api.repo_info(full_name, revision=revision).sha
        readme = _merged_readme(api, folder, full_name, parent).encode("utf-8")
        contents = {**files, "README.md": readme}
        operations = [CommitOperationAdd(name, str(file) if isinstance(file, Path) else file)
                      for name, file in contents.items()]  # fmt: skip
        return api.create_commit(
            full_name,
            operations,
            commit_message=commit_message or f"Upload {folder.resolve().name}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        ).commit_url

    try:
        return _retried(attempt, attempts, first_wait, give_up)
    except (ValueError, TypeError):
        raise
    except Exception as error:
        raise PushError(
            f"{repo_id} could not be pushed to ({summary(error)}). {folder} is complete; push it later by\n"
            f"  {push_command(folder, repo_id, private, include)}"
        ) from error


def push_pipeline(
    pipe: "DiffusionPipeline",
    repo_id: str,
    *,
    variant: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Push a pipeline that is in memory; see `push`. A card that is in the repository keeps its facts and figures."""
    with tempfile.TemporaryDirectory() as temporary:
        pipe.save_pretrained(temporary, variant=variant)
        return push(
            temporary,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message or f"Upload {type(pipe).__name__}",
            create_pr=create_pr,
        )


def push_command(folder: Path, repo_id: str, private: bool | None = None, include: Sequence[str] = ()) -> str:
    """The command line that pushes a finished folder."""
    options = (["--private"] if private else []) + [part for pattern in include for part in ("--include", pattern)]
    return shlex.join(["python", "-m", "ddpm_pipeline.hub", "push", str(folder), repo_id, *options])


def _merged_readme(api: HfApi, folder: Path, repo_id: str, revision: str) -> str:
    """The README to push: the folder's, naming the repository in its examples, poured into the one that is there."""
    fresh = _card_of_folder(folder, repo_id)
    ours = fresh
    if (folder / "README.md").is_file():
        ours = ModelCard(refresh_card(_read_text(folder / "README.md"), fresh, ["use"]), ignore_metadata_errors=True)
    _check_private(str(ours))
    try:
        theirs = _read_text(Path(api.hf_hub_download(repo_id, "README.md", revision=revision)))
    except EntryNotFoundError:
        return str(ours)
    if not (folder / "README.md").is_file():  # a pipeline from memory knows the examples, not the pictures
        return refresh_card(theirs, ours, ["use"])
    return refresh_card(theirs, ours)


def _retried(attempt: Callable[[], T], attempts: int, first_wait: float, give_up: threading.Event | None) -> T:
    """`attempt()`, again after ever longer waits while the Hub or the network fails; the last exception in the end."""
    for count in range(1, attempts + 1):
        try:
            return attempt()
        except (ValueError, TypeError):  # what was given is wrong, and stays so
            raise
        except Exception as error:
            stopped = give_up is not None and give_up.is_set()
            if count == attempts or stopped:
                raise
            wait = first_wait * 2 ** (count - 1)
            logger.debug("attempt %d of %d: %s; again in %.1f s", count, attempts, summary(error), wait)
            time.sleep(wait) if give_up is None else give_up.wait(wait)
    raise AssertionError("unreachable: attempts is at least 1")


def summary(error: BaseException) -> str:
    """One line of an exception: the Hub's status and words where it answered."""
    if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
        said = error.server_message or error.response.reason_phrase
        return f"HTTP {error.response.status_code}: {said}"
    cause = error.__cause__
    inner = f"; {summary(cause)}" if isinstance(cause, Exception) else ""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}{inner}"


# ---- command line ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ddpm_pipeline.hub", description="Push a finished pipeline folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("push", help="push FOLDER to the repository REPO of the Hub")
    command.add_argument("folder", metavar="FOLDER", type=Path)
    command.add_argument("repo", metavar="REPO", help="owner/name")
    command.add_argument("--private", action="store_true", default=None, help="where the repository is made anew")
    command.add_argument("--revision", help="branch to push to; main if not given")
    command.add_argument("--message", help="of the commit")
    command.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    command.add_argument("--include", action="append", default=[], metavar="PATTERN", help="further files to push")
    command.add_argument("--attempts", type=int, default=ATTEMPTS)
    options = parser.parse_args(argv)
    if options.attempts < 1:
        parser.error(f"--attempts {options.attempts} must be at least 1.")
    try:
        print(
            push(
                options.folder, options.repo, private=options.private, revision=options.revision,
                commit_message=options.message, create_pr=options.create_pr, include=options.include,
                attempts=options.attempts,
            )
        )  # fmt: skip
    except (ValueError, PushError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
