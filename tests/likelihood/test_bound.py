"""The bound against closed forms, an independent implementation, and what may be passed to it."""

import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from scipy.stats import norm

import condition_models
from condition_models import AGE
from ddpm_pipeline import AlphaDDPMScheduler
from ddpm_pipeline.encoding_alpha_ddpm import embedding_width
from ddpm_pipeline.likelihood import bits_per_dim, estimate_analytic_variance
from gaussian_likelihood import MEAN, SHORT, VARIANCE, exact_noise, generator, quadrature, signal


def closed_form_bound(scheduler, chain: list[int], variance_type: str) -> dict[str, float]:
    """E over Gaussian data of the bound's parts, for the exact ε*, from scalar arithmetic; bits per dimension.

    x_0 given x_t has variance v(1-a)/(av+1-a); that is what the mean of p_θ misses of the posterior's, times its slope.
    """
    a_of = [float(signal(scheduler, t)) for t in chain]  # ascending timesteps
    v, parts = VARIANCE, {"prior": 0.0, "diffusion": 0.0, "decoder": 0.0}
    a_last = a_of[-1]
    parts["prior"] = 0.5 * (a_last * (v + MEAN**2) + 1 - a_last - 1 - math.log(1 - a_last))
    betas = [1 - a / before for a, before in zip(a_of, [1.0, *a_of[:-1]], strict=True)]
    small = [(1 - before) / (1 - a) * b for a, before, b in zip(a_of, [1.0, *a_of[:-1]], betas, strict=True)]
    small[0] = small[1] if len(chain) > 1 else betas[0]
    for index, (a, b) in enumerate(zip(a_of, betas, strict=True)):
        unexplained = v * (1 - a) / (a * v + 1 - a)
        model = {"fixed_small": small[index], "fixed_large": b}[variance_type]
        if index == 0:
            parts["decoder"] = 0.5 * (math.log(2 * math.pi * model) + unexplained / model)
            continue
        before = a_of[index - 1]
        slope = math.sqrt(before) * b / (1 - a)
        ratio = small[index] / model
        parts["diffusion"] += 0.5 * (ratio - 1 - math.log(ratio) + slope**2 * unexplained / model)
    return {name: nats / math.log(2) for name, nats in parts.items()}


# Gaussian data with the exact noise


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [1000, 50, 7, 2, 1])
def test_closed_form_of_the_bound_on_gaussian_data(variance_type, prediction_type, steps):
    scheduler = AlphaDDPMScheduler(
        variance_type=variance_type, prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing"
    )
    x_0, z = quadrature()
    result = bits_per_dim(
        exact_noise(scheduler, prediction_type),
        scheduler,
        x_0,
        num_inference_steps=steps,
        num_bins=None,
        noise=lambda t, shape: z,
        progress=False,
    )
    scheduler.set_timesteps(steps)
    expected = closed_form_bound(scheduler, scheduler.timesteps.tolist()[::-1], variance_type)
    for name, value in expected.items():
        assert float(getattr(result, name).mean()) == pytest.approx(value, rel=1e-6, abs=1e-6), name
    truth = 0.5 * math.log2(2 * math.pi * math.e * VARIANCE)  # -E log p(x_0)
    assert float(result.total.mean()) > truth
    assert torch.equal(result.total, result.prior + result.diffusion + result.decoder)
    assert torch.allclose(result.terms.sum(dim=1), result.diffusion + result.decoder, rtol=1e-12)


