"""What images are drawn for: nothing, a class, or a caption; one object that the training loop asks, whichever it is.

In the loop a condition is drawn with each image from the value of its `column` (`draw`, on the CPU, in the data loader, be the
images mapped from a file or streamed), becomes arguments of the network
(`inputs`, on the device), and ends in a pipeline (`pipeline`). With a share of the images it is left out, for guidance.
Imports diffusers, tokenizers, torch, transformers and the package. Called by train.py and models.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import UNet2DConditionModel, UNet2DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..data.mapped import ImageData
from ..data.streamed import StreamData
from ..pipeline_alpha_ddpm import AlphaDDPMPipeline
from ..pipeline_alpha_ddpm_text import MAX_TOKENS, AlphaDDPMTextToImagePipeline, prepare_prompt, tokenize
from ..sampling_alpha_ddpm import describe_conditions
from ..support.draws import Stream, seeds, uniform
from ..support.errors import ConfigError
from .options import TrainingConfig

CAPTIONS = Path(__file__).parents[1] / "recipes"  # where a file of wordings is looked for that is not found as named

SMALL = "small"  # the text encoder that is trained from scratch with the UNet
SMALL_ENCODER = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
MAX_VOCABULARY = 8192  # with it the small encoder has 0.6 M parameters
MAX_CAPTIONS_READ = 1_000_000  # by the making of a tokenizer
CACHED_STATES = 2**28  # bytes of a frozen encoder's states
MAX_PREVIEW_ROWS = 10
DEFAULT_TEMPLATES = ("{name}", "a {name}", "a picture of {name}", "an image of a {name}", "this is a {name}")
SPECIAL_TOKENS = ("<|pad|>", "<|startoftext|>", "<|endoftext|>")


class Conditions:
    """Images for their own sake; and what the other conditions answer differently."""

    unet_class: type = UNet2DModel
    pipeline_class: type = AlphaDDPMPipeline
    column: str | None = None  # of the data, whose values `draw` takes

    def unet_config(self) -> dict[str, Any]:
        """What the UNet's config needs for this condition."""
        return {}

    def draw(self, values: Sequence[Any] | None, step: int, positions: slice) -> Any:
        """The conditions of b images with these values of `column`, at these positions of update `step`'s global batch: a
        function of (seed, step, position) and the value. None, int64 [b] or a list of b strings.
        """
        return None

    def inputs(self, drawn: Any, device: torch.device) -> dict[str, torch.Tensor]:
        """Those as arguments of the network, on the device."""
        return {}

    def network(self, unet: torch.nn.Module) -> torch.nn.Module:
        """What is trained: the UNet, and whatever is trained with it. Called as network(images, timesteps, **inputs)."""
        return unet

    def pipeline(self, unet: Any, scheduler: Any) -> Any:
        return AlphaDDPMPipeline(unet=unet, scheduler=scheduler)

    def preview(self, count: int) -> tuple[tuple[str, list[Any]] | None, int | None]:
        """((argument of the pipeline's call, its value for each of about `count` images), columns: one row a condition)."""
        return None, None

    def facts(self) -> dict[str, str]:
        """For the model card."""
        return {}

    def example(self) -> str:
        """The arguments of a call of the pipeline, as code."""
        return ""


