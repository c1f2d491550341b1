"""What the scheduler computes with: checks of its configuration, α schedules, tables read by timestep, fast arithmetic on
images. Everything follows from log α_t in float64, so that 1 - ᾱ_t keeps its digits near one.

Travels inside model repositories. Imports diffusers, numpy and torch.
"""

import difflib
import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
LEARNED_VARIANCE_TYPES = ("learned", "learned_range")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "analytic", *LEARNED_VARIANCE_TYPES)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
OWN_KEY = "_alpha_ddpm"  # of our settings in a config: stock classes silently keep what begins with an underscore

MAX_TRAIN_TIMESTEPS = 100_000
MIN_BETA = 1e-300  # below it β̃ underflows to 0
MAX_BETA = 0.999  # cap for schedules defined through ᾱ, as in Nichol & Dhariwal 2021
MAX_PIXEL = 1e30  # largest bound on x_0 that float32 can hold and divide by
# √ᾱ_T below which float32 overflows in x_0 computed from noise, or in the upper bound of the analytic variance
MIN_TERMINAL_SIGNAL = {("prediction_type", "epsilon"): 1e-30, ("variance_type", "analytic"): 1e-15}
FAR_FROM_NOISE = 0.05  # ᾱ_T above which sampling from pure noise does not match the forward process
CHOICES = {
    "beta_schedule": (BETA_SCHEDULES, " For other values use AlphaDDPMScheduler.from_alphas."),
    "variance_type": (VARIANCE_TYPES, " A UNet with out_channels = 2 * in_channels uses 'learned_range'."),
    "prediction_type": (PREDICTION_TYPES, ""),
    "timestep_spacing": (TIMESTEP_SPACINGS, ""),
}
# What other libraries and papers call the choices
OTHER_NAMES = {
    other: name
    for name, others in {
        "squaredcos_cap_v2": ("cosine", "cosine_beta", "squaredcos_cap", "squaredcos"),
        "linear": ("linear_beta",),
        "scaled_linear": ("scaled_linear_beta", "quad", "quadratic"),
        "sigmoid": ("sigmoid_beta",),
        "fixed_small": ("fixedsmall", "small"),
        "fixed_large": ("fixedlarge", "large"),
        "epsilon": ("eps", "noise", "pred_noise"),
        "sample": ("x0", "x_0", "x_start", "start_x", "xstart", "pred_x0", "original_sample"),
        "v_prediction": ("v", "velocity", "pred_v"),
        "leading": ("uniform",),
    }.items()
    for other in others
}
SWITCHES = ("clip_sample", "thresholding", "rescale_betas_zero_snr")
# Settings of configs of 2022 (diffusers 0.0 to 0.9), and what they are now
FORMER_SETTINGS = {
    "timesteps": lambda value: {"num_train_timesteps": value},
    "clip_predicted_image": lambda value: {"clip_sample": value},
    "predict_epsilon": lambda value: {"prediction_type": "epsilon" if value else "sample"},
    "tensor_format": lambda value: {},  # numpy or torch
}
RANGES = dict.fromkeys(("beta_start", "beta_end", "dynamic_thresholding_ratio"), (0, 1))  # above 0 and at most 1
RANGES |= {"clip_sample_range": (0, MAX_PIXEL), "sample_max_value": (1 / MAX_PIXEL, MAX_PIXEL)}

Generators = torch.Generator | list[torch.Generator] | None  # one for all images, or one per image
Timesteps = int | Tensor  # one for all images, or [B]
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_settings(config: Mapping[str, Any]) -> None:
    """Raise ValueError for the first setting that is not a known choice or lies outside its range."""
    check_integer("num_train_timesteps", config["num_train_timesteps"], 1, MAX_TRAIN_TIMESTEPS)
    check_integer("steps_offset", config["steps_offset"], 0, config["num_train_timesteps"])
    for name, (allowed, fix) in CHOICES.items():
        if config[name] not in allowed:
            raise ValueError(f"{name}={config[name]!r} is not one of {', '.join(allowed)}.{_meant(config[name], allowed)}{fix}")
    for name in SWITCHES:
        if not isinstance(config[name], bool):
            raise ValueError(f"{name}={config[name]!r} must be True or False.")
    for name, (low, high) in RANGES.items():
        value, number = config[name], isinstance(config[name], int | float) and not isinstance(config[name], bool)
        if not (number and low < value <= high):  # also refuses NaN
            raise ValueError(f"{name}={value!r} must be a number above {low} and at most {high}.")


