"""What images are conditioned on: nothing, a class or a caption. The training loop treats all of them alike.

A condition is drawn with each image from the value of its `column` (`draw`, on the CPU, in the data loader), becomes arguments
of the network (`inputs`, on the device), and ends in a pipeline. For a share of the images it is dropped, for classifier-free
guidance.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..conditioning_alpha_ddpm import MAX_TOKENS, tokenize
from ..data.mapped import ImageData, ImageSet
from ..generation.drawing import UNCONDITIONAL, Request
from ..pipeline_alpha_ddpm import AlphaDDPMPipeline
from ..pipeline_alpha_ddpm_text import AlphaDDPMTextToImagePipeline
from ..sampling_alpha_ddpm import describe_conditions
from ..support.draws import BatchSlice, RandomStream
from ..support.errors import ConfigError
from ..support.provenance import weights_digest
from .captions import Captions
from .export import is_checkpoint, pipeline_of
from .options import ConditionOptions
from .text_encoders import NO_TEXT_MODEL, load_text_encoder, make_small_encoder, make_tokenizer, tokenizer_digest

logger = logging.getLogger(__name__)

SMALL = "small"  # the text encoder that is trained from scratch with the UNet
CACHED_STATES = 2**28  # bytes of a frozen encoder's states
MAX_PREVIEW_ROWS = 10


class Condition:
    """No condition; the base of the others."""

    unet_class: type = UNet2DModel
    pipeline_class: type = AlphaDDPMPipeline
    column: str | None = None  # of the data, whose values `draw` takes
    variance_type: str | None = None  # of a new model; the scheduler's default if None

    def unet_config(self) -> dict[str, Any]:
        """What the UNet's config needs for this condition."""
        return {}

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find as it was: JSON values by the names that messages use."""
        return {}

    def draw(self, values: Sequence[Any] | None, where: BatchSlice) -> Any:
        """The conditions of b images with these values of `column`: None, int64 [b] or b strings. Each is a function of the
        value and of (seed, step, position).
        """
        return None

    def inputs(self, drawn: Any, device: torch.device) -> dict[str, Tensor]:
        """Those as arguments of the network, on the device."""
        return {}

    def probe(self, count: int) -> dict[str, Tensor]:
        """Arguments of the UNet for so many images, of the right shapes and types."""
        return {}

    def request_like(self, data: ImageData, indices: Sequence[int], seed: int) -> Request:
        """A request for images with the conditions that these images of the data have; none is dropped."""
        return UNCONDITIONAL

    def unet_inputs(self, request: Request) -> dict[str, Tensor]:
        """The values of a request as arguments of the UNet, [B, ...]."""
        return {}

    def network(self, unet: nn.Module) -> nn.Module:
        """What is trained: the UNet, and what is trained with it. Called as network(images, timesteps, **inputs)."""
        return unet

    def pipeline(self, unet: Any, scheduler: Any) -> Any:
        return AlphaDDPMPipeline(unet=unet, scheduler=scheduler)

    def preview(self, count: int) -> tuple[Request, int | None]:
        """A request for about `count` images, and the columns of their grid, with one row per condition."""
        return UNCONDITIONAL, None

    def left(self, request: Request, columns: int | None) -> Tensor | None:
        """Pictures [rows, 1, 3 or 4, H, W] in [0, 1] that the rows of such a grid begin with, if the condition has some."""
        return None

    def row_names(self, request: Request, columns: int | None) -> list[str]:
        """What each row of such a grid shows: the names of classes, or prompts."""
        return [str(value) for values in request.arguments.values() for value in values[::columns]]

    def facts(self) -> dict[str, str]:
        """For the model card."""
        return {}

    def example(self) -> str:
        """The arguments of a call of the pipeline, as code."""
        return ""


class ClassCondition(Condition):
    """Labels 0..N-1, and N for images whose label was dropped."""

    def __init__(self, options: ConditionOptions, data: ImageSet):
        if data.label_column is None:
            raise ConfigError(
                f"--condition class: {data.name} has no label column that is found automatically; name one of "
                f"{data.columns} with --label_column."
            )
        self.options, self.column, self.names = options, data.label_column, data.class_names

    def unet_config(self) -> dict[str, Any]:
        return {"num_class_embeds": len(self.names) + 1}

    def identity(self) -> dict[str, Any]:
        return {"class names": self.names}

    def draw(self, values: Sequence[int], where: BatchSlice) -> Tensor:
        dropped = torch.from_numpy(_dropped(where, self.options))
        return torch.as_tensor(values, dtype=torch.int64).masked_fill(dropped, len(self.names))

    def probe(self, count: int) -> dict[str, Tensor]:
        return {"class_labels": torch.zeros(count, dtype=torch.int64)}

    def inputs(self, drawn: Tensor, device: torch.device) -> dict[str, Tensor]:
        return {"class_labels": drawn.to(device, non_blocking=True)}

    def request_like(self, data: ImageData, indices: Sequence[int], seed: int) -> Request:
        return Request({"class_labels": data.column(self.column, indices).tolist()}, _guidance(self.options))

    def unet_inputs(self, request: Request) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor(request.arguments["class_labels"])}

    def pipeline(self, unet: Any, scheduler: Any) -> AlphaDDPMPipeline:
        describe_conditions(unet, class_names=self.names, condition_dropout=self.options.condition_dropout)
        return AlphaDDPMPipeline(unet=unet, scheduler=scheduler)

    def preview(self, count: int) -> tuple[Request, int | None]:
        return _rows("class_labels", list(range(len(self.names))), count, self.options)

    def row_names(self, request: Request, columns: int | None) -> list[str]:
        return [self.names[label] for label in request.arguments["class_labels"][::columns]]

    def facts(self) -> dict[str, str]:
        dropout = f"{self.options.condition_dropout:.0%} of the labels"
        return {"condition": f"{len(self.names)} classes", "condition dropout": dropout}

    def example(self) -> str:
        return f"class_labels={self.names[-1]!r}, guidance_scale={self.options.preview_guidance:g}"


class TextDenoiser(nn.Module):
    """UNet and text encoder as one network, so that they are trained, averaged and distributed as one."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: PreTrainedModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, sample: Tensor, timesteps: Tensor, caption_of: Tensor, **tokens: Tensor) -> Any:
        """Images [B, C, H, W]; tokens [U, 77] of U distinct captions, and the index of each image's caption, [B]."""
        states = self.text_encoder(**tokens)[0]
        return self.unet(sample, timesteps, encoder_hidden_states=states[caption_of])


