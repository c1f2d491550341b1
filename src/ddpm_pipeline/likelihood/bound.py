"""How likely a model finds images: the variational bound of report §6 in bits per dimension, and what lowers it.

Two evaluations of one bound share their network calls: the report's two-term form (6.10), a Monte-Carlo estimate along
one sampled chain, and the three-term form of Ho et al. 2020 (eq. 5), whose terms are divergences between Gaussians in
closed form. Beside them stand the variance that minimises the bound without training (Bao et al. 2022,
"Analytic-DPM") and the timesteps that minimise it for a number of steps (Watson et al. 2021).

Imports torch, numpy, tqdm, diffusers and the scheduler; called by objectives.py and training/evaluate.py.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from ..scheduling_alpha_ddpm import LEARNED_VARIANCE_TYPES, AlphaDDPMScheduler, Moments

Generators = torch.Generator | Sequence[torch.Generator] | None
NoiseSource = Callable[[int, torch.Size], torch.Tensor]

# ---- formulas, in nats, elementwise -----------------------------------------------------------------


def gaussian_kl(q: Moments, p: Moments) -> torch.Tensor:
    """KL(q ‖ p) of Gaussians with diagonal covariances, elementwise, in nats."""
    log_ratio = q.log_variance - p.log_variance
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + (q.mean - p.mean).square() * torch.exp(-p.log_variance))


def gaussian_log_density(x: torch.Tensor, moments: Moments) -> torch.Tensor:
    """log N(x; mean, variance), elementwise, in nats."""
    squared = (x - moments.mean).square() * torch.exp(-moments.log_variance)
    return -0.5 * (math.log(2 * math.pi) + moments.log_variance + squared)


def discretized_gaussian_log_likelihood(
    x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor, num_bins: int = 256
) -> torch.Tensor:
    """log of the probability of each value's bin under N(mean, variance), elementwise, in nats (Ho et al. 2020, eq. 13).

    `x_0` lies on the `num_bins` levels -1..1; bins reach half a level to either side, the outer two to infinity.
    Φ(b) - Φ(a) is taken in the lower tail, by symmetry, and in logarithms, so that it keeps its digits however far out.
    """
    half_bin = 1 / (num_bins - 1)
    inverse_std = torch.exp(-0.5 * log_variance)
    centred = x_0 - mean
    upper, lower = (centred + half_bin) * inverse_std, (centred - half_bin) * inverse_std
    in_upper_tail = centred > 0
    high = torch.special.log_ndtr(torch.where(in_upper_tail, -lower, upper))
    low = torch.special.log_ndtr(torch.where(in_upper_tail, -upper, lower))
    below_zero = (low - high).clamp(max=-torch.finfo(x_0.dtype).tiny)  # a bin of no width would have gradient NaN
    inside = high + torch.log(-torch.expm1(below_zero))
    last_level = 1 - half_bin  # anything above is the last level, whatever its rounding
    outside = torch.where(x_0 > last_level, torch.special.log_ndtr(-lower), torch.special.log_ndtr(upper))
    return torch.where(x_0.abs() > last_level, outside, inside)


def nats_to_bits_per_dim(nats: torch.Tensor) -> torch.Tensor:
    """Nats of every value, [B, C, H, W], to bits per dimension of every image, [B]."""
    return nats.flatten(1).mean(dim=1) / math.log(2)


def bound_terms(
    scheduler: AlphaDDPMScheduler,
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    original_samples: torch.Tensor,
    sample: torch.Tensor,
    timesteps: int | torch.Tensor,
    num_bins: int | None = 256,
) -> torch.Tensor:
    """The bound's term of each image's timestep in the three-term form, [B] in bits per dimension.

    KL(q(x_s|x_t,x_0) ‖ p_θ(x_s|x_t)), and -log p_θ(x_0|x_t) where s is clean data. `mean` and `log_variance` are those of
    p_θ, x_0 and x_t are [B, C, H, W], `timesteps` an int or [B].
    """
    posterior = scheduler.q_posterior(original_samples, sample, timesteps)
    at_data = torch.isinf(posterior.log_variance)  # the posterior is the point x_0 there
    finite = Moments(posterior.mean, posterior.variance, posterior.log_variance.masked_fill(at_data, 0.0))
    model = Moments(mean, log_variance, log_variance)
    if at_data.device.type == "cpu" and not at_data.any():  # asking a device would wait for it
        return nats_to_bits_per_dim(gaussian_kl(finite, model))
    decoder = -log_decoder(original_samples, mean, log_variance, num_bins)
    return nats_to_bits_per_dim(torch.where(at_data, decoder, gaussian_kl(finite, model)))


def log_decoder(
    x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor, num_bins: int | None
) -> torch.Tensor:
    """log p_θ(x_0|x_1), elementwise in nats: of x_0's bin, or the density where `num_bins` is None."""
    if num_bins is None:
        return gaussian_log_density(x_0, Moments(mean, log_variance, log_variance))
    return discretized_gaussian_log_likelihood(x_0, mean, log_variance, num_bins)