def _meant(value: Any, allowed: Sequence[str]) -> str:
    other_name = OTHER_NAMES.get(value) if isinstance(value, str) else None
    near = [other_name] if other_name in allowed else difflib.get_close_matches(str(value), allowed, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def warn(message: str, stacklevel: int) -> None:
    """Warn, unless diffusers was told to be quieter, as by DIFFUSERS_VERBOSITY=error."""
    if logging.get_verbosity() <= logging.WARNING:
        warnings.warn(message, stacklevel=stacklevel + 1)


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (integer and low <= value and (high is None or value <= high)):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={value!r} must be an integer {allowed}.")


def check_generators(generator: Any, count: int) -> None:
    if isinstance(generator, Sequence) and len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} images; give one, or a list of one per image.")


def plain(value: Any) -> Any:
    """NumPy's and torch's scalars and arrays, also within lists and tuples, as numbers and lists; anything else unchanged."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def as_table(name: str, values: Any, length: int) -> np.ndarray:
    """`values` as float64 [length]. Raises ValueError if they are not that many finite numbers."""
    try:
        table = np.asarray(plain(values)).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a list of {length} numbers, not {type(values).__name__}.") from error
    if table.shape != (length,):
        raise ValueError(f"{name} has shape {table.shape}; give one value per timestep: num_train_timesteps={length}.")
    if not np.isfinite(table).all():
        raise ValueError(f"{name} holds a NaN or an infinity at timestep {int(np.argmin(np.isfinite(table)))}.")
    return table


def _check_betas(betas: np.ndarray, source: str) -> None:
    inside = (betas >= MIN_BETA) & (betas < 1)
    inside[-1] |= betas[-1] == 1  # a chain may end without signal, but cannot lose all of it midway
    if not inside.all():
        t = int(np.argmin(inside))
        allowed = f"every beta = 1 - alpha must be at least {MIN_BETA} and below 1"
        raise ValueError(f"{source} gives beta={betas[t]} at timestep {t}; {allowed}.")


def check_terminal_signal(config: Mapping[str, Any], log_alpha_cumprod: float) -> None:
    """Raise ValueError if log ᾱ_T is too low for the configuration; warn if the forward process ends far from noise."""
    signal = math.exp(log_alpha_cumprod / 2)
    for (name, value), least in MIN_TERMINAL_SIGNAL.items():
        if config[name] == value and signal < least:
            raise ValueError(
                f"{name}={value!r} needs sqrt(alphas_cumprod[-1]) of at least {least}, but it is {signal:.1e}. Use "
                "prediction_type='sample' or 'v_prediction' with a fixed or learned variance, or a less noisy schedule."
            )
    if signal**2 > FAR_FROM_NOISE:
        found = f"alphas_cumprod={signal**2:.3g}, far from pure noise, where sampling starts"
        fix = "use more timesteps, a larger beta_end, or beta_schedule='squaredcos_cap_v2'"
        warn(f"the forward process ends with {found}; {fix}.", stacklevel=5)


def log_alphas_of(config: Mapping[str, Any]) -> np.ndarray:
    """log α_t of a configuration, float64 [T]. Raises ValueError if a β_t is outside (0, 1)."""
    source = "trained_betas" if config["trained_betas"] else f"beta_schedule={config['beta_schedule']!r}"
    betas = np.array(config["trained_betas"]) if config["trained_betas"] else _schedule_betas(config)
    _check_betas(betas, source)
    with np.errstate(divide="ignore"):  # log α = -inf if the last β is 1
        log_alphas = np.log1p(-betas)
    if config["rescale_betas_zero_snr"]:
        if len(betas) < 2:
            raise ValueError(f"rescale_betas_zero_snr needs at least 2 timesteps, not {len(betas)}.")
        if math.isfinite(log_alphas[-1]):  # otherwise the terminal SNR is already zero
            log_alphas = _rescale_zero_terminal_snr(log_alphas)
            _check_betas(-np.expm1(log_alphas), f"rescale_betas_zero_snr on {source}")
    return log_alphas


def _schedule_betas(config: Mapping[str, Any]) -> np.ndarray:
    """β_t of the named schedule as diffusers defines it, float64 [T]."""
    schedule, length = config["beta_schedule"], config["num_train_timesteps"]
    start, end = float(config["beta_start"]), float(config["beta_end"])
    if schedule == "linear":
        return np.linspace(start, end, length)
    if schedule == "scaled_linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), length) ** 2
    if schedule == "sigmoid":
        return (end - start) / (1 + np.exp(-np.linspace(-6, 6, length))) + start
    return np.minimum({"squaredcos_cap_v2": _cosine_betas, "laplace": _laplace_betas}[schedule](length), MAX_BETA)


def _cosine_betas(length: int) -> np.ndarray:
    """1 - f(t+1)/f(t), f(t) = cos²((t/T + 0.008)/1.008 · π/2), by sines alone (Nichol & Dhariwal 2021, eq. 17)."""
    unit = math.pi / 2 / (1.008 * length)
    step = np.arange(length)
    twice_midpoint = unit * (2 * step + 1 + 0.016 * length)
    twice_midpoint_from_end = unit * (2 * (length - step) - 1)
    sine_of_midpoint = np.sin(np.minimum(twice_midpoint, twice_midpoint_from_end))
    cosine = np.sin(unit * (length - step))  # cos(x) = sin(π/2 - x), exact where x is near π/2
    return math.sin(unit) * sine_of_midpoint / cosine**2


def _laplace_betas(length: int) -> np.ndarray:
    """1 - f(t+1)/f(t) for f = √(snr/(1+snr)) with Laplace-distributed log-SNR (Hang & Gu 2024), without cancellation.

    1/snr is √u before half time and 1/√u after it, with u = 1 - 2|1/2 - t/T| + 1e-6.
    """
    offset = 1e-6
    step = np.arange(length + 1)
    late = 2 * step > length
    u = 2 * np.where(late, length - step, step) / length + offset
    inverse_snr = np.where(late, u**-0.5, u**0.5)
    u0, u1 = u[:-1], u[1:]
    du = 2 / length
    growth_early = du / (np.sqrt(u0) + np.sqrt(u1))
    growth_late = du / ((np.sqrt(u0) + np.sqrt(u1)) * np.sqrt(u0 * u1))
    d0, d1 = 1 - 2 * step[:-1] / length, 2 * step[1:] / length - 1
    one_minus_product = (d0 + d1) * (1 + offset) - d0 * d1 - offset * (2 + offset)
    growth_across = one_minus_product / (1 + np.sqrt(u0 * u1)) / np.sqrt(u1)
    growth = np.where(late[1:], np.where(late[:-1], growth_late, growth_across), growth_early)
    return -np.expm1(-0.5 * np.log1p(growth / (1 + inverse_snr[:-1])))


def _rescale_zero_terminal_snr(log_alphas: np.ndarray) -> np.ndarray:
    """log α_t after √ᾱ is shifted and scaled so that √ᾱ_T = 0 and √ᾱ_1 is unchanged (Lin et al. 2023, algorithm 1).

    √α'_t = (√ᾱ_t - √ᾱ_T)/(√ᾱ_{t-1} - √ᾱ_T) = 1 - (1 - √α_t)/(1 - √(ᾱ_T/ᾱ_{t-1})) for t > 1, and α'_1 = α_1.
    """
    half = 0.5 * log_alphas[1:]
    half_log_remaining = half[::-1].cumsum()[::-1]  # log √(ᾱ_T/ᾱ_{t-1})
    with np.errstate(divide="ignore", invalid="ignore"):  # betas too small for it are refused afterwards
        middle = 2 * np.log1p(-np.expm1(half[:-1]) / np.expm1(half_log_remaining[:-1]))
    return np.concatenate([log_alphas[:1], middle, [-np.inf]])


def marginal_table(log_alphas_cumprod: np.ndarray) -> "Table":
    """Coefficients of x_0 -> x_t for every timestep; they do not depend on the chain."""
    half = 0.5 * log_alphas_cumprod
    variance = -np.expm1(log_alphas_cumprod)
    with np.errstate(over="ignore"):  # 1/√ᾱ is infinite at zero terminal SNR, where epsilon prediction is refused
        inverse = np.exp(-half)
    columns = {
        "sqrt_alpha_cumprod": np.exp(half),
        "sqrt_one_minus_alpha_cumprod": np.sqrt(variance),
        "one_minus_alpha_cumprod": variance,
        "log_one_minus_alpha_cumprod": np.log(variance),
        "inverse_sqrt_alpha_cumprod": inverse,
        "noise_to_signal": inverse * np.sqrt(variance),
        "log_snr": log_alphas_cumprod - np.log(variance),
    }
    return Table(np.arange(len(half)), len(half), columns)


def chain_table(
    chain: np.ndarray,
    log_alphas: np.ndarray,
    log_alphas_cumprod: np.ndarray,
    variance_type: str,
    noise_second_moments: np.ndarray | None,
) -> "Table":
    """Coefficients of x_s -> x_t for neighbours s < t of the ascending chain."""
    starts = np.concatenate([[0], chain[:-1] + 1])
    log_alpha = np.add.reduceat(log_alphas[: chain[-1] + 1], starts)
    log_alpha_cumprod = log_alphas_cumprod[chain]
    log_alpha_cumprod_prev = np.concatenate([[0.0], log_alpha_cumprod[:-1]])
    beta, variance, variance_prev = (-np.expm1(x) for x in (log_alpha, log_alpha_cumprod, log_alpha_cumprod_prev))
    log_beta = np.log(beta)
    posterior_variance = variance_prev / variance * beta + 0.0  # never -0.0
    # β̃ is 0 for the step into clean data. Where a finite logarithm is needed, its neighbour's value replaces it.
    log_lower = np.log(posterior_variance[1:])
    log_lower = np.concatenate([log_lower[:1] if len(chain) > 1 else log_beta[:1], log_lower])
    with np.errstate(divide="ignore"):
        posterior_log_variance = np.log(posterior_variance)  # -inf
    columns = {
        "previous": np.concatenate([[-1.0], chain[:-1]]),
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
        "noise_gate": (chain != chain[0]).astype(np.float64),  # the step into clean data adds no noise
    }
    log_model = {"fixed_small": log_lower, "fixed_large": log_beta}.get(variance_type.removesuffix("_log"))
    if variance_type == "analytic":
        # Bao et al. 2022 ("Analytic-DPM"), eq. 7: β̃ plus the unexplained share of the noise, 1 - Γ_t, as seen from x_s
        unexplained = np.clip(1 - noise_second_moments[chain], 0, 1)
        model_variance = posterior_variance + np.exp(2 * log_beta - log_alpha - np.log(variance)) * unexplained
        log_model = np.where(model_variance > 0, np.log(np.where(model_variance > 0, model_variance, 1)), log_lower)
    if log_model is not None:  # not learned
        model = {"model_variance": np.exp(log_model), "model_std": np.exp(0.5 * log_model)}
        columns |= {"model_log_variance": log_model, **model}
    return Table(chain, len(log_alphas), columns)


class Table:
    """Named float64 columns over some of the timesteps 0..T-1, read at one timestep or at one per image."""

    def __init__(self, timesteps: np.ndarray, total: int, columns: dict[str, np.ndarray]):
        self.positions = {t: position for position, t in enumerate(timesteps.tolist())}
        self.total, self.columns = total, columns
        self._rows: dict[int, SimpleNamespace] = {}
        self._on_device: dict[tuple, Tensor] = {}

    def at(self, timesteps: Timesteps, like: Tensor) -> "Coefficients":
        """The columns as attributes: scalars for a host timestep, otherwise tensors [B, 1, 1, 1] to go with images `like`.

        Raises ValueError for host timesteps that are not in the table; checking those on a device would synchronise.
        """
        if isinstance(timesteps, list | tuple | np.ndarray):
            timesteps = torch.as_tensor(np.asarray(timesteps))
        if isinstance(timesteps, Tensor):
            if timesteps.dtype not in INTEGER_DTYPES:
                raise ValueError(f"timesteps has dtype {timesteps.dtype}; they must be integers, such as torch.int64.")
            on_host = timesteps.device.type == "cpu"
            if timesteps.ndim > 1 or (timesteps.ndim == 1 and len(timesteps) not in (1, len(like))):
                shape = tuple(timesteps.shape)
                raise ValueError(f"timesteps has shape {shape}; give one, or one for each of {len(like)} images.")
            if timesteps.ndim == 1 or not on_host:
                if on_host:
                    self._check(timesteps.tolist())
                return Gathered(self, timesteps.to(like.device, torch.long), like)
        try:
            timesteps = operator.index(timesteps)
        except TypeError as error:
            raise TypeError(f"timestep {timesteps!r} must be an integer, or a [B] tensor of integers.") from error
        if timesteps not in self._rows:
            self._check([timesteps])
            row = {name: float(column[self.positions[timesteps]]) for name, column in self.columns.items()}
            self._rows[timesteps] = SimpleNamespace(**row)
        return self._rows[timesteps]

    def _check(self, timesteps: list[int]) -> None:
        if unknown := [t for t in timesteps if t not in self.positions]:
            chain = f"which has {len(self.positions)} of the timesteps 0 to {self.total - 1}; see set_timesteps"
            raise ValueError(f"timestep {', '.join(map(str, unknown))} is not in the chain in use, {chain}.")

    @torch.inference_mode(False)  # what is kept must also serve where gradients are wanted
    def on_device(self, name: str, like: Tensor) -> Tensor:
        """A column as [T] in the dtype and on the device of `like`, NaN where it has no value; copied there once."""
        key = (name, like.device, like.dtype)
        if key not in self._on_device:
            full = torch.full((self.total,), torch.nan, dtype=torch.float64)
            full[list(self.positions)] = torch.from_numpy(self.columns[name])
            self._on_device[key] = full.to(like.dtype).to(like.device)
        return self._on_device[key]


class Gathered:
    """A table's columns at one timestep per image, gathered when they are read."""

    def __init__(self, table: Table, timesteps: Tensor, like: Tensor):
        self._table, self._timesteps, self._like = table, timesteps, like

    def __getattr__(self, name: str) -> Tensor:
        shape = (-1,) + (1,) * (self._like.ndim - 1)
        # not by brackets, which would read a 0-dim index back to the host
        return self._table.on_device(name, self._like).index_select(0, self._timesteps.view(-1)).view(shape)


