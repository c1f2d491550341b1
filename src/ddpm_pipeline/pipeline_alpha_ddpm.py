"""Images from noise by the reverse process of DDPM: the report's figure 3.3 as a diffusers pipeline.

This file is also shipped inside model repositories, as `pipeline.py`, so that whoever trusts a repository can run it without
the package. It imports nothing but diffusers, torch and the siblings that are shipped with it.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .sampling_alpha_ddpm import AlphaDDPMOutput, AlphaDDPMSampling, Condition, Guidance, Images
from .scheduling_alpha_ddpm import AlphaDDPMScheduler
from .stock_format import StockFormatMixin
from .tables_alpha_ddpm import Generators

# diffusers runs the pipeline.py of every local folder in one and the same module, and wants to find a single class there
globals().pop("AlphaDDPMTextToImagePipeline", None)

ClassLabels = int | str | Sequence[int | str | None] | torch.Tensor


class AlphaDDPMPipeline(StockFormatMixin, AlphaDDPMSampling, DiffusionPipeline):
    """Image generation, unconditional or for class labels.

    Loads any repository of diffusers' `DDPMPipeline`; its `DDPMScheduler` becomes an `AlphaDDPMScheduler` of the same
    config. Another scheduler that was asked for (`scheduler=` when loading, or set later) is left as it is.
    What it saves names the stock classes, so that it loads with diffusers alone.

    Args:
        unet: the noise predictor, images [B, C, H, W] and a timestep to [B, C, H, W], or 2C for a learned variance.
        scheduler: any diffusers scheduler that works with DDPM models.
    """

    model_cpu_offload_seq = "unet"
    _stock_class = "DDPMPipeline"
    _scheduler_class = AlphaDDPMScheduler

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=self._own_scheduler(scheduler))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("image",),
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        image: Images | None = None,
        strength: float | None = None,
        mask_image: Images | None = None,
        num_resamples: int = 1,
        output_trajectory: bool = False,
    ) -> AlphaDDPMOutput | tuple:
        """Draw images.

        Args:
            batch_size: how many, at least 1; by default one, or one for each of the class labels.
            generator: one for all images, or a list with one an image; an image drawn with its own generator does not
                depend on the batch it is drawn in.
            num_inference_steps: length of the chain; by default every timestep the model was trained on.
            output_type: "pil" images, "np" [B, H, W, C] in [0, 1], or "pt" [B, C, H, W] in [0, 1].
            return_dict: an `AlphaDDPMOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, index, timestep, tensors)` after each step; what it returns
                under "image" takes the image's place.
            callback_on_step_end_tensor_inputs: what `tensors` holds: "image" (x_s, [B, C, H, W], about [-1, 1]) and
                "pred_original_sample" (the x_0 predicted at this step).
            class_labels: a class for all images, or one an image: ids, names (see `id2label`), or None for no class.
            guidance_scale: 1 is none; above it, images are pushed towards their class and away from "no class". Costs a
                second forward pass, in the same batch.
            guidance_rescale: from 0 to 1, how far to undo the contrast that guidance adds (Lin et al. 2023).
            guidance_interval: start and end of guidance as shares of the chain, noise being 0 (Kynkäänniemi et al. 2024).
            image: begin with this picture, noised, instead of pure noise: PIL, array [B, H, W, C] or tensor [B, C, H, W] in
                [0, 1] (or 0..255 as whole numbers); one, or one an image.
            strength: which share of the chain to run on `image`: 0 gives it back, 1 leaves nothing of it. By default 0.5,
                and 1 with a mask.
            mask_image: white (1) where `image` is to be painted anew, black (0) where its pixels are kept.
            num_resamples: with a mask, passes for each step, to make old and new fit better (Lugmayr et al. 2022); 1 is
                none, and time grows with it.
            output_trajectory: give all x_t too: `trajectory` [S + 1, B, C, H, W] on the CPU.

        Raises:
            ValueError: for a value that cannot be used, before anything is drawn.
        """
        labels = None if class_labels is None else self._label_ids(class_labels)
        if batch_size is None:
            batch_size = 1 if labels is None else len(labels)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be an integer of at least 1.")
        self._check_call(batch_size, generator, output_type, callback_on_step_end_tensor_inputs)
        guidance = Guidance(guidance_scale, guidance_rescale, tuple(guidance_interval))
        return self._draw(
            batch_size,
            self._class_condition(labels, batch_size, guidance),
            generator=generator,
            num_inference_steps=num_inference_steps,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            guidance=guidance,
            image=image,
            strength=strength,
            mask_image=mask_image,
            num_resamples=num_resamples,
            output_trajectory=output_trajectory,
        )

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by id; empty where the model has none."""
        return dict(enumerate(self._own_settings.get("class_names") or []))

    @property
    def _num_embeddings(self) -> int:
        return self.unet.config.get("num_class_embeds") or 0

    @property
    def _null_label(self) -> int | None:
        """The id that means "no class": the embedding after the named ones."""
        return len(self.id2label) if 0 < len(self.id2label) < self._num_embeddings else None

    def _label_ids(self, class_labels: ClassLabels) -> list[int]:
        if not self._num_embeddings:
            raise ValueError("class_labels were given to a model without classes; leave them out.")
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        labels = [class_labels] if isinstance(class_labels, (int, str)) else list(class_labels)
        if not labels:
            raise ValueError("class_labels is empty; give at least one label.")
        return [self._label_id(label) for label in labels]

    def _label_id(self, label: int | str | None) -> int:
        if label is None:
            if self._null_label is None:
                raise ValueError("class_labels holds None, and this model has no embedding for 'no class'.")
            return self._null_label
        if isinstance(label, str):
            names = list(self.id2label.values())
            if label not in names:
                raise ValueError(f"class_labels: there is no class {label!r}; {self._nearest_names(label)}.")
            return names.index(label)
        count = len(self.id2label) or self._num_embeddings
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
            raise ValueError(f"class_labels: {label!r} is no class of this model, whose ids are 0 to {count - 1}.")
        return label

    def _nearest_names(self, label: str) -> str:
        names = list(self.id2label.values())
        if not names:
            return f"this model has no names, only ids from 0 to {self._num_embeddings - 1}"
        folded = difflib.get_close_matches(label.casefold(), [name.casefold() for name in names], n=5)
        if near := [name for name in names if name.casefold() in folded]:
            return f"near it: {', '.join(map(repr, near))}"
        return f"its classes are {', '.join(map(repr, names[:10]))}{', ...' if len(names) > 10 else ''}"

    def _class_condition(self, labels: list[int] | None, batch_size: int, guidance: Guidance) -> Condition:
        if labels is None:
            if guidance.in_use:
                raise ValueError(f"guidance_scale={guidance.scale} needs class_labels to guide towards.")
            if not self._num_embeddings:
                return Condition({})
            labels = [self._label_id(None)]
        if len(labels) not in (1, batch_size):
            raise ValueError(f"{len(labels)} class_labels for batch_size={batch_size}; give 1 or {batch_size}.")
        ids = torch.tensor(labels * (batch_size // len(labels)), device=self._execution_device)
        if not guidance.in_use:
            return Condition({"class_labels": ids})
        if self._null_label is None:
            raise ValueError(
                f"guidance_scale={guidance.scale} needs a model with an embedding for 'no class', and this one has none "
                "beside its classes; use guidance_scale=1."
            )
        self._warn_if_never_unconditional()
        return Condition({"class_labels": ids}, {"class_labels": torch.full_like(ids, self._null_label)})

    def _batch_option(self, count: int, options: dict[str, Any]) -> dict[str, Any]:
        return {"batch_size": count}
