"""Model cards that say only what is known: built from `model_card.md`, refreshed between marks, with figures as metadata.

Names and captions of others are escaped and shortened, and what looks private is left out, so a card can always be built.
Imports huggingface_hub alone. Called by `upload`, by evaluation and by training.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..support.atomic import write_text
from .kinds import Kind, ModelFacts, facts_of
from .readme import decoded, metadata, private_lines, section_texts, with_line_ends_of, with_metadata, with_sections

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

CLOSEST_PAIRS = "closest_pairs.png"  # of an evaluation, in the card beside its figures
CARD, ROWS, TEMPLATE = "README.md", "samples.txt", Path(__file__).parent / "model_card.md"
OURS = "ddpm-pipeline"  # marks our evaluation results in a card's metadata, as the metric's configuration
GENERATED = re.compile(r"(?m)^This is the model card of a .* This model card has been automatically generated\.$")
LONGEST, LONGEST_CODE = 200, 2000  # characters of a name or caption, and of a command or an example


@dataclass(frozen=True)
class Measurement:
    """A measured figure and what it depends on."""

    metric: str  #: its usual name: "bits/dim", "FID", "KID"
    value: float
    num_images: int
    dataset: str
    split: str | None = None  #: None if the data have no splits
    standard_error: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  #: steps, network calls, scheduler, features, seed, ...

    @property
    def shown(self) -> str:
        """The value to as many digits as are read: '5.824 ± 0.38', ± being one standard error."""
        return f"{self.value:.4g}" + ("" if self.standard_error is None else f" ± {self.standard_error:.2g}")

    def __str__(self) -> str:
        return f"{self.metric} {self.shown}, of {self.num_images:,} images"

    def as_eval_result(self, task_type: str = "unconditional-image-generation") -> EvalResult:
        task = {"task_type": task_type, "task_name": "Image generation"}
        name = _shown(self.dataset, "the name of the data") or "unnamed data"
        data = {"dataset_type": name, "dataset_name": name, "dataset_split": _shown(self.split, "the split") or None}
        metric = {"metric_type": re.sub(r"\W+", "-", self.metric.lower()), "metric_name": self.metric}
        error = {} if self.standard_error is None else {"standard_error": self.standard_error}
        settings = {"metric_config": OURS, "metric_args": {"num_images": self.num_images, **error, **self.how}}
        return EvalResult(metric_value=self.value, **task, **data, **metric, **settings)

    @property
    def how(self) -> dict[str, Any]:
        """The settings as a card shows them."""
        return {name: value for name, value in _shown_items(self.settings).items() if value != ""}


@dataclass(frozen=True)
class TrainingFacts:
    """What a card says about the training. Whatever is left out is not mentioned."""

    dataset: str | None = None  #: the name of the training data
    num_images: int | None = None  #: None for a stream
    hub_dataset: str | None = None  #: the data set's name on the Hub, if it is there
    facts: Mapping[str, Any] = field(default_factory=dict)  #: rows of the table: learning rate, seed, time, ...
    command: str | None = None  #: the command line that trains this model, shown below the facts
    base_model: str | None = None  #: the name of the model that was fine-tuned; None if the training began from scratch
    hub_base_model: str | None = None  #: its name on the Hub, if it is there


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

    What looks like a token or a path in the home folder is left out, with a warning. Raises ValueError if the folder is not
    a pipeline.
    """
    about = facts_of(model)
    kind = about.kind
    training, example = training or TrainingFacts(), _shown_code(example or kind.example, "the example")
    name = _shown(name, "the name") or "DDPM"
    pictures = {file: _prose(_shown(caption, "a caption")) for file, caption in (pictures or {}).items()}
    repo = json.dumps(_shown(repo_id, "the repository's name") or name, ensure_ascii=False)
    command = _shown_code(training.command, "the training command")
    return ModelCard.from_template(
        _card_data(kind, name, license, training, evaluation or ()),
        template_path=str(TEMPLATE),
        name=_prose(name),
        repo=repo,
        # diffusers names a module after the repository, which a dot in it would split
        is_importable="." not in repo,
        summary=_summary(about, training),
        pictures={file: caption for file, caption in pictures.items() if file != CLOSEST_PAIRS},
        plain_note=kind.why_plain_cannot_sample,
        plain_class=kind.plain_class,
        plain_call=about.plain_call(example),
        our_class=kind.our_class,
        imports=kind.imports,
        setup=kind.setup,
        our_call=about.call(example),
        call_in_own_units=about.call(example, own_units=True) if about.values and not kind.own_units else "",
        has_units=about.values or kind.own_units,
        few_steps=about.few_steps,
        as_blocks=_code(f"pipe = ddpm_pipeline.{kind.our_blocks}().init_pipeline({repo})"),
        training_table=_training_table(training.facts, license),
        command=command,
        evaluation=_evaluation_text(evaluation, pictures.get(CLOSEST_PAIRS)),
        images=about.images,
    )


