"""Samplers held against distributions that are known exactly: Gaussian data in closed form, mixtures by their quantiles."""

import itertools
import math

import pytest
import torch

from ddpm_pipeline.scheduling_alpha_ddpm import AlphaDDPMScheduler
from oracles import PROBES, GaussianData, MixtureData, Normal, affine_step, draw, sampled_normal, signal_and_variance

CHAINS = [1, 2, 10, [999, 500, 499, 20, 3]]
DATA = [GaussianData(-0.3, 0.05), GaussianData(0.1, 3.0)]
VARIANCE_TYPES = ("fixed_small", "fixed_large", "analytic", "learned", "learned_range")


def scheduler_for(data: GaussianData, variance_type: str, chain: int | list[int], **config) -> AlphaDDPMScheduler:
    if variance_type == "analytic":
        config["noise_second_moments"] = data.noise_second_moments(AlphaDDPMScheduler(**config))
    scheduler = AlphaDDPMScheduler(variance_type=variance_type, clip_sample=False, **config)
    if isinstance(chain, int):
        scheduler.set_timesteps(chain)
    else:
        scheduler.set_timesteps(timesteps=chain)
    return scheduler


def network(scheduler, data: GaussianData):
    """ε* and, for learned variances, the variance half that says the truth."""
    predict = data.noise_predictor(scheduler)
    if not scheduler.variance_type.startswith("learned"):
        return predict

    def predict_with_variance(x_t: torch.Tensor, t: int) -> torch.Tensor:
        s = scheduler.previous_timestep(t)
        _, variance = data.reverse_slope_and_variance(scheduler, s, t)
        raw = math.log(variance)
        if scheduler.variance_type == "learned_range":
            low, high = raw_bounds(scheduler, t)
            raw = 2 * (raw - low) / (high - low) - 1 if high > low else 0.0
        return torch.cat([predict(x_t, t), torch.full_like(x_t, raw)], dim=1)

    return predict_with_variance


def raw_bounds(scheduler, t: int) -> tuple[float, float]:
    """log β̃ and log(1-α) as the network's -1 and +1 mean them; into clean data the neighbour's β̃."""
    raw = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    low, high = scheduler.p_mean_variance(torch.cat([0 * raw, raw], dim=1), t, PROBES).log_variance.flatten().tolist()
    return low, high


def closed_form(scheduler, data: GaussianData, start: Normal) -> Normal:
    """The marginal that the chain must end in, from ᾱ alone."""
    variance, timesteps = start.variance, scheduler.timesteps.tolist()
    mean_error = start.mean - data.marginal(*signal_and_variance(scheduler, timesteps[0])).mean
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        slope, true_variance = data.reverse_slope_and_variance(scheduler, s, t)
        (signal_s, variance_s), (signal_t, variance_t) = (signal_and_variance(scheduler, u) for u in (s, t))
        one_minus_alpha = 1 - (signal_t / signal_s) ** 2
        noise = {"fixed_small": variance_s / variance_t * one_minus_alpha, "fixed_large": one_minus_alpha}.get(
            scheduler.variance_type, true_variance
        )
        variance = slope**2 * variance + (noise if s >= 0 else 0)
        mean_error *= slope
    return Normal(data.mean + mean_error, variance)


