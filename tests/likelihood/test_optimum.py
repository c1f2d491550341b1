"""Optimal variances and timesteps against closed forms, brute force, and the bound that is then measured."""

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_pipeline import AlphaDDPMScheduler
from ddpm_pipeline.likelihood import (
    bits_per_dim,
    estimate_analytic_variance,
    optimal_timesteps,
    predicted_bits_per_dim,
    with_analytic_variance,
)
from ddpm_pipeline.likelihood.optimum import _PairCosts
from gaussian_likelihood import MEAN, SHORT, VARIANCE, exact_noise, generator, quadrature, signal


@pytest.mark.parametrize("steps", [1000, 10, 3])
def test_the_analytic_variance_is_the_optimum_on_gaussian_data(steps):
    full = AlphaDDPMScheduler(clip_sample=False)
    t = torch.arange(1000)
    a = signal(full, t).flatten()
    moments = (1 - a) / (a * VARIANCE + 1 - a)
    x_0, z = quadrature()
    totals = {}
    for variance_type in ("fixed_small", "fixed_large", "analytic"):
        own = {"noise_second_moments": moments.tolist()} if variance_type == "analytic" else {}
        scheduler = AlphaDDPMScheduler(clip_sample=False, variance_type=variance_type, **own)
        options = {"num_inference_steps": steps, "num_bins": None, "noise": lambda t, shape: z, "progress": False}
        totals[variance_type] = float(bits_per_dim(exact_noise(full), scheduler, x_0, **options).total.mean())
    assert totals["analytic"] < min(totals["fixed_small"], totals["fixed_large"])
    assert totals["analytic"] > 0.5 * math.log2(2 * math.pi * math.e * VARIANCE)


def gaussian_statistics(scheduler, count=4000):
    x_0 = MEAN + math.sqrt(VARIANCE) * torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=generator())
    return x_0, estimate_analytic_variance(
        exact_noise(scheduler), scheduler, x_0, num_bins=None, batch_size=count, generator=generator(1), progress=False
    )


def test_noise_moments_are_measured_with_their_error():
    scheduler = AlphaDDPMScheduler(clip_sample=False, **SHORT)
    _, statistics = gaussian_statistics(scheduler)
    a = signal(scheduler, torch.arange(12)).flatten()
    exact = (1 - a) / (a * VARIANCE + 1 - a)
    assert statistics.num_images == 4000
    assert ((statistics.noise_second_moments - exact).abs() < 4.5 * statistics.noise_second_moments_error).all()
    assert ((statistics.noise_errors - (1 - exact)).abs() < 4.5 * statistics.noise_errors_error).all()
    assert (statistics.noise_second_moments_error < 0.05).all()
    assert torch.allclose(statistics.residuals.sum(dim=(1, 2)), torch.ones(12, dtype=torch.float64))


def test_the_error_in_the_noise_is_that_in_the_clipped_x_0_times_the_snr():
    """z̃ - ε = √ᾱ (x_0 - x̂_0)/√(1-ᾱ): both are of the prediction that the chain uses."""
    scheduler = AlphaDDPMScheduler(prediction_type="sample", **SHORT)
    images = torch.randint(0, 256, (3, 1, 4, 4), generator=generator()) / 127.5 - 1
    statistics = estimate_analytic_variance(lambda x, t: 2 * x, scheduler, images, generator=generator(), progress=False)
    a = signal(scheduler, torch.arange(12)).flatten()
    assert torch.allclose(statistics.noise_errors, a / (1 - a) * statistics.x0_errors, rtol=1e-9)