def _card_data(
    kind: Kind, name: str, license: str | None, training: TrainingFacts, evaluation: Sequence[Measurement]
) -> ModelCardData:
    """The front matter."""
    hub_dataset = _shown(training.hub_dataset, "the name of the data")
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=kind.pipeline_tag,
        tags=["ddpm", OURS, "pytorch", *(["class-conditional"] if "class_labels" in kind.example else [])],
        license=license,
        base_model=_shown(training.hub_base_model, "the base model") or None,
        datasets=[hub_dataset] if hub_dataset else None,
        model_name=name if evaluation else None,
        eval_results=[one.as_eval_result(kind.pipeline_tag) for one in evaluation] or None,
    )


def _shown(text: str | None, place: str) -> str:
    """A name or caption of others as one line that is not too long; "" if it looks private, with a warning."""
    line = " ".join((text or "")[: 2 * LONGEST].split())
    line = "".join(character if character.isprintable() else " " for character in line)
    line = line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
    return "" if _is_private(line, place) else line


def _shown_items(items: Mapping[str, Any]) -> dict[str, Any]:
    """The same with strings as `_shown`."""
    return {
        _shown(name, "a name"): _shown(value, f"the value of {name[:LONGEST]!r}") if isinstance(value, str) else value
        for name, value in items.items()
    }


def _shown_code(code: str | None, place: str) -> str:
    """A command or an example, which cannot be shortened; "" if it is too long, has several lines or looks private."""
    if not code or _is_private(code[:LONGEST_CODE], place):
        return ""
    if len(code) > LONGEST_CODE or not code.isprintable():
        logger.warning("the model card leaves out %s, which is long or has several lines", place)
        return ""
    return code


def _is_private(text: str, place: str) -> bool:
    if what := next(iter(private_lines(text).values()), None):
        logger.warning("the model card leaves out %s, which looks like %s", place, what)
    return what is not None


def _prose(text: str) -> str:
    """Text as Markdown shows it, also in a table: every character that begins a construct is escaped."""
    return re.sub(r"[\\`*\[\]<>|&~]", r"\\\g<0>", text)


