"""Model cards that say only what is known: built from `model_card.md`, refreshed between marks, with figures as metadata.

Imports huggingface_hub alone. Called by `upload`, by evaluation and by training.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..support.atomic import write_text
from .files import INDEX, read_object

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CARD, TEMPLATE = "README.md", Path(__file__).parent / "model_card.md"
OURS = "ddpm-pipeline"  # marks our evaluation results in a card's metadata, as the metric's configuration
GENERATED = re.compile(r"(?m)^This is the model card of a .* This model card has been automatically generated\.$")
SECTION = re.compile(
    r"(?s)(?P<open><!-- ddpm-pipeline: (?P<name>[\w-]+) -->)(?P<text>.*?)(?P<close><!-- /ddpm-pipeline: (?P=name) -->)"
)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


@dataclass(frozen=True)
class Measurement:
    """A measured figure and what it depends on."""

    metric: str  # its usual name: "bits/dim", "FID", "KID"
    value: float
    num_images: int
    dataset: str
    split: str = "train"
    standard_error: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # steps, scheduler, feature extractor, seed, ...

    def as_eval_result(self, task_type: str = "unconditional-image-generation") -> EvalResult:
        task = {"task_type": task_type, "task_name": "Image generation"}
        data = {"dataset_type": self.dataset, "dataset_name": self.dataset, "dataset_split": self.split}
        metric = {"metric_type": re.sub(r"\W+", "-", self.metric.lower()), "metric_name": self.metric}
        settings = {"metric_config": OURS, "metric_args": {"num_images": self.num_images, **self.settings}}
        return EvalResult(metric_value=self.value, **task, **data, **metric, **settings)


@dataclass(frozen=True)
class TrainingFacts:
    """What a card says about the training. Whatever is left out is not mentioned."""

    dataset: str | None = None  # the name of the training data
    num_images: int | None = None  # None for a stream
    hub_dataset: str | None = None  # the data set's name on the Hub, if it is there
    facts: Mapping[str, Any] = field(default_factory=dict)  # rows of the table: learning rate, seed, time, ...
    command: str | None = None  # the command line that trains this model, shown below the facts


@dataclass(frozen=True)
class _Kind:
    """What the card of one kind of model says."""

    conditional: str = ""
    example: str = ""  # arguments of a call
    our_class: str = "AlphaDDPMPipeline"
    pipeline_tag: str = "unconditional-image-generation"
    why_plain_cannot_sample: str = ""


NO_CLASS = " the model loads, but it cannot be told a class, so it cannot sample images"
UNCONDITIONAL = _Kind()
CLASS = _Kind(" class-conditional", "class_labels=[0], guidance_scale=2.0", why_plain_cannot_sample=NO_CLASS)
TEXT_EXAMPLE = '"what it should show", guidance_scale=2.0'
TEXT = _Kind(" text-conditional", TEXT_EXAMPLE, "AlphaDDPMTextToImagePipeline", "text-to-image")


def build_card(
    model: "DiffusionPipeline | Path",
    *,
    name: str,
    repo_id: str | None = None,
    license: str | None = None,
    training: TrainingFacts | None = None,
    evaluation: Sequence[Measurement] | None = None,
    pictures: Mapping[str, str] | None = None,
    example: str = "",
) -> ModelCard:
    """The card of a model.

    Args:
        model: a pipeline, or the folder of one.
        name: the card's title.
        repo_id: the repository that the examples load; `push` puts in the one it pushes to.
        license: the model's licence, as the Hub spells it ("apache-2.0").
        training: what the model was trained on, and how.
        evaluation: what was measured; [] says that nothing was, None leaves that section of a refreshed card as it is.
        pictures: captions by the names of picture files in the folder.
        example: arguments of the examples' call, as code: a prompt or a label.

    Raises:
        ValueError: if the folder is not a pipeline, or the card contains a token or the path of the home folder.
    """
    kind, unet, schedule = _configs(model)
    training, images = training or TrainingFacts(), _images(unet)
    example, total = example or kind.example, schedule.get("num_train_timesteps", 1000)
    card = ModelCard.from_template(
        ModelCardData(
            library_name="diffusers",
            pipeline_tag=kind.pipeline_tag,
            tags=["ddpm", OURS, "pytorch", *(["class-conditional"] if kind is CLASS else [])],
            license=license,
            datasets=[training.hub_dataset] if training.hub_dataset else None,
            model_name=name if evaluation else None,
            eval_results=[one.as_eval_result(kind.pipeline_tag) for one in evaluation or ()] or None,
        ),
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id or name,
        summary=_summary(kind, images, schedule, training),
        pictures=dict(pictures or {}),
        plain_note=kind.why_plain_cannot_sample,
        # DDPMPipeline takes 1000 steps by default, however many there are
        plain_call="" if kind.why_plain_cannot_sample else _example_call(example, total),
        our_class=kind.our_class,
        our_call=_example_call(example, min(100, total)),
        training_table=_training_table(training.facts, license),
        command=training.command or "",
        evaluation=_evaluation_text(evaluation),
        resolution=images,
    )
    check_private(str(card))
    return card


def _configs(model: "DiffusionPipeline | Path") -> tuple[_Kind, Mapping[str, Any], Mapping[str, Any]]:
    """The kind of a model, and the configs of its UNet and scheduler."""
    if isinstance(model, Path):
        files = (INDEX, "unet/config.json", "scheduler/scheduler_config.json")
        index, unet, schedule = (read_object(model / name) for name in files)
    else:
        index, unet, schedule = json.loads(model.to_json_string()), model.unet.config, model.scheduler.config
    takes_classes = unet.get("num_class_embeds") or unet.get("class_embed_type")
    kind = TEXT if "text_encoder" in index else CLASS if takes_classes else UNCONDITIONAL
    return kind, unet, schedule


def _example_call(arguments: str, steps: int) -> str:
    return f"image = pipe({arguments}{', ' if arguments else ''}num_inference_steps={steps}).images[0]"


def _images(unet: Mapping[str, Any]) -> str:
    """Such as "RGB 32x32"."""
    channels, size = unet.get("in_channels", 3), unet.get("sample_size")
    colours = {1: "grey", 3: "RGB", 4: "RGBA"}.get(channels, f"{channels}-channel")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return f"{colours} {width}x{height}"


def _summary(kind: _Kind, images: str, schedule: Mapping[str, Any], training: TrainingFacts) -> str:
    amount = f"{training.num_images:,} images" if training.num_images else "a stream"
    source = f", trained from scratch on {amount} of `{training.dataset}`" if training.dataset else ""
    own_betas = schedule.get("trained_betas") is not None
    diffusion = [
        f"{schedule['num_train_timesteps']} steps" if "num_train_timesteps" in schedule else None,
        "betas of its own" if own_betas else f"{schedule.get('beta_schedule', 'linear')} schedule",
        f"{schedule.get('prediction_type', 'epsilon')} prediction",
        f"{schedule['variance_type']} variance" if schedule.get("variance_type") else None,
    ]
    return (
        f"A{kind.conditional} denoising diffusion probabilistic model (Ho et al. 2020) of {images} images{source}. "
        f"The diffusion process: {', '.join(filter(None, diffusion))}."
    )


def _training_table(facts: Mapping[str, Any], license: str | None) -> str:
    if not facts:
        return ""
    rows = {**facts, **({"licence": license} if license else {})}
    return "\n".join(["| | |", "|---|---|", *(f"| {fact} | {value} |" for fact, value in rows.items())])


def _evaluation_text(evaluation: Sequence[Measurement] | None) -> str:
    if not evaluation:
        return "" if evaluation is None else "Not measured yet."
    lines = ["| metric | value | images | data | how |", "|---|---|---|---|---|"]
    for one in evaluation:
        error = "" if one.standard_error is None else f" ± {one.standard_error:.2g}"
        how = ", ".join(f"{name} {value}" for name, value in one.settings.items())
        figure = f"| {one.metric} | {one.value:.4g}{error} | {one.num_images:,} |"
        lines.append(f"{figure} {one.dataset} ({one.split}) | {how} |")
    return "\n".join(lines)


def check_private(text: str) -> None:
    """Raises ValueError if a card gives away a secret or where its author works."""
    if TOKEN.search(text):
        raise ValueError("the model card contains what looks like a Hub token (hf_...); remove it.")
    if (home := str(Path.home())) != "/" and re.search(rf"{re.escape(home)}(?![\w-])", text):
        raise ValueError(f"the model card contains a local path, {home}; remove it.")


def refresh_card(existing: str, new: ModelCard, only: Sequence[str] | None = None) -> str:
    """The README `existing` with our sections as in `new`; everything else in it stays, character by character.

    Sections that are empty in `new` stay too, and so does a README without our marks, unless it is diffusers' blank
    template. In the metadata, our own evaluation results are replaced. `only` names the sections to refresh.
    """
    if not SECTION.search(existing):
        return str(new) if not existing or _is_blank(existing) else existing
    texts = {section["name"]: section["text"] for section in SECTION.finditer(str(new)) if section["text"].strip()}
    texts = {name: text for name, text in texts.items() if only is None or name in only}
    text = SECTION.sub(lambda old: old["open"] + texts.get(old["name"], old["text"]) + old["close"], existing)
    return _with_results(text, new) if "evaluation" in texts else text


def _is_blank(text: str) -> bool:
    """Whether a README has no text, or is diffusers' template with nothing filled in."""
    found = ModelCard(text, ignore_metadata_errors=True).text.strip()
    sentence = GENERATED.search(found)
    blank = ModelCard.from_template(ModelCardData(), model_description=sentence[0]).text.strip() if sentence else ""
    return found == blank


