"""What lowers the bound without training: the optimal variance (Bao et al. 2022, "Analytic-DPM") and the best timesteps for
a number of steps (Watson et al. 2021), both from statistics of the noise predictor on data.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..scheduling_alpha_ddpm import AlphaDDPMScheduler
from ..tables_alpha_ddpm import LEARNED_VARIANCE_TYPES, Generators
from .bound import batches, check_images, evaluating, own_scheduler
from .densities import NumBins, levels_of, log_decoder

RESIDUAL_EDGES = torch.logspace(-5, 1, 513, dtype=torch.float64)
_RESIDUAL_CENTRES = (RESIDUAL_EDGES[:-1] * RESIDUAL_EDGES[1:]).sqrt()


@dataclass(frozen=True)
class NoiseStatistics:
    """A model's noise predictor on data, for every timestep: all that optimal variances and timesteps need.

    Means are over images and their values, standard errors over images. `noise_errors` belong to the noise implied by the
    predicted x_0, clipped as configured. `residuals` are fractions of values by `|x_0 - predicted x_0|` over RESIDUAL_EDGES.
    """

    num_images: int
    num_bins: NumBins | None
    noise_second_moments: Tensor  #: Γ_t = E‖ε_θ(x_t, t)‖²/d, [T]
    noise_second_moments_error: Tensor  #: [T]
    noise_errors: Tensor  #: E‖z̃ - ε_θ(x_t, t)‖²/d, [T]
    noise_errors_error: Tensor  #: [T]
    x0_errors: Tensor  #: E‖x_0 - predicted x_0‖²/d, [T]
    data_second_moment: float  #: E‖x_0‖²/d
    residuals: Tensor  #: [T, 2, bins], separately inside and on the outer two of `num_bins` levels


def estimate_analytic_variance(
    unet: Callable,
    scheduler: Any,
    images: Tensor,
    *,
    num_bins: NumBins | None = 256,
    batch_size: int = 64,
    generator: Generators = None,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> NoiseStatistics:
    """Measure Γ_t and what `optimal_timesteps` needs, with one network call per image and timestep.

    The arguments are those of `bits_per_dim`. `with_analytic_variance` turns the result into a scheduler.
    """
    full = own_scheduler(scheduler)
    check_images(unet, images, num_bins, generator, batch_size)
    total, count = len(full), len(images)
    sums = torch.zeros(4, total, dtype=torch.float64)  # of ‖ε‖²/d, its square, ‖z̃ - ε‖²/d, its square
    x0_sums, data_sum = torch.zeros(total, dtype=torch.float64), 0.0
    residuals = torch.zeros(total, 2, len(_RESIDUAL_CENTRES), dtype=torch.float64)
    calls = -(-count // batch_size) * total
    with evaluating(unet) as network, tqdm(total=calls, disable=not progress or None, desc="noise") as bar:
        for batch in batches(network, images, batch_size, num_bins, generator, model_kwargs):
            x_0 = batch.x_0
            data_sum += float(_mean_squares(x_0).sum())
            outer = x_0.abs() > 1 - 1 / (levels_of(num_bins, x_0) - 1) if num_bins else torch.zeros_like(x_0, dtype=torch.bool)
            for t in range(total):
                z = batch.noise(t, x_0.shape).to(x_0)
                x_t = full.add_noise(x_0, z, t)
                output = network(x_t, t, full, batch.model_kwargs)
                clipped = full.p_mean_variance(output, t, x_t).pred_original_sample
                noise = _implied_noise(full, full.predict_original_sample(output, t, x_t), x_t, t)
                for row, values in enumerate((noise, z - _implied_noise(full, clipped, x_t, t))):
                    of_images = _mean_squares(values).double().cpu()
                    sums[2 * row, t] += of_images.sum()
                    sums[2 * row + 1, t] += of_images.square().sum()
                x0_sums[t] += float(_mean_squares(x_0 - clipped).sum())
                residuals[t] += _residual_histogram(x_0 - clipped, outer)
                bar.update()
    mean, mean_square = sums[0::2] / count, sums[1::2] / count
    error = ((mean_square - mean.square()).clamp(min=0) / max(count - 1, 1)).sqrt()
    measured = mean[0], error[0], mean[1], error[1], x0_sums / count, data_sum / count
    return NoiseStatistics(count, num_bins, *measured, residuals / (count * images[0].numel()))


def _mean_squares(values: Tensor) -> Tensor:
    """‖·‖²/d of each image, [B]."""
    return values.square().flatten(1).mean(dim=1)


def _implied_noise(scheduler: AlphaDDPMScheduler, x_0: Tensor, x_t: Tensor, timestep: int) -> Tensor:
    """(x_t - √ᾱ_t x_0)/√(1-ᾱ_t)."""
    q = scheduler.q_mean_variance(x_0, timestep)
    return (x_t - q.mean) / q.variance.sqrt()


def _residual_histogram(residual: Tensor, outer: Tensor) -> Tensor:
    """Counts of |residual| over RESIDUAL_EDGES, [2, bins]: of values inside, and on the outer levels."""
    bins, (low, high) = len(_RESIDUAL_CENTRES), map(math.log, RESIDUAL_EDGES[[0, -1]])
    clamped = residual.abs().clamp(min=float(RESIDUAL_EDGES[0]))
    index = ((clamped.log() - low) * (bins / (high - low))).long().clamp(max=bins - 1)
    return torch.bincount((index + bins * outer).flatten(), minlength=2 * bins).view(2, bins).double().cpu()


def with_analytic_variance(scheduler: Any, statistics: NoiseStatistics, *, from_errors: bool = False) -> AlphaDDPMScheduler:
    """A scheduler like the given one with variance_type="analytic" (Bao et al. 2022), its table in the config.

    The table is Γ_t, whose variance is optimal for a perfect noise predictor. `from_errors` uses 1 - E‖z̃ - ε_θ‖²/d instead,
    which is the same for a perfect predictor, and gives any other the variance that minimises its own bound.
    """
    table = (1 - statistics.noise_errors).clamp(min=0) if from_errors else statistics.noise_second_moments
    return own_scheduler(scheduler, variance_type="analytic", noise_second_moments=table.tolist())


def optimal_timesteps(statistics: NoiseStatistics, scheduler: Any, num_steps: int | Sequence[int]) -> dict[str, list[int]]:
    """For each number of steps the descending timesteps with the lowest bound, by dynamic programming.

    The bound of a chain is a sum over neighbouring pairs, so the best chain of k steps that ends at t is the best one of
    k - 1 that ends at some s < t, and the step from s to t (Watson et al. 2021), priced by `statistics` for the scheduler's
    variance_type. The result is a value for the config key `inference_timesteps`. Raises ValueError for numbers outside
    1..T, and for learned variances.
    """
    costs = _PairCosts(statistics, scheduler)
    numbers = [num_steps] if isinstance(num_steps, int) else list(num_steps)
    total = len(costs.prior)
    if wrong := [number for number in numbers if not 1 <= number <= total]:
        raise ValueError(f"num_steps={wrong[0]} must be an integer from 1 to {total}.")
    best = costs.first  # [T]: the lowest cost of a chain of `steps` steps that ends at t
    origins: list[np.ndarray] = []  # for each further step, the s it is reached from
    chosen = {}
    for steps in range(1, max(numbers) + 1):
        if steps > 1:
            priced = (costs.opening if steps == 2 else best[:, None]) + costs.pairs  # [s, t]
            origins.append(priced.argmin(axis=0))
            best = priced.min(axis=0)
        if steps in numbers:
            chain = [int((best + costs.prior).argmin())]
            for origin in reversed(origins):
                chain.append(int(origin[chain[-1]]))
            chosen[str(steps)] = chain
    return chosen


def predicted_bits_per_dim(statistics: NoiseStatistics, scheduler: Any, timesteps: Sequence[int]) -> float:
    """The bound of the chain of these descending timesteps as `optimal_timesteps` prices it."""
    return _PairCosts(statistics, scheduler).of_chain(timesteps)


class _PairCosts:
    """The bound's terms for every pair s < t in bits per dimension, float64; infinite for s >= t."""

    def __init__(self, statistics: NoiseStatistics, scheduler: Any):
        full = own_scheduler(scheduler)
        variance_type = full.config.variance_type
        if variance_type in LEARNED_VARIANCE_TYPES:
            use = "use with_analytic_variance, or variance_type='fixed_small' or 'fixed_large'"
            raise ValueError(f"variance_type={variance_type!r} has no table to price timesteps by; {use}.")
        if len(statistics.x0_errors) != len(full):
            covered = len(statistics.x0_errors)
            raise ValueError(f"the statistics cover {covered} timesteps, the scheduler has {len(full)}.")
        log_snr = full.schedule.log_snr.numpy()
        log_signal, log_variance = -np.logaddexp(0, -log_snr), -np.logaddexp(0, log_snr)  # log ᾱ_t, log(1-ᾱ_t)
        later = np.triu(np.ones((len(full), len(full)), dtype=bool), k=1)  # [s, t] with s < t
        with np.errstate(all="ignore"):  # the lower triangle means nothing
            log_alpha = np.where(later, log_signal[None, :] - log_signal[:, None], -1.0)
            log_beta = np.log(-np.expm1(log_alpha))
            log_posterior = log_variance[:, None] - log_variance[None, :] + log_beta  # β̃
            log_slope = 0.5 * log_signal[:, None] + log_beta - log_variance[None, :]  # coefficient of x_0 in μ̃
            log_model = log_posterior if variance_type.startswith("fixed_small") else log_beta
            log_alone = log_variance
            if variance_type == "analytic":
                unexplained = np.clip(1 - np.array(full.noise_second_moments), 0, 1)
                extra = np.exp(2 * log_beta - log_alpha - log_variance[None, :]) * unexplained
                log_model = np.log(np.exp(log_posterior) + extra)
                log_alone = log_variance - log_signal + np.log(np.maximum(unexplained, 1e-300))
                log_alone = np.where(unexplained > 0, log_alone, log_variance)
            log_ratio = log_posterior - log_model
            mean_term = np.exp(2 * log_slope - log_model) * statistics.x0_errors.numpy()
            nats = 0.5 * (np.expm1(log_ratio) - log_ratio + mean_term)
        self.pairs = np.where(later, nats / math.log(2), np.inf)  # [s, t]: the divergence of the step from t to s
        nats = 0.5 * (np.exp(log_signal) * (statistics.data_second_moment - 1) - log_variance)
        self.prior = nats / math.log(2)  # [t]: L_T of a chain that ends at t
        decoder = _decoder_costs(statistics)
        self.first = decoder(log_alone[:, None])[:, 0]  # [t]: the decoder of the chain of t alone
        self.opening = np.broadcast_to(self.first[:, None], later.shape)  # [s, t]: the decoder at s if t is next
        if variance_type.startswith("fixed_small"):
            self.opening = np.where(later, decoder(np.where(later, log_posterior, 0.0)), np.inf)

    def of_chain(self, timesteps: Sequence[int]) -> float:
        ascending = list(timesteps)[::-1]
        decoder = self.first[ascending[0]] if len(ascending) == 1 else self.opening[ascending[0], ascending[1]]
        steps = sum(self.pairs[s, t] for s, t in itertools.pairwise(ascending))
        return float(decoder + steps + self.prior[ascending[-1]])


def _decoder_costs(statistics: NoiseStatistics) -> Callable[[np.ndarray], np.ndarray]:
    """-log2 p_θ(x_0|x_t) per dimension for measured residuals, [T, n], as a function of log-variances [T, n]."""
    grid = torch.linspace(-40, 3, 1025, dtype=torch.float64)  # of log-variance
    shares, num_bins, residual = statistics.residuals, statistics.num_bins, _RESIDUAL_CENTRES[:, None]
    if isinstance(num_bins, Sequence):
        raise ValueError(f"num_bins={num_bins} differs by channel; optimal timesteps need one number for all.")
    inside = outer = log_decoder(torch.zeros_like(residual), residual, grid, num_bins)
    if num_bins is not None:
        outer = torch.special.log_ndtr((1 / (num_bins - 1) - residual) * torch.exp(-0.5 * grid))
    table = (-(shares[:, 0] @ inside + shares[:, 1] @ outer) / math.log(2)).numpy()  # [T, grid]
    return lambda wanted: np.stack([np.interp(x, grid.numpy(), y) for x, y in zip(wanted, table, strict=True)])