def _code(text: str) -> str:
    """Text as Markdown's inline code (CommonMark 6.1)."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _summary(about: ModelFacts, training: TrainingFacts) -> str:
    schedule = about.schedule
    amount = f"{training.num_images:,} images" if training.num_images else "a stream"
    base, data = _shown(training.base_model, "the base model"), _shown(training.dataset, "the name of the data")
    origin = "trained from scratch" if training.base_model is None else "fine-tuned"
    origin += f" from {_code(base)}" if base else ""
    source = f", {origin} on {amount} of {_code(data) if data else 'unnamed data'}" if training.dataset else ""
    own_betas = schedule.get("trained_betas") is not None
    diffusion = [
        f"{schedule['num_train_timesteps']} steps" if "num_train_timesteps" in schedule else None,
        "betas of its own" if own_betas else f"{schedule.get('beta_schedule', 'linear')} schedule",
        f"{schedule.get('prediction_type', 'epsilon')} prediction",
        f"{schedule['variance_type']} variance" if schedule.get("variance_type") else None,
    ]
    kind = f"A{about.kind.conditional} denoising diffusion probabilistic model (Ho et al. 2020)"
    process = f"The diffusion process: {', '.join(filter(None, diffusion))}."
    condition = _prose(_shown(about.kind.condition, "the condition"))
    return " ".join(filter(None, (f"{kind} of {about.images} images{source}.", about.values, condition, process)))


def _training_table(facts: Mapping[str, Any], license: str | None) -> str:
    if not facts:
        return ""
    rows = _shown_items({**facts, **({"licence": license} if license else {})})
    lines = (f"| {_prose(fact)} | {_prose(str(value))} |" for fact, value in rows.items() if value != "")
    return "\n".join(["| | |", "|---|---|", *lines])


def _evaluation_text(evaluation: Sequence[Measurement] | None, closest_pairs: str | None = None) -> str:
    if not evaluation:
        return "" if evaluation is None else "Not measured yet."
    lines = ["| metric | value | images | data | how |", "|---|---|---|---|---|"]
    for one in evaluation:
        how = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in one.how.items())
        split = _prose(_shown(one.split, "the split"))
        data = _prose(_shown(one.dataset, "the name of the data")) + (f" ({split})" if split else "")
        figure = f"| {_prose(one.metric)} | {one.shown} | {one.num_images:,} |"
        lines.append(f"{figure} {data} | {_prose(how)} |")
    if any(one.standard_error is not None for one in evaluation):
        lines += ["", "± is one standard error."]
    if closest_pairs:
        lines += ["", f"![{closest_pairs}]({CLOSEST_PAIRS})", "", f"{CLOSEST_PAIRS}: {closest_pairs}"]
    return "\n".join(lines)


def refresh_card(existing: str, new: ModelCard | str, only: Sequence[str] | None = None) -> str:
    """The README `existing` with our sections as in `new`; everything else in it stays, character by character.

    Sections that are empty in `new` stay too, and so does a README without our marks, unless it has front matter alone or is
    diffusers' blank template: then the text is that of `new`, and the front matter keeps every key. In the front matter of a
    README with marks, licence, data sets and base model are added, and our own evaluation results are replaced. `only` names
    the sections to refresh.
    """
    new, marked = str(new), section_texts(existing)
    if not marked:
        if not _is_blank(existing):
            return existing
        front, keys = REGEX_YAML_BLOCK.match(existing), None
        body = new[REGEX_YAML_BLOCK.match(new).end() :]
        refreshed = front[0] + with_line_ends_of(existing, body) if front else new
    else:
        texts = {name: text for name, text in section_texts(new).items() if text.strip() and name in marked}
        texts = {name: text for name, text in texts.items() if only is None or name in only}
        refreshed, keys = with_sections(existing, texts), ("license", "datasets", "base_model") if "training" in texts else ()
    try:
        theirs, ours = metadata(refreshed), metadata(new)
        changes = _added(theirs, {name: value for name, value in ours.items() if keys is None or name in keys})
        if marked and "evaluation" in texts:
            changes["model-index"] = _model_index(theirs.get("model-index"), ours.get("model-index"))
        return with_metadata(refreshed, changes)
    except ValueError as error:
        logger.warning("the front matter of %s stays as it is: %s", CARD, error)
        return refreshed


def _is_blank(text: str) -> bool:
    """Whether a README has no text, or is diffusers' template with nothing filled in."""
    front = REGEX_YAML_BLOCK.match(text)
    found = text[front.end() if front else 0 :].strip()
    sentence = GENERATED.search(found)
    blank = ModelCard.from_template(ModelCardData(), model_description=sentence[0]).text.strip() if sentence else ""
    return found.replace("\r\n", "\n") == blank