class TextCondition(Condition):
    """Captions through a text encoder, trained with the UNet or frozen; the empty caption if the condition is dropped."""

    unet_class = UNet2DConditionModel
    pipeline_class = AlphaDDPMTextToImagePipeline
    variance_type = "learned_range"  # without which diffusers' own pipeline of the saved model cannot sample

    def __init__(self, options: ConditionOptions, data: ImageSet, init_from: str | None = None):
        self.options, self.captions = options, Captions(options, data)
        self.column = self.captions.column
        self.source = options.text_encoder or (None if init_from else SMALL)
        if init_from and self.source:
            logger.warning("--text_encoder %s takes the place of the text encoder of %s", self.source, init_from)
        if self.source == SMALL:
            self.tokenizer = make_tokenizer(self.captions.all())
            self.text_encoder = make_small_encoder(self.tokenizer)
        elif self.source is None and is_checkpoint(init_from):
            saved = pipeline_of(init_from)
            if not isinstance(saved, self.pipeline_class):
                raise ConfigError(f"--init_from {init_from} {NO_TEXT_MODEL}")
            self.tokenizer, self.text_encoder = saved.tokenizer, saved.text_encoder
        else:
            self.tokenizer, self.text_encoder = load_text_encoder(self.source, init_from)
        self.trained = self.source == SMALL or options.train_text_encoder
        self.text_encoder.train(self.trained).requires_grad_(self.trained)
        self._states, self._room = {}, CACHED_STATES

    def unet_config(self) -> dict[str, Any]:
        encoder = self.text_encoder.config
        return {"cross_attention_dim": getattr(encoder, "hidden_size", None) or encoder.d_model}

    def identity(self) -> dict[str, Any]:
        return {
            "tokenizer": f"{len(self.tokenizer)} tokens, {tokenizer_digest(self.tokenizer)}",
            "frozen text encoder": None if self.trained else self._frozen_digest,
            "captions of classes": self.captions.identity(),
        }

    @cached_property
    def _frozen_digest(self) -> str:
        return weights_digest(self.text_encoder)

    def probe(self, count: int) -> dict[str, Tensor]:
        return {"encoder_hidden_states": torch.zeros(count, MAX_TOKENS, self.unet_config()["cross_attention_dim"])}

    def draw(self, values: Sequence[Any], where: BatchSlice) -> list[str]:
        return self.captions.draw(values, where, _dropped(where, self.options))

    def inputs(self, drawn: list[str], device: torch.device) -> dict[str, Tensor]:
        distinct = list(dict.fromkeys(drawn))
        if not self.trained:
            states = self._frozen_states(distinct, device)
            return {"encoder_hidden_states": torch.stack([states[caption] for caption in drawn])}
        place = {caption: index for index, caption in enumerate(distinct)}
        caption_of = torch.tensor([place[caption] for caption in drawn])
        arguments = {**tokenize(self.tokenizer, distinct), "caption_of": caption_of}
        return {name: value.to(device, non_blocking=True) for name, value in arguments.items()}

    @torch.no_grad()
    def _encoded(self, captions: list[str], device: torch.device) -> Tensor:
        """Text states [B, 77, D]."""
        tokens = {name: ids.to(device) for name, ids in tokenize(self.tokenizer, captions).items()}
        return self.text_encoder.to(device)(**tokens)[0].float()

    def _frozen_states(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        """Text states [77, D] of each caption, cached while there is room."""
        known = {caption: self._states[caption] for caption in captions if caption in self._states}
        if unknown := [caption for caption in captions if caption not in known]:
            for caption, state in zip(unknown, self._encoded(unknown, device), strict=True):
                known[caption] = state
                if self._room >= state.nbytes:
                    self._states[caption] = state.clone()  # a view would keep its whole batch
                    self._room -= state.nbytes
        return known

    def request_like(self, data: ImageData, indices: Sequence[int], seed: int) -> Request:
        where = BatchSlice(seed, 0, len(indices), slice(None))
        captions = self.captions.draw(data.column(self.column, indices), where, [False] * len(indices))
        return Request({"prompt": captions}, _guidance(self.options))

    def unet_inputs(self, request: Request) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self._encoded(request.arguments["prompt"], self.text_encoder.device)}

    def network(self, unet: nn.Module) -> nn.Module:
        return TextDenoiser(unet, self.text_encoder) if self.trained else unet

    def pipeline(self, unet: Any, scheduler: Any) -> AlphaDDPMTextToImagePipeline:
        describe_conditions(unet, condition_dropout=self.options.condition_dropout)
        parts = {"text_encoder": self.text_encoder.to(unet.device), "tokenizer": self.tokenizer}
        return AlphaDDPMTextToImagePipeline(unet=unet, scheduler=scheduler, **parts)

    def preview(self, count: int) -> tuple[Request, int | None]:
        prompts = self.options.preview_prompts
        texts = prompts.split("|") if prompts else self.captions.examples(MAX_PREVIEW_ROWS)
        return _rows("prompt", [text.strip() for text in texts] or [""], count, self.options)

    def facts(self) -> dict[str, str]:
        size = sum(parameter.numel() for parameter in self.text_encoder.parameters()) / 1e6
        how = "trained with the UNet" if self.trained else "frozen"
        source = self.source if self.source and not Path(self.source).exists() else type(self.text_encoder).__name__
        return {
            "condition": "captions",
            "text encoder": f"{source}, {size:.2f} M parameters, {how}",
            "condition dropout": f"{self.options.condition_dropout:.0%} of the captions",
            "word dropout": f"{self.options.word_dropout:.0%}",
        }

    def example(self) -> str:
        prompts = self.captions.examples(MAX_PREVIEW_ROWS) or ["a picture"]
        return f"{prompts[-1]!r}, guidance_scale={self.options.preview_guidance:g}"


def build_condition(options: ConditionOptions, data: ImageSet, init_from: str | None = None) -> Condition:
    """What `--condition` names. A small encoder's initial weights come from torch's global generator, as the UNet's do."""
    if options.condition == "text":
        return TextCondition(options, data, init_from)
    return ClassCondition(options, data) if options.condition == "class" else Condition()


def _dropped(where: BatchSlice, options: ConditionOptions) -> np.ndarray:
    """Which conditions are dropped, bool [b]."""
    return where.uniform(RandomStream.CONDITION_DROPOUT) < options.condition_dropout


def _rows(argument: str, values: list[Any], count: int, options: ConditionOptions) -> tuple[Request, int]:
    """Equal rows of about `count` images in total, at most MAX_PREVIEW_ROWS of them."""
    values = values[: min(count, MAX_PREVIEW_ROWS)]
    columns = max(1, count // len(values))
    return Request({argument: [value for value in values for _ in range(columns)]}, _guidance(options)), columns


def _guidance(options: ConditionOptions) -> float:
    """For previews: 1, none, for a model that was not trained without conditions."""
    return options.preview_guidance if options.condition_dropout else 1.0
