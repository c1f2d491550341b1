"""A deterministic sampler of few steps, whose coefficients were measured on the model (docs/fitted_sampler.md).

Each reverse step of the report is a linear combination of x_t and x̂_0: its mean, eq. 5.7, for the ancestral sampler. Here the
combination also takes the x̂_0 of steps before, and its coefficients are those that came nearest to the model's own solution
in many steps. `ddpm_pipeline.fitting` measures them. Travels inside model repositories.
"""

from collections.abc import Sequence
from typing import Any

from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from .scheduling_alpha_ddpm import AlphaDDPMScheduler, Device
from .tables_alpha_ddpm import Generators, Timesteps, add_scaled_, compute, plain


class AlphaDDPMFittedScheduler(AlphaDDPMScheduler):
    """An `AlphaDDPMScheduler` that samples in n steps by the sampler that was fitted to the model for n, where there is one.

    After `set_timesteps(n)` with n of `fitted_samplers`, `step` is x_s = c_0 x_t + c_1 x̂_0(t) + c_2 x̂_0(before t) + …, without
    noise, so that an image is a function of the noise it starts from. For any other n, and for given `timesteps`, it is the
    ancestral sampler. It is a class of its own because users of diffusers choose a sampler by its class: to sample ancestrally
    in n steps, set `pipe.scheduler = AlphaDDPMScheduler.from_config(pipe.scheduler.config)`, which keeps the fit when saved. A
    fitted chain runs as a whole: it has no coefficients for an image that enters in its middle.
    """

    _fitted: dict[str, Any] | None = None  # the sampler in use
    _history: tuple[Tensor, ...] = ()  # x̂_0 of the steps so far, the newest first
    _next = 0  # index of the next step

    @property
    def most_fitted_steps(self) -> int | None:
        """The default number of steps of a pipeline that starts from noise: the largest that was fitted; None without a fit."""
        return max(map(int, self._fitted_samplers), default=None)

    @property
    def runs_whole(self) -> bool:
        """Whether the chain in use is a fitted one, which starts with its first step and repeats none."""
        return self._fitted is not None

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """As in `AlphaDDPMScheduler`, but with the fitted sampler of `num_inference_steps` if there is one."""
        fitted = self._fitted_samplers.get(str(plain(num_inference_steps))) if timesteps is None else None
        chain = (num_inference_steps, device, timesteps) if fitted is None else (None, device, fitted["timesteps"])
        super().set_timesteps(*chain)
        self.custom_timesteps = timesteps is not None
        self._fitted, self._history, self._next = fitted, (), 0

    def step(
        self, model_output: Tensor, timestep: Timesteps, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_s from x_t and the predictions x̂_0 so far; a draw from p_θ(x_s | x_t) if the chain in use is not a fitted one.

        Arguments as in `AlphaDDPMScheduler.step`; a fitted chain takes one timestep for all images, and no `generator`. Raises
        ValueError if a step of it is skipped or repeated; the step that is due can still be taken then.
        """
        if self._fitted is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        index, x_t, x_0 = self._index(int(timestep)), compute(sample), self._reverse(model_output, timestep, sample)[1]
        # a copy: a compiled network may reuse its output, and a callback change what it is shown
        self._history = (x_0.clone(), *(self._history if index else ()))[: len(self._fitted["coefficients"][index]) - 1]
        self._next = index + 1
        scale, *weights = self._coefficients(index, x_t)
        x_s = x_t * scale
        for weight, predicted in zip(weights, self._history, strict=False):  # shorter at first
            x_s = add_scaled_(x_s, weight, predicted)
        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def _index(self, timestep: int) -> int:
        timesteps = self._fitted["timesteps"]
        index = timesteps.index(timestep) if timestep in timesteps else -1
        if index not in (0, self._next):
            fix = "go through scheduler.timesteps from the first, or use AlphaDDPMScheduler, which can begin anywhere"
            raise ValueError(f"timestep {timestep} is not the next of the fitted chain {timesteps}; {fix}.")
        return index

    def _coefficients(self, index: int, x_t: Tensor) -> list[float]:
        return self._fitted["coefficients"][index]


def our_scheduler(scheduler: Any) -> Any:
    """Our scheduler of the same config for diffusers' `DDPMScheduler`, the fitted one if the config has fitted samplers. Any
    other scheduler comes back as it is, also a subclass of that one, which may step in another way.
    """
    if type(scheduler) is not DDPMScheduler:
        return scheduler
    ours = AlphaDDPMScheduler.from_config(scheduler.config)
    return AlphaDDPMFittedScheduler.from_config(scheduler.config) if ours.fitted_samplers else ours
