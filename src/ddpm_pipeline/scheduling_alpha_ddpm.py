"""The forward process of DDPM, its posterior and the reverse step, as a drop-in for diffusers' `DDPMScheduler`.

Equation numbers are those of the report; docs/equations.md has them beside those of Ho et al. 2020 ("Denoising Diffusion
Probabilistic Models"). Report step t in {1..T} is timestep t - 1 in {0..T-1} here; what comes before timestep 0 is clean data.

| symbol | name | meaning |
|---|---|---|
| α_t | `alphas` | share of x_{t-1} kept at a step; 1 - α_t is `betas` |
| ᾱ_t | `alphas_cumprod` | share of x_0 left after t steps |
| x_0 | `original_samples` | clean images in [-1, 1] |
| x_t | `sample` | noised images |
| s | `previous_timestep(t)` | the timestep before t in the chain in use; -1 is clean data |
| α_{t|s} = ᾱ_t/ᾱ_s | | takes the place of α_t when the chain skips timesteps |

Travels inside model repositories.
"""

import json
import math
import reprlib
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from torch import Tensor

from . import tables_alpha_ddpm as tables  # the pipelines import it as well, so that it travels
from .tables_alpha_ddpm import LEARNED_VARIANCE_TYPES, OWN_KEY, Coefficients, Generators, Timesteps, compute, mix

OWN_SETTINGS = ("noise_second_moments", "inference_timesteps", "fitted_samplers")
Device = str | torch.device | None


@dataclass(frozen=True)
class Moments:
    """A Gaussian over images, float64 for float64 images, otherwise float32. `log_variance` is in nats."""

    mean: Tensor  #: [B, C, H, W]
    variance: Tensor  #: broadcasts against the mean, as does its logarithm
    log_variance: Tensor


@dataclass(frozen=True)
class ReverseMoments(Moments):
    """Moments of p_θ(x_s | x_t)."""

    pred_original_sample: Tensor  #: the x_0 they were computed from, clipped as configured


@dataclass(frozen=True)
class Schedule:
    """The numbers of a chain, float64 [n] on the CPU, by ascending timestep. s is the timestep before t in the chain, and the
    first one's s is clean data.
    """

    timesteps: Tensor  # t, int64
    betas: Tensor  # 1 - α_{t|s}, the variance of q(x_t | x_s); 1 - α_t in the full chain
    alphas_cumprod: Tensor  # ᾱ_t, the share of x_0's variance that is left in x_t
    posterior_variance: Tensor  # β̃_t, the variance of q(x_s | x_t, x_0), report eq. 5.7 corrected; 0 into clean data
    sigmas: Tensor  # √((1-ᾱ_t)/ᾱ_t), the noise in x_t/√ᾱ_t
    log_snr: Tensor  # log(ᾱ_t/(1-ᾱ_t)), in nats

    @property
    def snr(self) -> Tensor:
        """ᾱ_t/(1-ᾱ_t), the signal-to-noise ratio."""
        return self.log_snr.exp()


