"""Images from text: the report's §3 as a diffusers pipeline, in pixel space.

Samples the same images as diffusers' `IFPipeline`, under whose name it is saved: prompts in lower case and padded to 77
tokens, the unconditional half first in the batch, the variance half unguided, the UNet attending to all 77 states.
Travels inside model repositories as `pipeline.py`. Imports every sibling that travels with it.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conditioning_alpha_ddpm import MAX_TOKENS, TextConditioning
from .editing_alpha_ddpm import Batch
from .encoding_alpha_ddpm import image_condition  # noqa: F401, travels as well
from .modular_alpha_ddpm import AlphaDDPMTextBlocks
from .pictures_alpha_ddpm import Images
from .ranges_alpha_ddpm import ValueRange  # noqa: F401
from .samplers_alpha_ddpm import Steps
from .sampling_alpha_ddpm import AlphaDDPMOutput, AlphaDDPMSampling, Conditioning, Guidance, Output, check_unet
from .scheduling_alpha_ddpm import AlphaDDPMScheduler
from .scheduling_fitted_alpha_ddpm import our_scheduler
from .stock_format import StockFormatMixin
from .tables_alpha_ddpm import Generators

# diffusers runs the pipeline.py of every local folder in one and the same module, where it wants to find a single class
for other in ("AlphaDDPMPipeline", "AlphaDDPMImageToImagePipeline"):
    globals().pop(other, None)


class AlphaDDPMTextToImagePipeline(StockFormatMixin, TextConditioning, AlphaDDPMSampling, DiffusionPipeline):
    """Text-to-image generation with a pixel-space DDPM.

    What it saves loads and runs with diffusers alone, as `IFPipeline`, if the scheduler's variance is learned.

    Args:
        unet: the noise predictor, from images [B, C, H, W], a timestep and text states [B, 77, D] to [B, C, H, W], or 2C for
            a learned variance.
        text_encoder: any transformers text model that returns a last hidden state and takes 77 tokens.
        tokenizer: the encoder's.
        scheduler: any diffusers scheduler that works with DDPM models.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _stock_class = "IFPipeline"
    _scheduler_class = AlphaDDPMScheduler
    _blocks_class = AlphaDDPMTextBlocks
    _stock_components: ClassVar = {
        **dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"), (None, None)),
        "requires_safety_checker": False,
    }

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: DDPMScheduler,
    ):
        super().__init__()
        _check_components(unet, text_encoder)
        scheduler = our_scheduler(scheduler)
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple:
        """As in diffusers. Raises ValueError for the index of a model without text."""
        if "text_encoder" not in config_dict and "text_encoder" not in kwargs and "_class_name" in config_dict:
            raise ValueError(f"this {config_dict['_class_name']} has no text_encoder; load it with AlphaDDPMPipeline.")
        return super().extract_init_dict(config_dict, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 2.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents", "image"),
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        image: Images | None = None,
        strength: float | None = None,
        mask_image: Images | None = None,
        num_resamples: int = 1,
        output_trajectory: bool = False,
        latents: Tensor | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        denormalize: bool = False,
    ) -> AlphaDDPMOutput | tuple:
        """Sample `num_images_per_prompt` images per prompt; those of one prompt are neighbours.

        A single prompt serves for all of several images or latents.

        Args:
            prompt: what to show; tokens beyond the 77th are cut, with a warning. The empty prompt means no condition.
            guidance_scale: 1 is none; above 1, images are pushed towards the prompt, for twice the network's batch.
            negative_prompt: what to guide away from, one for all or one per prompt; the default is the empty prompt.
            prompt_embeds, negative_prompt_embeds: text states [B, 77, D] in place of prompts, from `encode_prompt`.

        The other arguments are those of `AlphaDDPMPipeline`. Raises ValueError for a value that cannot be used.
        """
        check_unet(self.unet)  # it may have been replaced
        steps = Steps(num_inference_steps, timesteps, sigmas)
        callback_inputs = callback_on_step_end_tensor_inputs
        output = Output(output_type, return_dict, output_trajectory, callback_on_step_end, callback_inputs, denormalize)
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval)
        given = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        states, null_states = self.encode_prompt(prompt, guidance.in_use, negative_prompt=negative_prompt, **given)
        edit = self._edit(image, strength, mask_image, num_resamples, latents, denormalize)
        batch = Batch.of(len(states) if len(states) > 1 else None, num_images_per_prompt, edit)
        kwargs = {"encoder_hidden_states": batch.spread(states, "prompts")}
        null_kwargs = None
        if guidance.in_use:
            self._warn_if_never_unconditional()
            null_kwargs = {"encoder_hidden_states": batch.spread(null_states, "negative prompts")}
        return self._sample(batch, Conditioning(kwargs, null_kwargs, guidance), edit, output, generator, steps)


def _check_components(unet: Any, text_encoder: Any) -> None:
    if unet is None:
        return  # `from_pretrained(..., unet=None)` loads part of a pipeline
    check_unet(unet)
    if text_encoder is None:
        return
    width = unet.config.get("cross_attention_dim")
    if width is None:
        use = "use a UNet2DConditionModel, or AlphaDDPMPipeline for a model without text"
        raise ValueError(f"{type(unet).__name__} without cross-attention cannot read text states; {use}.")
    encoder = text_encoder.config
    states = getattr(encoder, "hidden_size", None) or getattr(encoder, "d_model", None)
    if unet.config.get("encoder_hid_dim") is None and states != width:
        wanted = f"but the UNet's cross_attention_dim is {width}"
        raise ValueError(f"the text encoder's states have {states} values, {wanted}.")
    positions = getattr(encoder, "max_position_embeddings", None)
    if positions is not None and positions < MAX_TOKENS:
        raise ValueError(f"the text encoder takes {positions} tokens; prompts are padded to {MAX_TOKENS}.")
