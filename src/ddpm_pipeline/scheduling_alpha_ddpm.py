"""The forward process of DDPM, its posterior and the reverse step, as a drop-in for diffusers' `DDPMScheduler`.

Equation numbers are those of the report; docs/equations.md has them beside those of Ho et al. 2020 ("Denoising
Diffusion Probabilistic Models"). Report step t in {1..T} is timestep t - 1 in {0..T-1} here, and "before timestep 0" is
clean data.

| symbol | name | meaning |
|---|---|---|
| α_t | `alphas` | share of x_{t-1} kept at a step; 1 - α_t is `betas` |
| ᾱ_t | `alphas_cumprod` | share of x_0 left after t steps |
| x_0 | `original_samples` | clean images in [-1, 1] |
| x_t | `sample` | noised images |
| s | `previous_timestep(t)` | the timestep before t in the chain in use; -1 is clean data |
| α_{t|s} = ᾱ_t/ᾱ_s | | what stands for α_t where the chain skips timesteps |

This file is also shipped inside model repositories, so it imports nothing but diffusers, numpy and torch.
"""

import json
import math
import operator
import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
FIXED_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "analytic")
LEARNED_VARIANCE_TYPES = ("learned", "learned_range")
VARIANCE_TYPES = FIXED_VARIANCE_TYPES + LEARNED_VARIANCE_TYPES
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")

MAX_TRAIN_TIMESTEPS = 100_000
MIN_BETA = 1e-300  # below it β̃ is no longer a number above 0
MAX_BETA = 0.999  # cap of the schedules that are given by ᾱ, as in Nichol & Dhariwal 2021
# √ᾱ_T below which float32 no longer holds x_0 from predicted noise, or the upper bound of the analytic variance
MIN_TERMINAL_SIGNAL = {"prediction_type='epsilon'": 1e-30, "variance_type='analytic'": 1e-15}
MAX_PIXEL = 1e30  # largest bound on x_0 that float32 can hold and divide by
FAR_FROM_NOISE = 0.05  # ᾱ_T above which sampling from pure noise does not match the forward process

FACTORS = frozenset(
    (
        "forward_scale",
        "sqrt_alpha_cumprod",
        "inverse_sqrt_alpha_cumprod",
        "posterior_x0",
        "log_std_middle",
    )
)

_OWN_KEY = "_alpha_ddpm"  # stock classes keep underscore keys of a config through load and save without a word
_OWN_SETTINGS = ("noise_second_moments", "inference_timesteps")


@dataclass(frozen=True)
class Moments:
    """Mean, variance and log-variance of a Gaussian over images, float64 for float64 images, else float32.

    `mean` is [B, C, H, W]; `variance` and `log_variance` (natural logarithm) broadcast against it.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor


@dataclass(frozen=True)
class ReverseMoments(Moments):
    """Moments of p_θ(x_s | x_t) and the x_0 they rest on, clipped as the scheduler's config says."""

    pred_original_sample: torch.Tensor


# ---- α tables: everything is derived from log α_t in float64 --------------------------------------


def _cosine_betas(num_steps: int) -> np.ndarray:
    """1 - f(t+1)/f(t), f(t) = cos²((t/T + 0.008)/1.008 · π/2), by sines alone (Nichol & Dhariwal 2021, eq. 17)."""
    unit = math.pi / 2 / (1.008 * num_steps)
    step = np.arange(num_steps)
    twice_midpoint = unit * (2 * step + 1 + 0.016 * num_steps)
    twice_midpoint_from_end = unit * (2 * (num_steps - step) - 1)
    sine_of_midpoint = np.sin(np.minimum(twice_midpoint, twice_midpoint_from_end))
    cosine = np.sin(unit * (num_steps - step))  # cos(x) = sin(π/2 - x), exact where x is near π/2
    return np.minimum(math.sin(unit) * sine_of_midpoint / cosine**2, MAX_BETA)


def _laplace_betas(num_steps: int) -> np.ndarray:
    """1 - f(t+1)/f(t) for f = √(snr/(1+snr)) with Laplace-distributed log-SNR (Hang & Gu 2024), without cancellation.

    1/snr is √u before half time and 1/√u after it, with u = 1 - 2|1/2 - t/T| + 1e-6.
    """
    offset = 1e-6
    step = np.arange(num_steps + 1)
    late = 2 * step > num_steps
    u = 2 * np.where(late, num_steps - step, step) / num_steps + offset
    inverse_snr = np.where(late, u**-0.5, u**0.5)
    u0, u1 = u[:-1], u[1:]
    du = 2 / num_steps
    growth_early = du / (np.sqrt(u0) + np.sqrt(u1))
    growth_late = du / ((np.sqrt(u0) + np.sqrt(u1)) * np.sqrt(u0 * u1))
    d0, d1 = 1 - 2 * step[:-1] / num_steps, 2 * step[1:] / num_steps - 1
    one_minus_product = (d0 + d1) * (1 + offset) - d0 * d1 - offset * (2 + offset)
    growth_across = one_minus_product / (1 + np.sqrt(u0 * u1)) / np.sqrt(u1)
    growth = np.where(late[1:], np.where(late[:-1], growth_late, growth_across), growth_early)
    betas = -np.expm1(-0.5 * np.log1p(growth / (1 + inverse_snr[:-1])))
    return np.minimum(betas, MAX_BETA)


