"""The pipelines as blocks of diffusers' Modular Diffusers, over the same functions as the pipelines' own loop.

A block reads its inputs from the pipeline's state and writes its outputs there, beside what the caller gave. Travels inside
model repositories, whose `modular_config.json` names it, and imports every sibling that travels with it.
"""

from copy import deepcopy
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import AutoPipelineBlocks, DDPMScheduler, LoopSequentialPipelineBlocks, SequentialPipelineBlocks, UNet2DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import BlockState, ComponentSpec, InputParam, ModularPipelineBlocks, OutputParam, PipelineState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conditioning_alpha_ddpm import ClassLabels, Conditioned, ConditionVector, TextConditioning, Told
from .editing_alpha_ddpm import Batch, Chain, start_chain
from .encoding_alpha_ddpm import image_condition, value_range
from .pictures_alpha_ddpm import Images
from .ranges_alpha_ddpm import ValueRange
from .samplers_alpha_ddpm import Steps, checked_generators, reserved, reverse_step, set_timesteps
from .sampling_alpha_ddpm import AlphaDDPMSampling, Output, check_finite, check_shown, check_unet, guided_output, to_images
from .scheduling_alpha_ddpm import AlphaDDPMScheduler  # noqa: F401, travels as well
from .scheduling_fitted_alpha_ddpm import our_scheduler
from .tables_alpha_ddpm import Generators

DENOISER_INPUTS = "denoiser_input_fields"  # as diffusers calls what the guider hands to the UNet
UNET, SCHEDULER = ComponentSpec("unet", UNet2DModel), ComponentSpec("scheduler", DDPMScheduler)
X = InputParam("latents", Tensor, description="x_t, [B, C, H, W].")
CHAIN = InputParam("chain", Chain, description="From the step that starts the chain.")
CONDITIONS = InputParam(kwargs_type=DENOISER_INPUTS, description="What goes to the UNet, each with its negative.")
NUM_PROMPTS = OutputParam("num_prompts", int, "Number of prompts or labels, or None if any number of images may share them.")
GUIDER = partial(ComponentSpec, "guider", ClassifierFreeGuidance, default_creation_method="from_config")
GUIDED = InputParam("guidance_conditions", list[str], description="What guidance strengthens; by default all that is told.")
OWN_UNITS = InputParam("denormalize", bool, False, description="Whether numbers are in the units of the model's data.")
# Inputs that make a workflow
PROMPT, IMAGE, MASK, CONDITION = {"prompt": True}, {"image": True}, {"mask_image": True}, {"condition_image": True}
UNET_ARGUMENTS = {"class_ids": "class_labels", "condition_images": "condition_image", "text_states": "encoder_hidden_states"}


class Parts(Conditioned, TextConditioning, AlphaDDPMSampling):
    """The components of a modular pipeline, with the methods of our pipelines."""

    def __init__(self, components: Any):
        check_unet(components.unet)
        self.unet, self.scheduler = components.unet, components.scheduler
        self.text_encoder, self.tokenizer = (getattr(components, name, None) for name in ("text_encoder", "tokenizer"))
        self._execution_device = components._execution_device


class Block(ModularPipelineBlocks):
    """A block says in class attributes what it uses, takes and gives; `run` works on its view of the state."""

    model_name = "alpha-ddpm"
    uses: ClassVar[list[ComponentSpec]] = []
    takes: ClassVar[list[InputParam]] = []
    gives: ClassVar[list[OutputParam]] = []

    expected_components = property(lambda self: deepcopy(self.uses))  # diffusers changes those of a sequence in place
    inputs = property(lambda self: deepcopy(self.takes))
    intermediate_outputs = property(lambda self: deepcopy(self.gives))

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        self.run(components, block_state)
        self.set_block_state(state, block_state)
        return components, state