@pytest.mark.parametrize(("data", "chain"), [*itertools.product(DATA, CHAINS), (DATA[0], 1000)], ids=str)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_gaussian_data_in_closed_form(data, variance_type, chain):
    scheduler = scheduler_for(data, variance_type, chain)
    start = Normal(0.0, 1.0)
    found, _ = sampled_normal(scheduler, network(scheduler, data), start)
    expected = closed_form(scheduler, data, start)
    assert found.mean == pytest.approx(expected.mean, rel=1e-9, abs=1e-11)
    assert found.variance == pytest.approx(expected.variance, rel=1e-9)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_gaussian_data_by_other_predictions(prediction_type):
    """The same network said in x_0 or in v gives the same chain."""
    data = GaussianData(0.2, 0.4)
    by_noise = scheduler_for(data, "fixed_small", 20)
    other = scheduler_for(data, "fixed_small", 20, prediction_type=prediction_type)
    predict = data.noise_predictor(by_noise)

    def predict_other(x_t: torch.Tensor, t: int) -> torch.Tensor:
        x_0 = by_noise.predict_original_sample(predict(x_t, t), t, x_t)
        return other.training_target(x_0, predict(x_t, t), t)

    start = Normal(0.0, 1.0)
    (expected, _), (found, _) = sampled_normal(by_noise, predict, start), sampled_normal(other, predict_other, start)
    assert found.mean == pytest.approx(expected.mean, rel=1e-9)
    assert found.variance == pytest.approx(expected.variance, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
@pytest.mark.parametrize("std", [0.01, 0.5, 10.0])
@pytest.mark.parametrize("config", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"timestep_spacing": "trailing"}], ids=str)
def test_analytic_variance_is_exact_for_gaussian_data(std, steps, config):
    """Output variance and the last step's σ², which is not added, are s² together, for every number of steps and every s.

    Started from q(x_T) itself. N(0, I), where sampling starts, differs from it by ᾱ_T (s² - 1).
    """
    data = GaussianData(0.1, std)
    scheduler = scheduler_for(data, "analytic", steps, **config)
    start = data.marginal(*signal_and_variance(scheduler, scheduler.timesteps[0].item()))
    found, last_variance = sampled_normal(scheduler, data.noise_predictor(scheduler), start)
    assert found.variance + last_variance == pytest.approx(std**2, rel=1e-10)
    assert found.mean == pytest.approx(0.1, rel=1e-9)
    for s, t in [(scheduler.previous_timestep(t), t) for t in scheduler.timesteps.tolist()[:: max(1, steps // 10)]]:
        slope, _, variance = affine_step(scheduler, data.noise_predictor(scheduler), t)
        assert (slope, variance) == pytest.approx(data.reverse_slope_and_variance(scheduler, s, t), rel=1e-9)


def test_ten_steps_with_too_little_too_much_and_the_right_noise():
    """Linear schedule, T = 1000, 10 steps from 999 to 0, s² = 0.25: 0.104, 0.359 and 0.250."""
    data = GaussianData(0.0, 0.5)
    for variance_type, expected in {"fixed_small": 0.104, "fixed_large": 0.359, "analytic": 0.250}.items():
        scheduler = scheduler_for(data, variance_type, 10, timestep_spacing="linspace")
        found, last_variance = sampled_normal(scheduler, data.noise_predictor(scheduler), Normal(0.0, 1.0))
        assert found.variance + last_variance == pytest.approx(expected, abs=5e-4)


def test_fixed_variances_close_in_on_the_data_with_more_steps():
    data = GaussianData(0.0, 0.5)
    errors = {}
    for variance_type in ("fixed_small", "fixed_large"):
        for steps in (10, 100, 1000):
            scheduler = scheduler_for(data, variance_type, steps)
            found, _ = sampled_normal(scheduler, data.noise_predictor(scheduler), Normal(0.0, 1.0))
            errors[variance_type, steps] = abs(found.variance / data.std**2 - 1)
    for variance_type in ("fixed_small", "fixed_large"):
        assert errors[variance_type, 1000] < errors[variance_type, 100] < errors[variance_type, 10]
        assert errors[variance_type, 1000] < 0.15


@pytest.mark.parametrize(("chain", "count"), [(1, 200_000), (10, 100_000), ([999, 700, 300, 42], 100_000)], ids=str)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_drawn_samples_have_the_gaussian_moments(variance_type, chain, count):
    """`step` itself: mean and variance of many draws within five standard errors, and no excess kurtosis."""
    data = GaussianData(0.3, 0.5)
    scheduler = scheduler_for(data, variance_type, chain)
    predict = network(scheduler, data)
    expected = closed_form(scheduler, data, Normal(0.0, 1.0))
    generator = torch.Generator().manual_seed(count)
    x = draw(scheduler, predict, torch.randn(count, 1, 1, 1, generator=generator), generator).double()
    assert abs(x.mean().item() - expected.mean) < 5 * math.sqrt(expected.variance / count)
    assert abs(x.var().item() / expected.variance - 1) < 5 * math.sqrt(2 / count)
    standardised = (x - x.mean()) / x.std()
    assert abs((standardised**4).mean().item() - 3) < 5 * math.sqrt(24 / count)


MIXTURE = MixtureData(weights=(0.35, 0.4, 0.25), means=(-0.8, 0.1, 0.7), stds=(0.05, 0.1, 0.02))


def mixture_error(steps: int, count: int, **config) -> float:
    """W_1 between `count` drawn samples and the mixture that they should follow."""
    scheduler = AlphaDDPMScheduler(clip_sample=False, **config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 1, 1, generator=generator)
    return MIXTURE.wasserstein(draw(scheduler, MIXTURE.noise_predictor(scheduler), x, generator))


def test_mixture_is_sampled_within_the_scatter_of_true_samples():
    count = 4_000
    random = torch.Generator().manual_seed(1)
    component = torch.multinomial(torch.tensor(MIXTURE.weights), count, replacement=True, generator=random)
    means, stds = torch.tensor(MIXTURE.means), torch.tensor(MIXTURE.stds)
    true = means[component] + stds[component] * torch.randn(count, generator=random)
    floor = MIXTURE.wasserstein(true)
    for variance_type in ("fixed_small", "fixed_large"):
        assert mixture_error(1000, count, variance_type=variance_type) < 3 * floor


def test_mixture_error_falls_with_the_number_of_steps():
    errors = [mixture_error(steps, 4_000) for steps in (2, 10, 50, 250)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]
