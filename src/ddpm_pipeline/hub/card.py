"""Model cards that say only what is known: made from `model_card.md`, refreshed between marks, with figures as metadata.

Imports huggingface_hub alone; pipelines come in as arguments. Called by hub.py and the training scripts.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .files import INDEX, read_object

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CARD_TEMPLATE = Path(__file__).parent / "model_card.md"
OUR_SOURCE = "ddpm-pipeline"  # marks evaluation results of ours in a card's metadata
OUR_SOURCE_URL = "https://pypi.org/project/ddpm-pipeline/"
GENERATED = re.compile(
    r"^This is the model card of a .* This model card has been automatically generated\.$", re.MULTILINE
)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


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
    model: "DiffusionPipeline | Path",
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
        model: a pipeline, or the folder of one.
        name: its title.
        repo_id: where it is loaded from, in the examples; `push` puts in the repository that it pushes to.
        dataset: what it was trained on, `num_images` of them, or a stream; `hub_dataset` if that is the name of one of the Hub.
        license: the model's, as the Hub spells it ("apache-2.0").
        training: facts as a table, and the `command` that trained it.
        evaluation: what was measured; [] says that nothing was, None leaves a card that is refreshed as it is.
        pictures: captions by the names of files in the folder.
        example: arguments of a call of the pipeline, as code: the prompt or label.

    Raises ValueError for a folder that is no pipeline, and for a card that holds a token or the path of the home folder.
    """
    index, unet, schedule = _configs(model)
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
    check_private(str(card))
    return card


def _configs(model: "DiffusionPipeline | Path") -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """The index, and the configs of UNet and scheduler."""
    if not isinstance(model, Path):
        return json.loads(model.to_json_string()), model.unet.config, model.scheduler.config
    paths = (model / INDEX, model / "unet" / "config.json", model / "scheduler" / "scheduler_config.json")
    index, unet, schedule = map(read_object, paths)
    return index, unet, schedule


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


def check_private(text: str) -> None:
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
    readme = folder / "README.md"
    existing = read_text(readme) if readme.is_file() else ""
    card = card_of_folder(folder, folder.resolve().name, existing, evaluation)
    write_text(readme, refresh_card(existing, card, ["evaluation"]))


def card_of_folder(
    folder: Path, repo_id: str, existing: str = "", evaluation: Sequence[Measurement] | None = None
) -> ModelCard:
    """What can be said of a folder by its configs alone, with the example of the card that there is."""
    pictures = {"samples.png": "samples", "process.png": "from noise to images"}
    kind = KINDS[kind_of(*_configs(folder)[:2])]
    return build_card(
        folder,
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        evaluation=evaluation,
        pictures={file: caption for file, caption in pictures.items() if (folder / file).is_file()},
        example=_example_in(existing, kind),
    )


def _example_in(readme: str, kind: _Kind) -> str:
    """The arguments that the card's example calls our class with; "" where there are none for this kind of model."""
    use = _section("use").search(readme)
    calls = re.findall(r"pipe\((.*), num_inference_steps=\d+\)", use["text"]) if use else []
    fits = calls and kind.our_class in use["text"] and ("class_labels" in calls[-1]) == ("class_labels" in kind.example)
    return calls[-1] if fits else ""


def read_text(path: Path) -> str:
    """A card, line ends as they are."""
    return path.read_bytes().decode("utf-8")


def write_text(path: Path, text: str) -> None:
    """Replace a card, all of it or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(text.encode("utf-8"))
    os.replace(temporary, path)
