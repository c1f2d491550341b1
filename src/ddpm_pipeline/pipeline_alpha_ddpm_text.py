"""Images from text: the report's §3 as a diffusers pipeline, in pixel space.

Samples the same images as diffusers' `IFPipeline`, under whose name it is saved: prompts in lower case and padded to 77
tokens, the unconditional half first in the batch, the variance half unguided, the UNet attending to all 77 states.
Travels inside model repositories as `pipeline.py`. Imports every sibling that travels with it.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .editing_alpha_ddpm import Batch, expanded
from .pictures_alpha_ddpm import Images
from .samplers_alpha_ddpm import Steps
from .sampling_alpha_ddpm import AlphaDDPMOutput, AlphaDDPMSampling, Conditioning, Guidance, Output, check_unet
from .scheduling_alpha_ddpm import AlphaDDPMScheduler
from .stock_format import StockFormatMixin
from .tables_alpha_ddpm import Generators

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
        callback_inputs = tuple(callback_on_step_end_tensor_inputs)
        output = Output(output_type, return_dict, output_trajectory, callback_on_step_end, callback_inputs)
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval)
        given = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        states, null_states = self.encode_prompt(prompt, guidance.in_use, negative_prompt=negative_prompt, **given)
        edit = self._edit(image, strength, mask_image, num_resamples, latents)
        batch = Batch.of(len(states) if len(states) > 1 else None, num_images_per_prompt, edit)
        kwargs = {"encoder_hidden_states": batch.spread(states, "prompts")}
        null_kwargs = None
        if guidance.in_use:
            self._warn_if_never_unconditional()
            null_kwargs = {"encoder_hidden_states": batch.spread(null_states, "negative prompts")}
        return self._sample(batch, Conditioning(kwargs, null_kwargs, guidance), edit, output, generator, steps)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clean_caption: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Text states of the prompts and, for guidance, of the negative ones, each [B, 77, D], as in `IFPipeline`.

        B is the number of prompts times `num_images_per_prompt`, those of one prompt being neighbours. `clean_caption` strips
        links, mark-up and punctuation from the prompts as `IFPipeline` does, which training does not.
        """
        device = device or self._execution_device
        states = self._states(prompt, prompt_embeds, "prompt", clean_caption)
        prompt_embeds = states.repeat_interleave(num_images_per_prompt, dim=0).to(device)
        if do_classifier_free_guidance:
            if negative_prompt is None and negative_prompt_embeds is None:
                negative_prompt = ""
            null_states = self._states(negative_prompt, negative_prompt_embeds, "negative_prompt", clean_caption)
            null_states = expanded(null_states, len(states), "negative prompts")
            if null_states.shape[1] != states.shape[1]:
                lengths = f"{states.shape[1]} and {null_states.shape[1]} tokens"
                raise ValueError(f"prompt_embeds and negative_prompt_embeds have {lengths}; guidance needs equal lengths.")
            negative_prompt_embeds = null_states.repeat_interleave(num_images_per_prompt, dim=0).to(device)
        else:
            negative_prompt_embeds = None
        return prompt_embeds, negative_prompt_embeds

    def _encode(self, prompts: list[str]) -> Tensor:
        """Text states [B, 77, D] of the prompts; a warning shows what is cut."""
        for prompt in prompts:
            ids = self.tokenizer(prepare_prompt(prompt), verbose=False).input_ids
            if len(ids) > MAX_TOKENS:
                cut = self.tokenizer.decode(ids[MAX_TOKENS - 1 : -1]).strip()
                cut = cut if len(cut) <= SHOWN else f"{cut[:SHOWN]}... ({len(cut)} characters)"
                problem = f"the prompt has more than {MAX_TOKENS} tokens; this was cut from it: {cut!r}"
                warnings.warn(problem, stacklevel=7)
        tokens = {name: ids.to(self._execution_device) for name, ids in tokenize(self.tokenizer, prompts).items()}
        return self.text_encoder(**tokens)[0]

    def _states(self, prompt: Any, embeds: Tensor | None, name: str, clean_caption: bool) -> Tensor:
        """The states given as `embeds`, or those of the prompts, [B, tokens, D]. `name` is the prompt's in the call."""
        if (prompt is None) == (embeds is None):
            raise ValueError(f"give either {name} or {name}_embeds.")
        if embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(p, str) for p in prompts):
                raise ValueError(f"{name} must be a string or a list of strings with at least one, not {prompt!r}.")
            if self.text_encoder is None:
                raise ValueError(f"without a text encoder this pipeline cannot read {name}={prompt!r}; give {name}_embeds.")
            embeds = self._encode(_cleaned(prompts) if clean_caption else list(prompts))
        embeds = torch.as_tensor(embeds)
        if self.unet is not None:
            width = self.unet.config.get("encoder_hid_dim") or self.unet.config.cross_attention_dim
            if embeds.ndim != 3 or embeds.shape[2] != width:
                raise ValueError(f"{name}_embeds has shape {tuple(embeds.shape)}; this model takes [B, tokens, {width}].")
        reader = self.text_encoder if self.unet is None else self.unet
        return embeds.to(self._execution_device, reader.dtype)


def _cleaned(prompts: list[str]) -> list[str]:
    """As `IFPipeline` cleans them, which needs beautifulsoup4 and ftfy."""
    from diffusers import IFPipeline  # slow to import

    return IFPipeline.__new__(IFPipeline)._text_preprocessing(list(prompts), clean_caption=True)


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