Coefficients = SimpleNamespace | Gathered


def compute(images: Tensor) -> Tensor:
    """Images in the dtype of the computation: float32 for half precision, otherwise their own."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, not {type(images).__name__}.")
    if images.dtype in (torch.float32, torch.float64):
        return images
    if not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}; they must be floating-point, usually in [-1, 1].")
    return images.float()


def mix(a: float | Tensor, x: Tensor, b: float | Tensor, y: Tensor) -> Tensor:
    """a·x + b·y in two passes over memory, in the dtype of x."""
    return add_scaled_(torch.mul(x, a), b, y)


def add_scaled_(x: Tensor, b: float | Tensor, y: Tensor) -> Tensor:
    """x + b·y in place."""
    y = y.to(x.dtype)
    return x.add_(y, alpha=b) if isinstance(b, float) else x.addcmul_(y, b)


def standard_normal(shape: torch.Size, like: Tensor, generator: Generators) -> Tensor:
    """Noise in the dtype and on the device of `like`, by the same draws as diffusers' own schedulers."""
    options = {"generator": generator, "device": like.device, "dtype": like.dtype}
    if generator is None or (isinstance(generator, torch.Generator) and generator.device == like.device):
        return torch.randn(shape, **options)
    if not (isinstance(generator, list) and len(generator) == 1):  # which randn_tensor takes for any number
        check_generators(generator, shape[0])
    return randn_tensor(shape, **options)
