"""What the noise predictor is trained to minimise (report §6), and how its timesteps are sampled: float32, per image.

Three objectives: `mean_squared_error` (L_simple), `bound_loss` (the variational bound) and `hybrid_loss` (both, for learned
variances). `per_image_loss` chooses among them by name. The scheduler comes in as an argument and computes the formulas.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..likelihood import NumBins, bound_terms
from ..scheduling_alpha_ddpm import AlphaDDPMScheduler
from .options import HYBRID_BOUND_WEIGHT, OBJECTIVES

# ---- losses -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoisedBatch:
    """Images, the noise in them, and what the network sees; images and noise are [B, C, H, W]."""

    original_samples: torch.Tensor  # x_0, in [-1, 1]
    noise: torch.Tensor
    timesteps: torch.Tensor  # [B]
    sample: torch.Tensor  # x_t
    num_bins: NumBins | None = 256  # levels of the images' values; None for a density


def mean_squared_error(scheduler: AlphaDDPMScheduler, prediction: torch.Tensor, batch: NoisedBatch) -> torch.Tensor:
    """L_simple (Ho et al. 2020, eq. 14): ‖target - prediction‖² averaged over each image's values, [B] in float32.

    `prediction` is [B, C, H, W]; the target is the noise, x_0 or v by prediction type.
    """
    target = scheduler.training_target(batch.original_samples.float(), batch.noise.float(), batch.timesteps)
    return (prediction.float() - target).square().flatten(1).mean(dim=1)


def bound_loss(scheduler: AlphaDDPMScheduler, model_output: torch.Tensor, batch: NoisedBatch) -> torch.Tensor:
    """T·L_t, [B] in bits per dimension: for uniform t its mean is the bound without the prior term (report 6.12).

    `model_output` is [B, C, H, W], or has 2C channels for a learned variance. The predicted x_0 is not clipped, since that
    would stop the gradient.
    """
    output, x_0, x_t, t = model_output.float(), batch.original_samples.float(), batch.sample.float(), batch.timesteps
    mean = scheduler.q_posterior(scheduler.predict_original_sample(output, t, x_t), x_t, t).mean
    log_variance = scheduler.p_mean_variance(output, t, x_t).log_variance
    return len(scheduler) * bound_terms(scheduler, mean, log_variance, x_0, x_t, t, batch.num_bins)


def hybrid_loss(
    scheduler: AlphaDDPMScheduler,
    model_output: torch.Tensor,
    batch: NoisedBatch,
    bound_weight: float = HYBRID_BOUND_WEIGHT,
    error_weights: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """L_simple + λ·L_vlb for learned variances (Nichol & Dhariwal 2021, eq. 16), [B] in float32.

    `model_output` is [B, 2C, H, W], prediction and variance half. The mean's gradient is stopped in the bound, so the bound
    trains the variance alone. L_vlb is estimated by T·L_t in bits per dimension: with λ = 0.001 one timestep's L_t has
    the weight T/1000. `error_weights`, [B], multiply L_simple.
    """
    prediction, raw_variance = model_output.float().chunk(2, dim=1)  # [B, 2C, H, W] -> 2 x [B, C, H, W]
    stopped = torch.cat([prediction.detach(), raw_variance], dim=1)
    error = mean_squared_error(scheduler, prediction, batch)
    return error_weights * error + bound_weight * bound_loss(scheduler, stopped, batch)


def per_image_loss(
    objective: str,
    scheduler: AlphaDDPMScheduler,
    model_output: torch.Tensor,
    batch: NoisedBatch,
    bound_weight: float = HYBRID_BOUND_WEIGHT,
    error_weights: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """The loss that `objective`, one of OBJECTIVES, names: [B] in float32. `error_weights` do not affect the bound."""
    if objective == "simple":
        return error_weights * mean_squared_error(scheduler, model_output, batch)
    if objective == "bound":
        return bound_loss(scheduler, model_output, batch)
    if objective == "hybrid":
        return hybrid_loss(scheduler, model_output, batch, bound_weight, error_weights)
    raise ValueError(f"objective={objective!r} is not one of {', '.join(OBJECTIVES)}.")


def min_snr_weights(scheduler: AlphaDDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weights of the squared error equivalent to min(SNR_t, γ) on the x_0 error (Hang et al. 2023, "Min-SNR"), [B]: the error
    in x_0 is that in the noise over SNR_t, and that in v over SNR_t + 1.
    """
    like = torch.ones(len(timesteps), 1, 1, 1, device=timesteps.device)
    snr = scheduler.log_snr(timesteps, like).flatten().exp()
    per_error = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[scheduler.config.prediction_type]
    return snr.clamp(max=gamma) / per_error