class ClassLabelsStep(Block):
    description = "Turns class ids or names, or numbers, into what the UNet's embedding takes; without, into 'not told'."
    uses: ClassVar = [UNET]
    takes: ClassVar = [
        InputParam("class_labels", ClassLabels, description="One class for all images, or one per image: ids or names."),
        InputParam("batch_size", int, description="Number of images; by default one, or one per condition or image."),
        InputParam("condition_vector", ConditionVector, description="Numbers, or a dict by name; or one such per image."),
        GUIDED,
    ]
    gives: ClassVar = [
        OutputParam("class_ids", Tensor, "Ids of embeddings [1 or N], or encoded numbers [1 or N, ...].", DENOISER_INPUTS),
        OutputParam("negative_class_ids", Tensor, "Those of 'no class', or of numbers that are not told.", DENOISER_INPUTS),
        NUM_PROMPTS,
    ]

    def run(self, components: Any, state: BlockState) -> None:
        parts = Parts(components)
        told = parts._told(state.class_labels, state.condition_vector, state.guidance_conditions)
        state.class_ids, state.negative_class_ids = parts._label_rows(told)
        state.num_prompts = told.prompts(state.batch_size)


class ConditionImageStep(Block):
    description = "Encodes condition images for the UNet; without them, zeros."
    uses: ClassVar = [UNET]
    takes: ClassVar = [
        InputParam("condition_image", Images, description="One for all images, or one per image."),
        InputParam("condition_mask", Images, description="For inpainting, white where the condition image is unknown."),
        InputParam("num_prompts", int, description="From the step before."),
        GUIDED,
        OWN_UNITS,
    ]
    gives: ClassVar = [
        OutputParam("condition_images", Tensor, "As the UNet gets them beside x_t, [1 or N, k, H, W].", DENOISER_INPUTS),
        OutputParam("negative_condition_images", Tensor, "Zeros.", DENOISER_INPUTS),
        NUM_PROMPTS,
    ]

    def run(self, components: Any, state: BlockState) -> None:
        parts = Parts(components)
        encoded = parts._condition_images(state.condition_image, state.condition_mask, state.denormalize)
        told = Told(condition_image=encoded, guided=parts._guided(state.guidance_conditions))
        state.condition_images, state.negative_condition_images = parts._image_rows(told)
        state.num_prompts = told.prompts(state.num_prompts)


class TextEncoderStep(Block):
    description = "Encodes prompts, and the negative prompts that guidance leads away from."
    uses: ClassVar = [ComponentSpec("text_encoder", PreTrainedModel), ComponentSpec("tokenizer", PreTrainedTokenizerBase), UNET]
    takes: ClassVar = [
        InputParam("prompt", str | list[str], description="What to show; one for all images, or one per image."),
        InputParam("negative_prompt", str | list[str], description="What to lead away from; by default the empty prompt."),
        InputParam("prompt_embeds", Tensor, description="Text states [N, 77, D] in place of the prompt."),
        InputParam("negative_prompt_embeds", Tensor, description="Those in place of the negative prompt."),
    ]
    gives: ClassVar = [
        OutputParam("text_states", Tensor, "Of the prompts, [N, 77, D].", DENOISER_INPUTS),
        OutputParam("negative_text_states", Tensor, "Of the negative prompts, [N, 77, D].", DENOISER_INPUTS),
        NUM_PROMPTS,
    ]

    def run(self, components: Any, state: BlockState) -> None:
        given = {name: state[name] for name in ("negative_prompt", "prompt_embeds", "negative_prompt_embeds")}
        state.text_states, state.negative_text_states = Parts(components).encode_prompt(state.prompt, True, **given)
        state.num_prompts = len(state.text_states) if len(state.text_states) > 1 else None


class SetTimestepsStep(Block):
    description = "Puts the scheduler, which is ours where a repository names DDPMScheduler, into the chain asked for."
    uses: ClassVar = [SCHEDULER]
    from_noise: ClassVar[bool] = True
    takes: ClassVar = [
        InputParam("num_inference_steps", int, description="Number of steps; by default as of the pipeline's call."),
        InputParam("timesteps", description="Timesteps of the chain, noise first; by default evenly spaced."),
        InputParam("sigmas", list[float], description="The noise levels themselves, for schedulers that take them."),
    ]

    def run(self, components: Any, state: BlockState) -> None:
        loaded = components.scheduler
        if (ours := our_scheduler(loaded)) is not loaded:
            ours._diffusers_load_id = getattr(loaded, "_diffusers_load_id", "null")  # its source, for saving
            components.scheduler = ours
        steps = Steps(state.num_inference_steps, state.timesteps, state.sigmas)
        set_timesteps(components.scheduler, steps, self.from_noise)


