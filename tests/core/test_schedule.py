"""What can be read and seen of a schedule without a model: its tables, its signal-to-noise ratio, a picture being noised."""

import math

import pytest
import torch

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from helpers import tiny_unet


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("chain", [None, [970, 801, 800, 41, 2], [617]])
def test_the_tables_are_those_of_the_chain_in_use(chain):
    scheduler = AlphaDDPMScheduler()
    if chain:
        scheduler.set_timesteps(timesteps=chain)
    found = scheduler.schedule
    assert found.timesteps.tolist() == scheduler.timesteps.tolist()[::-1]
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for row, t in list(enumerate(found.timesteps.tolist()))[:: max(1, len(found.timesteps) // 5)]:
        q = scheduler.q_mean_variance(one, t)
        assert found.alphas_cumprod[row].item() == pytest.approx(q.mean.item() ** 2, rel=1e-12)
        assert found.sigmas[row].item() == pytest.approx((q.variance.sqrt() / q.mean).item(), rel=1e-12)
        assert found.snr[row].item() == pytest.approx((q.mean**2 / q.variance).item(), rel=1e-12)
        assert found.betas[row].item() == scheduler.forward_mean_variance(one, t).variance.item()
        assert found.posterior_variance[row].item() == scheduler.q_posterior(one, one, t).variance.item()
    before = 1 - found.alphas_cumprod[:-1]  # 1-ᾱ_s
    precision = (1 - found.betas[1:]) / found.betas[1:] + 1 / before  # report 5.7: precisions add
    torch.testing.assert_close(1 / found.posterior_variance[1:], precision, rtol=1e-9, atol=0)
    assert found.posterior_variance[0] == 0


def test_the_signal_to_noise_ratio_needs_no_images():
    scheduler = AlphaDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    whole = scheduler.schedule
    for timesteps in (torch.tensor([3, 700]), [3, 700]):
        assert torch.equal(scheduler.log_snr(timesteps), whole.log_snr[[3, 700]])
        assert torch.equal(scheduler.snr(timesteps), whole.snr[[3, 700]])
    assert scheduler.snr(700) == math.exp(scheduler.log_snr(700)) == pytest.approx(whole.snr[700].item())
    assert scheduler.snr(999) == 0 and scheduler.log_snr(999) == -math.inf
    assert scheduler.snr(torch.tensor([3, 700]), torch.zeros(2, 1, 4, 4)).shape == (2, 1, 1, 1)


def test_a_picture_is_noised_without_a_model_and_of_any_size():
    scheduler = AlphaDDPMScheduler()
    scheduler.set_timesteps(7)
    chain, x_0 = scheduler.timesteps.clone(), torch.rand(2, 3, 5, 4, generator=seeded(1)) * 2 - 1
    found = scheduler.forward_trajectory(x_0, (-1, 10, 999), seeded())
    assert found.shape == (3, 2, 3, 5, 4) and torch.equal(found[0], x_0)
    assert torch.equal(scheduler.timesteps, chain)
    noise = seeded()
    first = scheduler.add_noise(x_0, torch.randn(x_0.shape, generator=noise), 10)
    torch.testing.assert_close(found[1], first)
    scheduler.set_timesteps(timesteps=[999, 10])
    torch.testing.assert_close(found[2], scheduler.forward_step(first, 999, torch.randn(x_0.shape, generator=noise)))


def test_the_predictions_of_a_call_make_its_steps():
    pipe = AlphaDDPMPipeline(tiny_unet(), AlphaDDPMScheduler(variance_type="fixed_large"))
    pipe.set_progress_bar_config(disable=True)
    output = pipe(2, num_inference_steps=5, generator=seeded(), output_trajectory=True)
    assert output.predictions.shape == (5, 2, 1, 8, 8)
    pipe.scheduler.set_timesteps(5)
    steps = zip(output.trajectory[:-1], output.predictions, output.trajectory[1:], pipe.scheduler.timesteps, strict=True)
    for x_t, x_0, x_s, t in steps:
        q = pipe.scheduler.q_posterior(x_0, x_t, int(t))
        noise = (x_s - q.mean) / pipe.scheduler.forward_mean_variance(x_t, int(t)).variance.sqrt()
        assert noise.std() < 1e-5 if t == 0 else 0.8 < noise.std() < 1.2
    assert pipe(2, num_inference_steps=5).predictions is None