class AlphaDDPMScheduler(SchedulerMixin, ConfigMixin):
    """DDPM's forward process q, its posterior, and the learned reverse process p_θ.

    Configuration keys, their meaning and their defaults are those of diffusers' `DDPMScheduler`, so configs of either class
    load in the other; docs/scheduler.md lists the differences. Images are [B, C, H, W]; `timesteps` is an int, a 0-d tensor or
    a [B] tensor. After `set_timesteps` every method that involves the preceding timestep follows that sub-sequence; before,
    the full chain T-1..0. Images come back in their own dtype, computed in float32 if it is a half precision.

    Args:
        num_train_timesteps: T, the length of the chain, 1 to 100,000.
        beta_start, beta_end: ends of the linear, scaled_linear and sigmoid schedules, in (0, 1).
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid" or "laplace".
        trained_betas: β_1..β_T instead of a schedule; see `from_alphas`.
        variance_type: of p_θ(x_s | x_t): "fixed_small" β̃, "fixed_large" 1 - α_{t|s} (or with "_log", the same), "learned" (the
            second half of the network's output is the log-variance), "learned_range" (it interpolates between the
            logarithms of those two, Nichol & Dhariwal 2021 eq. 15), or "analytic" (Bao et al. 2022).
        clip_sample: clip the predicted x_0 to [-clip_sample_range, clip_sample_range].
        prediction_type: what the network predicts: "epsilon" (the noise), "sample" (x_0) or "v_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: threshold x_0 dynamically instead (Saharia et al. 2022).
        timestep_spacing, steps_offset: how `set_timesteps` picks a sub-sequence, as in diffusers.
        rescale_betas_zero_snr: rescale so that ᾱ_T = 0 (Lin et al. 2023); not with epsilon prediction.
        noise_second_moments: Γ_t = E‖ε_θ(x_t, t)‖²/d for every t, [T]; determines the "analytic" variance.
        inference_timesteps: sub-sequences for `set_timesteps(n)` to use, `{str(n): [n descending timesteps]}`.
        fitted_samplers: what `AlphaDDPMFittedScheduler` steps by, `{str(n): {"timesteps": [n], "coefficients": [n, k + 1]}}`;
            this class keeps them and does not use them.

    Raises ValueError for a value outside these ranges, before anything is allocated.
    """

    _compatibles: ClassVar = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    ignore_for_config: ClassVar = list(OWN_SETTINGS)  # stored under one underscore key instead, see `extract_init_dict`
    order = 1
    init_noise_sigma = 1.0

    @torch.inference_mode(False)  # its tensors must also serve where gradients are wanted
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        noise_second_moments: list[float] | None = None,
        inference_timesteps: dict[str, list[int]] | None = None,
        fitted_samplers: dict[str, dict[str, Any]] | None = None,
    ):
        # JSON has no numbers of numpy and torch. Values left to a default count as explicit: under `_use_default_values`
        # diffusers would replace them by another class's own defaults, and Heun's betas are not DDPM's.
        explicit = {"_use_default_values": []} if "_use_default_values" in self.config else {}
        self.register_to_config(**{name: tables.plain(x) for name, x in self.config.items()} | explicit)
        tables.check_settings(self.config)
        self.variance_type = variance_type
        if trained_betas is not None:
            betas = tables.as_table("trained_betas", trained_betas, len(self))
            self.register_to_config(trained_betas=betas.tolist())
        self._log_alphas = tables.log_alphas_of(self.config)
        self._log_alphas_cumprod = self._log_alphas.cumsum()
        tables.check_terminal_signal(self.config, float(self._log_alphas_cumprod[-1]))
        self._noise_second_moments = self._checked_noise_second_moments(noise_second_moments)
        self._inference_timesteps = self._checked_inference_timesteps(inference_timesteps)
        self._fitted_samplers = self._checked_fitted_samplers(fitted_samplers)
        if own := {name: value for name in OWN_SETTINGS if (value := getattr(self, name))}:
            self.register_to_config(**{OWN_KEY: own})

        # float32 for other code to multiply with images, as in diffusers; nothing here reads them
        self.betas = torch.from_numpy(-np.expm1(self._log_alphas)).float()
        self.alphas = torch.from_numpy(np.exp(self._log_alphas)).float()
        self.alphas_cumprod = torch.from_numpy(np.exp(self._log_alphas_cumprod)).float()

        self._marginal = tables.marginal_table(self._log_alphas_cumprod)
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._use_chain(np.arange(len(self))[::-1])

    @classmethod
    def from_alphas(cls, alphas: Sequence[float] | np.ndarray | Tensor, **config: Any) -> "AlphaDDPMScheduler":
        """The scheduler of given constants α_1..α_T (report §4.1), [T], each in (0, 1), or ValueError. Stored as betas."""
        table = tables.as_table("alphas", alphas, np.size(tables.plain(alphas)))
        return cls(num_train_timesteps=table.size, trained_betas=(1 - table).tolist(), **config)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """diffusers' split of a config into arguments of `__init__` and the rest, with our settings unpacked first.

        Settings of 2022 that are now called otherwise are taken under their present names. A `variance_type` of null, as in the
        configs of DPM-Solver and SA-Solver, is left to its default.
        """
        if config_dict.get("variance_type", "") is None:
            config_dict = {key: value for key, value in config_dict.items() if key != "variance_type"}
        for former in tables.FORMER_SETTINGS.keys() & config_dict.keys():
            present = tables.FORMER_SETTINGS[former](config_dict[former])
            config_dict = present | {key: value for key, value in config_dict.items() if key != former}
        own = config_dict.get(OWN_KEY) or {}
        if not isinstance(own, dict):
            raise ValueError(f"{OWN_KEY}={own!r} in the scheduler config must be an object; remove it or save it anew.")
        own = own | {key: config_dict[key] for key in OWN_SETTINGS if key in config_dict}
        own |= {key: kwargs.pop(key) for key in OWN_SETTINGS if key in kwargs}
        if unknown := sorted(set(own) - set(OWN_SETTINGS)):
            raise ValueError(f"the scheduler config has unknown settings {unknown}; upgrade ddpm-pipeline.")
        shared = {key: value for key, value in config_dict.items() if key not in (OWN_KEY, *OWN_SETTINGS)}
        init_dict, unused, hidden = super().extract_init_dict(shared, **kwargs)
        if "_use_default_values" in config_dict:  # the config of a scheduler rather than of a file: so is that of the new one
            hidden = hidden | {"_use_default_values": []}
        return init_dict | own, unused, hidden

    def to_json_string(self) -> str:
        """The config as JSON under the stock class name, so that a saved scheduler loads with diffusers alone."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = "DDPMScheduler"
        config.pop("_name_or_path", None)  # may be a local path
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @property
    def noise_second_moments(self) -> list[float] | None:
        """Γ_t = E‖ε_θ(x_t, t)‖²/d for every timestep, or None if it was never measured."""
        return None if self._noise_second_moments is None else self._noise_second_moments.tolist()

    @property
    def inference_timesteps(self) -> dict[str, list[int]]:
        """The sub-sequences that `set_timesteps(n)` uses instead of its spacing, by str(n)."""
        return dict(self._inference_timesteps)

    @property
    def fitted_samplers(self) -> dict[str, dict[str, Any]]:
        """Timesteps and coefficients that were measured on the model, by str(n); see docs/fitted_sampler.md."""
        return dict(self._fitted_samplers)

    def _checked_noise_second_moments(self, values: Any) -> np.ndarray | None:
        if values is None:
            if self.config.variance_type == "analytic":
                how = "measure them with ddpm_pipeline.likelihood.estimate_analytic_variance"
                raise ValueError(f"variance_type='analytic' needs noise_second_moments, one per timestep; {how}.")
            return None
        table = tables.as_table("noise_second_moments", values, len(self))
        if (table < 0).any():
            raise ValueError(f"noise_second_moments holds {table.min()!r}; mean squares are never negative.")
        return table

    def _checked_inference_timesteps(self, sequences: Any) -> dict[str, list[int]]:
        if not isinstance(sequences, dict | None):
            raise ValueError(f"inference_timesteps must be a dict of lists, not {type(sequences).__name__}.")
        checked = {}
        for key, timesteps in (sequences or {}).items():
            chain = self._checked_chain(timesteps, f"inference_timesteps[{key!r}]")
            if str(key) != (count := str(len(chain))):
                raise ValueError(f"inference_timesteps[{key!r}] has {count} timesteps; its key must be {count}.")
            checked[count] = chain.tolist()
        return checked

    def _checked_fitted_samplers(self, samplers: Any) -> dict[str, dict[str, Any]]:
        needed = "an object of timesteps [n] and coefficients [n, 2 or more], finite numbers, with n as its key"
        if not isinstance(samplers, dict | None):
            raise ValueError(f"fitted_samplers={samplers!r} must hold, by number of steps, {needed}.")
        checked = {}
        for key, sampler in (samplers or {}).items():
            named = f"fitted_samplers[{key!r}]"
            try:
                timesteps, coefficients = sampler["timesteps"], np.asarray(sampler["coefficients"], dtype=np.float64)
            except (TypeError, KeyError, ValueError) as error:
                raise ValueError(f"{named} must be {needed}.") from error
            chain = self._checked_chain(timesteps, f"{named}: timesteps")
            fits = coefficients.ndim == 2 and len(coefficients) == len(chain) and coefficients.shape[1] >= 2
            if not (fits and key == str(len(chain)) and np.isfinite(coefficients).all()):
                raise ValueError(f"{named} must be {needed}, not {len(chain)} timesteps and {coefficients.shape}.")
            checked[key] = {**sampler, "timesteps": chain.tolist(), "coefficients": coefficients.tolist()}
        return checked

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """Choose the chain: `num_inference_steps` timesteps, stored in the config or spaced; or the descending `timesteps`.

        Raises ValueError for a number outside 1..T, or timesteps that are not strictly descending within 0..T-1.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps.")
        if timesteps is not None:
            chain = self._checked_chain(timesteps, "timesteps")
        else:
            num_inference_steps = tables.plain(num_inference_steps)
            tables.check_integer("num_inference_steps", num_inference_steps, 1, len(self))
            stored = self._inference_timesteps.get(str(num_inference_steps))
            chain = np.array(stored) if stored else self._spaced_chain(int(num_inference_steps))
        self.custom_timesteps, self.num_inference_steps = timesteps is not None, len(chain)
        self._use_chain(chain, device)

    @torch.inference_mode(False)
    def _use_chain(self, descending: np.ndarray, device: Device = None) -> None:
        logs = self._log_alphas, self._log_alphas_cumprod
        self._chain = tables.chain_table(descending[::-1], *logs, self.variance_type, self._noise_second_moments)
        self.timesteps = torch.from_numpy(descending.astype(np.int64)).to(device)

    def _spaced_chain(self, num_inference_steps: int) -> np.ndarray:
        """`num_inference_steps` descending timesteps (Lin et al. 2023, table 2)."""
        total, offset = len(self), self.config.steps_offset
        if self.config.timestep_spacing == "linspace":
            chain = np.linspace(0, total - 1, num_inference_steps).round()[::-1]
        elif self.config.timestep_spacing == "leading":
            chain = np.arange(num_inference_steps)[::-1] * (total // num_inference_steps) + offset
        else:  # rounding can give arange one value too many, for which stock emits timestep -1
            chain = np.round(np.arange(total, 0, -total / num_inference_steps)[:num_inference_steps]) - 1
        source = f"num_inference_steps={num_inference_steps} with steps_offset={offset}"
        return self._checked_chain(chain.astype(np.int64), source)

    def _checked_chain(self, timesteps: Any, source: str) -> np.ndarray:
        timesteps = tables.plain(timesteps)
        try:
            chain, last = np.asarray(timesteps), len(self) - 1
        except ValueError as error:
            raise ValueError(f"{source} must be a list of integers, not {reprlib.repr(timesteps)}.") from error
        if chain.ndim != 1 or chain.size == 0 or chain.dtype.kind not in "iu":
            raise ValueError(f"{source} must be a non-empty list of integers, not {reprlib.repr(timesteps)}.")
        if (np.diff(chain.astype(np.int64)) >= 0).any() or chain[0] > last or chain[-1] < 0:
            found = reprlib.repr(chain.tolist())
            raise ValueError(f"{source} must be strictly descending timesteps from at most {last} to 0, not {found}.")
        return chain.astype(np.int64)

    def previous_timestep(self, timestep: Timesteps) -> Timesteps:
        """s, the timestep before `timestep` in the chain in use, -1 if that is clean data: an int, or a tensor for a tensor."""
        if not isinstance(timestep, Tensor):
            return int(self._chain.at(timestep, self.betas).previous)
        each = timestep.reshape(-1)
        return self._chain.at(each, each.float()).previous.long().view_as(timestep)

    def scale_model_input(self, sample: Tensor, timestep: Timesteps | None = None) -> Tensor:
        """x_t unchanged: the network's input needs no scaling here."""
        return sample

    def forward_step(self, sample: Tensor, timestep: Timesteps, noise: Tensor) -> Tensor:
        """x_t from x_s and z_t ~ N(0, I): √α_{t|s} x_s + √(1-α_{t|s}) z_t, report eq. 4.3. All [B, C, H, W]."""
        x_s = compute(sample)
        chain = self._chain.at(timestep, x_s)
        return mix(chain.forward_scale, x_s, chain.forward_std, noise).to(sample.dtype)

    def forward_mean_variance(self, sample: Tensor, timesteps: Timesteps) -> Moments:
        """Moments of q(x_t | x_s), report eq. 4.12. `sample` is x_s, [B, C, H, W]."""
        x_s = compute(sample)
        chain = self._chain.at(timesteps, x_s)
        return _moments(chain.forward_scale * x_s, chain.forward_variance, chain.forward_log_variance)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Timesteps) -> Tensor:
        """x_t directly from x_0: √ᾱ_t x_0 + √(1-ᾱ_t) z̃, report eq. 4.10. [B, C, H, W], in the dtype of x_0."""
        x_0 = compute(original_samples)
        q = self._marginal.at(timesteps, x_0)
        return mix(q.sqrt_alpha_cumprod, x_0, q.sqrt_one_minus_alpha_cumprod, noise).to(original_samples.dtype)

    def q_mean_variance(self, original_samples: Tensor, timesteps: Timesteps) -> Moments:
        """Moments of q(x_t | x_0) = N(√ᾱ_t x_0, (1-ᾱ_t) I), report eq. 4.11. `original_samples` is [B, C, H, W]."""
        x_0 = compute(original_samples)
        q = self._marginal.at(timesteps, x_0)
        return _moments(q.sqrt_alpha_cumprod * x_0, q.one_minus_alpha_cumprod, q.log_one_minus_alpha_cumprod)

    def forward_trajectory(self, original_samples: Tensor, timesteps: Sequence[int], generator: Generators = None) -> Tensor:
        """x_t at the ascending `timesteps`, each from the one before (report eq. 4.3, figure 3.4); timestep -1 is x_0 itself.

        x_0 is [B, C, H, W], the result [len(timesteps), B, C, H, W]; `generator` is one, or a list of one per image. No network
        is needed, and the chain in use stays as it is. Raises ValueError if the timesteps are not ascending within -1..T-1.
        """
        each = np.ravel(tables.plain(timesteps)).tolist()
        for t in each:
            tables.check_integer("timesteps: each", t, -1, len(self) - 1)
        if not each or sorted(set(each)) != each:
            allowed = f"ascending, from -1 (the image) to {len(self) - 1}, with at least one"
            raise ValueError(f"timesteps={each} must be {allowed}.")
        tables.check_generators(generator, len(original_samples))
        x, chain = original_samples, copy(self)  # whose own chain takes the place of this one's, not its tables
        trajectory = [x] if each[0] == -1 else []
        if noisy := [t for t in each if t >= 0]:
            chain.set_timesteps(timesteps=noisy[::-1])
        for t in noisy:
            x = chain.forward_step(x, t, tables.standard_normal(x.shape, x, generator))
            trajectory.append(x)
        return torch.stack(trajectory)

    def log_snr(self, timesteps: Timesteps, like: Tensor | None = None) -> float | Tensor:
        """log(ᾱ_t/(1-ᾱ_t)) in nats, -inf at zero terminal SNR: a number for an int, float64 [B] on the CPU for [B] timesteps;
        or, with images `like`, in their dtype on their device and to broadcast against them.
        """
        if like is None:
            like = torch.empty(np.size(tables.plain(timesteps)), dtype=torch.float64)
        return self._marginal.at(timesteps, compute(like)).log_snr

    def snr(self, timesteps: Timesteps, like: Tensor | None = None) -> float | Tensor:
        """The signal-to-noise ratio ᾱ_t/(1-ᾱ_t); arguments and result as of `log_snr`."""
        log_snr = self.log_snr(timesteps, like)
        return log_snr.exp() if isinstance(log_snr, Tensor) else math.exp(log_snr)

    @property
    def schedule(self) -> Schedule:
        """The tables of the chain in use: of all timesteps 0..T-1, or, after `set_timesteps`, of those chosen."""
        t, chain, marginal = np.array(list(self._chain.positions)), self._chain.columns, self._marginal.columns
        columns = {
            "timesteps": t,
            "betas": chain["forward_variance"],
            "alphas_cumprod": np.exp(self._log_alphas_cumprod[t]),
            "posterior_variance": chain["posterior_variance"],
            "sigmas": marginal["noise_to_signal"][t],
            "log_snr": marginal["log_snr"][t],
        }
        return Schedule(**{name: torch.tensor(values) for name, values in columns.items()})

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Timesteps) -> Tensor:
        """v = √ᾱ_t z̃ - √(1-ᾱ_t) x_0 (Salimans & Ho 2022). `sample` is x_0, as in diffusers. [B, C, H, W]."""
        x_0 = compute(sample)
        q = self._marginal.at(timesteps, x_0)
        velocity = mix(q.sqrt_alpha_cumprod, noise.to(x_0.dtype), -q.sqrt_one_minus_alpha_cumprod, x_0)
        return velocity.to(sample.dtype)

    def training_target(self, original_samples: Tensor, noise: Tensor, timesteps: Timesteps) -> Tensor:
        """What the network regresses on (report §6): the noise, x_0 or v, by `prediction_type`. [B, C, H, W]."""
        if self.config.prediction_type == "v_prediction":
            return self.get_velocity(original_samples, noise, timesteps)
        return noise if self.config.prediction_type == "epsilon" else original_samples

    def q_posterior(self, original_samples: Tensor, sample: Tensor, timesteps: Timesteps) -> Moments:
        """Moments of q(x_s | x_t, x_0), report eq. 5.7 corrected. x_0 and x_t are [B, C, H, W].

        The mean is [√ᾱ_s (1-α_{t|s}) x_0 + √α_{t|s} (1-ᾱ_s) x_t] / (1-ᾱ_t). If s is clean data, the posterior is the point
        x_0: variance 0 and log-variance -inf.
        """
        x_t = compute(sample)
        chain = self._chain.at(timesteps, x_t)
        mean = mix(chain.posterior_x0, original_samples.to(x_t.dtype), chain.posterior_xt, x_t)
        return _moments(mean, chain.posterior_variance, chain.posterior_log_variance)

    def predict_original_sample(self, model_output: Tensor, timesteps: Timesteps, sample: Tensor) -> Tensor:
        """x_0 [B, C, H, W], unclipped, from x_t and the output, whose variance half is ignored (report, above eq. 5.8)."""
        x_t = compute(sample)
        output = compute(self._split(model_output, sample)[0]).to(x_t.dtype)
        return self._predict_x0(output, timesteps, x_t).to(sample.dtype)

    def p_mean_variance(self, model_output: Tensor, timesteps: Timesteps, sample: Tensor) -> ReverseMoments:
        """Moments of p_θ(x_s | x_t), report eq. 5.8, with x_0 clipped as configured.

        `model_output` [B, C or 2C, H, W], `sample` x_t [B, C, H, W]. For the step into clean data the neighbour's β̃ replaces
        0, so that likelihoods stay finite. Raises ValueError if channels or timesteps do not fit.
        """
        mean, x_0, log_std, chain = self._reverse(model_output, timesteps, sample)
        if log_std is None:
            moments = _moments(mean, chain.model_variance, chain.model_log_variance)
        else:
            moments = Moments(mean, (2 * log_std).exp(), 2 * log_std)
        return ReverseMoments(**vars(moments), pred_original_sample=x_0)

    def step(
        self, model_output: Tensor, timestep: Timesteps, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_s ~ p_θ(x_s | x_t); its mean if s is clean data (end of report §5).

        `model_output` [B, C or 2C, H, W], `sample` x_t [B, C, H, W]; `generator` is one, or a list of one per image.
        """
        x_s, x_0, log_std, chain = self._reverse(model_output, timestep, sample)
        gate = chain.noise_gate  # 0 for the step into clean data, otherwise 1: a float, or [B, 1, 1, 1]
        per_image = isinstance(gate, Tensor)
        if per_image or gate:
            noise = tables.standard_normal(sample.shape, model_output, generator)
            std = chain.model_std if log_std is None else log_std.exp_()
            x_s = tables.add_scaled_(x_s, std * gate if per_image else std, noise)
        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def _reverse(
        self, model_output: Tensor, timesteps: Timesteps, sample: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Coefficients]:
        """The reverse formula: mean of p_θ(x_s | x_t), its x_0, log σ if that is learned, and the chain's coefficients."""
        prediction, raw_variance = self._split(model_output, sample)
        x_t = compute(sample)
        chain = self._chain.at(timesteps, x_t)
        x_0 = self._clip(self._predict_x0(prediction.to(x_t.dtype), timesteps, x_t))
        log_std = None if raw_variance is None else self._learned_log_std(raw_variance.to(x_t.dtype), chain)
        return mix(chain.posterior_x0, x_0, chain.posterior_xt, x_t), x_0, log_std, chain

    def _predict_x0(self, output: Tensor, timesteps: Timesteps, x_t: Tensor) -> Tensor:
        """x_0 = (x_t - √(1-ᾱ_t) z̃)/√ᾱ_t from the noise, √ᾱ_t x_t - √(1-ᾱ_t) v from v."""
        if self.config.prediction_type == "sample":
            return output
        q = self._marginal.at(timesteps, x_t)
        if self.config.prediction_type == "epsilon":
            return mix(q.inverse_sqrt_alpha_cumprod, x_t, -q.noise_to_signal, output)
        return mix(q.sqrt_alpha_cumprod, x_t, -q.sqrt_one_minus_alpha_cumprod, output)

    def _clip(self, x_0: Tensor) -> Tensor:
        """Clip to the range; or each image to a quantile of its |x_0|, scaled back to [-1, 1] (Saharia et al. 2022, §2.3)."""
        if self.config.thresholding:
            flat = x_0.flatten(1)
            limit = torch.quantile(flat.abs(), self.config.dynamic_thresholding_ratio, dim=1, keepdim=True)
            limit = limit.clamp(min=1, max=self.config.sample_max_value)
            return (flat.clamp(-limit, limit) / limit).view_as(x_0)
        if not self.config.clip_sample:
            return x_0
        limit = self.config.clip_sample_range
        if self.config.prediction_type == "sample":  # x_0 is the network's output then, not ours to change
            return x_0.clamp(-limit, limit)
        return x_0.clamp_(-limit, limit)

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction and, for learned variances, the variance half, each [B, C, H, W]."""
        learned = self.config.variance_type in LEARNED_VARIANCE_TYPES
        parts = (model_output, None)
        if learned and model_output.ndim > 1 and model_output.shape[1] % 2 == 0:
            parts = model_output.chunk(2, dim=1)
        if parts[0].shape == sample.shape and sample.ndim > 1 and learned == (parts[1] is not None):
            return parts
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)} for images {tuple(sample.shape)}; "
            f"variance_type={self.config.variance_type!r} needs {'twice the' if learned else 'the same'} channels"
            f" (a UNet with out_channels = {'2 * ' if learned else ''}in_channels) and otherwise the same shape."
        )

    def _learned_log_std(self, raw_variance: Tensor, chain: Coefficients) -> Tensor:
        """log σ, half the log-variance, from the network's variance half (Nichol & Dhariwal 2021, eq. 15)."""
        if self.config.variance_type == "learned":
            return raw_variance * 0.5
        middle = torch.zeros_like(raw_variance).add_(chain.log_std_middle)
        return tables.add_scaled_(middle, chain.log_std_half_range, raw_variance)


def _moments(mean: Tensor, variance: float | Tensor, log_variance: float | Tensor) -> Moments:
    if not isinstance(variance, Tensor):
        shape = (1,) * mean.ndim
        variance, log_variance = mean.new_full(shape, variance), mean.new_full(shape, log_variance)
    return Moments(mean, variance, log_variance)