class SetTimestepsOfImageStep(SetTimestepsStep):
    description = "The same for a chain that starts from an image, which is not a fitted one by default."
    from_noise = False
    takes: ClassVar = [*SetTimestepsStep.takes, InputParam("image", Images, required=True, description="To start from.")]


class TimestepsStep(AutoPipelineBlocks):
    block_classes: ClassVar = [SetTimestepsOfImageStep, SetTimestepsStep]
    block_names: ClassVar = ["image", "noise"]
    block_trigger_inputs: ClassVar = ["image", None]
    description = "The chain: by default the full one, or from noise that of the fitted sampler of most steps."


class NoiseStep(Block):
    description = "Starts the chain from noise, with a condition for each image."
    uses: ClassVar = [UNET, SCHEDULER]
    takes: ClassVar = [
        InputParam("num_prompts", int, description="From the step that reads the conditions."),
        InputParam.template("num_images_per_prompt"),
        InputParam("latents", Tensor, description="The noise N(0, I) to use, [B, C, H, W]."),
        InputParam("generator", Generators, description="One generator for all images, or one per image."),
        CONDITIONS,
        InputParam("chain", Chain, description="Of an earlier call, whose result is not taken for noise."),
        InputParam("strength", float, description="Fraction of the chain to run; by default 0.5, or 1 with a mask."),
        InputParam("num_resamples", int, 1, description="With a mask, passes per step, for a better fit of old and new."),
        OWN_UNITS,
    ]
    gives: ClassVar = [OutputParam.template("latents"), OutputParam("chain", Chain, "Where it starts, and what it keeps.")]

    def run(self, components: Any, state: BlockState) -> None:
        parts, given = Parts(components), state.as_dict().get
        if image_condition(parts.unet) and state[DENOISER_INPUTS].get("condition_images") is None:
            raise ValueError("this model takes a condition image; use AlphaDDPMImageToImageBlocks.")
        latents = None if state.chain is not None and state.latents is state.chain.x else state.latents
        edit = parts._edit(given("image"), state.strength, given("mask_image"), state.num_resamples, latents, state.denormalize)
        batch = Batch.of(state.num_prompts, state.num_images_per_prompt, edit)
        generator = checked_generators(state.generator, batch.size)
        noise = parts._start_noise(edit.latents, batch.size, generator)
        state.chain = start_chain(components.scheduler, edit, batch, noise, generator)
        state.latents = state.chain.x
        for name, rows in state[DENOISER_INPUTS].items():
            state[name] = batch.spread(rows, name)


class ImageStep(NoiseStep):
    description = "Starts the chain from an image, noised to the first of the last `strength` of its steps."
    takes: ClassVar = [*NoiseStep.takes, InputParam("image", Images, required=True, description="To start from.")]


class MaskStep(ImageStep):
    description = "Starts the chain from an image of which a mask's white part is painted anew."
    takes: ClassVar = [*ImageStep.takes, InputParam("mask_image", Images, required=True, description="White is painted anew.")]


class StartStep(AutoPipelineBlocks):
    block_classes: ClassVar = [MaskStep, ImageStep, NoiseStep]
    block_names: ClassVar = ["inpaint", "image", "noise"]
    block_trigger_inputs: ClassVar = ["mask_image", "image", None]
    description = "Where the chain starts: an image with a mask if `mask_image` is given, an image if `image` is, else noise."


class PredictStep(Block):
    description = "In the loop: what the UNet predicts under each condition, put together by the guider."
    uses: ClassVar = [UNET]
    takes: ClassVar = [X, CHAIN, CONDITIONS]

    def __call__(self, components: Any, state: BlockState, i: int, t: Tensor) -> tuple[Any, BlockState]:
        guider, scheduler = components.guider, state.chain.scheduler
        guider.set_state(step=i, num_inference_steps=len(scheduler.timesteps), timestep=t)
        pairs = {name: (state[name], state[f"negative_{name}"]) for name in UNET_ARGUMENTS if state[name] is not None}
        given = {UNET_ARGUMENTS[name]: (c, c if null is None else null) for name, (c, null) in pairs.items()}
        state.model_output = guided_output(components.unet, scheduler, state.latents, t, guider, given)
        return components, state