def _added(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """What `ours` adds to the metadata: keys that are missing or empty, and entries of lists."""
    changes = {}
    for name, value in ours.items():
        present = theirs.get(name)
        if present in (None, "", []):
            changes[name] = value
        elif name in ("tags", "datasets"):
            listed = present if isinstance(present, list) else [present]
            if more := [entry for entry in value if entry not in listed]:
                changes[name] = listed + more
    return changes


def _model_index(theirs: Any, ours: Any) -> Any:
    """The metadata's evaluation results: ours of earlier are replaced, all others stay. Raises ValueError if malformed."""
    try:
        models = [{**model, "results": [_not_ours(result) for result in model["results"]]} for model in theirs or []]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"its model-index is malformed ({type(error).__name__}: {error})") from error
    models = [{**model, "results": [one for one in model["results"] if one["metrics"]]} for model in models]
    models = [model for model in models if model["results"]]
    if ours and models:
        models[0]["results"] += ours[0]["results"]
    return models or ours


def _not_ours(result: Mapping[str, Any]) -> dict[str, Any]:
    # cards of earlier versions carry our mark as the source's name
    whole = (result.get("source") or {}).get("name") == OURS
    return {**result, "metrics": [] if whole else [one for one in result["metrics"] if one.get("config") != OURS]}


def record_evaluation(folder: str | Path, evaluation: Sequence[Measurement], pictures: Mapping[str, str] | None = None) -> None:
    """Write what was measured into the card of a pipeline folder: its text, with CLOSEST_PAIRS if this is among the `pictures`
    (captions by file names), and its metadata.
    """
    folder = Path(folder)
    existing = read_card(folder)
    card = card_of_folder(folder, folder.resolve().name, existing, evaluation, pictures)
    write_text(folder / CARD, refresh_card(existing, card, ["evaluation"]))


def card_of_folder(
    folder: Path,
    repo_id: str,
    existing: str = "",
    evaluation: Sequence[Measurement] | None = None,
    pictures: Mapping[str, str] | None = None,
) -> ModelCard:
    """What a folder's configs alone tell, with the example of the card that exists already."""
    example, name = _example_in(existing, facts_of(folder).kind), repo_id.split("/")[-1]
    told = {"name": name, "repo_id": repo_id, "example": example, "pictures": {**pictures_in(folder), **(pictures or {})}}
    return build_card(folder, evaluation=evaluation, **told)


def pictures_in(folder: Path) -> dict[str, str]:
    """Captions of those pictures of a training run that are in a folder, by file name; samples.txt names rows, and says how
    images are shown.
    """
    text = decoded((folder / ROWS).read_bytes()) if (folder / ROWS).is_file() else ""
    rows = re.findall(r"(?m)^row \d+: (.*)$", text)
    shown = f" ({found[1]})" if (found := re.search(r"(?m)^shown: (.*)$", text)) else ""
    left = ", on the left the condition images" if re.search(r"(?m)^left: condition images$", text) else ""
    samples = f"samples{shown}{left}" + (f", row by row: {', '.join(rows)}" if rows else "")
    pictures = {"samples.png": samples, "process.png": f"from noise to images{shown}"}
    return {file: caption for file, caption in pictures.items() if (folder / file).is_file()}


def _example_in(readme: str, kind: Kind) -> str:
    """The arguments of our class's call in the card's example; "" if the card has none for this kind of model."""
    use = section_texts(readme).get("use", "")
    calls = re.findall(r"pipe\((.*), num_inference_steps=\d+[,)]", use)
    told = [re.findall(r"(class_labels|condition_\w+)=", example) for example in (*calls[-1:], kind.example)]
    fits = calls and kind.our_class in use and {*told[0]} == {*told[1]}
    return calls[-1] if fits else ""


def read_card(folder: Path) -> str:
    """The card in a folder, with its line ends as they are; "" if there is none."""
    return decoded((folder / CARD).read_bytes()) if (folder / CARD).is_file() else ""
