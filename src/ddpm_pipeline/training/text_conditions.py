"""Training on captions, through a text encoder that is trained with the UNet or frozen."""

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..conditioning_alpha_ddpm import MAX_TOKENS, tokenize
from ..data.mapped import ImageData, ImageSet
from ..generation.drawing import Request
from ..pipeline_alpha_ddpm_text import AlphaDDPMTextToImagePipeline
from ..support.draws import BatchSlice
from ..support.errors import ConfigError
from ..support.provenance import weights_digest
from .captions import Captions
from .condition_base import MAX_PREVIEW_ROWS, Condition
from .export import is_checkpoint, pipeline_of
from .options import ConditionOptions
from .text_encoders import NO_TEXT_MODEL, load_text_encoder, make_small_encoder, make_tokenizer, tokenizer_digest

logger = logging.getLogger(__name__)

SMALL = "small"  # the text encoder that is trained from scratch with the UNet
CACHED_STATES = 2**28  # bytes of a frozen encoder's states


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

    def probe(self, count: int, unet: nn.Module) -> dict[str, Tensor]:
        return {"encoder_hidden_states": torch.zeros(count, MAX_TOKENS, self.unet_config()["cross_attention_dim"])}

    def draw(self, values: Sequence[Any], where: BatchSlice) -> list[str]:
        return self.captions.draw(values, where, self.dropped(where))

    def inputs(self, drawn: list[str], original_samples: Tensor) -> dict[str, Tensor]:
        distinct, device = list(dict.fromkeys(drawn)), original_samples.device
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
        return self.asked(prompt=captions)

    def unet_inputs(self, request: Request) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self._encoded(request.arguments["prompt"], self.text_encoder.device)}

    def network(self, unet: nn.Module) -> nn.Module:
        return TextDenoiser(unet, self.text_encoder) if self.trained else unet

    def components(self, unet: Any) -> dict[str, Any]:
        return {"text_encoder": self.text_encoder.to(unet.device), "tokenizer": self.tokenizer}

    def preview(self, count: int) -> tuple[Request, int | None]:
        prompts = self.options.preview_prompts
        texts = prompts.split("|") if prompts else self.captions.examples(MAX_PREVIEW_ROWS)
        return self.rows(count, prompt=[text.strip() for text in texts] or [""])

    def row_names(self, request: Request, columns: int | None) -> list[str]:
        return list(request.arguments["prompt"][::columns])

    def facts(self) -> dict[str, str]:
        size = sum(parameter.numel() for parameter in self.text_encoder.parameters()) / 1e6
        how = "trained with the UNet" if self.trained else "frozen"
        source = self.source if self.source and not Path(self.source).exists() else type(self.text_encoder).__name__
        return {
            "condition": "captions",
            "text encoder": f"{source}, {size:.2f} M parameters, {how}",
            "condition dropout": self.share_of("captions"),
            "word dropout": f"{self.options.word_dropout:.0%}",
        }

    def arguments(self) -> list[str]:
        return [repr((self.captions.examples(MAX_PREVIEW_ROWS) or ["a picture"])[-1])]
