"""Densities and divergences against arbitrary precision and torch's own distributions."""

import itertools
import math

import mpmath
import pytest
import torch

from ddpm_pipeline.likelihood import discretized_gaussian_log_likelihood, gaussian_kl
from ddpm_pipeline.scheduling_alpha_ddpm import Moments
from gaussian_likelihood import generator


@pytest.mark.parametrize("num_bins", [2, 17, 256, 65536])
def test_bins_sum_to_one(num_bins):
    levels = torch.linspace(-1, 1, num_bins, dtype=torch.float64)
    for mean, std in itertools.product((-1.3, -1.0, -0.37, 0.0, 1 / 255, 0.9999, 2.5), (1e-4, 0.0026, 0.01, 0.3, 5.0)):
        log_variance = torch.tensor(2 * math.log(std), dtype=torch.float64)
        log_p = discretized_gaussian_log_likelihood(levels, torch.tensor(mean, dtype=torch.float64), log_variance, num_bins)
        assert abs(log_p.exp().sum() - 1) < 1e-11, (mean, std)


def test_bins_far_out_in_the_tails_keep_their_digits():
    mpmath.mp.dps = 60
    for level, mean, std in [(100, -1.0, 0.02), (3, 0.9, 0.03), (250, -0.5, 0.1), (255, -1, 0.01), (0, 1, 0.01)]:
        x = 2 * level / 255 - 1
        upper = mpmath.inf if level == 255 else (mpmath.mpf(x) + mpmath.mpf(1) / 255 - mean) / std
        lower = -mpmath.inf if level == 0 else (mpmath.mpf(x) - mpmath.mpf(1) / 255 - mean) / std
        exact = mpmath.log((mpmath.erf(upper / mpmath.sqrt(2)) - mpmath.erf(lower / mpmath.sqrt(2))) / 2)
        if lower > 0 or level == 255:
            tails = [mpmath.erfc(edge / mpmath.sqrt(2)) if edge != mpmath.inf else 0 for edge in (lower, upper)]
            exact = mpmath.log((tails[0] - tails[1]) / 2)
        elif upper < 0:
            tails = [mpmath.erfc(-edge / mpmath.sqrt(2)) if edge != -mpmath.inf else 0 for edge in (upper, lower)]
            exact = mpmath.log((tails[0] - tails[1]) / 2)
        values = torch.tensor([x, mean, 2 * math.log(std)], dtype=torch.float64)
        assert float(discretized_gaussian_log_likelihood(*values)) == pytest.approx(float(exact), rel=1e-11)


@pytest.mark.parametrize("std", [1e-4, 1e-3, 0.01, 0.3])
def test_float32_is_enough_for_16_bits(std):
    """Values and gradients, on all levels, up to five deviations from the mean."""
    x_0 = torch.linspace(-1, 1, 65536, dtype=torch.float64)
    offsets = torch.randn(65536, dtype=torch.float64, generator=generator()).clamp(-5, 5)
    mean = (x_0 + std * offsets).float()
    found = []
    for dtype in (torch.float64, torch.float32):
        given = mean.to(dtype, copy=True).requires_grad_()
        log_variance = torch.tensor(2 * math.log(std), dtype=dtype, requires_grad=True)
        log_p = discretized_gaussian_log_likelihood(x_0.to(dtype), given, log_variance, 65536)
        log_p.mean().backward()
        found.append((log_p.detach().double(), given.grad.double() * 65536 * std, log_variance.grad.double()))
    for exact, value, tolerance in zip(*found, (0.01, 0.05, 1e-3), strict=True):
        assert (exact - value).abs().max() < tolerance


def test_narrow_bins_have_the_density_times_their_width():
    x_0, mean, log_variance = torch.tensor([0.2, -0.3, 0.9]), torch.tensor(0.1), torch.tensor(-4.0)
    for bits in (8, 12, 16):
        width, std = 2 / (2**bits - 1), math.exp(-2.0)
        log_p = discretized_gaussian_log_likelihood(x_0.double(), mean.double(), log_variance.double(), 2**bits)
        density = torch.distributions.Normal(mean.double(), std).log_prob(x_0.double())
        bound = (width / std) ** 2 / 24 * (1 + ((x_0 - mean) / std).square().max())  # of the midpoint rule
        assert (log_p - density - math.log(width)).abs().max() < 1.01 * bound


def test_channels_with_numbers_of_their_own():
    x_0, mean = torch.rand(2, 2, 3, 4, 5, dtype=torch.float64, generator=generator()) * 2 - 1
    log_variance = torch.full_like(mean, -3)
    together = discretized_gaussian_log_likelihood(x_0, mean, log_variance, (17, 65536, 256))
    for channel, count in enumerate((17, 65536, 256)):
        alone = discretized_gaussian_log_likelihood(x_0[:, channel], mean[:, channel], log_variance[:, channel], count)
        assert torch.equal(together[:, channel], alone)


def test_decoder_gradients_are_finite_in_float32():
    x_0 = torch.linspace(-1, 1, 256).repeat(3, 1)
    mean = torch.tensor([[-1.2], [0.0], [1.0]]).expand_as(x_0).clone().requires_grad_()
    log_variance = torch.full_like(x_0, 2 * math.log(0.007)).requires_grad_()
    discretized_gaussian_log_likelihood(x_0, mean, log_variance).sum().backward()
    assert mean.grad.isfinite().all()
    assert log_variance.grad.isfinite().all()


def test_kl_is_that_of_torch():
    m1, m2, l1, l2 = torch.randn(4, 100, dtype=torch.float64, generator=generator())
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(m1, (0.5 * l1).exp()), torch.distributions.Normal(m2, (0.5 * l2).exp())
    )
    actual = gaussian_kl(Moments(m1, l1.exp(), l1), Moments(m2, l2.exp(), l2))
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-14)
