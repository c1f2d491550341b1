"""Chains of given coefficients: DDIM's give DDIM; a fit travels through stock classes, is used, and can be left alone."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from ddpm_pipeline import AlphaDDPMBlocks, AlphaDDPMFittedScheduler, AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.generation.pipelines import steps_of
from helpers import tiny_unet

CONFIG = {"num_train_timesteps": 50, "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
TIMESTEPS = [40, 22, 9, 3]


def ddim_coefficients(scheduler: AlphaDDPMScheduler, timesteps: list[int]) -> np.ndarray:
    """√ᾱ_s x̂_0 + √(1-ᾱ_s) ε̂ with ε̂ = (x_t - √ᾱ_t x̂_0)/√(1-ᾱ_t) (Song et al. 2021, eq. 12 without noise)."""
    signal = np.sqrt([*scheduler.alphas_cumprod[timesteps].double().tolist(), 1.0])
    noise = np.sqrt(1 - signal**2)
    scale = noise[1:] / noise[:-1]
    return np.stack([scale, signal[1:] - scale * signal[:-1]], axis=1)


def fitted(timesteps: list[int] = TIMESTEPS, **config) -> AlphaDDPMFittedScheduler:
    base = AlphaDDPMScheduler(**{**CONFIG, **config})
    sampler = {"timesteps": timesteps, "coefficients": ddim_coefficients(base, timesteps)}
    return AlphaDDPMFittedScheduler.from_config(base.config, fitted_samplers={str(len(timesteps)): sampler})


def pipeline(scheduler=None) -> AlphaDDPMPipeline:
    pipe = AlphaDDPMPipeline(tiny_unet(), scheduler or fitted())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, steps: int, seed: int = 3, **call) -> np.ndarray:
    generator = [torch.Generator().manual_seed(seed + i) for i in range(2)]
    return pipe(batch_size=2, generator=generator, num_inference_steps=steps, output_type="np", **call).images


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_with_ddim_s_coefficients_it_is_ddim(prediction_type):
    stock = DDIMScheduler(**CONFIG, prediction_type=prediction_type)
    stock.set_timesteps(10)
    ours = fitted(stock.timesteps.tolist(), prediction_type=prediction_type)
    unet, x = tiny_unet(), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ours.set_timesteps(10)
    found, expected = x, x
    with torch.no_grad():
        for t in stock.timesteps:
            expected = stock.step(unet(expected, t).sample, t, expected).prev_sample
            found = ours.step(unet(found, t).sample, t, found).prev_sample
    assert ours.timesteps.tolist() == stock.timesteps.tolist() and ours.num_inference_steps == 10
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_half_precision_is_computed_in_float32_and_learned_variances_are_not_used():
    ours, x = fitted(), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    learned = fitted(variance_type="learned_range")
    for scheduler in (ours, learned):
        scheduler.set_timesteps(4)
    output = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = ours.step(output, 40, x).prev_sample
    assert torch.equal(learned.step(torch.cat([output, 9 * output], dim=1), 40, x).prev_sample, whole)
    ours.set_timesteps(4)
    half = ours.step(output.bfloat16(), 40, x.bfloat16()).prev_sample
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, atol=0.05, rtol=0.05)


def test_other_lengths_and_given_timesteps_are_ancestral():
    pipe, plain = pipeline(), pipeline(AlphaDDPMScheduler(**CONFIG))
    assert np.array_equal(images(pipe, 5), images(plain, 5))
    given = {"timesteps": TIMESTEPS}
    assert np.array_equal(images(pipe, None, **given), images(plain, None, **given))
    deterministic = images(pipe, 4)
    assert not np.allclose(deterministic, images(plain, 4))
    latents = torch.randn(1, 1, 8, 8)
    one, other = (pipe(latents=latents, num_inference_steps=4, output_type="np").images for _ in range(2))
    assert np.array_equal(one, other), "nothing is drawn"
    forced = AlphaDDPMScheduler.from_config(pipe.scheduler.config)
    assert forced.fitted_samplers == pipe.scheduler.fitted_samplers
    assert np.array_equal(images(pipeline(forced), 4), images(plain, 4))


def test_a_call_that_names_no_steps_takes_the_most_fitted_ones_and_edits_the_full_chain():
    pipe, plain = pipeline(), pipeline(AlphaDDPMScheduler(**CONFIG))
    assert np.array_equal(images(pipe, None), images(pipe, 4))
    assert steps_of(pipe.scheduler, None) == 4 and steps_of(plain.scheduler, None) == 50
    picture = np.full((1, 8, 8, 1), 0.5, np.float32)
    for call in ({"strength": 0.5}, {"strength": 1.0}, {"mask_image": picture, "num_resamples": 2}):
        assert np.array_equal(images(pipe, None, image=picture, **call), images(plain, None, image=picture, **call))
    seeded = lambda: {"generator": torch.Generator().manual_seed(0), "output_type": "np"}  # noqa: E731
    mixed, expected = (each.interpolate(picture, picture, 20, [0.5], **seeded()).images for each in (pipe, plain))
    assert np.array_equal(mixed, expected)


def test_it_survives_saving_and_stock_classes(tmp_path):
    pipe = pipeline()
    expected, kept = images(pipe, 4), pipe.scheduler.fitted_samplers
    pipe.save_pretrained(tmp_path / "ours")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(stock) is DDPMPipeline
    stock.save_pretrained(tmp_path / "stock")
    again = AlphaDDPMPipeline.from_pretrained(tmp_path / "stock")
    again.save_pretrained(tmp_path / "again")
    trusted = {"custom_pipeline": str(tmp_path / "again"), "trust_remote_code": True}
    for loaded in (again, AlphaDDPMPipeline.from_pipe(stock), DiffusionPipeline.from_pretrained(tmp_path / "again", **trusted)):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler).__name__ == "AlphaDDPMFittedScheduler"
        assert loaded.scheduler.fitted_samplers == kept
        assert np.abs(images(loaded, 4) - expected).max() < 1e-6
    written = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert written["_class_name"] == "DDPMScheduler" and written["_alpha_ddpm"]["fitted_samplers"] == kept
    solver = DPMSolverMultistepScheduler.from_config(again.scheduler.config)
    solver.set_timesteps(timesteps=kept["4"]["timesteps"])
    assert solver.timesteps.tolist() == TIMESTEPS
    assert AlphaDDPMFittedScheduler.from_config(solver.config).fitted_samplers == kept


def test_modular_blocks_use_it(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    modular = AlphaDDPMBlocks().init_pipeline(str(tmp_path))
    modular.load_components()
    modular.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipe(latents=latents, num_inference_steps=4, output_type="np").images
    for steps in (4, None):
        found = modular(latents=latents, num_inference_steps=steps, output_type="np", output="images")
        assert np.abs(found - expected).max() < 1e-6


def test_a_chain_that_begins_in_its_middle_or_goes_back_is_refused():
    pipe, picture = pipeline(), np.full((1, 8, 8, 1), 0.5, np.float32)
    mask = np.zeros((1, 8, 8, 1), np.float32)
    mask[:, :4] = 1
    for call in ({"strength": 0.5}, {"mask_image": mask, "num_resamples": 2}):
        with pytest.raises(ValueError, match=r"AlphaDDPMFittedScheduler.*use AlphaDDPMScheduler"):
            images(pipe, 4, image=picture, **call)
    with pytest.raises(ValueError, match="AlphaDDPMFittedScheduler cannot begin in the middle"):
        pipe.interpolate(picture, picture, at=20, num_inference_steps=4)
    assert images(pipe, 5, image=picture, strength=0.6).shape == (2, 8, 8, 1), "which is ancestral"
    painted = images(pipe, 4, image=picture, mask_image=mask)
    assert np.allclose(painted[:, 4:], 0.5, atol=1e-6) and not np.allclose(painted[:, :4], 0.5, atol=0.05)
    scheduler, x = pipe.scheduler, torch.zeros(1, 1, 8, 8)
    scheduler.set_timesteps(4)
    for timestep in (22, 41):
        with pytest.raises(ValueError, match=rf"timestep {timestep} is not the next of the fitted chain"):
            scheduler.step(x, timestep, x)
    scheduler.step(x, 40, x)
    scheduler.step(x, 40, x)  # begins again
    with pytest.raises(ValueError, match="model_output has shape"):
        scheduler.step(x[:, :, 1:], 22, x)
    scheduler.step(x, 22, x)  # as if that had not been


def test_a_prediction_is_kept_as_it_was():
    sampler = {"timesteps": [9, 3], "coefficients": [[0.5, 0.5, 0], [0.2, 0.5, 0.3]]}
    scheduler = AlphaDDPMFittedScheduler(**CONFIG, prediction_type="sample", fitted_samplers={"2": sampler})
    found, x = [], torch.ones(1, 1, 8, 8)
    for later in (1.0, 5.0):
        scheduler.set_timesteps(2)
        output = x.clone()
        scheduler.step(output, 9, x)
        output.fill_(later)  # as compiled networks do
        found.append(scheduler.step(x, 3, x).prev_sample)
    assert torch.equal(*found)


def test_a_subclass_of_stock_s_scheduler_keeps_its_own_step():
    class Mine(DDPMScheduler):
        pass

    assert type(pipeline(Mine()).scheduler) is Mine


@pytest.mark.parametrize(
    "samplers",
    [
        [1],
        {"2": 3},
        {"2": {"timesteps": [9, 3]}},
        {"3": {"timesteps": [9, 3], "coefficients": [[1, 1], [0, 1]]}},
        {"2": {"timesteps": [9, 3], "coefficients": [[1, 1]]}},
        {"2": {"timesteps": [9, 3], "coefficients": [[1], [0]]}},
        {"2": {"timesteps": [9, 3], "coefficients": [[1, float("inf")], [0, 1]]}},
        {"2": {"timesteps": [3, 9], "coefficients": [[1, 1], [0, 1]]}},
        {"2": {"timesteps": [9, 3], "coefficients": [[1, 1], [0]]}},
    ],
)
def test_malformed_samplers_are_refused(samplers):
    with pytest.raises(ValueError, match="fitted_samplers"):
        AlphaDDPMScheduler(**CONFIG, fitted_samplers=samplers)