def test_a_chain_of_one_step_is_the_bound_of_a_vae():
    """Report 6.5: reconstruction term minus KL(q(x_1|x_0) ‖ p(x_1)), here with torch's own distributions."""
    with pytest.warns(UserWarning, match="far from pure noise"):
        scheduler = AlphaDDPMScheduler.from_alphas([0.3], clip_sample=False)
    x_0 = torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=generator())
    z = torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=generator(1))
    with pytest.warns(UserWarning):
        result = bits_per_dim(
            lambda x, t: 0.5 * x, scheduler, x_0, num_bins=None, noise=lambda t, s: z, two_term=True, progress=False
        )
    x_1 = math.sqrt(0.3) * x_0 + math.sqrt(0.7) * z
    encoder = torch.distributions.Normal(math.sqrt(0.3) * x_0, math.sqrt(0.7))
    decoder = torch.distributions.Normal((x_1 - math.sqrt(0.7) * 0.5 * x_1) / math.sqrt(0.3), math.sqrt(0.7))
    prior = torch.distributions.Normal(torch.zeros_like(x_0), 1.0)
    kl = torch.distributions.kl_divergence(encoder, prior)
    bound = (kl - decoder.log_prob(x_0)).flatten(1).mean(dim=1) / math.log(2)
    assert torch.allclose(result.total, bound, rtol=1e-12)
    two_term = encoder.log_prob(x_1) - prior.log_prob(x_1) - decoder.log_prob(x_0)  # 6.10 with T = 1
    assert torch.allclose(result.two_term, two_term.flatten(1).mean(dim=1) / math.log(2), rtol=1e-12)


def test_the_two_forms_agree_within_the_monte_carlo_error(record_property):
    """Their variances are a matter of the model: none is always the smaller, docs/likelihood.md has measured ratios."""
    scheduler = AlphaDDPMScheduler(clip_sample=False, num_train_timesteps=50, beta_start=0.002, beta_end=0.3)
    x_0 = torch.full((20_000, 1, 1, 1), 0.75, dtype=torch.float64)
    options = {"num_bins": None, "batch_size": 20_000, "progress": False}
    chain = bits_per_dim(exact_noise(scheduler), scheduler, x_0, two_term=True, generator=generator(), **options)
    independent = bits_per_dim(exact_noise(scheduler), scheduler, x_0, generator=generator(1), **options)
    for totals in (chain.total, independent.total):
        error = float(chain.two_term.var() + totals.var()) ** 0.5 / math.sqrt(len(x_0))
        assert abs(float(chain.two_term.mean() - totals.mean())) < 4 * error
        record_property("variance ratio", float(chain.two_term.var() / totals.var()))
    assert independent.total.var() < chain.total.var()


def test_two_term_shares_the_network_calls():
    calls = []
    scheduler = AlphaDDPMScheduler(**SHORT)
    images = torch.zeros(3, 1, 2, 2) + 1 / 255
    bits_per_dim(lambda x, t: calls.append(int(t)) or 0 * x, scheduler, images, two_term=True, progress=False)
    assert calls == list(range(12))


# Against an independent implementation, on the same noise


