"""Images sampled from seeds: previews of a run, images to evaluate, images in bulk, and the reverse process as a strip.

Image i is a function of (seed, i), the model and the sampler. Called by `run`, by evaluation and by training.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..encoding_alpha_ddpm import value_range
from ..ranges_alpha_ddpm import ValueRange
from ..samplers_alpha_ddpm import default_steps
from ..support.draws import RandomStream, seeds
from ..support.errors import ConfigError
from ..support.pictures import BY_DEFAULT, Display, strip

PROCESS_ROWS, PROCESS_MOMENTS = 4, 10
PROCESS_STEPS = 100  # a trajectory of more would only take memory


@dataclass(frozen=True)
class Request:
    """What a pipeline is asked for: values for some arguments of its call, with guidance. By default, nothing.

    Image i gets value i of each argument: of "class_labels", "prompt", "condition_image" ([k, H, W] each) or
    "condition_vector". After its last value an argument begins again with its first.
    """

    arguments: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    guidance_scale: float = 1.0

    def __len__(self) -> int:
        """The number of values of the argument that has most."""
        return max(map(len, self.arguments.values()), default=0)

    def call(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Arguments of the pipeline's call for the images with these numbers."""
        if not self.arguments:
            return {"batch_size": len(numbers)}
        values = {name: [some[number % len(some)] for number in numbers] for name, some in self.arguments.items()}
        return {**values, "guidance_scale": self.guidance_scale}


UNCONDITIONAL = Request()


@torch.no_grad()
def sample(
    pipe: Any,
    numbers: Sequence[int],
    seed: int,
    num_inference_steps: int | None,
    request: Request = UNCONDITIONAL,
    **options: Any,
) -> Any:
    """The pipeline's output for the images with these numbers, in one batch; `images` are [b, C, H, W] in [0, 1]."""
    image_seeds = seeds(seed, RandomStream.PREVIEW, 0, max(numbers) + 1)[list(numbers)]
    options["generator"] = [torch.Generator(pipe.device).manual_seed(int(image_seed)) for image_seed in image_seeds]
    return pipe(num_inference_steps=num_inference_steps, output_type="pt", **request.call(numbers), **options)


def sample_in_batches(
    pipe: Any, count: int, batch_size: int, seed: int, num_inference_steps: int, request: Request = UNCONDITIONAL
) -> torch.Tensor:
    """Images 0..count-1 in [0, 1], [count, C, H, W] on the CPU. The bar goes at the end."""
    batches = [range(count)[start : start + batch_size] for start in range(0, count, batch_size)]
    with step_bar(len(batches), num_inference_steps, leave=False) as shown:
        drawn = [sample(pipe, batch, seed, num_inference_steps, request, **shown).images.cpu() for batch in batches]
    return torch.cat(drawn)


@contextlib.contextmanager
def step_bar(num_batches: int, num_inference_steps: int, show: bool = True, leave: bool = True) -> Iterator[dict[str, Any]]:
    """A progress bar of the reverse steps of several batches, on a terminal or in a notebook, as options of `sample` and
    `sample_uint8`.
    """
    steps = num_batches * num_inference_steps
    with tqdm(total=steps, desc="sampling", unit="step", disable=not show or None, leave=leave) as bar:

        def update(*_: Any) -> None:
            bar.update()

        yield {} if bar.disable else {"callback_on_step_end": update}


def sample_uint8(
    pipe: Any, numbers: Sequence[int], seed: int, num_inference_steps: int, request: Request = UNCONDITIONAL, **options: Any
) -> torch.Tensor:
    """The images with these numbers, uint8 [b, C, H, W] on the CPU. With a run's seed they begin with those of samples.png.

    Raises ConfigError if the sampler cannot run that many steps, or produces NaN or infinite values.
    """
    return _reported(pipe, numbers, seed, num_inference_steps, request, **options).mul(255).round().to(torch.uint8)


def sample_values(pipe: Any, numbers: Sequence[int], *how: Any, **options: Any) -> np.ndarray:
    """As `sample_uint8`, in the units and of the type of the model's data."""
    values = value_range(pipe.unet)
    if values == ValueRange():
        return sample_uint8(pipe, numbers, *how, **options).numpy()
    return values.restore(_reported(pipe, numbers, *how, **options) * 2 - 1)


def _reported(pipe: Any, *how: Any, **options: Any) -> torch.Tensor:
    """Images of `sample` [b, C, H, W] in [0, 1] on the CPU. Raises ConfigError."""
    try:
        return sample(pipe, *how, **options).images.float().cpu()
    except (ValueError, FloatingPointError) as error:
        raise ConfigError(f"{error} Options: --num_inference_steps, --scheduler.") from error


def sample_process(
    pipe: Any, seed: int, request: Request = UNCONDITIONAL, display: Display = BY_DEFAULT, rows: Sequence[str] = ()
) -> Image.Image:
    """The reverse process as a strip: PROCESS_ROWS images, one per row, from noise to the result, over PROCESS_STEPS steps at
    most. `rows` are their names.
    """
    images, steps = range(min(PROCESS_ROWS, len(request) or PROCESS_ROWS)), min(PROCESS_STEPS, default_steps(pipe.scheduler))
    with step_bar(1, steps, leave=False) as shown:
        trajectory = sample(pipe, images, seed, steps, request, output_trajectory=True, **shown).trajectory
    return strip(trajectory, PROCESS_MOMENTS, display=display, rows=rows[: len(images)])
