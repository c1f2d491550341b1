"""Losses against the bound they estimate, and timesteps against the distributions they are drawn from."""

import numpy as np
import pytest
import torch

from ddpm_pipeline import AlphaDDPMScheduler
from ddpm_pipeline.likelihood import bits_per_dim
from ddpm_pipeline.training.objectives import (
    ImportanceTimesteps,
    NoisedBatch,
    UniformTimesteps,
    bound_loss,
    hybrid_loss,
    mean_squared_error,
    min_snr_weights,
    per_image_loss,
    timestep_quantiles,
    timestep_sampler,
)

SHORT = {"num_train_timesteps": 12, "beta_start": 0.02, "beta_end": 0.6, "clip_sample": False}


def noised(scheduler, channels: int = 1, one_image: bool = False) -> tuple[NoisedBatch, torch.Tensor]:
    """Twelve noised images, one per timestep, and what a network might say of them."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 256, (12, 1, 4, 4), generator=generator) / 127.5 - 1
    x_0 = x_0[:1].expand_as(x_0) if one_image else x_0
    noise = torch.randn(x_0.shape, generator=generator)
    timesteps = torch.arange(12)
    output = torch.randn(12, channels, 4, 4, generator=generator)
    return NoisedBatch(x_0, noise, timesteps, scheduler.add_noise(x_0, noise, timesteps)), output


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_bound_loss_over_all_timesteps_is_the_bound(variance_type, prediction_type):
    scheduler = AlphaDDPMScheduler(variance_type=variance_type, prediction_type=prediction_type, **SHORT)
    batch, output = noised(scheduler, channels=2 if variance_type == "learned_range" else 1, one_image=True)
    loss = bound_loss(scheduler, output, batch)
    whole = bits_per_dim(
        lambda x, t: output[int(t)][None].double(),
        scheduler,
        batch.original_samples[:1],
        noise=lambda t, s: batch.noise[t][None],
        progress=False,
    )
    assert loss.dtype == torch.float32
    assert torch.allclose(loss / 12, whole.terms[0].float(), rtol=2e-4, atol=1e-5)
    assert float(loss.mean()) == pytest.approx(float(whole.total - whole.prior), rel=1e-4)


def test_the_hybrid_teaches_the_mean_by_the_error_and_the_variance_by_the_bound():
    scheduler = AlphaDDPMScheduler(variance_type="learned_range", **SHORT)
    batch, output = noised(scheduler, channels=2)

    def gradient(loss):
        (result,) = torch.autograd.grad(loss(output).sum(), output)
        return result

    output.requires_grad_()
    weights = torch.linspace(0.5, 3, 12)
    hybrid = gradient(lambda o: hybrid_loss(scheduler, o, batch, bound_weight=0.01, error_weights=weights))
    error = gradient(lambda o: weights * mean_squared_error(scheduler, o[:, :1], batch))
    bound = gradient(lambda o: bound_loss(scheduler, o, batch))
    assert torch.equal(hybrid[:, :1], error[:, :1])
    assert torch.allclose(hybrid[:, 1:], 0.01 * bound[:, 1:])
    assert bound[:, :1].abs().min() > 0
    assert bound.isfinite().all()


def test_objectives_by_name():
    scheduler = AlphaDDPMScheduler(**SHORT)
    batch, output = noised(scheduler)
    weighted = per_image_loss("simple", scheduler, output, batch, error_weights=torch.full((12,), 3.0))
    assert torch.equal(weighted, 3 * mean_squared_error(scheduler, output, batch))
    assert torch.equal(per_image_loss("bound", scheduler, output, batch), bound_loss(scheduler, output, batch))
    learned = AlphaDDPMScheduler(variance_type="learned_range", **SHORT)
    batch, output = noised(learned, channels=2)
    by_name = per_image_loss("hybrid", learned, output, batch, 0.5, torch.full((12,), 3.0))
    assert torch.equal(by_name, hybrid_loss(learned, output, batch, 0.5, torch.full((12,), 3.0)))
    with pytest.raises(ValueError, match=r"objective='vlb'.*simple, hybrid, bound"):
        per_image_loss("vlb", scheduler, output, batch)


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


def test_importance_is_the_root_mean_square_with_a_uniform_share():
    """A timestep whose losses vary weighs more than its mean, and one whose losses are 0 is still sampled."""
    sampler = ImportanceTimesteps(3, history_per_timestep=2, uniform_share=0.3)
    for losses in ([1.0, 0.0, 0.0], [1.0, 2.0, 0.0]):
        sampler.observe(torch.arange(3), torch.tensor(losses))
    rms = np.array([1.0, 2**0.5, 0.0])
    np.testing.assert_allclose(sampler.probabilities(), 0.7 * rms / rms.sum() + 0.1, rtol=1e-12)
    timesteps, weights = sampler.draw(torch.tensor([0.0, 0.9999], dtype=torch.float64))
    assert timesteps.tolist() == [0, 2] and weights[1] == pytest.approx(1 / (3 * 0.1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weights_amount_to_one_weight_on_the_x0_error(prediction_type):
    scheduler = AlphaDDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    x_0, noise, error = (torch.randn(4, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    timesteps = torch.tensor([10, 200, 500, 900])
    batch = NoisedBatch(x_0, noise, timesteps, scheduler.add_noise(x_0, noise, timesteps))
    prediction = scheduler.training_target(x_0, noise, timesteps) + 0.1 * error
    loss = mean_squared_error(scheduler, prediction, batch)
    x0_error = (scheduler.predict_original_sample(prediction, timesteps, batch.sample) - x_0).square().flatten(1).mean(1)
    snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
    weighted = loss * min_snr_weights(scheduler, timesteps, gamma=5.0)
    torch.testing.assert_close(weighted.double(), snr.clamp(max=5).double() * x0_error, rtol=1e-3, atol=0)


def test_the_loss_is_float32_whatever_the_network_computes_in():
    noise = torch.full((1, 1, 2, 2), 1.001)
    batch = NoisedBatch(noise, noise, torch.tensor([5]), noise)
    loss = mean_squared_error(AlphaDDPMScheduler(), torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e-6, rel=1e-3)