class ClassConditions(Conditions):
    """Labels 0..N-1, and N for images whose label was left out."""

    def __init__(self, config: TrainingConfig, data: ImageData | StreamData):
        if data.label_column is None:
            raise ConfigError(
                f"--condition class: {data.name} has no label column that is found by itself; name one of "
                f"{data.columns} with --label_column."
            )
        self.config, self.column = config, data.label_column
        self.names = data.class_names

    def unet_config(self) -> dict[str, Any]:
        return {"num_class_embeds": len(self.names) + 1}

    def draw(self, values: Sequence[int], step: int, positions: slice) -> torch.Tensor:
        labels = torch.as_tensor(values, dtype=torch.int64)
        dropped = torch.from_numpy(_left_out(self.config, step, positions))
        return labels.masked_fill(dropped, len(self.names))

    def inputs(self, drawn: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        return {"class_labels": drawn.to(device, non_blocking=True)}

    def pipeline(self, unet: Any, scheduler: Any) -> AlphaDDPMPipeline:
        describe_conditions(unet, class_names=self.names, condition_dropout=self.config.condition_dropout)
        return AlphaDDPMPipeline(unet=unet, scheduler=scheduler)

    def preview(self, count: int) -> tuple[tuple[str, list[Any]] | None, int | None]:
        return _rows("class_labels", list(range(len(self.names))), count)

    def facts(self) -> dict[str, str]:
        return {
            "condition": f"{len(self.names)} classes",
            "left out": f"{self.config.condition_dropout:.0%} of the labels",
        }

    def example(self) -> str:
        return f"class_labels={self.names[-1]!r}, guidance_scale={self.config.preview_guidance:g}"


# ---- captions --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Templates:
    """Wordings of a class: templates with {name}, each class's names, and wordings that training must never use."""

    templates: Sequence[str]
    names: Sequence[Sequence[str]]  # one list a class
    held_out: frozenset[str] = frozenset()

    def caption(self, label: int, rng: np.random.Generator, word_dropout: float) -> str:
        template = self.templates[rng.integers(len(self.templates))]
        names = self.names[label]
        name = names[rng.integers(len(names))]
        shortened = _without_words(template, rng, word_dropout).replace("{name}", name)
        return template.replace("{name}", name) if prepare_prompt(shortened) in self.held_out else shortened

    def all(self) -> Iterator[str]:
        """Every wording of every class, no word left out."""
        for names in self.names:
            for name in names:
                for template in self.templates:
                    yield template.replace("{name}", name)


def read_templates(config: TrainingConfig, class_names: Sequence[str]) -> Templates:
    """The file that `--caption_templates` names (see docs/conditions.md), or plain wordings of the class names.

    Raises ConfigError where the file cannot be used.
    """
    if config.caption_templates is None:
        return Templates(DEFAULT_TEMPLATES, [[name] for name in class_names])
    path = Path(config.caption_templates)
    path = path if path.exists() or path.is_absolute() else CAPTIONS / path
    option = f"--caption_templates {path}"
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} cannot be read: {error}") from error
    if (
        not isinstance(content, dict)
        or set(content) - {"templates", "names", "held_out"}
        or not content.get("templates")
    ):
        raise ConfigError(f"{option} must hold `templates`, a list, and may hold `names` and `held_out`.")
    templates, held_out = ([str(text) for text in content.get(key) or []] for key in ("templates", "held_out"))
    if strange := [template for template in templates + held_out if "{name}" not in template]:
        raise ConfigError(f"{option}: {strange[0]!r} has no {{name}} where the class's name goes.")
    given = {str(name): values for name, values in (content.get("names") or {}).items()}
    if unknown := sorted(set(given) - set(class_names)):
        raise ConfigError(f"{option}: {unknown[0]!r} is no class; the classes are {', '.join(class_names[:10])}.")
    names = [[str(value) for value in given.get(name, [name])] for name in class_names]
    if empty := [name for name, values in zip(class_names, names, strict=True) if not values]:
        raise ConfigError(f"{option}: the class {empty[0]!r} has an empty list of names.")
    never = frozenset(
        prepare_prompt(template.replace("{name}", name)) for values in names for name in values for template in held_out
    )
    result = Templates(templates, names, never)
    if clash := [caption for caption in result.all() if prepare_prompt(caption) in never]:
        raise ConfigError(f"{option}: {clash[0]!r} is held out and is a wording of a template too.")
    return result


def _without_words(text: str, rng: np.random.Generator, share: float) -> str:
    """The text with a share of its words left out, but for the one with {name}; as it is if nothing would be left."""
    words = text.split()
    kept = rng.random(len(words)) >= share
    chosen = [word for word, keep in zip(words, kept, strict=True) if keep or "{name}" in word]
    return " ".join(chosen) if chosen else text


