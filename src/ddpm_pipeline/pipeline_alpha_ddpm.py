"""Images from noise by the reverse process of DDPM: the report's figure 3.3 as a diffusers pipeline.

This file is also shipped inside model repositories, as `pipeline.py`, so that whoever trusts a repository can run it without
the package. It imports nothing but diffusers, torch and its sibling, the scheduler.
"""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from .scheduling_alpha_ddpm import LEARNED_VARIANCE_TYPES, AlphaDDPMScheduler

OUTPUT_TYPES = ("pil", "np", "pt")


class AlphaDDPMPipeline(DiffusionPipeline):
    """Unconditional image generation.

    Loads any repository of diffusers' `DDPMPipeline`; its `DDPMScheduler` becomes an `AlphaDDPMScheduler` of the same
    config. Another scheduler that was asked for (`scheduler=` when loading, or set later) is left as it is.
    What it saves names the stock classes, so that it loads with diffusers alone.

    Args:
        unet: the noise predictor, images [B, C, H, W] and a timestep to [B, C, H, W], or 2C for a learned variance.
        scheduler: any diffusers scheduler that works with DDPM models.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs: ClassVar = ["image", "pred_original_sample"]

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler):
        super().__init__()
        if isinstance(scheduler, DDPMScheduler):
            scheduler = AlphaDDPMScheduler.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("image",),
    ) -> ImagePipelineOutput | tuple:
        """Draw `batch_size` images.

        Args:
            batch_size: how many, at least 1.
            generator: one for all images, or a list with one an image; an image drawn with its own generator does not
                depend on the batch it is drawn in.
            num_inference_steps: length of the chain; by default every timestep the model was trained on.
            output_type: "pil" images, "np" [B, H, W, C] in [0, 1], or "pt" [B, C, H, W] in [0, 1].
            return_dict: an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, index, timestep, tensors)` after each step; what it returns
                under "image" takes the image's place.
            callback_on_step_end_tensor_inputs: what `tensors` holds: "image" (x_s, [B, C, H, W], about [-1, 1]) and
                "pred_original_sample" (the x_0 predicted at this step).

        Raises:
            ValueError: for a batch size, step count, output type, callback input or generator list that cannot be used.
        """
        self._check_inputs(batch_size, generator, output_type, callback_on_step_end_tensor_inputs)
        if num_inference_steps is None:
            num_inference_steps = self.scheduler.config.num_train_timesteps
        self.scheduler.set_timesteps(num_inference_steps)

        image = self._initial_noise(batch_size, generator) * self.scheduler.init_noise_sigma
        step_options = self._step_options(generator)
        for index, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_output = self._predict(image, t)
            step = self.scheduler.step(model_output, t, image, **step_options)
            image = step.prev_sample
            if callback_on_step_end is not None:
                tensors = {"image": image, "pred_original_sample": getattr(step, "pred_original_sample", None)}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                image = (callback_on_step_end(self, index, t, chosen) or {}).get("image", image)

        images = self._to_output(image, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_inputs(self, batch_size: int, generator: Any, output_type: str, callback_inputs: Any) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be an integer of at least 1.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators for batch_size={batch_size}; give one, or a list of one an image."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is not one of {', '.join(OUTPUT_TYPES)}.")
        if unknown := sorted(set(callback_inputs) - set(self._callback_tensor_inputs)):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {unknown} are not among {', '.join(self._callback_tensor_inputs)}."
            )

    def _initial_noise(
        self, batch_size: int, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        """x_T ~ N(0, I), [B, C, H, W] in float32: only the network computes in half precision, never the chain."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        device = self._execution_device
        return randn_tensor(shape, generator=generator, device=device, dtype=self._chain_dtype)

    @property
    def _chain_dtype(self) -> torch.dtype:
        return torch.float64 if self.unet.dtype == torch.float64 else torch.float32

    def _predict(self, image: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The network's output in the precision of the chain, with the channels that the scheduler can use."""
        model_input = self.scheduler.scale_model_input(image, t).to(self.unet.dtype)
        output = self.unet(model_input, t).sample.to(image.dtype)
        if output.shape[1] == 2 * image.shape[1] and not self._scheduler_learns_variance:
            output = output.chunk(2, dim=1)[0]  # it has a variance of its own and wants the prediction only
        return output

    @property
    def _scheduler_learns_variance(self) -> bool:
        """Whether the scheduler reads a variance half. Others keep the key of another's config, or, as DPM-Solver does,
        cut at three channels whatever the image has.
        """
        is_ddpm = isinstance(self.scheduler, DDPMScheduler) or hasattr(self.scheduler, "p_mean_variance")
        return is_ddpm and self.scheduler.config.variance_type in LEARNED_VARIANCE_TYPES

    def _step_options(self, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        """Some of diffusers' schedulers draw no noise and take no generator."""
        accepts_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if accepts_generator else {}

    def _to_output(self, image: torch.Tensor, output_type: str) -> Any:
        image = (image / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return image
        array = image.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    # ---- saving: stock names for everyone, and this code beside them ----------------------------------

    def to_json_string(self) -> str:
        """`model_index.json` with the names of the stock classes."""
        index = json.loads(super().to_json_string())
        for private in ("_module", "_name_or_path"):  # the latter may be a local path
            index.pop(private, None)
        index["_class_name"] = "DDPMPipeline"
        if hasattr(self.scheduler, "p_mean_variance"):
            index["scheduler"] = ["diffusers", "DDPMScheduler"]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json`, and the code of this pipeline and its scheduler for those who load it with trust."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name, code in {"pipeline.py": type(self), "scheduling_alpha_ddpm.py": AlphaDDPMScheduler}.items():
            source, target = Path(inspect.getfile(code)), Path(save_directory, name)
            if source.resolve() != target.resolve():
                shutil.copyfile(source, target)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
