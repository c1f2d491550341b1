"""Images from text: the report's §3 as a diffusers pipeline, in pixel space.

Samples the same images as diffusers' `IFPipeline`, under whose name it is saved: prompts in lower case and padded to 77
tokens, the unconditional half first in the batch, the variance half unguided, the UNet attending to all 77 states.
Travels inside model repositories as `pipeline.py`. Imports every sibling that travels with it.
"""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .editing_alpha_ddpm import Edit, expanded
from .pictures_alpha_ddpm import Images
from .sampling_alpha_ddpm import AlphaDDPMOutput, AlphaDDPMSampling, Conditioning, Guidance, Output
from .scheduling_alpha_ddpm import AlphaDDPMScheduler
from .stock_format import StockFormatMixin
from .tables_alpha_ddpm import Generators, check_integer

# diffusers runs the pipeline.py of every local folder in one and the same module, where it wants to find a single class
globals().pop("AlphaDDPMPipeline", None)

MAX_TOKENS = 77  # IFPipeline pads to 77, whatever the tokenizer
SHOWN = 200  # most characters of a cut prompt that the warning shows


def prepare_prompt(prompt: str) -> str:
    """The prompt as the tokenizer gets it, in training and in sampling."""
    return prompt.lower().strip()


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, each int64 [B, 77], cut and padded."""
    prompts = [prepare_prompt(prompt) for prompt in prompts]
    fixed_length = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True}
    tokens = tokenizer(prompts, **fixed_length, return_attention_mask=True, return_tensors="pt")
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


class AlphaDDPMTextToImagePipeline(StockFormatMixin, AlphaDDPMSampling, DiffusionPipeline):
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
        scheduler = self._own_scheduler(scheduler)
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)

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
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("image",),
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        image: Images | None = None,
        strength: float | None = None,
        mask_image: Images | None = None,
        num_resamples: int = 1,
        output_trajectory: bool = False,
    ) -> AlphaDDPMOutput | tuple:
        """Sample `num_images_per_prompt` images per prompt; those of one prompt are neighbours.

        Args:
            prompt: what to show; tokens beyond the 77th are cut, with a warning. The empty prompt means no condition.
            guidance_scale: 1 is none; above 1, images are pushed towards the prompt, for twice the network's batch.
            negative_prompt: what to guide away from, one for all or one per prompt; the default is the empty prompt.
            prompt_embeds, negative_prompt_embeds: text states [B, 77, D] in place of prompts, as `encode` returns them.

        The other arguments are those of `AlphaDDPMPipeline`. Raises ValueError for a value that cannot be used.
        """
        count = num_images_per_prompt
        check_integer("num_images_per_prompt", count, 1)
        edit = Edit(image, strength, mask_image, num_resamples)
        callback_inputs = tuple(callback_on_step_end_tensor_inputs)
        output = Output(output_type, return_dict, output_trajectory, callback_on_step_end, callback_inputs)
        guidance = Guidance(guidance_scale, guidance_rescale, tuple(guidance_interval))
        states = self._states(prompt, prompt_embeds, "prompt")
        conditioning = Conditioning({"encoder_hidden_states": states.repeat_interleave(count, dim=0)})
        if guidance.in_use:
            self._warn_if_never_unconditional()
            if negative_prompt is None and negative_prompt_embeds is None:
                negative_prompt = ""
            null_states = self._states(negative_prompt, negative_prompt_embeds, "negative_prompt")
            null_states = expanded(null_states, len(states), "negative prompts")
            null_kwargs = {"encoder_hidden_states": null_states.repeat_interleave(count, dim=0)}
            conditioning = Conditioning(conditioning.kwargs, null_kwargs, guidance)
        return self._sample(count * len(states), conditioning, edit, output, generator, num_inference_steps)

    @torch.no_grad()
    def encode(self, prompts: str | list[str]) -> Tensor:
        """Text states [B, 77, D] of the prompts, in the UNet's precision."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        for prompt in prompts:
            ids = self.tokenizer(prepare_prompt(prompt), verbose=False).input_ids
            if len(ids) > MAX_TOKENS:
                cut = self.tokenizer.decode(ids[MAX_TOKENS - 1 : -1]).strip()
                cut = cut if len(cut) <= SHOWN else f"{cut[:SHOWN]}... ({len(cut)} characters)"
                problem = f"the prompt has more than {MAX_TOKENS} tokens; this was cut from it: {cut!r}"
                warnings.warn(problem, stacklevel=6)
        tokens = {name: ids.to(self._execution_device) for name, ids in tokenize(self.tokenizer, prompts).items()}
        return self.text_encoder(**tokens)[0].to(self.unet.dtype)

    def _states(self, prompt: Any, embeds: Tensor | None, name: str) -> Tensor:
        """The states given as `embeds`, or those of the prompts, [B, tokens, D]. `name` is the prompt's in the call."""
        if (prompt is None) == (embeds is None):
            raise ValueError(f"give either {name} or {name}_embeds.")
        if embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(p, str) for p in prompts):
                raise ValueError(f"{name} must be a string or a list of strings with at least one, not {prompt!r}.")
            return self.encode(list(prompts))
        width = self.unet.config.cross_attention_dim
        if embeds.ndim != 3 or embeds.shape[2] != width:
            raise ValueError(f"{name}_embeds has shape {tuple(embeds.shape)}; this model takes [B, tokens, {width}].")
        return embeds.to(self._execution_device, self.unet.dtype)

    def _batch_option(self, count: int, options: dict[str, Any]) -> dict[str, Any]:
        prompts = options.get("prompt") if options.get("prompt") is not None else options.get("prompt_embeds")
        one = isinstance(prompts, str) or (prompts is not None and len(prompts) == 1)
        return {"num_images_per_prompt": count} if one else {}


def _check_components(unet: Any, text_encoder: Any) -> None:
    if unet is None or text_encoder is None:
        return  # `from_pretrained(..., unet=None)` loads part of a pipeline
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