class Captions:
    """A caption for each image, drawn afresh at each use, from a text column or from templates over a label column."""

    def __init__(self, config: TrainingConfig, data: ImageData | StreamData):
        self.config, self.data = config, data
        self.column = data.text_column or data.label_column
        self.templates = None
        if data.text_column is None:
            if data.label_column is None:
                raise ConfigError(
                    f"--condition text: {data.name} has neither a --text_column nor a --label_column for templates; name one "
                    f"of {data.columns}."
                )
            self.templates = read_templates(config, data.class_names)
        elif config.caption_templates is not None:
            raise ConfigError("--caption_templates word a label column; drop them, or --text_column.")

    def draw(self, values: Sequence[Any], step: int, positions: slice) -> list[str]:
        config = self.config
        caption_seeds = seeds(config.seed, Stream.CONDITION, step, config.batch_size)[positions]
        left_out = _left_out(config, step, positions)
        return [
            "" if dropped else self._caption(value, np.random.default_rng(caption_seed))
            for value, caption_seed, dropped in zip(values, caption_seeds.tolist(), left_out, strict=True)
        ]

    def _caption(self, value: Any, rng: np.random.Generator) -> str:
        if self.templates is not None:
            return self.templates.caption(int(value), rng, self.config.word_dropout)
        texts = [text for text in (value if isinstance(value, list) else [value]) if text]
        return _without_words(texts[rng.integers(len(texts))], rng, self.config.word_dropout) if texts else ""

    def all(self) -> Iterator[str]:
        """Every caption there is, no word left out; of a text column, in the data's order, and of a stream the first ones."""
        if self.templates is not None:
            yield from self.templates.all()
            return
        for texts in self.data.values(self.data.text_column):
            yield from (text for text in (texts if isinstance(texts, list) else [texts]) if text)

    def examples(self, count: int) -> list[str]:
        """A fixed set for previews: one caption a class, or the first different ones of the data."""
        if self.templates is not None:
            return [self.templates.templates[0].replace("{name}", names[-1]) for names in self.templates.names][:count]
        return list(islice(dict.fromkeys(self.all()), count))


class TextDenoiser(torch.nn.Module):
    """UNet and text encoder as one network, so that they are trained, averaged and distributed as one."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: PreTrainedModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self, sample: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor,
        caption_of: torch.Tensor,
    ) -> Any:  # fmt: skip
        """Images [B, C, H, W]; tokens [U, 77] of U different captions, and which one each image has, [B]."""
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        return self.unet(sample, timesteps, encoder_hidden_states=states[caption_of])


class TextConditions(Conditions):
    """Captions through a text encoder, trained with the UNet or frozen; the empty caption for those left out."""

    unet_class = UNet2DConditionModel
    pipeline_class = AlphaDDPMTextToImagePipeline

    def __init__(self, config: TrainingConfig, data: ImageData | StreamData):
        self.config = config
        self.captions = Captions(config, data)
        self.column = self.captions.column
        source = config.text_encoder or (None if config.init_from else SMALL)
        if source == SMALL:
            self.tokenizer = make_tokenizer(self.captions.all())
            self.text_encoder = make_small_encoder(self.tokenizer)
        else:
            self.tokenizer, self.text_encoder = load_text_encoder(source, config.init_from)
        self.source = source
        self.trained = source == SMALL or config.train_text_encoder
        self.text_encoder.train(self.trained).requires_grad_(self.trained)
        self._states: dict[str, torch.Tensor] = {}
        self._room = CACHED_STATES

    def unet_config(self) -> dict[str, Any]:
        encoder = self.text_encoder.config
        return {"cross_attention_dim": getattr(encoder, "hidden_size", None) or encoder.d_model}

    def draw(self, values: Sequence[Any], step: int, positions: slice) -> list[str]:
        return self.captions.draw(values, step, positions)

    def inputs(self, drawn: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        different = list(dict.fromkeys(drawn))
        if not self.trained:
            states = self._frozen_states(different, device)
            return {"encoder_hidden_states": torch.stack([states[caption] for caption in drawn])}
        place = {caption: index for index, caption in enumerate(different)}
        caption_of = torch.tensor([place[caption] for caption in drawn])
        arguments = {**tokenize(self.tokenizer, different), "caption_of": caption_of}
        return {name: value.to(device, non_blocking=True) for name, value in arguments.items()}

    @torch.no_grad()
    def _frozen_states(self, captions: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        """Text states [77, D] of each caption, from the cache where they are in it."""
        known = {caption: self._states[caption] for caption in captions if caption in self._states}
        if unknown := [caption for caption in captions if caption not in known]:
            self.text_encoder.to(device)
            tokens = {name: ids.to(device) for name, ids in tokenize(self.tokenizer, unknown).items()}
            for caption, state in zip(unknown, self.text_encoder(**tokens)[0].float(), strict=True):
                known[caption] = state
                if self._room >= state.nbytes:
                    self._states[caption] = state.clone()  # a view would keep its whole batch
                    self._room -= state.nbytes
        return known

    def network(self, unet: torch.nn.Module) -> torch.nn.Module:
        return TextDenoiser(unet, self.text_encoder) if self.trained else unet

    def pipeline(self, unet: Any, scheduler: Any) -> AlphaDDPMTextToImagePipeline:
        describe_conditions(unet, condition_dropout=self.config.condition_dropout)
        self.text_encoder.to(unet.device)
        return AlphaDDPMTextToImagePipeline(
            unet=unet, text_encoder=self.text_encoder, tokenizer=self.tokenizer, scheduler=scheduler
        )

    def preview(self, count: int) -> tuple[tuple[str, list[Any]] | None, int | None]:
        prompts = self.config.preview_prompts
        texts = prompts.split("|") if prompts else self.captions.examples(MAX_PREVIEW_ROWS)
        return _rows("prompt", [text.strip() for text in texts] or [""], count)

    def facts(self) -> dict[str, str]:
        size = sum(parameter.numel() for parameter in self.text_encoder.parameters()) / 1e6
        how = "trained with the UNet" if self.trained else "frozen"
        source = self.source if self.source and not Path(self.source).exists() else type(self.text_encoder).__name__
        return {
            "condition": "captions",
            "text encoder": f"{source}, {size:.2f} M parameters, {how}",
            "left out": f"{self.config.condition_dropout:.0%} of the captions, {self.config.word_dropout:.0%} of their words",
        }

    def example(self) -> str:
        prompts = self.captions.examples(MAX_PREVIEW_ROWS) or ["a picture"]
        return f"{prompts[-1]!r}, guidance_scale={self.config.preview_guidance:g}"


def build_conditions(config: TrainingConfig, data: ImageData | StreamData) -> Conditions:
    """What `--condition` names. The small encoder's initial weights come from torch's global generator, as the UNet's."""
    kinds: dict[str, Callable[..., Conditions]] = {"class": ClassConditions, "text": TextConditions}
    return kinds[config.condition](config, data) if config.condition in kinds else Conditions()