class ReverseStep(Block):
    description = "In the loop: one step of the reverse process, after which kept pixels are put back."
    takes: ClassVar = [X, CHAIN]

    def __call__(self, components: Any, state: BlockState, i: int, t: Tensor) -> tuple[Any, BlockState]:
        step = reverse_step(state.chain.scheduler, state.model_output, t, state.latents, state.chain.generator)
        state.latents = state.chain.keep(step.prev_sample, i)
        return components, state


class DenoiseStep(LoopSequentialPipelineBlocks):
    description = "The reverse process: predicts and steps at each timestep, or several times at each with `num_resamples`."
    model_name = Block.model_name
    block_classes: ClassVar = [PredictStep, ReverseStep]
    block_names: ClassVar = ["predict", "step"]
    loop_expected_components: ClassVar = [GUIDER(config=FrozenDict({"guidance_scale": 1.0}))]
    loop_intermediate_outputs: ClassVar = [OutputParam.template("latents")]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        chain = (view := self.get_block_state(state)).chain
        with reserved(chain.scheduler):
            for index, t in self.progress_bar(chain.steps):
                for repeat in chain.repeats(index):
                    view.latents = chain.again(repeat, view.latents, t)
                    components, view = self.loop_step(components, view, i=index, t=t)
                chain.watch(view.model_output, view.latents)
        check_finite(chain, components.unet)
        chain.x = view.latents
        self.set_block_state(state, view)
        return components, state


class TextDenoiseStep(DenoiseStep):
    loop_expected_components: ClassVar = [GUIDER(config=FrozenDict({"guidance_scale": 2.0}))]


class DecodeStep(Block):
    description = "Turns x_0 into pictures."
    uses: ClassVar = [UNET]
    takes: ClassVar = [X, InputParam.template("output_type"), OWN_UNITS]
    gives: ClassVar = [OutputParam.template("images")]

    def run(self, components: Any, state: BlockState) -> None:
        output = Output(state.output_type, denormalize=state.denormalize)
        check_shown(components.unet, output)
        own: ValueRange | None = value_range(components.unet) if output.denormalize else None
        state.images = to_images(state.latents, output.type, own)


class AlphaDDPMBlocks(SequentialPipelineBlocks):
    """Those of `AlphaDDPMPipeline`."""

    model_name = Block.model_name
    block_classes: ClassVar = [ClassLabelsStep, TimestepsStep, StartStep, DenoiseStep, DecodeStep]
    block_names: ClassVar = ["class_labels", "set_timesteps", "start", "denoise", "decode"]
    description = "Images from noise by the reverse process of DDPM, unconditional, for class labels or for numbers."
    outputs: ClassVar = [OutputParam.template("images")]
    _workflow_map: ClassVar = {"unconditional": {}, "image2image": IMAGE, "inpainting": IMAGE | MASK}


class AlphaDDPMImageToImageBlocks(AlphaDDPMBlocks):
    """Those of `AlphaDDPMImageToImagePipeline`."""

    block_classes: ClassVar = [*AlphaDDPMBlocks.block_classes[:1], ConditionImageStep, *AlphaDDPMBlocks.block_classes[1:]]
    block_names: ClassVar = [*AlphaDDPMBlocks.block_names[:1], "condition_image", *AlphaDDPMBlocks.block_names[1:]]
    description = "Images for a condition image by the reverse process of DDPM."
    _workflow_map: ClassVar = {
        "conditional": CONDITION, "image2image": CONDITION | IMAGE, "inpainting": CONDITION | IMAGE | MASK
    }  # fmt: skip


class AlphaDDPMTextBlocks(AlphaDDPMBlocks):
    """Those of `AlphaDDPMTextToImagePipeline`."""

    block_classes: ClassVar = [TextEncoderStep, TimestepsStep, StartStep, TextDenoiseStep, DecodeStep]
    block_names: ClassVar = ["text_encoder", *AlphaDDPMBlocks.block_names[1:]]
    description = "Images from text by the reverse process of DDPM."
    _workflow_map: ClassVar = {"text2image": PROMPT, "image2image": PROMPT | IMAGE, "inpainting": PROMPT | IMAGE | MASK}
