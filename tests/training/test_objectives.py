"""Losses against the bound they estimate, and timesteps against the distributions they are drawn from."""

import numpy as np
import pytest
import torch

from ddpm_pipeline import AlphaDDPMScheduler
from ddpm_pipeline.likelihood import bits_per_dim
from ddpm_pipeline.training.objectives import (
    ImportanceTimesteps,
    UniformTimesteps,
    bound_loss,
    hybrid_loss,
    mean_squared_error,
    per_image_loss,
    timestep_quantiles,
    timestep_sampler,
)

SHORT = {"num_train_timesteps": 12, "beta_start": 0.02, "beta_end": 0.6, "clip_sample": False}


def batch(count: int = 12, channels: int = 1):
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 256, (count, 1, 4, 4), generator=generator) / 127.5 - 1
    noise = torch.randn(x_0.shape, generator=generator)
    output = torch.randn(count, channels, 4, 4, generator=generator)
    return x_0, noise, output, torch.arange(12).repeat(count // 12)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_bound_loss_over_all_timesteps_is_the_bound(variance_type, prediction_type):
    scheduler = AlphaDDPMScheduler(variance_type=variance_type, prediction_type=prediction_type, **SHORT)
    x_0, noise, output, timesteps = batch(channels=2 if variance_type == "learned_range" else 1)
    x_0 = x_0[:1].expand_as(x_0)
    noisy = scheduler.add_noise(x_0, noise, timesteps)
    loss = bound_loss(scheduler, output, x_0, noisy, timesteps)
    whole = bits_per_dim(
        lambda x, t: output[int(t)][None].double(),
        scheduler,
        x_0[:1],
        noise=lambda t, s: noise[t][None],
        progress=False,
    )
    assert loss.dtype == torch.float32
    assert torch.allclose(loss / 12, whole.terms[0].float(), rtol=2e-4, atol=1e-5)
    assert float(loss.mean()) == pytest.approx(float(whole.total - whole.prior), rel=1e-4)


def test_the_hybrid_teaches_the_mean_by_the_error_and_the_variance_by_the_bound():
    scheduler = AlphaDDPMScheduler(variance_type="learned_range", **SHORT)
    x_0, noise, output, timesteps = batch(channels=2)
    noisy = scheduler.add_noise(x_0, noise, timesteps)

    def gradient(loss):
        (result,) = torch.autograd.grad(loss(output).sum(), output)
        return result

    output.requires_grad_()
    hybrid = gradient(lambda o: hybrid_loss(scheduler, o, x_0, noisy, noise, timesteps, bound_weight=0.01))
    error = gradient(lambda o: mean_squared_error(scheduler, o[:, :1], x_0, noise, timesteps))
    bound = gradient(lambda o: bound_loss(scheduler, o, x_0, noisy, timesteps))
    assert torch.equal(hybrid[:, :1], error[:, :1])
    assert torch.allclose(hybrid[:, 1:], 0.01 * bound[:, 1:])
    assert bound[:, :1].abs().min() > 0
    assert bound.isfinite().all()


def test_objectives_by_name():
    scheduler = AlphaDDPMScheduler(**SHORT)
    x_0, noise, output, timesteps = batch()
    noisy = scheduler.add_noise(x_0, noise, timesteps)
    arguments = (scheduler, output, x_0, noisy, noise, timesteps)
    weighted = per_image_loss("simple", *arguments, error_weights=torch.full((12,), 3.0))
    assert torch.equal(weighted, 3 * mean_squared_error(scheduler, output, x_0, noise, timesteps))
    assert torch.equal(per_image_loss("bound", *arguments), bound_loss(scheduler, output, x_0, noisy, timesteps))
    with pytest.raises(ValueError, match=r"objective='vlb'.*simple, hybrid, bound"):
        per_image_loss("vlb", *arguments)


def test_stratified_quantiles_have_one_in_every_stratum():
    drawn = np.random.default_rng(0).random(64)
    quantiles = timestep_quantiles(drawn, "stratified")
    assert np.array_equal(np.floor(quantiles * 64), np.arange(64))
    assert timestep_quantiles(np.array([1 - 2.0**-53] * 3), "stratified")[-1] < 1
    assert timestep_quantiles(drawn, "uniform") is drawn
    timesteps, weights = UniformTimesteps(1000).draw(torch.from_numpy(quantiles))
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert (weights == 1).all()


def test_importance_sampling_is_unbiased_with_smaller_variance():
    """Losses that depend on t alone: in proportion to them, every draw weighs the same."""
    losses = torch.logspace(0, -4, 50, dtype=torch.float64)
    sampler = timestep_sampler("importance", 50)
    uniform = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    timesteps, weights = sampler.draw(uniform)  # not warmed up: uniform
    assert (weights == 1).all()
    plain = losses[timesteps]
    for _ in range(10):
        sampler.observe(torch.arange(50), losses)
    assert sampler.warmed_up
    timesteps, weights = sampler.draw(uniform)
    weighted = weights * losses[timesteps]
    assert float(weighted.mean()) == pytest.approx(float(losses.mean()), rel=0.01)
    assert weighted.std() < 0.1 * plain.std()
    shares = timesteps.bincount(minlength=50) / 20_000
    assert torch.allclose(shares.double(), sampler.probabilities(), atol=0.01)


def test_the_samplers_state_comes_back_and_broken_losses_are_not_remembered():
    sampler = ImportanceTimesteps(5)
    sampler.observe(torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 2.0, torch.nan, torch.inf]))
    assert sampler.counts.tolist() == [1, 1, 0, 0, 0]
    other = ImportanceTimesteps(5)
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.losses, sampler.losses)
    for step in range(12):
        sampler.observe(torch.tensor([4]), torch.tensor([float(step)]))
    assert sorted(sampler.losses[4].tolist()) == [float(step) for step in range(2, 12)]
    with pytest.raises(ValueError, match="num_train_timesteps"):
        ImportanceTimesteps(6).load_state_dict(sampler.state_dict())
