"""Data for which the best noise predictor is known exactly, and the reverse process that follows from it.

Nothing here reads the scheduler's tables: its coefficients are seen through `q_mean_variance` and `p_mean_variance`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

NoisePredictor = Callable[[torch.Tensor, int], torch.Tensor]
PROBES = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)


def signal_and_variance(scheduler, t: int) -> tuple[float, float]:
    """√ᾱ_t and 1-ᾱ_t; 1 and 0 for clean data, t = -1."""
    if t < 0:
        return 1.0, 0.0
    moments = scheduler.q_mean_variance(PROBES[1:], t)
    return moments.mean.item(), moments.variance.item()


@dataclass(frozen=True)
class Normal:
    """Mean and variance of one pixel."""

    mean: float
    variance: float


@dataclass(frozen=True)
class GaussianData:
    """x_0 ~ N(mean, std² I)."""

    mean: float
    std: float

    def marginal(self, signal: float, variance: float) -> Normal:
        """x_t of √ᾱ_t = signal and 1-ᾱ_t = variance."""
        return Normal(signal * self.mean, (signal * self.std) ** 2 + variance)

    def noise_predictor(self, scheduler) -> NoisePredictor:
        """ε*(x_t, t) = E[z̃ | x_t] = √(1-ᾱ_t) (x_t - √ᾱ_t m)/(ᾱ_t s² + 1-ᾱ_t)."""

        def predict(x_t: torch.Tensor, t: int) -> torch.Tensor:
            signal, variance = signal_and_variance(scheduler, t)
            marginal = self.marginal(signal, variance)
            return variance**0.5 * (x_t - marginal.mean) / marginal.variance

        return predict

    def noise_second_moments(self, scheduler) -> list[float]:
        """Γ_t = E ε*² = (1-ᾱ_t)/(ᾱ_t s² + 1-ᾱ_t)."""
        total = len(scheduler)
        q = scheduler.q_mean_variance(PROBES[1:].expand(total, 1, 1, 1), torch.arange(total))
        return (q.variance / (q.mean**2 * self.std**2 + q.variance)).flatten().tolist()

    def reverse_slope_and_variance(self, scheduler, s: int, t: int) -> tuple[float, float]:
        """x_s given x_t in truth: slope √α V_s/V_t and variance (1-α) V_s/V_t, V being the marginals' variances."""
        (signal_s, variance_s), (signal_t, variance_t) = (signal_and_variance(scheduler, u) for u in (s, t))
        ratio = self.marginal(signal_s, variance_s).variance / self.marginal(signal_t, variance_t).variance
        alpha = (signal_t / signal_s) ** 2
        return alpha**0.5 * ratio, (1 - alpha) * ratio


@dataclass(frozen=True)
class MixtureData:
    """x_0 ~ Σ_k weights_k N(means_k, stds_k²), a pixel at a time."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def noise_predictor(self, scheduler) -> NoisePredictor:
        """ε* = Σ_k p(k | x_t) ε*_k: Gaussian predictors weighted by how likely each component made x_t."""
        weights, means, stds = (torch.tensor(x) for x in (self.weights, self.means, self.stds))

        def predict(x_t: torch.Tensor, t: int) -> torch.Tensor:
            signal, variance = signal_and_variance(scheduler, t)
            spread = (signal * stds) ** 2 + variance
            from_mean = x_t.unsqueeze(-1) - signal * means
            responsibility = (weights.log() - 0.5 * (spread.log() + from_mean**2 / spread)).softmax(-1)
            return variance**0.5 * (responsibility * from_mean / spread).sum(-1)

        return predict

    def quantiles(self, count: int) -> torch.Tensor:
        """At levels (i + 1/2)/count, [count], from the exact distribution function on a fine grid."""
        grid = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
        cdf = sum(w * torch.special.ndtr((grid - m) / s) for w, m, s in zip(self.weights, self.means, self.stds, strict=True))
        levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return grid[torch.searchsorted(cdf, levels).clamp(max=len(grid) - 1)]

    def wasserstein(self, samples: torch.Tensor) -> float:
        """W_1 between the samples and the mixture."""
        ordered = samples.flatten().double().sort().values
        return (ordered - self.quantiles(len(ordered))).abs().mean().item()


def affine_step(scheduler, predict: Callable, t: int) -> tuple[float, float, float]:
    """Slope, intercept and variance of p_θ(x_s | x_t), exact where `predict` is affine in x_t."""
    moments = scheduler.p_mean_variance(predict(PROBES, t), t, PROBES)
    at_zero, at_one = moments.mean.flatten().tolist()
    variance = moments.variance.flatten()
    assert torch.equal(variance, variance[:1].expand_as(variance)), "the variance depends on x_t"
    return at_one - at_zero, at_zero, variance[0].item()


def sampled_normal(scheduler, predict: Callable, start: Normal) -> tuple[Normal, float]:
    """What the chain in use makes of `start`, and the last step's variance, which is not added."""
    mean, variance = start.mean, start.variance
    for t in scheduler.timesteps.tolist():
        slope, intercept, step_variance = affine_step(scheduler, predict, t)
        mean, variance = slope * mean + intercept, slope**2 * variance
        if scheduler.previous_timestep(t) >= 0:
            variance += step_variance
    return Normal(mean, variance), step_variance


def draw(scheduler, predict: Callable, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Samples by the chain in use, from x_T = `x`."""
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(predict(x, t), t, x, generator=generator).prev_sample
    return x