def _with_results(existing: str, new: ModelCard) -> str:
    """`existing` with our evaluation results in its metadata replaced by those of `new`."""
    card = ModelCard(existing, ignore_metadata_errors=True)
    before = card.data.eval_results or []
    # cards of earlier versions carry our mark as the source's name
    theirs = [result for result in before if OURS not in (result.metric_config, result.source_name)]
    results = theirs + (new.data.eval_results or [])
    if results == before:
        return existing
    card.data.eval_results = results or None
    if results:
        card.data.model_name = card.data.model_name or new.data.model_name
    return str(card)


def record_evaluation(folder: str | Path, evaluation: Sequence[Measurement]) -> None:
    """Write what was measured into the card of a pipeline folder: its text and its metadata."""
    folder = Path(folder)
    existing = read_card(folder)
    card = card_of_folder(folder, folder.resolve().name, existing, evaluation)
    write_text(folder / CARD, refresh_card(existing, card, ["evaluation"]))


def card_of_folder(
    folder: Path, repo_id: str, existing: str = "", evaluation: Sequence[Measurement] | None = None
) -> ModelCard:
    """What a folder's configs alone tell, with the example of the card that exists already."""
    example, name = _example_in(existing, _configs(folder)[0]), repo_id.split("/")[-1]
    told = {"name": name, "repo_id": repo_id, "example": example, "pictures": pictures_in(folder)}
    return build_card(folder, evaluation=evaluation, **told)


def pictures_in(folder: Path) -> dict[str, str]:
    """Captions of those pictures of a training run that are in a folder, by file name."""
    pictures = {"samples.png": "samples", "process.png": "from noise to images"}
    return {file: caption for file, caption in pictures.items() if (folder / file).is_file()}


def _example_in(readme: str, kind: _Kind) -> str:
    """The arguments of our class's call in the card's example; "" if the card has none for this kind of model."""
    use = "".join(found["text"] for found in SECTION.finditer(readme) if found["name"] == "use")
    calls = re.findall(r"pipe\((.*), num_inference_steps=\d+\)", use)
    fits = calls and kind.our_class in use and ("class_labels" in calls[-1]) == ("class_labels" in kind.example)
    return calls[-1] if fits else ""


def read_card(folder: Path) -> str:
    """The card in a folder, with its line ends as they are; "" if there is none."""
    return (folder / CARD).read_bytes().decode("utf-8") if (folder / CARD).is_file() else ""