def _schedule_betas(schedule: str, num_steps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """β_t of the named schedule, float64 [T]; the same definitions as in diffusers."""
    if schedule == "linear":
        return np.linspace(beta_start, beta_end, num_steps)
    if schedule == "scaled_linear":
        return np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps) ** 2
    if schedule == "sigmoid":
        return (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, num_steps))) + beta_start
    if schedule == "squaredcos_cap_v2":
        return _cosine_betas(num_steps)
    return _laplace_betas(num_steps)


def _rescale_zero_terminal_snr(log_alphas: np.ndarray) -> np.ndarray:
    """log α_t after √ᾱ is shifted and scaled so that √ᾱ_T = 0 and √ᾱ_1 stays (Lin et al. 2023, algorithm 1).

    √α'_t = (√ᾱ_t - √ᾱ_T)/(√ᾱ_{t-1} - √ᾱ_T) = 1 - (1 - √α_t)/(1 - √(ᾱ_T/ᾱ_{t-1})) for t > 1, and α'_1 = α_1.
    """
    half = 0.5 * log_alphas[1:]
    half_log_remaining = half[::-1].cumsum()[::-1]  # log √(ᾱ_T/ᾱ_{t-1})
    with np.errstate(divide="ignore", invalid="ignore"):  # where betas are too small for it, which is checked after
        middle = 2 * np.log1p(-np.expm1(half[:-1]) / np.expm1(half_log_remaining[:-1]))
    return np.concatenate([log_alphas[:1], middle, [-np.inf]])


