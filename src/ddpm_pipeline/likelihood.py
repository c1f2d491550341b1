"""How likely a model finds images: the variational bound of report §6 in bits per dimension, and what lowers it.

Two evaluations of one bound share their network calls: the report's two-term form (6.10), a Monte-Carlo estimate along
one sampled chain, and the three-term form of Ho et al. 2020 (eq. 5), whose terms are divergences between Gaussians in
closed form. Beside them stand the variance that minimises the bound without training (Bao et al. 2022,
"Analytic-DPM") and the timesteps that minimise it for a number of steps (Watson et al. 2021).

Imports torch, numpy, tqdm and the scheduler; called by objectives.py and training/evaluate.py.
"""

import math
from collections.abc import Callable, Sequence

import torch

from .scheduling_alpha_ddpm import AlphaDDPMScheduler, Moments

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
