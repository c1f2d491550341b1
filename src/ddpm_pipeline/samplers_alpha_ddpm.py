"""What is asked of a sampler, any diffusers scheduler in a pipeline: how many steps, or which ones.

Travels inside model repositories.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor

from .tables_alpha_ddpm import Generators


@dataclass(frozen=True)
class Steps:
    """The chain a call asks for: the number of its steps, by default T, or its timesteps or sigmas, noise first."""

    count: int | None = None
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were given; give the number of steps, timesteps or sigmas.")


def set_timesteps(scheduler: Any, steps: Steps) -> Tensor:
    """Put the scheduler into the chain asked for and return its timesteps. ValueError if it cannot run them.

    They stay on the CPU, so that no step waits for the device.
    """
    if steps.timesteps is not None or steps.sigmas is not None:
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps  # slow to import

        retrieve_timesteps(scheduler, timesteps=steps.timesteps, sigmas=steps.sigmas)
    else:
        scheduler.set_timesteps(scheduler.config.num_train_timesteps if steps.count is None else steps.count)
    return scheduler.timesteps


def reverse_step(scheduler: Any, model_output: Tensor, t: Tensor, x: Tensor, generator: Generators) -> Any:
    """One step of the reverse process: an output with `prev_sample` and, for most samplers, `pred_original_sample`."""
    options = {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}
    return scheduler.step(model_output, t, x, **options)