# ---- the bound of a model on images -------------------------------------------------------------------


@dataclass(frozen=True)
class BitsPerDim:
    """Upper bounds on -log2 p_θ(x_0) / d of B images: every field in bits per dimension, float64 on the CPU.

    total = prior + diffusion + decoder. `terms` [B, n] are the terms of the timesteps [B, n] that were evaluated, ascending;
    column 0 is the decoder, and `diffusion` their sum over the others, where all were evaluated. `standard_error` is what
    evaluating a subset adds to the uncertainty of `total`: 0 for all of them. `two_term` is the estimate of the same
    total in the report's form, (6.10), or None where it was not asked for.
    """

    total: torch.Tensor  # [B]
    prior: torch.Tensor  # [B]
    diffusion: torch.Tensor  # [B]
    decoder: torch.Tensor  # [B]
    standard_error: torch.Tensor  # [B]
    timesteps: torch.Tensor  # [B, n] int64
    terms: torch.Tensor  # [B, n]
    two_term: torch.Tensor | None = None  # [B]


def bits_per_dim(
    unet: Callable,
    scheduler: Any,
    images: torch.Tensor,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    num_evaluated: int | None = None,
    two_term: bool = False,
    num_bins: int | None = 256,
    batch_size: int = 64,
    generator: Generators = None,
    noise: NoiseSource | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> BitsPerDim:
    """The variational bound on the negative log-likelihood of each image.

    Args:
        unet: called as `unet(x_t, t, **model_kwargs)`, giving [B, C, H, W] or, with a learned variance, 2C channels.
        scheduler: ours or diffusers' own; its config says what is predicted, the variance and the clipping.
        images: [B, C, H, W] in [-1, 1], on the `num_bins` levels.
        num_inference_steps, timesteps: the chain, as for `AlphaDDPMScheduler.set_timesteps`; all T timesteps by default.
        num_evaluated: network calls an image, at least 3, for an estimate from timesteps that each image draws for itself
            in strata of equal fall of log-SNR; all of the chain by default.
        two_term: estimate the report's two-term form too, from the same network calls. Noise is then drawn along one
            chain x_0 -> x_1 -> ... -> x_T; else independently for every timestep, which gives the smaller variance.
        num_bins: levels of a value, 256 for 8-bit images; None for the density of continuous values.
        batch_size: images in a network call.
        generator: one for all images, or a list of one an image, whose result then does not depend on the others.
        noise: in place of `generator`: called with a timestep and a shape [b, C, H, W], gives the noise.
        model_kwargs: conditions; tensors with a first dimension of B are cut up along with the images.
        progress: show a progress bar.

    Raises:
        ValueError: for images off the levels, and arguments outside these ranges.
    """
    chain = _chain_scheduler(scheduler, num_inference_steps, timesteps)
    ascending = chain.timesteps.flip(0).cpu()
    _check_images(images, num_bins, generator)
    if num_evaluated is not None and num_evaluated < len(ascending):
        if two_term:
            raise ValueError("two_term=True follows whole chains; leave out num_evaluated.")
        if num_evaluated < 3 or noise is not None:
            raise ValueError(f"num_evaluated={num_evaluated} must be at least 3, and takes a generator, not `noise`.")
        strata = _strata(chain, ascending, num_evaluated)
    else:
        strata = None
    parts = []
    calls = len(ascending) if strata is None else num_evaluated
    num_batches = -(-len(images) // batch_size)
    with _Network(unet) as network, tqdm(total=num_batches * calls, disable=not progress, desc="bits/dim") as bar:
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            x_0 = network.prepare(_on_levels(images[rows], num_bins))
            draw = noise or _noise_of(generator, rows)
            options = _rows_of(model_kwargs, rows, len(images), network.device)
            if strata is None:
                parts.append(_whole_chain(network, chain, ascending, x_0, options, draw, two_term, num_bins, bar))
            else:
                keys = _uniform(generator, rows, len(x_0), len(ascending))
                parts.append(_subset(network, chain, ascending, strata, keys, x_0, options, draw, num_bins, bar))
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    return BitsPerDim(**{name: torch.cat([getattr(part, name) for part in parts]).cpu() for name in names})


def _whole_chain(
    network: "_Network",
    chain: AlphaDDPMScheduler,
    ascending: torch.Tensor,
    x_0: torch.Tensor,
    options: dict[str, Any],
    draw: NoiseSource,
    two_term: bool,
    num_bins: int | None,
    bar: tqdm,
) -> BitsPerDim:
    terms, log_ratios = [], []
    x_s = x_0
    for t in ascending.tolist():
        z = draw(t, x_0.shape).to(x_0)
        x_t = chain.forward_step(x_s, t, z) if two_term else chain.add_noise(x_0, z, t)
        p = chain.p_mean_variance(network(x_t, t, chain, options), t, x_t)
        terms.append(bound_terms(chain, p.mean, p.log_variance, x_0, x_t, t, num_bins))
        if two_term:  # report 6.10: log p_θ(x_s|x_t) - log q(x_t|x_s)
            at_data = t == ascending[0]
            log_p = log_decoder(x_0, p.mean, p.log_variance, num_bins) if at_data else gaussian_log_density(x_s, p)
            log_q = gaussian_log_density(x_t, chain.forward_mean_variance(x_s, t))
            log_ratios.append(nats_to_bits_per_dim(log_p - log_q))
            x_s = x_t
        bar.update()
    terms = torch.stack(terms, dim=1)  # n x [B] -> [B, n]
    prior, decoder, diffusion = _prior(chain, x_0), terms[:, 0], terms[:, 1:].sum(dim=1)
    estimate = None
    if two_term:
        zero = torch.zeros_like(x_0)
        log_prior = nats_to_bits_per_dim(gaussian_log_density(x_s, Moments(zero, zero + 1, zero)))
        estimate = -(log_prior + torch.stack(log_ratios).sum(dim=0))
    return BitsPerDim(
        total=prior + diffusion + decoder,
        prior=prior,
        diffusion=diffusion,
        decoder=decoder,
        standard_error=torch.zeros_like(prior),
        timesteps=ascending.expand(len(x_0), -1),
        terms=terms,
        two_term=estimate,
    )


def _subset(
    network: "_Network",
    chain: AlphaDDPMScheduler,
    ascending: torch.Tensor,
    strata: list[tuple[int, int, int]],
    keys: torch.Tensor,
    x_0: torch.Tensor,
    options: dict[str, Any],
    draw: NoiseSource,
    num_bins: int | None,
    bar: tqdm,
) -> BitsPerDim:
    """Stratified sampling without replacement: Σ_h N_h·mean_h, with variance Σ_h N_h² (1 - n_h/N_h) s_h²/n_h."""
    drawn = [torch.zeros(len(x_0), 1, dtype=torch.long)]  # the decoder always
    for start, stop, count in strata:
        drawn.append(start + keys[:, start:stop].argsort(dim=1)[:, :count].sort(dim=1).values)
    timesteps = ascending[torch.cat(drawn, dim=1)]  # [B, n]
    terms = []
    for t in timesteps.unbind(dim=1):
        x_t = chain.add_noise(x_0, draw(-1, x_0.shape).to(x_0), t)
        p = chain.p_mean_variance(network(x_t, t, chain, options), t, x_t)
        terms.append(bound_terms(chain, p.mean, p.log_variance, x_0, x_t, t, num_bins))
        bar.update()
    terms = torch.stack(terms, dim=1)  # n x [B] -> [B, n]
    prior, decoder = _prior(chain, x_0), terms[:, 0]
    diffusion, variance = torch.zeros_like(prior), torch.zeros_like(prior)
    columns = terms[:, 1:].split([count for _, _, count in strata], dim=1)
    for (start, stop, count), values in zip(strata, columns, strict=True):
        size = stop - start
        diffusion += size * values.mean(dim=1)
        if size > count:
            variance += size**2 * (1 - count / size) * values.var(dim=1) / count
    return BitsPerDim(
        total=prior + diffusion + decoder,
        prior=prior,
        diffusion=diffusion,
        decoder=decoder,
        standard_error=variance.sqrt(),
        timesteps=timesteps,
        terms=terms,
    )


def _prior(chain: AlphaDDPMScheduler, x_0: torch.Tensor) -> torch.Tensor:
    """L_T = KL(q(x_T|x_0) ‖ N(0, I)), [B] in bits per dimension."""
    last = int(chain.timesteps[0])
    zero = torch.zeros((1,) * x_0.ndim, dtype=x_0.dtype, device=x_0.device)
    return nats_to_bits_per_dim(gaussian_kl(chain.q_mean_variance(x_0, last), Moments(zero, zero + 1, zero)))


def _strata(chain: AlphaDDPMScheduler, ascending: torch.Tensor, num_evaluated: int) -> list[tuple[int, int, int]]:
    """(start, stop, timesteps to draw) of strata of the chain's positions 1..N-1, of equal fall of log-SNR.

    The terms fall steeply with the timestep, about as the log-SNR does, so strata are short where terms are large. Each
    has at least two draws, for its variance.
    """
    like = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    log_snr = np.array([float(chain.log_snr(t, like)) for t in ascending.tolist()])
    fall = np.cumsum(-np.diff(np.maximum(log_snr, -50)))  # of positions 1..N-1
    positions, draws = len(ascending), num_evaluated - 1
    count = max(1, draws // 2)
    strata, start = [], 1
    for index in range(count):
        later = count - index - 1
        stop = positions if later == 0 else 1 + int(np.searchsorted(fall, fall[-1] * (index + 1) / count, side="right"))
        stop = min(max(stop, start + 2), positions - 2 * later)
        strata.append((start, stop, 2))
        start = stop
    if draws % 2:  # the odd one goes to the longest
        longest = max(range(count), key=lambda index: strata[index][1] - strata[index][0])
        start, stop, _ = strata[longest]
        strata[longest] = (start, stop, min(3, stop - start))
    return strata


# ---- the training-free optimum: variance and timesteps ------------------------------------------------


@dataclass(frozen=True)
class NoiseStatistics:
    """What a model's noise predictor does on data, for every timestep: all that optimal variances and timesteps need.

    Means are over images and their values; their standard errors are over the `num_images` images, as independent.
    `noise_errors` is of the noise implied by the predicted x_0, clipped as the scheduler says. `residuals` are shares of
    values by |x_0 - predicted x_0|, over RESIDUAL_EDGES, apart for values inside and on the outer two of `num_bins` levels.
    """

    num_images: int
    num_bins: int | None
    noise_second_moments: torch.Tensor  # Γ_t = E‖ε_θ(x_t, t)‖²/d, [T]
    noise_second_moments_error: torch.Tensor  # [T]
    noise_errors: torch.Tensor  # E‖z̃ - ε_θ(x_t, t)‖²/d, [T]
    noise_errors_error: torch.Tensor  # [T]
    x0_errors: torch.Tensor  # E‖x_0 - predicted x_0‖²/d, [T]
    data_second_moment: float  # E‖x_0‖²/d
    residuals: torch.Tensor  # [T, 2, bins]: inside, outer


RESIDUAL_EDGES = torch.logspace(-5, 1, 513, dtype=torch.float64)
_RESIDUAL_CENTRES = (RESIDUAL_EDGES[:-1] * RESIDUAL_EDGES[1:]).sqrt()


def estimate_analytic_variance(
    unet: Callable,
    scheduler: Any,
    images: torch.Tensor,
    *,
    num_bins: int | None = 256,
    batch_size: int = 64,
    generator: Generators = None,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> NoiseStatistics:
    """Measure Γ_t and what `optimal_timesteps` needs: one network call an image and timestep, arguments as in `bits_per_dim`.

    `with_analytic_variance` makes of it a scheduler, for every sub-sequence of timesteps.
    """
    full = _chain_scheduler(scheduler, None, None)
    _check_images(images, num_bins, generator)
    total, count = len(full), len(images)
    sums = torch.zeros(4, total, dtype=torch.float64)  # of ‖ε‖²/d, its square, ‖z̃ - ε‖²/d, its square
    x0_sums = torch.zeros(total, dtype=torch.float64)
    residuals = torch.zeros(total, 2, len(_RESIDUAL_CENTRES), dtype=torch.float64)
    data_sum = 0.0
    num_batches = -(-count // batch_size)
    with _Network(unet) as network, tqdm(total=num_batches * total, disable=not progress, desc="noise") as bar:
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            x_0 = network.prepare(_on_levels(images[rows], num_bins))
            options = _rows_of(model_kwargs, rows, count, network.device)
            draw = _noise_of(generator, rows)
            data_sum += float(x_0.square().flatten(1).mean(dim=1).sum())
            outer = x_0.abs() > 1 - 1 / (num_bins - 1) if num_bins else torch.zeros_like(x_0, dtype=torch.bool)
            for t in range(total):
                z = draw(t, x_0.shape).to(x_0)
                x_t = full.add_noise(x_0, z, t)
                output = network(x_t, t, full, options)
                clipped = full.p_mean_variance(output, t, x_t).pred_original_sample
                squares = _implied_noise(full, full.predict_original_sample(output, t, x_t), x_t, t).square()
                errors = (z - _implied_noise(full, clipped, x_t, t)).square()
                for row, values in enumerate((squares, errors)):
                    of_images = values.flatten(1).mean(dim=1).double().cpu()
                    sums[2 * row, t] += of_images.sum()
                    sums[2 * row + 1, t] += of_images.square().sum()
                x0_sums[t] += float((x_0 - clipped).square().flatten(1).mean(dim=1).sum())
                residuals[t] += _residual_histogram(x_0 - clipped, outer)
                bar.update()
    mean, mean_square = sums[0::2] / count, sums[1::2] / count
    error = ((mean_square - mean.square()).clamp(min=0) / max(count - 1, 1)).sqrt()
    return NoiseStatistics(
        num_images=count,
        num_bins=num_bins,
        noise_second_moments=mean[0],
        noise_second_moments_error=error[0],
        noise_errors=mean[1],
        noise_errors_error=error[1],
        x0_errors=x0_sums / count,
        data_second_moment=data_sum / count,
        residuals=residuals / (count * images[0].numel()),
    )


def _implied_noise(scheduler: AlphaDDPMScheduler, x_0: torch.Tensor, x_t: torch.Tensor, timestep: int) -> torch.Tensor:
    """The noise that leads from x_0 to x_t: (x_t - √ᾱ_t x_0)/√(1-ᾱ_t)."""
    q = scheduler.q_mean_variance(x_0, timestep)
    return (x_t - q.mean) / q.variance.sqrt()


def _residual_histogram(residual: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """Counts of |residual| over RESIDUAL_EDGES, [2, bins]: of values inside, and on the outer levels."""
    bins = len(_RESIDUAL_CENTRES)
    low, high = math.log(RESIDUAL_EDGES[0]), math.log(RESIDUAL_EDGES[-1])
    smallest = float(RESIDUAL_EDGES[0])
    index = ((residual.abs().clamp(min=smallest).log() - low) * (bins / (high - low))).long().clamp(max=bins - 1)
    return torch.bincount((index + bins * outer).flatten(), minlength=2 * bins).view(2, bins).double().cpu()


def with_analytic_variance(
    scheduler: Any, statistics: NoiseStatistics, *, from_errors: bool = False
) -> AlphaDDPMScheduler:
    """A scheduler like the given one with variance_type="analytic" (Bao et al. 2022), its table in the config.

    The table is Γ_t, from which the variance is optimal for a perfect noise predictor. `from_errors` puts 1 - E‖z̃ - ε_θ‖²/d
    in its place, which for a perfect predictor is the same, and gives any other the variance that minimises its own
    bound.
    """
    table = statistics.noise_second_moments
    if from_errors:
        table = (1 - statistics.noise_errors).clamp(min=0)
    return AlphaDDPMScheduler.from_config(
        _config_of(scheduler), variance_type="analytic", noise_second_moments=table.tolist()
    )


def optimal_timesteps(
    statistics: NoiseStatistics, scheduler: Any, num_steps: int | Sequence[int]
) -> dict[str, list[int]]:
    """For each number of steps the timesteps with the lowest bound, descending, by dynamic programming.

    The bound of a chain is a sum over neighbouring pairs, so the best chain of k steps that ends at t is the best one of
    k - 1 that ends at some s < t, and the step from s to t (Watson et al. 2021). Pairs are priced by `statistics`, for
    the scheduler's variance_type. The result is what the config key `inference_timesteps` takes, by str(number):

        AlphaDDPMScheduler.from_config(scheduler.config, inference_timesteps=optimal_timesteps(...))

    Raises ValueError for numbers outside 1..T and for learned variances, which no table can price.
    """
    costs = _PairCosts(statistics, scheduler)
    numbers = [num_steps] if isinstance(num_steps, int) else list(num_steps)
    total = len(costs.prior)
    if wrong := [number for number in numbers if not 1 <= number <= total]:
        raise ValueError(f"num_steps={wrong[0]} must be an integer from 1 to {total}.")
    best = costs.first  # [T]: the lowest cost of a chain of `steps` steps that ends at t
    origins: list[np.ndarray] = []  # for each further step, the s that it is reached from
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
    """The bound's terms for every pair s < t in bits per dimension, float64; infinite where s >= t.

    `pairs` [s, t]: the divergence of the step from t to s; `prior` [t]: L_T of a chain that ends at t; `first` [t]: the
    decoder of the chain of t alone; `opening` [s, t]: the decoder at s where t is next, whose variance may depend on both.
    """

    def __init__(self, statistics: NoiseStatistics, scheduler: Any):
        full = _chain_scheduler(scheduler, None, None)
        variance_type = full.config.variance_type
        if variance_type in LEARNED_VARIANCE_TYPES:
            raise ValueError(
                f"variance_type={variance_type!r}: timesteps are priced for variances that are a table; use "
                "with_analytic_variance, or variance_type='fixed_small' or 'fixed_large'."
            )
        if len(statistics.x0_errors) != len(full):
            raise ValueError(
                f"the statistics are of {len(statistics.x0_errors)} timesteps, the scheduler has {len(full)}."
            )
        like = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        log_snr = np.array([float(full.log_snr(t, like)) for t in range(len(full))])
        log_signal, log_variance = -np.logaddexp(0, -log_snr), -np.logaddexp(0, log_snr)  # log ᾱ_t, log(1-ᾱ_t)
        later = np.triu(np.ones((len(full), len(full)), dtype=bool), k=1)  # [s, t] with s < t
        with np.errstate(all="ignore"):  # the lower triangle means nothing
            log_alpha = np.where(later, log_signal[None, :] - log_signal[:, None], -1.0)
            log_beta = np.log(-np.expm1(log_alpha))
            log_posterior = log_variance[:, None] - log_variance[None, :] + log_beta  # β̃
            log_slope = 0.5 * log_signal[:, None] + log_beta - log_variance[None, :]  # coefficient of x_0 in μ̃
            if variance_type == "analytic":
                unexplained = np.clip(1 - np.array(full.noise_second_moments), 0, 1)
                extra = np.exp(2 * log_beta - log_alpha - log_variance[None, :]) * unexplained
                log_model = np.log(np.exp(log_posterior) + extra)
            else:
                log_model = log_posterior if variance_type.startswith("fixed_small") else log_beta
            log_ratio = log_posterior - log_model
            mean_term = np.exp(2 * log_slope - log_model) * statistics.x0_errors.numpy()
            nats = 0.5 * (np.expm1(log_ratio) - log_ratio + mean_term)
        self.pairs = np.where(later, nats / math.log(2), np.inf)
        signal = np.exp(log_signal)
        self.prior = 0.5 * (signal * (statistics.data_second_moment - 1) - log_variance) / math.log(2)

        decoder = _DecoderCosts(statistics)
        log_alone = log_variance
        if variance_type == "analytic":
            log_alone = log_variance - log_signal + np.log(np.maximum(unexplained, 1e-300))
            log_alone = np.where(unexplained > 0, log_alone, log_variance)
        self.first = decoder(log_alone[:, None])[:, 0]
        if variance_type.startswith("fixed_small"):
            self.opening = np.where(later, decoder(np.where(later, log_posterior, 0.0)), np.inf)
        else:
            self.opening = np.broadcast_to(self.first[:, None], later.shape)

    def of_chain(self, timesteps: Sequence[int]) -> float:
        """The bound of the chain of these descending timesteps."""
        ascending = list(timesteps)[::-1]
        first, last = ascending[0], ascending[-1]
        decoder = self.first[first] if len(ascending) == 1 else self.opening[first, ascending[1]]
        return float(decoder + sum(self.pairs[s, t] for s, t in itertools.pairwise(ascending)) + self.prior[last])


class _DecoderCosts:
    """-log2 p_θ(x_0|x_t) a dimension for measured residuals, [T, n], as a function of log-variances [T, n]."""

    def __init__(self, statistics: NoiseStatistics):
        self.grid = torch.linspace(-40, 3, 1025, dtype=torch.float64)  # of log-variance
        shares = statistics.residuals
        residual, log_variance = _RESIDUAL_CENTRES[:, None], self.grid[None, :]
        if statistics.num_bins is None:
            inside = outer = log_decoder(residual, torch.zeros_like(residual), log_variance, None)
        else:
            half_bin = 1 / (statistics.num_bins - 1)
            zero = torch.zeros_like(residual)
            inside = discretized_gaussian_log_likelihood(zero, residual, log_variance, statistics.num_bins)
            outer = torch.special.log_ndtr((half_bin - residual) * torch.exp(-0.5 * log_variance))
        self.table = (-(shares[:, 0] @ inside + shares[:, 1] @ outer) / math.log(2)).numpy()  # [T, grid]

    def __call__(self, log_variance: np.ndarray) -> np.ndarray:
        grid = self.grid.numpy()
        rows = zip(log_variance, self.table, strict=True)
        return np.stack([np.interp(wanted, grid, row) for wanted, row in rows])


# ---- parts ----------------------------------------------------------------------------------------------


class _Network:
    """The noise predictor, in evaluation mode within the `with` block, in its own precision on its own device."""

    def __init__(self, unet: Callable):
        self.unet = unet
        self.module = unet if isinstance(unet, torch.nn.Module) else None
        parameter = next(self.module.parameters(), None) if self.module is not None else None
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.dtype = None if parameter is None else parameter.dtype

    def __enter__(self) -> "_Network":
        self.was_training = self.module is not None and self.module.training
        if self.was_training:
            self.module.eval()
        self.no_grad = contextlib.ExitStack()
        self.no_grad.enter_context(torch.no_grad())
        return self

    def __exit__(self, *error: Any) -> None:
        self.no_grad.close()
        if self.was_training:
            self.module.train()

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Images on the network's device, in float64 where it has that."""
        return images.to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)

    def __call__(
        self, x_t: torch.Tensor, timesteps: int | torch.Tensor, scheduler: AlphaDDPMScheduler, options: dict[str, Any]
    ) -> torch.Tensor:
        """The prediction, with the variance half where the scheduler uses one, in the dtype of x_t."""
        t = torch.as_tensor(timesteps, device=self.device)
        output = self.unet(x_t if self.dtype is None else x_t.to(self.dtype), t, **options)
        output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        learned = scheduler.config.variance_type in LEARNED_VARIANCE_TYPES
        if output.shape[1] == 2 * x_t.shape[1] and not learned:
            output = output.chunk(2, dim=1)[0]  # [B, 2C, H, W] -> [B, C, H, W]
        return output.to(x_t.dtype)


def _config_of(scheduler: Any) -> dict[str, Any]:
    """The config, without a variance type that another kind of sampler may hold as None."""
    config = dict(scheduler.config)
    if config.get("variance_type", "") is None:
        del config["variance_type"]
    return config


def _chain_scheduler(
    scheduler: Any, num_inference_steps: int | None, timesteps: Sequence[int] | None
) -> AlphaDDPMScheduler:
    """A scheduler of ours of the same config with the chain in use; the given one stays as it is."""
    chain = AlphaDDPMScheduler.from_config(_config_of(scheduler))
    if num_inference_steps is not None or timesteps is not None:
        chain.set_timesteps(num_inference_steps, timesteps=timesteps)
    return chain


def _check_images(images: torch.Tensor, num_bins: int | None, generator: Generators) -> None:
    if images.ndim != 4 or not len(images) or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; give floating-point [B, C, H, W] in [-1, 1]."
        )
    if num_bins is not None and num_bins < 2:
        raise ValueError(f"num_bins={num_bins} must be at least 2, or None for continuous values.")
    if isinstance(generator, Sequence) and len(generator) != len(images):
        raise ValueError(f"{len(generator)} generators for {len(images)} images; give one, or a list of one an image.")


def _on_levels(images: torch.Tensor, num_bins: int | None) -> torch.Tensor:
    """Images in float64, exactly on the levels -1..1 that they are near. Raises ValueError where one is not near."""
    images = images.double()
    if num_bins is None:
        return images
    levels = ((images + 1) * ((num_bins - 1) / 2)).round()
    exact = levels * (2 / (num_bins - 1)) - 1
    off = (images - exact).abs().max().item() * (num_bins - 1) / 2
    if not off < 0.01 or levels.min() < 0 or levels.max() > num_bins - 1:  # NaN fails
        raise ValueError(
            f"images are up to {off:.2g} of a level off the {num_bins} levels of [-1, 1], or outside: {images.min():.4g} to "
            f"{images.max():.4g}. Give uint8 / 127.5 - 1 for num_bins=256, the right num_bins, or None for a density."
        )
    return exact


def _rows_of(options: Mapping[str, Any] | None, rows: slice, count: int, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of one batch: tensors of one row an image are cut."""
    cut = {}
    for name, value in (options or {}).items():
        if isinstance(value, torch.Tensor):
            value = (value[rows] if value.ndim and len(value) == count else value).to(device)
        cut[name] = value
    return cut


def _noise_of(generator: Generators, rows: slice) -> NoiseSource:
    """Noise from the generator, or from those of the images in `rows`; drawn in float32 whatever is computed in."""
    mine = list(generator[rows]) if isinstance(generator, Sequence) else generator
    first = mine[0] if isinstance(mine, list) else mine
    device = torch.device("cpu") if first is None else first.device
    return lambda timestep, shape: randn_tensor(shape, generator=mine, device=device, dtype=torch.float32)


def _uniform(generator: Generators, rows: slice, count: int, length: int) -> torch.Tensor:
    """Numbers in [0, 1), [count, length], each row from its image's own generator where there are such."""
    if isinstance(generator, Sequence):
        return torch.stack([torch.rand(length, generator=each, device=each.device).cpu() for each in generator[rows]])
    device = generator.device if generator is not None else None
    return torch.rand(count, length, generator=generator, device=device).cpu()