class _Table:
    """Named float64 columns over some of the timesteps 0..T-1, read at one timestep or at one an image."""

    def __init__(self, timesteps: np.ndarray, total: int, columns: dict[str, np.ndarray]):
        self.positions = {t: position for position, t in enumerate(timesteps.tolist())}
        self.total = total
        self.columns = columns
        self._rows: dict[torch.dtype, dict[int, SimpleNamespace]] = {torch.float32: {}, torch.float64: {}}
        self._on_device: dict[tuple, torch.Tensor] = {}

    def at(self, timesteps: int | torch.Tensor, like: torch.Tensor) -> "SimpleNamespace | _Gathered":
        """The columns as attributes: numbers for one host timestep, else tensors [B, 1, 1, 1] to go with images `like`.

        `like` is float32 or float64. Timesteps on the host are checked; those on a device are not, as that would wait.
        """
        t = _host_timestep(timesteps)
        if t is None:
            return self._gather(timesteps, like)
        row = self._rows[like.dtype].get(t)
        if row is None:
            self.check([t])
            row = self._rows[like.dtype][t] = self._row(self.positions[t], like.dtype)
        return row

    def _row(self, position: int, dtype: torch.dtype) -> SimpleNamespace:
        values = {name: float(column[position]) for name, column in self.columns.items()}
        # torch computes with a 0-dim tensor quicker than with a float, but takes nothing but floats as `alpha`
        factors = {name: torch.tensor(values[name], dtype=dtype) for name in FACTORS & values.keys()}
        return SimpleNamespace(**values | factors)

    def check(self, timesteps: list[int]) -> None:
        if strangers := [t for t in timesteps if t not in self.positions]:
            raise ValueError(
                f"timestep {', '.join(map(str, strangers))} is not in the chain in use, which has "
                f"{len(self.positions)} of the timesteps 0 to {self.total - 1}; set_timesteps chooses them."
            )

    def _gather(self, timesteps: torch.Tensor, like: torch.Tensor) -> "_Gathered":
        if timesteps.ndim > 1 or (timesteps.ndim == 1 and len(timesteps) not in (1, len(like))):
            raise ValueError(
                f"timesteps has shape {tuple(timesteps.shape)}; give one for all images or one for each of {len(like)}."
            )
        if timesteps.device.type == "cpu":
            self.check(timesteps.tolist())
        return _Gathered(self, timesteps.to(like.device, torch.long), like)

    def on_device(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A column as [T] in the dtype of `like` and on its device, NaN where it has no value; copied there once."""
        key = (name, like.device, like.dtype)
        if key not in self._on_device:
            full = torch.full((self.total,), torch.nan, dtype=torch.float64)
            full[list(self.positions)] = torch.from_numpy(self.columns[name])
            self._on_device[key] = full.to(like.dtype).to(like.device)
        return self._on_device[key]


class _Gathered:
    """A table's columns at one timestep an image, gathered as they are asked for."""

    def __init__(self, table: _Table, timesteps: torch.Tensor, like: torch.Tensor):
        self._table, self._timesteps, self._like = table, timesteps, like

    def __getattr__(self, name: str) -> torch.Tensor:
        shape = (-1,) + (1,) * (self._like.ndim - 1)
        # not by brackets, which would read a 0-dim index back to the host
        return self._table.on_device(name, self._like).index_select(0, self._timesteps.view(-1)).view(shape)


def _host_timestep(timesteps: int | torch.Tensor) -> int | None:
    """The one timestep as an int where knowing it costs no device synchronisation; else None."""
    if isinstance(timesteps, torch.Tensor):
        if timesteps.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise ValueError(f"timesteps has dtype {timesteps.dtype}; they are integers, such as torch.int64.")
        return timesteps.item() if timesteps.ndim == 0 and timesteps.device.type == "cpu" else None
    return operator.index(timesteps)


# ---- checks of the configuration ------------------------------------------------------------------


def _on_host(values: Any) -> Any:
    """A tensor, wherever it lies, as lists of numbers."""
    return values.tolist() if isinstance(values, torch.Tensor) else values


def _check_choice(name: str, value: Any, allowed: Sequence[str], fix: str = "") -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}.{' ' + fix if fix else ''}")


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be an integer from {low} to {high}.")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    """low < value <= high; NaN fails every comparison."""
    real = (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, real) or not low < value <= high:
        raise ValueError(f"{name}={value!r} must be a number above {low} and at most {high}.")


def _as_table(name: str, values: Any, length: int) -> np.ndarray:
    """`values` as float64 [length]; ValueError where it is not that many finite numbers."""
    try:
        table = np.asarray(_on_host(values)).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a list of {length} numbers, not {type(values).__name__}.") from error
    if table.shape != (length,):
        raise ValueError(
            f"{name} has shape {table.shape}; it must have one value a timestep: num_train_timesteps={length}."
        )
    if not np.isfinite(table).all():
        raise ValueError(f"{name} holds a NaN or an infinity at timestep {int(np.argmin(np.isfinite(table)))}.")
    return table


def _check_betas(betas: np.ndarray, source: str) -> None:
    inside = (betas >= MIN_BETA) & (betas < 1)
    inside[-1] |= betas[-1] == 1  # zero terminal signal is a valid end of the chain, not a valid middle
    if not inside.all():
        t = int(np.argmin(inside))
        raise ValueError(
            f"{source} gives beta={betas[t]} at timestep {t}; every beta = 1 - alpha must be at least {MIN_BETA} and below 1."
        )


class AlphaDDPMScheduler(SchedulerMixin, ConfigMixin):
    """DDPM's forward process q, its posterior, and the learned reverse process p_θ.

    The same configuration keys as diffusers' `DDPMScheduler` with the same meaning and defaults, so configs of one load
    in the other; what stock gets wrong is right here (docs/scheduler.md lists it). Images are [B, C, H, W]; `timesteps`
    is an int, a 0-d tensor or a [B] tensor. After `set_timesteps` the chain in use is the sub-sequence, and every
    method that speaks of the timestep before follows it; before that, it is the full chain T-1..0.

    Tables are float64 inside. Images come back in the dtype they had, float16 and bfloat16 being computed in float32;
    moments are in the dtype that was computed in, float32 or float64.

    Args:
        num_train_timesteps: T, the length of the chain, 1 to 100,000.
        beta_start, beta_end: ends of the linear, scaled_linear and sigmoid schedules, in (0, 1).
        beta_schedule: one of `BETA_SCHEDULES`.
        trained_betas: β_1..β_T instead of a schedule; see `from_alphas`.
        variance_type: variance of p_θ(x_s | x_t): "fixed_small" β̃, "fixed_large" 1 - α_{t|s} (their "_log" forms are
            the same quantities), "learned" (the network's second half is the log-variance), "learned_range" (it
            interpolates the logarithms of the two, Nichol & Dhariwal 2021 eq. 15), or "analytic" (Bao et al. 2022).
        clip_sample: clip the predicted x_0 to [-clip_sample_range, clip_sample_range].
        prediction_type: what the network predicts: "epsilon" (the noise), "sample" (x_0) or "v_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x_0 (Saharia et al. 2022),
            in place of clipping.
        timestep_spacing, steps_offset: how `set_timesteps` picks a sub-sequence, as in diffusers.
        rescale_betas_zero_snr: rescale so that ᾱ_T = 0 (Lin et al. 2023); not with epsilon prediction.
        noise_second_moments: Γ_t = E‖ε_θ(x_t, t)‖²/d for every t, [T]; what "analytic" is computed from.
        inference_timesteps: sub-sequences to be used by `set_timesteps(n)`, `{str(n): [n descending timesteps]}`.

    Raises:
        ValueError: for any value outside these ranges, before anything is allocated.
    """

    _compatibles: ClassVar = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    ignore_for_config: ClassVar = list(_OWN_SETTINGS)  # kept under one underscore key instead, see `extract_init_dict`
    order = 1
    init_noise_sigma = 1.0

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
    ):
        numpy_numbers = {name: x.item() for name, x in self.config.items() if isinstance(x, np.generic)}
        # JSON knows no numpy numbers. Values left to a default are as explicit as others: under `_use_default_values`
        # diffusers would give another class its own default instead, and Heun's betas are not DDPM's.
        self.register_to_config(**numpy_numbers, _use_default_values=[])
        _check_integer("num_train_timesteps", num_train_timesteps, 1, MAX_TRAIN_TIMESTEPS)
        _check_choice(
            "beta_schedule", beta_schedule, BETA_SCHEDULES, "For other values use AlphaDDPMScheduler.from_alphas."
        )
        _check_choice(
            "variance_type",
            variance_type,
            VARIANCE_TYPES,
            "A UNet with out_channels = 2 * in_channels uses 'learned_range'.",
        )
        _check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        _check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        _check_number("beta_start", beta_start, 0, 1)
        _check_number("beta_end", beta_end, 0, 1)
        _check_number("clip_sample_range", clip_sample_range, 0, MAX_PIXEL)
        _check_number("sample_max_value", sample_max_value, 1 / MAX_PIXEL, MAX_PIXEL)
        _check_number("dynamic_thresholding_ratio", dynamic_thresholding_ratio, 0, 1)
        _check_integer("steps_offset", steps_offset, 0, num_train_timesteps)

        if trained_betas is None:
            source = f"beta_schedule={beta_schedule!r}"
            betas = _schedule_betas(beta_schedule, num_train_timesteps, float(beta_start), float(beta_end))
        else:
            source = "trained_betas"
            betas = _as_table("trained_betas", trained_betas, num_train_timesteps)
            self.register_to_config(trained_betas=betas.tolist())
        _check_betas(betas, source)
        with np.errstate(divide="ignore"):  # a last β of 1 has log α = -inf
            log_alphas = np.log1p(-betas)
        if rescale_betas_zero_snr:
            if num_train_timesteps < 2:
                raise ValueError(f"rescale_betas_zero_snr needs at least 2 timesteps, not {num_train_timesteps}.")
            if math.isfinite(log_alphas[-1]):  # else its terminal SNR is zero already
                log_alphas = _rescale_zero_terminal_snr(log_alphas)
                _check_betas(-np.expm1(log_alphas), f"rescale_betas_zero_snr on {source}")
        log_alphas_cumprod = log_alphas.cumsum(dtype=np.longdouble).astype(np.float64)
        self._check_terminal_signal(float(log_alphas_cumprod[-1]))

        self._prediction_type = prediction_type
        self._variance_type = variance_type
        self._learned = variance_type in LEARNED_VARIANCE_TYPES
        self._thresholding = thresholding
        self._clip_range = clip_sample_range if clip_sample else None
        self._log_alphas = log_alphas
        self._log_alphas_cumprod = log_alphas_cumprod
        self._marginal = self._marginal_table()
        self._noise_second_moments = self._checked_noise_second_moments(noise_second_moments)
        self._inference_timesteps = self._checked_inference_timesteps(inference_timesteps)
        if own := {name: value for name in _OWN_SETTINGS if (value := getattr(self, name))}:
            self.register_to_config(**{_OWN_KEY: own})

        # float32 for other code to multiply with images, as in diffusers; nothing here reads them
        self.betas = torch.from_numpy(-np.expm1(log_alphas)).float()
        self.alphas = torch.from_numpy(np.exp(log_alphas)).float()
        self.alphas_cumprod = torch.from_numpy(np.exp(log_alphas_cumprod)).float()

        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._use_chain(np.arange(num_train_timesteps)[::-1], device=None)

    @classmethod
    def from_alphas(cls, alphas: Sequence[float] | np.ndarray | torch.Tensor, **config: Any) -> "AlphaDDPMScheduler":
        """The scheduler of the constants α_1..α_T fixed beforehand (report §4.1), [T], each in (0, 1).

        They are stored as `trained_betas`, which every diffusers scheduler reads. Raises ValueError for values outside.
        """
        alphas = _on_host(alphas)
        table = _as_table("alphas", alphas, np.size(alphas))
        return cls(num_train_timesteps=table.size, trained_betas=(1 - table).tolist(), **config)

    # ---- configuration: own settings travel under one key that stock classes keep ---------------------

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        own = config_dict.get(_OWN_KEY) or {}
        if not isinstance(own, dict):
            raise ValueError(f"the scheduler config has {_OWN_KEY}={own!r}; it must be a dict of {_OWN_SETTINGS}.")
        own = dict(own)
        own |= {key: config_dict[key] for key in _OWN_SETTINGS if key in config_dict}
        own |= {key: kwargs.pop(key) for key in _OWN_SETTINGS if key in kwargs}
        if unknown := sorted(set(own) - set(_OWN_SETTINGS)):
            raise ValueError(
                f"the scheduler config has settings {unknown} that this version does not know; upgrade ddpm-pipeline."
            )
        shared = {key: value for key, value in config_dict.items() if key not in (_OWN_KEY, *_OWN_SETTINGS)}
        init_dict, unused, hidden = super().extract_init_dict(shared, **kwargs)
        return init_dict | own, unused, hidden

    def to_json_string(self) -> str:
        """The config as JSON under the stock class name, so that a saved scheduler loads with diffusers alone."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = "DDPMScheduler"
        config.pop("_name_or_path", None)  # may hold a local path
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @property
    def variance_type(self) -> str:
        return self.config.variance_type

    @property
    def noise_second_moments(self) -> list[float] | None:
        """Γ_t = E‖ε_θ(x_t, t)‖²/d for every timestep, or None where it was never measured."""
        return None if self._noise_second_moments is None else self._noise_second_moments.tolist()

    @property
    def inference_timesteps(self) -> dict[str, list[int]]:
        """The sub-sequences that `set_timesteps(n)` uses instead of equal spacing, by str(n)."""
        return dict(self._inference_timesteps)

    def _check_terminal_signal(self, log_alpha_cumprod: float) -> None:
        settings = [f"{name}={self.config[name]!r}" for name in ("prediction_type", "variance_type")]
        signal = math.exp(log_alpha_cumprod / 2)
        for setting in settings:
            if signal < MIN_TERMINAL_SIGNAL.get(setting, 0):
                raise ValueError(
                    f"{setting} needs sqrt(alphas_cumprod[-1]) of at least {MIN_TERMINAL_SIGNAL[setting]}, and it is "
                    f"{signal:.1e}: x_0 cannot be had from predicted noise there. Use prediction_type='sample' or "
                    "'v_prediction' with a fixed or learned variance, or a schedule that ends with more signal."
                )
        if signal**2 > FAR_FROM_NOISE:
            warnings.warn(
                f"the forward process ends with alphas_cumprod={signal**2:.3g}, far from pure noise, where sampling "
                "starts; use more timesteps, a larger beta_end, or beta_schedule='squaredcos_cap_v2'.",
                stacklevel=4,
            )

    def _checked_noise_second_moments(self, values: Any) -> np.ndarray | None:
        if values is None:
            if self.config.variance_type == "analytic":
                raise ValueError(
                    "variance_type='analytic' needs noise_second_moments, one value a timestep; "
                    "ddpm_pipeline.likelihood.estimate_analytic_variance measures them."
                )
            return None
        table = _as_table("noise_second_moments", values, self.config.num_train_timesteps)
        if (table < 0).any():
            raise ValueError(f"noise_second_moments holds {table.min()!r}; mean squares are never negative.")
        return table

    def _checked_inference_timesteps(self, sequences: Any) -> dict[str, list[int]]:
        if not isinstance(sequences, dict | None):
            raise ValueError(f"inference_timesteps must be a dict of lists, not {type(sequences).__name__}.")
        checked = {}
        for key, timesteps in (sequences or {}).items():
            chain = self._checked_chain(timesteps, f"inference_timesteps[{key!r}]")
            if str(key) != str(len(chain)):
                raise ValueError(
                    f"inference_timesteps[{key!r}] has {len(chain)} timesteps; the key must be that number."
                )
            checked[str(key)] = chain.tolist()
        return checked

    # ---- tables ---------------------------------------------------------------------------------------

    def _marginal_table(self) -> _Table:
        """What belongs to x_0 -> x_t and so to no chain, for every timestep."""
        half = 0.5 * self._log_alphas_cumprod
        variance = -np.expm1(self._log_alphas_cumprod)
        with np.errstate(over="ignore"):  # 1/√ᾱ is infinite at zero terminal SNR, where epsilon prediction is refused
            inverse = np.exp(-half)
        columns = {
            "sqrt_alpha_cumprod": np.exp(half),
            "sqrt_one_minus_alpha_cumprod": np.sqrt(variance),
            "one_minus_alpha_cumprod": variance,
            "log_one_minus_alpha_cumprod": np.log(variance),
            "inverse_sqrt_alpha_cumprod": inverse,
            "noise_to_signal": inverse * np.sqrt(variance),
            "log_snr": self._log_alphas_cumprod - np.log(variance),
        }
        return _Table(np.arange(len(half)), len(half), columns)

    def _chain_table(self, chain: np.ndarray) -> _Table:
        """What belongs to x_s -> x_t for neighbours s < t of the ascending chain."""
        starts = np.concatenate([[0], chain[:-1] + 1])
        log_alpha = np.add.reduceat(self._log_alphas[: chain[-1] + 1].astype(np.longdouble), starts).astype(np.float64)
        log_alpha_cumprod = self._log_alphas_cumprod[chain]
        log_alpha_cumprod_prev = np.concatenate([[0.0], log_alpha_cumprod[:-1]])
        beta, variance, variance_prev = (-np.expm1(x) for x in (log_alpha, log_alpha_cumprod, log_alpha_cumprod_prev))
        log_beta = np.log(beta)
        posterior_variance = variance_prev / variance * beta
        # The step into clean data has β̃ = 0. Where a finite logarithm is needed its neighbour's value stands in.
        log_lower = np.log(posterior_variance[1:])
        log_lower = np.concatenate([log_lower[:1] if len(chain) > 1 else log_beta[:1], log_lower])
        with np.errstate(divide="ignore"):
            posterior_log_variance = np.log(posterior_variance)
        columns = {
            "previous": np.concatenate([[-1], chain[:-1]]),
            "forward_scale": np.exp(0.5 * log_alpha),
            "forward_variance": beta,
            "forward_log_variance": log_beta,
            "forward_std": np.sqrt(beta),
            "posterior_x0": np.exp(0.5 * log_alpha_cumprod_prev) * beta / variance,
            "posterior_xt": np.exp(0.5 * log_alpha) * variance_prev / variance,
            "posterior_variance": posterior_variance,
            "posterior_log_variance": posterior_log_variance,
            "log_std_middle": 0.25 * (log_beta + log_lower),
            "log_std_half_range": 0.25 * (log_beta - log_lower),
        }
        if self.config.variance_type not in LEARNED_VARIANCE_TYPES:
            log_model = self._fixed_log_variance(chain, log_alpha, log_beta, log_lower, posterior_variance)
            columns["model_log_variance"] = log_model
            columns["model_variance"] = np.exp(log_model)
            columns["model_std"] = np.exp(0.5 * log_model)
        columns["noise_gate"] = (chain != chain[0]).astype(np.float64)  # the step into clean data draws nothing
        return _Table(chain, self.config.num_train_timesteps, columns)

    def _fixed_log_variance(
        self,
        chain: np.ndarray,
        log_alpha: np.ndarray,
        log_beta: np.ndarray,
        log_lower: np.ndarray,
        posterior_variance: np.ndarray,
    ) -> np.ndarray:
        """log σ_t² of p_θ(x_s | x_t) where it does not depend on the network's output, one value a chain step."""
        if self.config.variance_type in ("fixed_small", "fixed_small_log"):
            return log_lower
        if self.config.variance_type in ("fixed_large", "fixed_large_log"):
            return log_beta
        # Bao et al. 2022 ("Analytic-DPM"), eq. 7: the noise's unexplained share 1 - Γ_t, seen from x_s, added to β̃.
        unexplained = np.clip(1 - self._noise_second_moments[chain], 0, 1)
        log_extra = 2 * log_beta - log_alpha - np.log(-np.expm1(self._log_alphas_cumprod[chain]))
        variance = posterior_variance + np.exp(log_extra) * unexplained
        return np.where(variance > 0, np.log(np.where(variance > 0, variance, 1)), log_lower)

    def _use_chain(self, descending: np.ndarray, device: str | torch.device | None) -> None:
        chain = descending[::-1]
        self._chain = self._chain_table(chain)
        self.timesteps = torch.from_numpy(descending.astype(np.int64)).to(device)

    # ---- the chain in use -----------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the chain: `num_inference_steps` timesteps by the configured spacing, or the descending `timesteps`.

        A sub-sequence that the config stores for this number of steps is used in place of the spacing.
        Raises ValueError for a number outside 1..T, or timesteps that are not strictly descending within 0..T-1.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps.")
        if timesteps is not None:
            chain = self._checked_chain(timesteps, "timesteps")
        else:
            _check_integer("num_inference_steps", num_inference_steps, 1, self.config.num_train_timesteps)
            stored = self._inference_timesteps.get(str(num_inference_steps))
            chain = np.array(stored) if stored else self._spaced_chain(int(num_inference_steps))
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(chain)
        self._use_chain(chain, device)

    def _spaced_chain(self, num_inference_steps: int) -> np.ndarray:
        """`num_inference_steps` descending timesteps (Lin et al. 2023, table 2)."""
        total = self.config.num_train_timesteps
        if self.config.timestep_spacing == "linspace":
            chain = np.linspace(0, total - 1, num_inference_steps).round()[::-1].astype(np.int64)
        elif self.config.timestep_spacing == "leading":
            chain = np.arange(num_inference_steps)[::-1] * (total // num_inference_steps) + self.config.steps_offset
        else:
            # arange may end with one value too many, by rounding; stock then emits timestep -1
            chain = (
                np.round(np.arange(total, 0, -total / num_inference_steps)[:num_inference_steps]).astype(np.int64) - 1
            )
        return self._checked_chain(
            chain, f"num_inference_steps={num_inference_steps} with steps_offset={self.config.steps_offset}"
        )

    def _checked_chain(self, timesteps: Any, source: str) -> np.ndarray:
        timesteps = _on_host(timesteps)
        chain = np.asarray(timesteps)
        last = self.config.num_train_timesteps - 1
        if chain.ndim != 1 or chain.size == 0 or chain.dtype.kind not in "iu":
            raise ValueError(f"{source} must be a non-empty list of integers, not {reprlib.repr(timesteps)}.")
        if (np.diff(chain.astype(np.int64)) >= 0).any() or chain[0] > last or chain[-1] < 0:
            raise ValueError(
                f"{source} must be strictly descending timesteps from at most {last} to at least 0, not "
                f"{reprlib.repr(chain.tolist())}."
            )
        return chain.astype(np.int64)

    def previous_timestep(self, timestep: int | torch.Tensor) -> int:
        """s, the timestep before `timestep` in the chain in use; -1 where that is clean data."""
        timestep = timestep.cpu() if isinstance(timestep, torch.Tensor) else timestep
        return int(self._chain.at(timestep, self.betas).previous)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The network sees x_t as it is."""
        return sample

    # ---- forward process q (report §4) ----------------------------------------------------------------

    def forward_step(self, sample: torch.Tensor, timestep: int | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t from x_s and z_t ~ N(0, I): √α_{t|s} x_s + √(1-α_{t|s}) z_t, report eq. 4.3. All [B, C, H, W]."""
        x_s = _compute(sample)
        chain = self._chain.at(timestep, x_s)
        return _mix(chain.forward_scale, x_s, chain.forward_std, noise).to(sample.dtype)

    def forward_mean_variance(self, sample: torch.Tensor, timesteps: int | torch.Tensor) -> Moments:
        """Moments of q(x_t | x_s), report eq. 4.12. `sample` is x_s, [B, C, H, W]."""
        x_s = _compute(sample)
        chain = self._chain.at(timesteps, x_s)
        return _moments(chain.forward_scale * x_s, chain.forward_variance, chain.forward_log_variance)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """x_t from x_0 in one go: √ᾱ_t x_0 + √(1-ᾱ_t) z̃, report eq. 4.10. [B, C, H, W], in the dtype of x_0."""
        x_0 = _compute(original_samples)
        q = self._marginal.at(timesteps, x_0)
        return _mix(q.sqrt_alpha_cumprod, x_0, q.sqrt_one_minus_alpha_cumprod, noise).to(original_samples.dtype)

    def q_mean_variance(self, original_samples: torch.Tensor, timesteps: int | torch.Tensor) -> Moments:
        """Moments of q(x_t | x_0) = N(√ᾱ_t x_0, (1-ᾱ_t) I), report eq. 4.11. `original_samples` is [B, C, H, W]."""
        x_0 = _compute(original_samples)
        q = self._marginal.at(timesteps, x_0)
        return _moments(q.sqrt_alpha_cumprod * x_0, q.one_minus_alpha_cumprod, q.log_one_minus_alpha_cumprod)

    def log_snr(self, timesteps: int | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
        """log(ᾱ_t/(1-ᾱ_t)), to broadcast against the images `like`; -inf at zero terminal SNR."""
        return self._marginal.at(timesteps, _compute(like)).log_snr

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """v = √ᾱ_t z̃ - √(1-ᾱ_t) x_0 (Salimans & Ho 2022). `sample` is x_0, as in diffusers. [B, C, H, W]."""
        x_0 = _compute(sample)
        q = self._marginal.at(timesteps, x_0)
        velocity = _mix(q.sqrt_alpha_cumprod, noise.to(x_0.dtype), -q.sqrt_one_minus_alpha_cumprod, x_0)
        return velocity.to(sample.dtype)

    def training_target(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """What the network regresses on (report §6): the noise, x_0 or v, by `prediction_type`. [B, C, H, W]."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return original_samples
        return self.get_velocity(original_samples, noise, timesteps)

    # ---- posterior and reverse process (report §5) ----------------------------------------------------

    def q_posterior(
        self, original_samples: torch.Tensor, sample: torch.Tensor, timesteps: int | torch.Tensor
    ) -> Moments:
        """Moments of q(x_s | x_t, x_0), report eq. 5.7 corrected. x_0 and x_t are [B, C, H, W].

        Where s is clean data the posterior is the point x_0: variance 0 and log-variance -inf.
        """
        x_t = _compute(sample)
        chain = self._chain.at(timesteps, x_t)
        mean = self._posterior_mean(_cast(original_samples, x_t.dtype), x_t, chain)
        return _moments(mean, chain.posterior_variance, chain.posterior_log_variance)

    @staticmethod
    def _posterior_mean(x_0: torch.Tensor, x_t: torch.Tensor, chain: "SimpleNamespace | _Gathered") -> torch.Tensor:
        """μ̃ = [√ᾱ_s (1-α_{t|s}) x_0 + √α_{t|s} (1-ᾱ_s) x_t] / (1-ᾱ_t)."""
        return _mix(chain.posterior_x0, x_0, chain.posterior_xt, x_t)

    def predict_original_sample(
        self, model_output: torch.Tensor, timesteps: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """x_0 from the network's output and x_t, unclipped (report, above eq. 5.8). [B, C, H, W].

        `model_output` is the noise, x_0 or v, by `prediction_type`; a variance half beside it is left out of account.
        """
        x_t = _compute(sample)
        output = _compute(self._split(model_output, sample)[0]).to(x_t.dtype)
        return self._predict_x0(output, timesteps, x_t).to(sample.dtype)

    def _predict_x0(self, output: torch.Tensor, timesteps: int | torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        if self._prediction_type == "sample":
            return output
        q = self._marginal.at(timesteps, x_t)
        if self._prediction_type == "epsilon":
            return _mix(q.inverse_sqrt_alpha_cumprod, x_t, -q.noise_to_signal, output)
        return _mix(q.sqrt_alpha_cumprod, x_t, -q.sqrt_one_minus_alpha_cumprod, output)

    def _clip(self, x_0: torch.Tensor) -> torch.Tensor:
        if self._thresholding:
            return self._dynamic_threshold(x_0)
        return x_0 if self._clip_range is None else x_0.clamp(-self._clip_range, self._clip_range)

    def _dynamic_threshold(self, x_0: torch.Tensor) -> torch.Tensor:
        """Clip to a quantile of |x_0|, an image at a time, and scale back to [-1, 1] (Saharia et al. 2022, §2.3)."""
        flat = x_0.flatten(1)
        limit = torch.quantile(flat.abs(), self.config.dynamic_thresholding_ratio, dim=1, keepdim=True)
        limit = limit.clamp(min=1, max=self.config.sample_max_value)
        return (flat.clamp(-limit, limit) / limit).view_as(x_0)

    def _split(self, model_output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prediction and, for learned variances, the variance half: [B, 2C, H, W] -> 2 x [B, C, H, W]."""
        if not self._learned:
            if model_output.shape == sample.shape and sample.ndim > 1:
                return model_output, None
        elif model_output.ndim > 1 and model_output.shape[1] % 2 == 0:
            prediction, raw_variance = model_output.chunk(2, dim=1)
            if prediction.shape == sample.shape:
                return prediction, raw_variance
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)} for images {tuple(sample.shape)}; "
            f"variance_type={self.config.variance_type!r} needs {'twice the' if self._learned else 'the same'} channels"
            f" (a UNet with out_channels = {'2 * ' if self._learned else ''}in_channels) and all else the same."
        )

    def _learned_log_std(self, raw_variance: torch.Tensor, chain: "SimpleNamespace | _Gathered") -> torch.Tensor:
        """log σ, half the log-variance, from the network's variance half (Nichol & Dhariwal 2021, eq. 15)."""
        if self._variance_type == "learned":
            return raw_variance * 0.5
        middle, half_range = chain.log_std_middle, chain.log_std_half_range
        if isinstance(half_range, float):
            return torch.add(middle, raw_variance, alpha=half_range)
        return torch.addcmul(middle, half_range, raw_variance)

    def p_mean_variance(
        self, model_output: torch.Tensor, timesteps: int | torch.Tensor, sample: torch.Tensor
    ) -> ReverseMoments:
        """Moments of p_θ(x_s | x_t), report eq. 5.8, with x_0 clipped as configured.

        `model_output` [B, C or 2C, H, W], `sample` x_t [B, C, H, W]. The variance of the step into clean data, whose β̃
        is 0, is its neighbour's, so that likelihoods stay finite. Raises ValueError where channels or timesteps do not
        fit.
        """
        prediction, raw_variance = self._split(model_output, sample)
        x_t = _compute(sample)
        chain = self._chain.at(timesteps, x_t)
        x_0 = self._clip(self._predict_x0(_cast(prediction, x_t.dtype), timesteps, x_t))
        mean = self._posterior_mean(x_0, x_t, chain)
        if raw_variance is None:
            variance, log_variance = chain.model_variance, chain.model_log_variance
        else:
            log_variance = 2 * self._learned_log_std(_cast(raw_variance, x_t.dtype), chain)
            variance = log_variance.exp()
        moments = _moments(mean, variance, log_variance)
        return ReverseMoments(moments.mean, moments.variance, moments.log_variance, x_0)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """x_s ~ p_θ(x_s | x_t); its mean where s is clean data (end of report §5).

        `model_output` [B, C or 2C, H, W], `sample` x_t [B, C, H, W]; with a list of generators, one an image.
        """
        host_timestep = _host_timestep(timestep)
        timestep = timestep if host_timestep is None else host_timestep
        prediction, raw_variance = self._split(model_output, sample)
        x_t = _compute(sample)
        chain = self._chain.at(timestep, x_t)
        x_0 = self._clip(self._predict_x0(_cast(prediction, x_t.dtype), timestep, x_t))
        x_s = self._posterior_mean(x_0, x_t, chain)
        if host_timestep is None or chain.noise_gate:
            noise = _cast(self._noise_like(prediction, generator), x_t.dtype)
            if raw_variance is None:
                std = chain.model_std
            else:
                std = self._learned_log_std(_cast(raw_variance, x_t.dtype), chain).exp_()
            if host_timestep is None:
                std = std * chain.noise_gate
            x_s = x_s.add_(noise, alpha=std) if isinstance(std, float) else x_s.addcmul_(noise, std)
        if sample.dtype != x_t.dtype:
            x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        if not return_dict:
            return x_s, x_0
        return DDPMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0)

    @staticmethod
    def _noise_like(
        prediction: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        """Standard normal noise from the same draws as diffusers' own schedulers make."""
        if generator is None or (isinstance(generator, torch.Generator) and generator.device == prediction.device):
            return torch.randn(prediction.shape, generator=generator, device=prediction.device, dtype=prediction.dtype)
        if isinstance(generator, list) and len(generator) not in (1, len(prediction)):
            raise ValueError(f"{len(generator)} generators for {len(prediction)} images; give one, or one an image.")
        return randn_tensor(prediction.shape, generator=generator, device=prediction.device, dtype=prediction.dtype)


def _compute(images: torch.Tensor) -> torch.Tensor:
    """Images in the dtype that is computed in: float32 for half precision, else their own."""
    if images.dtype in (torch.float32, torch.float64):
        return images
    if not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}; they are floating-point numbers, usually in [-1, 1].")
    return images.float()


def _mix(a: torch.Tensor, x: torch.Tensor, b: float | torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """a·x + b·y in two passes over memory, in the dtype of x."""
    y = _cast(y, x.dtype)
    return torch.mul(x, a).add_(y, alpha=b) if isinstance(b, float) else torch.mul(x, a).addcmul_(y, b)


def _cast(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return images if images.dtype == dtype else images.to(dtype)


def _moments(mean: torch.Tensor, variance: float | torch.Tensor, log_variance: float | torch.Tensor) -> Moments:
    if not isinstance(variance, torch.Tensor):
        shape = (1,) * mean.ndim
        variance, log_variance = mean.new_full(shape, variance), mean.new_full(shape, log_variance)
    return Moments(mean, variance, log_variance)