# ---- timesteps: quantiles from the run's random stream, and a sampler that turns them into timesteps ----------


def timestep_quantiles(uniform: np.ndarray, timestep_sampling: str) -> np.ndarray:
    """Quantiles of the timestep distribution, float64 [B] below 1: `uniform` itself, one per position of the batch, or, for
    "stratified", (i + u_i)/B: position i samples the i-th of B equal strata.
    """
    if timestep_sampling != "stratified":
        return uniform
    return np.minimum((np.arange(len(uniform)) + uniform) / len(uniform), np.nextafter(1.0, 0.0))


class UniformTimesteps:
    """All timesteps with equal probability; weights 1 and no state."""

    observes_losses = False

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps

    def draw(self, quantiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps int64 [B] and the weights float32 [B] that keep the mean loss unbiased, for quantiles float64 [B]."""
        timesteps = (quantiles * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)
        return timesteps, torch.ones(len(timesteps))


class ImportanceTimesteps:
    """Timesteps sampled in proportion to √E[L_t²] of the latest losses seen at each (Nichol & Dhariwal 2021, eq. 18).

    Uniform until every timestep has been seen `history_per_timestep` times; then mixed with a `uniform_share` of uniform
    sampling, so that weights are bounded. The state is a function of the losses observed, in the order of their positions
    in the global batch, and is saved with checkpoints.
    """

    observes_losses = True

    def __init__(self, num_timesteps: int, history_per_timestep: int = 10, uniform_share: float = 0.001):
        self.num_timesteps, self.uniform_share = num_timesteps, uniform_share
        self.losses = torch.zeros(num_timesteps, history_per_timestep, dtype=torch.float64)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    @property
    def warmed_up(self) -> bool:
        return bool((self.counts >= self.losses.shape[1]).all())

    def probabilities(self) -> torch.Tensor:
        """Of each timestep, float64 [T]."""
        uniform = torch.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=torch.float64)
        root_mean_square = self.losses.square().mean(dim=1).sqrt()
        if not self.warmed_up or root_mean_square.sum() == 0:
            return uniform
        return torch.lerp(root_mean_square / root_mean_square.sum(), uniform, self.uniform_share)

    def draw(self, quantiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps int64 [B] and weights 1/(T p_t) float32 [B], for quantiles float64 [B]."""
        probabilities = self.probabilities()
        timesteps = torch.searchsorted(probabilities.cumsum(0), quantiles, right=True)
        timesteps = timesteps.clamp(max=self.num_timesteps - 1)  # the sum may end a rounding below 1
        return timesteps, (1 / (self.num_timesteps * probabilities[timesteps])).float()

    def observe(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Remember unweighted losses [B] seen at timesteps [B]; each replaces the oldest at its timestep."""
        remembered, counts = self.losses.numpy(), self.counts.numpy()  # views: reading one number is ten times quicker
        for t, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):  # it may not be finite in an update that the fp16 scaler skips
                remembered[t, counts[t] % remembered.shape[1]] = loss
                counts[t] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.counts = state["losses"].double(), state["counts"].long()


def timestep_sampler(timestep_sampling: str, num_timesteps: int) -> UniformTimesteps | ImportanceTimesteps:
    """The sampler that `timestep_sampling`, one of TIMESTEP_SAMPLINGS, names."""
    return ImportanceTimesteps(num_timesteps) if timestep_sampling == "importance" else UniformTimesteps(num_timesteps)