def _left_out(config: TrainingConfig, step: int, positions: slice) -> np.ndarray:
    """Which conditions are left out, bool [b]."""
    return uniform(config.seed, Stream.CONDITION_DROPOUT, step, config.batch_size)[positions] < config.condition_dropout


def _rows(argument: str, values: list[Any], count: int) -> tuple[tuple[str, list[Any]], int]:
    """Equal rows of about `count` images in all, at most MAX_PREVIEW_ROWS of them."""
    values = values[: min(count, MAX_PREVIEW_ROWS)]
    columns = max(1, count // len(values))
    return (argument, [value for value in values for _ in range(columns)]), columns


# ---- text encoders ----------------------------------------------------------------------------------


def make_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE made of the training captions: their words become tokens, and any text whatever has some."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=True
    )  # a word is the same token wherever it stands
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        islice(captions, MAX_CAPTIONS_READ),
        trainers.BpeTrainer(
            vocab_size=MAX_VOCABULARY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    pad, start, end = SPECIAL_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=start, eos_token=end, model_max_length=MAX_TOKENS
    )


def make_small_encoder(tokenizer: PreTrainedTokenizerBase) -> CLIPTextModel:
    """A CLIP-style text transformer of under 2 M parameters with fresh weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            **SMALL_ENCODER,
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def load_text_encoder(source: str | None, init_from: str | None) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and encoder from a Hub name or folder, float32; from the pipeline `init_from` where source is None.

    Raises ConfigError where they cannot be used.
    """
    option = f"--text_encoder {source}" if source else f"--init_from {init_from}"
    places = {part: {} if source else {"subfolder": part} for part in ("tokenizer", "text_encoder")}
    name = source or init_from
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **places["tokenizer"])
        encoder_config = AutoConfig.from_pretrained(name, **places["text_encoder"])
        if encoder_config.model_type == "clip":  # the text half of a whole CLIP
            loader = CLIPTextModel
        else:
            known = type(encoder_config) in AutoModelForTextEncoding._model_mapping
            loader = AutoModelForTextEncoding if known else AutoModel
        encoder = loader.from_pretrained(name, dtype=torch.float32, **places["text_encoder"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{option} cannot be used as a text encoder: {error}") from error
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions is not None and positions < MAX_TOKENS:
        raise ConfigError(f"{option} takes {positions} tokens; captions are padded to {MAX_TOKENS}.")
    if tokenizer.pad_token is None:
        raise ConfigError(f"{option} has a tokenizer without a padding token, which captions of different length need.")
    return tokenizer, encoder
