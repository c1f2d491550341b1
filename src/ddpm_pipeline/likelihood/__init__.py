"""How likely a model finds images: the variational bound of report §6 in bits per dimension, and what lowers it."""

from .bound import BitsPerDim, bits_per_dim, bound_terms
from .densities import (
    NumBins,
    discretized_gaussian_log_likelihood,
    gaussian_kl,
    gaussian_log_density,
    log_decoder,
    nats_to_bits_per_dim,
)
from .optimum import (
    RESIDUAL_EDGES,
    NoiseStatistics,
    estimate_analytic_variance,
    optimal_timesteps,
    predicted_bits_per_dim,
    with_analytic_variance,
)

__all__ = [
    "RESIDUAL_EDGES", "BitsPerDim", "NoiseStatistics", "NumBins", "bits_per_dim", "bound_terms",
    "discretized_gaussian_log_likelihood", "estimate_analytic_variance", "gaussian_kl", "gaussian_log_density",
    "log_decoder", "nats_to_bits_per_dim", "optimal_timesteps", "predicted_bits_per_dim", "with_analytic_variance",
]  # fmt: skip