def nichol_dhariwal_bits_per_dim(model, betas, x_0, noises, learned) -> np.ndarray:
    """The loop of Nichol & Dhariwal's `calc_bpd_loop`, in numpy float64 with scipy's normal distribution; x_0 clipped."""
    a = np.cumprod(1 - betas)
    before = np.append(1.0, a[:-1])
    posterior = betas * (1 - before) / (1 - a)
    log_posterior = np.log(np.append(posterior[1], posterior[1:]))
    total = np.zeros(len(x_0))
    for t in range(len(betas))[::-1]:
        x_t = np.sqrt(a[t]) * x_0 + np.sqrt(1 - a[t]) * noises[t]
        output = model(x_t, t)
        log_variance = log_posterior[t] * np.ones_like(x_0)
        if learned:
            output, raw = np.split(output, 2, axis=1)
            share = (raw + 1) / 2
            log_variance = share * np.log(betas[t]) + (1 - share) * log_posterior[t]
        predicted = np.clip(np.sqrt(1 / a[t]) * x_t - np.sqrt(1 / a[t] - 1) * output, -1, 1)

        def mean_of(x, x_t=x_t, t=t):
            return (np.sqrt(before[t]) * betas[t] * x + np.sqrt(1 - betas[t]) * (1 - before[t]) * x_t) / (1 - a[t])

        mean = mean_of(predicted)
        if t == 0:
            std = np.exp(0.5 * log_variance)
            upper = np.where(x_0 > 0.999, 1.0, norm.cdf(x_0 + 1 / 255, mean, std))
            lower = np.where(x_0 < -0.999, 0.0, norm.cdf(x_0 - 1 / 255, mean, std))
            term = -np.log(np.maximum(upper - lower, 1e-300))
        else:
            difference = (mean_of(x_0) - mean) ** 2 * np.exp(-log_variance)
            ratio = log_posterior[t] - log_variance
            term = 0.5 * (-1 - ratio + np.exp(ratio) + difference)
        total += term.reshape(len(x_0), -1).mean(axis=1) / np.log(2)
    prior = 0.5 * (-1 - np.log(1 - a[-1]) + (1 - a[-1]) + a[-1] * x_0**2)
    return total + prior.reshape(len(x_0), -1).mean(axis=1) / np.log(2)


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_agrees_with_the_loop_of_nichol_and_dhariwal(variance_type, kind):
    steps = 60
    kinds = {"stock": DDPMScheduler, "ours": AlphaDDPMScheduler}
    scheduler = kinds[kind](num_train_timesteps=steps, beta_end=0.15, variance_type=variance_type)
    learned = variance_type == "learned_range"
    unet = tiny_unet(2 if learned else 1)
    images = torch.randint(0, 256, (2, 1, 8, 8), generator=generator()).float() / 127.5 - 1
    noises = torch.randn(steps, *images.shape, generator=generator(1))

    def model(x_t, t):
        with torch.no_grad():
            return unet(torch.from_numpy(x_t).float(), t).sample.double().numpy()

    result = bits_per_dim(unet, scheduler, images, noise=lambda t, shape: noises[t], progress=False)
    betas = np.linspace(1e-4, 0.15, steps)
    expected = nichol_dhariwal_bits_per_dim(model, betas, images.double().numpy(), noises.double().numpy(), learned)
    assert np.abs(result.total.numpy() - expected).max() < 1e-4
    assert result.total.isfinite().all()


def tiny_unet(out_channels: int = 1, **options) -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8, in_channels=1, out_channels=out_channels, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"), **options,
        )  # fmt: skip


# What may be passed


def test_schedulers_of_other_kinds_and_other_bin_counts():
    images = torch.randint(0, 17, (2, 1, 8, 8), generator=generator()) / 8 - 1
    unet, ours = tiny_unet(), AlphaDDPMScheduler(**SHORT)
    totals = [
        bits_per_dim(unet, scheduler, images, num_bins=17, generator=generator(), progress=False).total
        for scheduler in (ours, DDIMScheduler(**SHORT), DPMSolverMultistepScheduler.from_config(ours.config))
    ]
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])


def test_the_given_scheduler_and_model_stay_as_they_are():
    scheduler, unet = AlphaDDPMScheduler(**SHORT), tiny_unet().train()
    scheduler.set_timesteps(3)
    before = torch.random.get_rng_state()
    result = bits_per_dim(unet, scheduler, torch.ones(1, 1, 8, 8), generator=generator(), progress=False)
    assert result.timesteps.tolist() == [list(range(12))]  # the full chain, whatever was in use
    assert scheduler.timesteps.tolist() == [8, 4, 0]
    assert unet.training
    assert torch.equal(before, torch.random.get_rng_state())


def test_likelihoods_are_those_of_the_network_without_dropout():
    scheduler, unet = AlphaDDPMScheduler(**SHORT), tiny_unet(dropout=0.5)
    images = torch.ones(2, 1, 8, 8)
    totals, moments = [], []
    for network in (unet.eval(), unet.train()):
        totals.append(bits_per_dim(network, scheduler, images, generator=generator(), progress=False).total)
        statistics = estimate_analytic_variance(network, scheduler, images, generator=generator(), progress=False)
        moments.append(statistics.noise_second_moments)
    assert unet.training
    assert torch.equal(*totals) and torch.equal(*moments)