@pytest.mark.parametrize("from_errors", [False, True])
def test_the_analytic_scheduler_is_stored_and_loads(tmp_path, from_errors):
    scheduler = AlphaDDPMScheduler(clip_sample=False, **SHORT)
    _, statistics = gaussian_statistics(scheduler, 100)
    analytic = with_analytic_variance(scheduler, statistics, from_errors=from_errors)
    stored = optimal_timesteps(statistics, analytic, [3, 5])
    AlphaDDPMScheduler.from_config(analytic.config, inference_timesteps=stored).save_pretrained(tmp_path)
    loaded = AlphaDDPMScheduler.from_pretrained(tmp_path)
    assert loaded.config.variance_type == "analytic"
    assert loaded.noise_second_moments == analytic.noise_second_moments
    if from_errors:  # the exact predictor explains all that can be explained: 1 - E‖z̃ - ε*‖²/d is Γ_t
        plain = with_analytic_variance(scheduler, statistics).noise_second_moments
        error = (statistics.noise_errors_error + statistics.noise_second_moments_error).tolist()
        for table in zip(analytic.noise_second_moments, plain, error, strict=True):
            assert table[0] == pytest.approx(table[1], abs=5 * table[2])
    loaded.set_timesteps(3)
    assert loaded.timesteps.tolist() == stored["3"]
    assert DDPMScheduler.from_pretrained(tmp_path).config.num_train_timesteps == 12  # stock loads it too


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "analytic"])
def test_dynamic_programming_finds_what_brute_force_finds(variance_type):
    scheduler = AlphaDDPMScheduler(clip_sample=False, **SHORT)
    _, statistics = gaussian_statistics(scheduler, 200)
    if variance_type == "analytic":
        scheduler = with_analytic_variance(scheduler, statistics)
    else:
        scheduler = AlphaDDPMScheduler.from_config(scheduler.config, variance_type=variance_type)
    chosen = optimal_timesteps(statistics, scheduler, range(1, 13))
    assert list(chosen) == [str(number) for number in range(1, 13)]
    costs = _PairCosts(statistics, scheduler)
    for number in range(1, 13):
        best = min(costs.of_chain(chain[::-1]) for chain in itertools.combinations(range(12), number))
        assert predicted_bits_per_dim(statistics, scheduler, chosen[str(number)]) == pytest.approx(best, rel=1e-12)
        assert all(a > b for a, b in itertools.pairwise(chosen[str(number)]))


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "analytic"])
@pytest.mark.parametrize("num_bins", [None, 256])
def test_predicted_bits_are_what_is_then_measured(variance_type, num_bins):
    """On the images and noise that the statistics are of, up to how residuals are binned."""
    scheduler = AlphaDDPMScheduler(**SHORT)
    if num_bins is None:
        images = torch.rand(64, 1, 4, 4, generator=generator()) * 1.6 - 0.8
    else:
        images = torch.randint(0, 256, (64, 1, 4, 4), generator=generator()) / 127.5 - 1
    again = generator(3)  # the draws of the statistics, once more
    noises = [torch.randn(images.shape, generator=again) for _ in range(12)]
    model = exact_noise(scheduler)
    statistics = estimate_analytic_variance(model, scheduler, images, num_bins=num_bins, generator=generator(3), progress=False)
    if variance_type == "analytic":
        scheduler = with_analytic_variance(scheduler, statistics, from_errors=True)
    else:
        scheduler = AlphaDDPMScheduler.from_config(scheduler.config, variance_type=variance_type)
    for chain in ([11, 8, 5, 3, 2, 1, 0], [10, 4, 1], [9, 2], [6]):
        measured = bits_per_dim(
            model, scheduler, images, timesteps=chain, num_bins=num_bins, noise=lambda t, s: noises[t], progress=False
        )
        predicted = predicted_bits_per_dim(statistics, scheduler, chain)
        assert predicted == pytest.approx(float(measured.total.mean()), rel=2e-3)


def test_optimal_timesteps_of_a_thousand_take_seconds_and_beat_equal_spacing():
    scheduler = AlphaDDPMScheduler(clip_sample=False)
    a = signal(scheduler, torch.arange(1000)).flatten()
    x_0, z = quadrature()
    images = MEAN + math.sqrt(VARIANCE) * torch.randn(256, 1, 8, 8, dtype=torch.float64, generator=generator())
    statistics = estimate_analytic_variance(
        exact_noise(scheduler), scheduler, images, num_bins=None, generator=generator(), progress=False
    )
    moments = ((1 - a) / (a * VARIANCE + 1 - a)).tolist()
    analytic = AlphaDDPMScheduler(clip_sample=False, variance_type="analytic", noise_second_moments=moments)
    chosen = optimal_timesteps(statistics, analytic, [5, 20])
    for steps in (5, 20):
        options = {"num_bins": None, "noise": lambda t, shape: z, "progress": False}
        spaced = bits_per_dim(exact_noise(scheduler), analytic, x_0, num_inference_steps=steps, **options).total.mean()
        best = bits_per_dim(exact_noise(scheduler), analytic, x_0, timesteps=chosen[str(steps)], **options).total.mean()
        assert best < spaced


def test_timesteps_cannot_be_priced_for_learned_variances():
    _, statistics = gaussian_statistics(AlphaDDPMScheduler(**SHORT), 4)
    with pytest.raises(ValueError, match="with_analytic_variance"):
        optimal_timesteps(statistics, AlphaDDPMScheduler(variance_type="learned_range", **SHORT), 3)
    with pytest.raises(ValueError, match="num_steps=13"):
        optimal_timesteps(statistics, AlphaDDPMScheduler(**SHORT), [2, 13])
    with pytest.raises(ValueError, match="12 timesteps, the scheduler has 1000"):
        optimal_timesteps(statistics, AlphaDDPMScheduler(), 3)
