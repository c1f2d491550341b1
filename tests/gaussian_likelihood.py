"""Gaussian data, their exact noise predictor, and a short chain to evaluate the bound on."""

import itertools
import math

import numpy as np
import torch

MEAN, VARIANCE = 0.3, 0.25  # of Gaussian data
SHORT = {"num_train_timesteps": 12, "beta_start": 0.02, "beta_end": 0.6}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def signal(scheduler, t) -> torch.Tensor:
    """ᾱ_t in float64, to go with images."""
    betas = torch.tensor(scheduler.config.trained_betas or _betas(scheduler), dtype=torch.float64)
    return torch.exp(torch.log1p(-betas).cumsum(0))[t].view(-1, 1, 1, 1)


def _betas(scheduler) -> list[float]:
    config = scheduler.config
    return np.linspace(config.beta_start, config.beta_end, config.num_train_timesteps).tolist()


def exact_noise(scheduler, prediction_type="epsilon"):
    """ε*(x_t, t) for N(MEAN, VARIANCE) data, or the x_0 or v that belongs to it."""

    def predict(x_t, t):
        a = signal(scheduler, t).to(x_t)
        noise = (1 - a).sqrt() * (x_t - a.sqrt() * MEAN) / (a * VARIANCE + 1 - a)
        x_0 = (x_t - (1 - a).sqrt() * noise) / a.sqrt()
        return {"epsilon": noise, "sample": x_0, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x_0}[prediction_type]

    return predict


def quadrature() -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 and noise at ± one deviation, all four pairs: exact for every quadratic's Gaussian mean."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    shape = (4, 1, 1, 1)
    return MEAN + math.sqrt(VARIANCE) * signs[:, 0].view(shape), signs[:, 1].view(shape)