def test_an_images_bits_do_not_depend_on_the_batch():
    images = torch.randint(0, 256, (5, 1, 8, 8), generator=generator()) / 127.5 - 1
    scheduler, unet = AlphaDDPMScheduler(**SHORT), tiny_unet()
    for options in ({}, {"num_evaluated": 7}, {"two_term": True}):
        results = [
            bits_per_dim(
                unet, scheduler, images, batch_size=size, generator=[generator(i) for i in range(5)], progress=False, **options
            )
            for size in (1, 2, 5)
        ]
        assert torch.allclose(results[0].total, results[1].total, atol=1e-5)
        assert torch.allclose(results[0].total, results[2].total, atol=1e-5)
        assert torch.equal(results[0].timesteps, results[2].timesteps)


def test_conditions_are_cut_along_with_the_images():
    images = torch.randint(0, 256, (5, 1, 8, 8), generator=generator()) / 127.5 - 1
    labels = torch.arange(5)
    unet, scheduler = tiny_unet(num_class_embeds=5), AlphaDDPMScheduler(**SHORT)

    def total(rows):
        generators = [generator(i) for i in range(5)]
        options = {"generator": [generators[row] for row in rows], "batch_size": 2, "progress": False}
        return bits_per_dim(unet, scheduler, images[rows], model_kwargs={"class_labels": labels[rows]}, **options).total

    together = total([0, 1, 2, 3, 4])
    assert torch.allclose(together, torch.cat([total([row]) for row in range(5)]), atol=1e-5)
    swapped = bits_per_dim(
        unet, scheduler, images, model_kwargs={"class_labels": labels.flip(0)}, generator=[generator(i) for i in range(5)],
        progress=False,
    ).total  # fmt: skip
    assert not torch.allclose(together, swapped, atol=1e-3)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(1, 1, 8, 8), {}, "off the 256 levels"),
        (torch.full((1, 1, 8, 8), 255.0), {}, "or outside"),
        (torch.full((1, 1, 8, 8), torch.nan), {}, "off the 256 levels"),
        (torch.ones(1, 1, 8, 8, dtype=torch.uint8), {}, "floating-point"),
        (torch.ones(8), {}, "floating-point"),
        (torch.ones(1, 8, 8), {}, r"this network takes floating-point \[B, 1, H, W\]"),
        (torch.ones(1, 3, 8, 8), {}, "this network takes"),
        (torch.ones(1, 1, 8, 8), {"num_bins": 1}, "num_bins=1"),
        (torch.ones(1, 1, 8, 8), {"num_bins": (256, 256)}, "num_bins=.256, 256. must be at least 2, 1 such numbers"),
        (torch.ones(1, 1, 8, 8), {"num_evaluated": 2}, "num_evaluated=2"),
        (torch.ones(1, 1, 8, 8), {"num_evaluated": 4, "two_term": True}, "whole chains"),
        (torch.ones(2, 1, 8, 8), {"generator": [torch.Generator()]}, "1 generators for 2"),
        (torch.ones(1, 1, 8, 8), {"num_inference_steps": 13}, "num_inference_steps=13"),
        (torch.ones(1, 1, 8, 8), {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_cannot_be_used_is_named(images, options, message):
    with pytest.raises(ValueError, match=message):
        bits_per_dim(tiny_unet(), AlphaDDPMScheduler(**SHORT), images, progress=False, **options)


def test_a_network_of_half_precision_reads_numbers():
    pipe = condition_models.pipeline(1, None, AGE).to(dtype=torch.bfloat16)
    told = {"class_labels": AGE.encode(torch.tensor([[30.0]]), embedding_width(pipe.unet))}
    how = {"num_inference_steps": 2, "progress": False}
    assert bits_per_dim(pipe.unet, pipe.scheduler, torch.ones(1, 1, 8, 16), model_kwargs=told, **how).total.isfinite().all()


def test_all_images_are_checked_before_the_network_is_called():
    images = torch.tensor([1.0, 0.3]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    with pytest.raises(ValueError, match="off the 256 levels"):
        bits_per_dim(Mock(side_effect=AssertionError), AlphaDDPMScheduler(**SHORT), images, batch_size=1, progress=False)


def test_a_density_in_own_units_is_the_probability_of_narrow_bins():
    """A density of x in [-1, 1] is that of the data's own values once the logarithm of half their range is added."""
    scheduler = AlphaDDPMScheduler(**SHORT)
    values = torch.randint(2000, 60_000, (3, 2, 4, 6), generator=generator())  # inside: the outer bins are open
    images = values.float() / 32767.5 - 1  # float32, as of the loader
    options = {"num_inference_steps": 6, "noise": lambda t, shape: torch.zeros(shape), "progress": False}
    found = {
        bins: bits_per_dim(lambda x, t: 0.5 * x, scheduler, images, num_bins=bins, **options).total
        for bins in (65536, (65536, 65536), None)
    }
    assert torch.equal(found[65536], found[65536, 65536])
    assert torch.allclose(found[None] + math.log2(65535 / 2), found[65536], rtol=0, atol=1e-4)


# The stratified subset


def test_the_subset_is_unbiased_and_its_error_is_right():
    """Over many draws with the noise held fixed, the mean is the full chain's value, the spread the stated error."""
    scheduler = AlphaDDPMScheduler(num_train_timesteps=100, beta_start=0.001, beta_end=0.2)
    images = torch.full((4000, 1, 1, 1), 51 / 127.5 - 1)

    def model(x_t, t):  # the terms then depend on the timestep alone, but for the noise, which cancels
        a = signal(scheduler, t).to(x_t)
        x_0 = images[0].double()
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt() * 0 + (x_t - a.sqrt() * (x_0 + 0.2)) / (1 - a).sqrt()

    full = bits_per_dim(model, scheduler, images[:1], generator=generator(), progress=False)
    for calls in (3, 8, 21, 60):
        part = bits_per_dim(
            model, scheduler, images, num_evaluated=calls, generator=generator(), batch_size=4000, progress=False
        )
        assert part.terms.shape == (4000, calls)
        spread = part.total.std()
        assert abs(part.total.mean() - full.total[0]) < 4.5 * spread / math.sqrt(4000)
        assert float(part.standard_error.square().mean().sqrt()) == pytest.approx(float(spread), rel=0.15)
        rows = part.timesteps.sort(dim=1).values
        assert (rows.diff(dim=1) > 0).all()  # no timestep twice
    assert float(part.standard_error.mean()) < 0.05 * float(full.total[0])


def test_a_subset_of_everything_is_the_full_chain():
    scheduler, images = AlphaDDPMScheduler(**SHORT), torch.ones(2, 1, 8, 8)
    whole = bits_per_dim(tiny_unet(), scheduler, images, generator=generator(), progress=False)
    same = bits_per_dim(tiny_unet(), scheduler, images, num_evaluated=12, generator=generator(), progress=False)
    assert torch.equal(whole.total, same.total)
    assert (same.standard_error == 0).all()


@pytest.mark.parametrize("shape", [(1, 16), (16,), (1, 2, 2, 4), (2, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_evaluated": 4}, {"two_term": True}, {"num_bins": None}], ids=str)
def test_signals_and_volumes_have_the_bound_of_the_same_numbers_as_images(shape, options):
    """For a network that treats every value alike, the shape of the data does not matter."""
    images = torch.randint(0, 256, (2, 1, 4, 4), generator=generator()) / 127.5 - 1
    found = [
        bits_per_dim(
            lambda x, t: 0.5 * x, AlphaDDPMScheduler(20, beta_schedule="squaredcos_cap_v2"), images.view(2, *of),
            generator=[generator(1), generator(2)], progress=False, **options,
        )
        for of in ((1, 4, 4), shape)
    ]  # fmt: skip
    torch.testing.assert_close(found[0].total, found[1].total)
