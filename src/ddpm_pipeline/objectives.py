"""What the noise predictor is trained to minimise (report §6): per-image losses and their weights, in float32.

Imports torch only; the scheduler comes in as an argument and computes the formulas. Called by training/train.py.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .scheduling_alpha_ddpm import AlphaDDPMScheduler


def mean_squared_error(
    scheduler: "AlphaDDPMScheduler",
    prediction: torch.Tensor,
    original_samples: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """L_simple (Ho et al. 2020, eq. 14): ‖target - prediction‖² averaged over each image's values, [B] in float32.

    `prediction`, x_0 and noise are [B, C, H, W], `timesteps` [B]; the target is the noise, x_0 or v by prediction type.
    """
    target = scheduler.training_target(original_samples.float(), noise.float(), timesteps)
    return (prediction.float() - target).square().flatten(1).mean(dim=1)


def min_snr_weights(scheduler: "AlphaDDPMScheduler", timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weights of the squared error that amount to min(SNR_t, γ) on the x_0 error (Hang et al. 2023, "Min-SNR"), [B].

    The error in x_0 is that in the noise over SNR_t, and that in v over SNR_t + 1.
    """
    like = torch.ones(len(timesteps), 1, 1, 1, device=timesteps.device)
    snr = scheduler.log_snr(timesteps, like).flatten().exp()
    clipped = snr.clamp(max=gamma)
    if scheduler.config.prediction_type == "epsilon":
        return clipped / snr
    if scheduler.config.prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return clipped
