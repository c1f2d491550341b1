"""What must hold between the scheduler's formulas, whatever its numbers: Bayes, composition, inverses, telescoping."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

from ddpm_pipeline import AlphaDDPMScheduler, Moments
from ddpm_pipeline.tables_alpha_ddpm import LEARNED_VARIANCE_TYPES, VARIANCE_TYPES

SHAPE = (3, 2, 4, 5)
CHAINS = {"full": None, "respaced": 10, "irregular": [970, 801, 800, 333, 41, 5, 2], "one step": [617]}


def images(seed: int, *, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scheduler_on(chain: str, **config) -> AlphaDDPMScheduler:
    scheduler = AlphaDDPMScheduler(**{"clip_sample": False} | config)
    steps = CHAINS[chain]
    if isinstance(steps, int):
        scheduler.set_timesteps(steps)
    elif steps:
        scheduler.set_timesteps(timesteps=steps)
    return scheduler


def neighbours(scheduler: AlphaDDPMScheduler) -> list[tuple[int, int]]:
    """Some (s, t) of the chain in use, its first and last step among them."""
    ascending = scheduler.timesteps.tolist()[::-1]
    pairs = list(zip([-1, *ascending], ascending, strict=False))
    return sorted({*pairs[:3], *pairs[:: max(1, len(pairs) // 5)], pairs[-1]})


def log_density(x: torch.Tensor, moments: Moments) -> torch.Tensor:
    return -0.5 * ((x - moments.mean) ** 2 / moments.variance + moments.log_variance + math.log(2 * math.pi))


def signal_and_variance(scheduler: AlphaDDPMScheduler, t: int) -> tuple[float, float]:
    """√ᾱ_t and 1-ᾱ_t; 1 and 0 for clean data."""
    if t < 0:
        return 1.0, 0.0
    moments = scheduler.q_mean_variance(torch.ones(1, 1, 1, 1, dtype=torch.float64), t)
    return moments.mean.item(), moments.variance.item()


def single(moments: Moments) -> Moments:
    assert moments.variance.numel() == moments.log_variance.numel() == 1
    return moments


# ---- Gaussians multiplied and composed ------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS)
def test_bayes_holds_pointwise(chain):
    """q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s) q(x_s | x_0), report eq. 5.2."""
    scheduler = scheduler_on(chain)
    x_0, x_s, x_t = images(1), images(2), images(3)
    for s, t in neighbours(scheduler):
        if s < 0:
            continue  # q(x_0 | x_t, x_0) is a point
        left = log_density(x_s, scheduler.q_posterior(x_0, x_t, t)) + log_density(x_t, scheduler.q_mean_variance(x_0, t))
        right = log_density(x_t, scheduler.forward_mean_variance(x_s, t)) + log_density(x_s, scheduler.q_mean_variance(x_0, s))
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chain", CHAINS)
def test_posterior_precision_is_the_sum_of_precisions(chain):
    """1/β̃ = α/(1-α) + 1/(1-ᾱ_s): report eq. 5.7 with the slip corrected that calls this sum the variance."""
    scheduler = scheduler_on(chain)
    for s, t in neighbours(scheduler):
        forward = single(scheduler.forward_mean_variance(images(1), t))
        posterior = single(scheduler.q_posterior(images(1), images(2), t))
        _, variance_s = signal_and_variance(scheduler, s)
        if s < 0:
            assert posterior.variance.item() == 0
            assert posterior.log_variance.item() == -math.inf
            continue
        beta = forward.variance.item()
        assert 1 / posterior.variance.item() == pytest.approx((1 - beta) / beta + 1 / variance_s, rel=1e-12)
        assert posterior.log_variance.exp().item() == pytest.approx(posterior.variance.item(), rel=1e-12)


@pytest.mark.parametrize("chain", CHAINS)
def test_posterior_of_clean_data_is_clean_data(chain):
    scheduler = scheduler_on(chain)
    first = scheduler.timesteps[-1].item()
    torch.testing.assert_close(scheduler.q_posterior(images(1), images(2), first).mean, images(1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("seed", range(8))
def test_any_partition_composes_to_the_marginal(seed):
    """q(x_t | x_s) over any 0 < ... < t gives q(x_t | x_0), mean and variance."""
    random = np.random.default_rng(seed)
    scheduler = AlphaDDPMScheduler(beta_schedule=("linear", "squaredcos_cap_v2", "sigmoid", "laplace")[seed % 4])
    partition = sorted(random.choice(1000, size=random.integers(1, 200), replace=False).tolist(), reverse=True)
    scheduler.set_timesteps(timesteps=partition)
    mean, variance = images(seed), 0.0
    for t in partition[::-1]:
        forward = scheduler.forward_mean_variance(mean, t)
        share_kept = (scheduler.forward_mean_variance(torch.ones_like(mean), t).mean.flatten()[0] ** 2).item()
        mean, variance = forward.mean, share_kept * variance + forward.variance.item()
    whole = scheduler.q_mean_variance(images(seed), partition[0])
    torch.testing.assert_close(mean, whole.mean, rtol=1e-12, atol=0)
    assert variance == pytest.approx(whole.variance.item(), rel=1e-12)


def test_squared_noise_weights_telescope():
    """Report eq. 4.9: Σ_i α_t⋯α_{i+1} (1-α_i) = 1-ᾱ_t, and the weight of x_0 is √ᾱ_t, eq. 4.4."""
    scheduler = AlphaDDPMScheduler()
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    steps = [scheduler.forward_mean_variance(one, t) for t in range(1000)]
    alphas = [step.mean.item() ** 2 for step in steps]
    for t in (0, 1, 2, 10, 400, 999):
        weights = [math.prod(alphas[i + 1 : t + 1]) * steps[i].variance.item() for i in range(t + 1)]
        signal, variance = signal_and_variance(scheduler, t)
        assert math.fsum(weights) == pytest.approx(variance, rel=1e-12)
        assert math.prod(alphas[: t + 1]) == pytest.approx(signal**2, rel=1e-12)
        assert math.fsum([*weights, math.prod(alphas[: t + 1])]) == pytest.approx(1, rel=1e-13)


@pytest.mark.parametrize("chain", CHAINS)
def test_iterated_steps_equal_the_closed_form_with_merged_noise(chain):
    """Report eq. 4.2 to 4.10: the z_i of all steps, merged into one z̃ by their weights, give the same x_t."""
    scheduler = scheduler_on(chain)
    ascending = scheduler.timesteps.tolist()[::-1]
    x_t = x_0 = images(0)
    merged = torch.zeros_like(x_0)
    for i, t in enumerate(ascending):
        noise = images(i + 1)
        x_t = scheduler.forward_step(x_t, t, noise)
        merged = scheduler.forward_step(merged, t, noise)
    _, variance = signal_and_variance(scheduler, ascending[-1])
    torch.testing.assert_close(scheduler.add_noise(x_0, merged / math.sqrt(variance), ascending[-1]), x_t)


def test_forward_step_and_its_moments_agree():
    scheduler = scheduler_on("respaced")
    for _, t in neighbours(scheduler):
        moments = scheduler.forward_mean_variance(images(1), t)
        expected = moments.mean + moments.variance.sqrt() * images(2)
        torch.testing.assert_close(scheduler.forward_step(images(1), t, images(2)), expected, rtol=1e-13, atol=1e-15)


# ---- inverses and parametrisations ----------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_prediction_inverts_noising(prediction_type):
    """A network that answers with its training target gives x_0 back."""
    scheduler = AlphaDDPMScheduler(prediction_type=prediction_type)
    x_0, noise = images(1, shape=(7, *SHAPE[1:])), images(2, shape=(7, *SHAPE[1:]))
    timesteps = torch.tensor([0, 1, 2, 50, 300, 700, 999])
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    target = scheduler.training_target(x_0, noise, timesteps)
    found = scheduler.predict_original_sample(target, timesteps, x_t)
    torch.testing.assert_close(found, x_0, rtol=1e-11, atol=1e-11)


def test_training_targets_by_name():
    x_0, noise = images(1), images(2)
    assert AlphaDDPMScheduler().training_target(x_0, noise, 5) is noise
    assert AlphaDDPMScheduler(prediction_type="sample").training_target(x_0, noise, 5) is x_0
    scheduler = AlphaDDPMScheduler(prediction_type="v_prediction")
    signal, variance = signal_and_variance(scheduler, 5)
    expected = signal * noise - math.sqrt(variance) * x_0
    torch.testing.assert_close(scheduler.training_target(x_0, noise, 5), expected, rtol=1e-13, atol=1e-15)


def test_velocity_is_the_turned_pair():
    """(x_t, v) is (x_0, z̃) turned by an angle, so lengths stay: x_t² + v² = x_0² + z̃²."""
    scheduler = AlphaDDPMScheduler()
    for t in (0, 17, 500, 999):
        turned = scheduler.add_noise(images(1), images(2), t) ** 2 + scheduler.get_velocity(images(1), images(2), t) ** 2
        torch.testing.assert_close(turned, images(1) ** 2 + images(2) ** 2)


@pytest.mark.parametrize("chain", CHAINS)
def test_mean_in_the_noise_is_the_posterior_mean(chain):
    """Report eq. 5.8: (x_t - (1-α)/√(1-ᾱ_t) z̃)/√α equals q's posterior mean of the x_0 that z̃ stands for."""
    scheduler = scheduler_on(chain)
    x_0, noise = images(1), images(2)
    for _, t in neighbours(scheduler):
        x_t = scheduler.add_noise(x_0, noise, t)
        one = scheduler.forward_mean_variance(torch.ones_like(x_0), t)
        _, variance = signal_and_variance(scheduler, t)
        in_the_noise = (x_t - one.variance / math.sqrt(variance) * noise) / one.mean
        torch.testing.assert_close(in_the_noise, scheduler.q_posterior(x_0, x_t, t).mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scheduler.p_mean_variance(noise, t, x_t).mean, in_the_noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_reverse_mean_does_not_depend_on_the_parametrisation(prediction_type):
    x_0, noise = images(1), images(2)
    by_noise, other = AlphaDDPMScheduler(), AlphaDDPMScheduler(prediction_type=prediction_type)
    for t in (0, 1, 250, 999):
        x_t = by_noise.add_noise(x_0, noise, t)
        expected = by_noise.p_mean_variance(noise, t, x_t)
        found = other.p_mean_variance(other.training_target(x_0, noise, t), t, x_t)
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.pred_original_sample, expected.pred_original_sample, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chain", CHAINS)
def test_variances_in_their_order(chain):
    """β̃ ≤ σ*² ≤ (1-α)/α, with equality at Γ = 1 and Γ = 0; β̃ ≤ 1-α; learned_range goes from one to the other."""
    small, large, learned = (scheduler_on(chain, variance_type=v) for v in ("fixed_small", "fixed_large", "learned_range"))
    analytic = {
        gamma: scheduler_on(chain, variance_type="analytic", noise_second_moments=[gamma] * 1000)
        for gamma in (0.0, 0.4, 1.0, 1.7)  # above 1 by sampling error counts as 1
    }
    for s, t in neighbours(small):
        low, high = (x.p_mean_variance(images(1), t, images(2)).variance.item() for x in (small, large))
        stars = [analytic[g].p_mean_variance(images(1), t, images(2)).variance.item() for g in (1.7, 1.0, 0.4, 0.0)]
        assert low <= high * (1 + 1e-12) or s < 0  # into clean data β̃ is borrowed from the neighbour
        if s >= 0:
            assert stars[0] == stars[1] == pytest.approx(low, rel=1e-12)
            assert stars[1] < stars[2] < stars[3]
        assert stars[3] == pytest.approx(high / (1 - high), rel=1e-9)
        for raw, bound in ((-1.0, low), (1.0, high), (0.0, math.sqrt(low * high))):
            output = torch.cat([images(1), torch.full(SHAPE, raw, dtype=torch.float64)], dim=1)
            found = learned.p_mean_variance(output, t, images(2)).variance
            torch.testing.assert_close(found, torch.full(SHAPE, bound, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["fixed_small", "fixed_large"])
def test_log_forms_are_the_same_quantities(name):
    for t in (0, 1, 500):
        plain, log = (
            AlphaDDPMScheduler(variance_type=v).p_mean_variance(images(1), t, images(2)) for v in (name, name + "_log")
        )
        assert torch.equal(plain.variance, log.variance)
        assert torch.equal(plain.log_variance, log.log_variance)


# ---- the step -------------------------------------------------------------------------------------


def config_for(variance_type: str) -> dict:
    second_moments = np.random.default_rng(0).uniform(0, 1, 1000).tolist()
    return {"variance_type": variance_type} | ({"noise_second_moments": second_moments} if variance_type == "analytic" else {})


def output_for(variance_type: str, seed: int = 4) -> torch.Tensor:
    batch, channels, *rest = SHAPE
    return images(seed, shape=(batch, channels * (1 + (variance_type in LEARNED_VARIANCE_TYPES)), *rest))


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("chain", CHAINS)
def test_step_draws_from_the_reverse_moments(chain, variance_type):
    """x_s = mean + √variance · noise, and the mean itself where s is clean data."""
    scheduler = scheduler_on(chain, **config_for(variance_type))
    output, x_t = output_for(variance_type), images(5)
    for s, t in neighbours(scheduler):
        moments = scheduler.p_mean_variance(output, t, x_t)
        found = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(t))
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        expected = moments.mean + (moments.variance.sqrt() * noise if s >= 0 else 0)
        torch.testing.assert_close(found.prev_sample, expected, rtol=1e-12, atol=1e-13)
        assert torch.equal(found.pred_original_sample, moments.pred_original_sample)


def test_step_leaves_its_arguments_alone():
    scheduler = AlphaDDPMScheduler(variance_type="learned_range", clip_sample=False, prediction_type="sample")
    output, x_t = output_for("learned_range"), images(5)
    kept = output.clone(), x_t.clone()
    for t in (0, 500):
        result = scheduler.step(output, t, x_t)
        result.prev_sample.zero_()
        scheduler.p_mean_variance(output, t, x_t).mean.zero_()
    assert torch.equal(output, kept[0])
    assert torch.equal(x_t, kept[1])


def test_step_as_a_tuple():
    scheduler = AlphaDDPMScheduler()
    named = scheduler.step(images(1), 9, images(2), generator=torch.Generator().manual_seed(0))
    plain = scheduler.step(images(1), 9, images(2), generator=torch.Generator().manual_seed(0), return_dict=False)
    assert torch.equal(named.prev_sample, plain[0])
    assert torch.equal(named.pred_original_sample, plain[1])


def test_one_generator_an_image_makes_images_independent_of_their_batch():
    scheduler = AlphaDDPMScheduler()
    output, x_t = images(1), images(2)
    together = scheduler.step(output, 9, x_t, [torch.Generator().manual_seed(i) for i in range(len(x_t))]).prev_sample
    for i in range(len(x_t)):
        alone = scheduler.step(output[i : i + 1], 9, x_t[i : i + 1], torch.Generator().manual_seed(i)).prev_sample
        assert torch.equal(together[i : i + 1], alone)
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        scheduler.step(output, 9, x_t, [torch.Generator(), torch.Generator()])


def test_gradients_pass_through_the_reverse_moments():
    """Learned variances are trained through them."""
    scheduler = AlphaDDPMScheduler(variance_type="learned_range", clip_sample=False)
    output = output_for("learned_range").requires_grad_()
    moments = scheduler.p_mean_variance(output, torch.tensor([0, 4, 900]), images(5))
    (moments.mean.sum() + moments.log_variance.sum() + moments.variance.sum()).backward()
    assert output.grad.isfinite().all()
    assert (output.grad[1:] != 0).all()
    # at timestep 0 the bounds are 1-α_1 and the neighbouring β̃, which differ, so its variance is learned as well
    assert (output.grad[0] != 0).all()


# ---- timesteps and dtypes -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_timestep_an_image_equals_one_call_an_image(prediction_type, variance_type, dtype):
    scheduler = scheduler_on("irregular", prediction_type=prediction_type, **config_for(variance_type))
    timesteps = torch.tensor([970, 41, 2])
    x, y, noise = images(1, dtype=dtype), images(2, dtype=dtype), images(3, dtype=dtype)
    output = output_for(variance_type).to(dtype)
    close = {"rtol": 1e-13, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6}

    def check(method, *arguments):
        """`method` with [B] timesteps against itself with a host int, image by image; arguments hold None for t."""
        together = method(*(timesteps if a is None else a for a in arguments))
        for i, t in enumerate(timesteps.tolist()):
            alone = method(*(t if a is None else a[i : i + 1] for a in arguments))
            for name in vars(together) if isinstance(together, Moments) else [None]:
                whole, part = (together, alone) if name is None else (getattr(together, name), getattr(alone, name))
                assert whole.dtype == part.dtype == dtype
                torch.testing.assert_close(whole[i : i + 1], part, **close)

    check(scheduler.add_noise, x, noise, None)
    check(scheduler.forward_step, x, None, noise)
    check(scheduler.forward_mean_variance, x, None)
    check(scheduler.q_mean_variance, x, None)
    check(scheduler.get_velocity, x, noise, None)
    check(scheduler.training_target, x, noise, None)
    check(scheduler.q_posterior, x, y, None)
    check(scheduler.predict_original_sample, output, None, y)
    check(scheduler.p_mean_variance, output, None, y)

    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    together = scheduler.step(output, timesteps, y, generators)
    for i, t in enumerate(timesteps.tolist()):
        alone = scheduler.step(output[i : i + 1], t, y[i : i + 1], torch.Generator().manual_seed(i))
        torch.testing.assert_close(together.prev_sample[i : i + 1], alone.prev_sample, **close)
        torch.testing.assert_close(together.pred_original_sample[i : i + 1], alone.pred_original_sample, **close)


def test_a_timestep_is_a_timestep_in_any_form():
    scheduler = AlphaDDPMScheduler()
    expected = scheduler.add_noise(images(1), images(2), 37)
    for timestep in (np.int64(37), np.uint8(37), torch.tensor(37), torch.tensor(37, dtype=torch.int32)):
        assert torch.equal(scheduler.add_noise(images(1), images(2), timestep), expected)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        for length in (1, SHAPE[0]):
            found = scheduler.add_noise(images(1), images(2), torch.full((length,), 37, dtype=dtype))
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("timesteps", [3, torch.tensor([0, 3, 900])])
def test_half_precision_is_noised_in_float32(dtype, timesteps):
    """Exactly the float32 result, rounded once."""
    scheduler = AlphaDDPMScheduler(prediction_type="v_prediction")
    half = [images(seed, dtype=dtype) for seed in (1, 2, 3)]
    single = [x.float() for x in half]

    def equal(found, expected):
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype))

    equal(scheduler.add_noise(*half[:2], timesteps), scheduler.add_noise(*single[:2], timesteps))
    equal(scheduler.get_velocity(*half[:2], timesteps), scheduler.get_velocity(*single[:2], timesteps))
    equal(scheduler.forward_step(half[0], timesteps, half[1]), scheduler.forward_step(single[0], timesteps, single[1]))
    equal(
        scheduler.predict_original_sample(half[0], timesteps, half[1]),
        scheduler.predict_original_sample(single[0], timesteps, single[1]),
    )
    for moments in (
        scheduler.q_mean_variance(half[0], timesteps),
        scheduler.q_posterior(half[0], half[1], timesteps),
        scheduler.p_mean_variance(half[0], timesteps, half[1]),
    ):
        assert {x.dtype for x in vars(moments).values()} == {torch.float32}

    moments = scheduler.p_mean_variance(half[0], timesteps, half[1])
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype).float()
    gate = (torch.as_tensor(timesteps) > 0).view(-1, 1, 1, 1)
    expected = moments.mean + gate * moments.variance.sqrt() * noise
    found = scheduler.step(half[0], timesteps, half[1], torch.Generator().manual_seed(0))
    assert found.prev_sample.dtype == found.pred_original_sample.dtype == dtype
    torch.testing.assert_close(found.prev_sample, expected.to(dtype))


def test_small_timesteps_survive_bfloat16():
    """1-ᾱ_0 = 1e-4 is far below bfloat16's resolution at 1, but the noise it scales is not."""
    scheduler = AlphaDDPMScheduler()
    noisy = scheduler.add_noise(torch.zeros(SHAPE, dtype=torch.bfloat16), images(1, dtype=torch.bfloat16), 0)
    torch.testing.assert_close(noisy.double(), 0.01 * images(1, dtype=torch.bfloat16).double(), rtol=1e-2, atol=0)


def test_mixed_dtypes_follow_the_images():
    scheduler = AlphaDDPMScheduler()
    noisy = scheduler.add_noise(images(1), images(2, dtype=torch.float32), 5)
    assert noisy.dtype == torch.float64
    step = scheduler.step(images(1, dtype=torch.bfloat16), 5, images(2, dtype=torch.float32))
    assert step.prev_sample.dtype == torch.float32
    for x_0, x_t in itertools.permutations((images(1), images(2, dtype=torch.float32))):
        assert scheduler.q_posterior(x_0, x_t, 5).mean.dtype == x_t.dtype


# ---- the chain ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS)
def test_previous_timestep_walks_the_chain_to_clean_data(chain):
    scheduler = scheduler_on(chain)
    walked, t = [], scheduler.timesteps[0].item()
    while t >= 0:
        walked.append(t)
        t = int(scheduler.previous_timestep(torch.tensor(t) if len(walked) % 2 else t))
    assert t == -1
    assert walked == scheduler.timesteps.tolist()


def test_setting_timesteps_replaces_the_chain():
    scheduler = AlphaDDPMScheduler()
    full = scheduler.q_posterior(images(1), images(2), 900)
    scheduler.set_timesteps(10)
    respaced = scheduler.q_posterior(images(1), images(2), 900)
    assert scheduler.previous_timestep(900) == 800
    assert not torch.allclose(full.mean, respaced.mean)
    scheduler.set_timesteps(1000)
    assert torch.equal(scheduler.q_posterior(images(1), images(2), 900).mean, full.mean)
    for t in (0, 900):  # what belongs to x_0 -> x_t belongs to no chain
        scheduler.set_timesteps(timesteps=[900, 0])
        a = scheduler.add_noise(images(1), images(2), t)
        scheduler.set_timesteps(timesteps=[899, 450])
        assert torch.equal(scheduler.add_noise(images(1), images(2), t), a)


def test_stored_sub_sequences_are_used_for_their_number_of_steps():
    stored = {"3": [999, 700, 11], "1": [998]}
    scheduler = AlphaDDPMScheduler(inference_timesteps=stored)
    for count, timesteps in stored.items():
        scheduler.set_timesteps(int(count))
        assert scheduler.timesteps.tolist() == timesteps
        assert not scheduler.custom_timesteps
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [500, 0]


def test_log_snr_is_the_log_ratio_of_the_marginal():
    scheduler = AlphaDDPMScheduler()
    timesteps = torch.tensor([0, 500, 999])
    moments = scheduler.q_mean_variance(torch.ones(SHAPE, dtype=torch.float64), timesteps)
    expected = (moments.mean[:, :1, :1, :1] ** 2 / moments.variance).log()
    torch.testing.assert_close(scheduler.log_snr(timesteps, images(1)), expected, rtol=1e-12, atol=1e-12)
    for t, value in zip(timesteps.tolist(), expected.flatten().tolist(), strict=True):
        assert scheduler.log_snr(t, images(1)) == pytest.approx(value, rel=1e-12)
    descending = scheduler.log_snr(torch.arange(1000), torch.zeros(1000, 1, 1, 1, dtype=torch.float64)).flatten()
    assert (descending.diff() < 0).all()


def test_zero_terminal_snr_ends_in_pure_noise():
    scheduler = AlphaDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    plain = AlphaDDPMScheduler()
    assert torch.equal(scheduler.add_noise(images(1), images(2), 999), images(2))
    assert scheduler.log_snr(999, images(1)) == -math.inf
    assert torch.equal(scheduler.get_velocity(images(1), images(2), 999), -images(1))
    assert signal_and_variance(scheduler, 0) == signal_and_variance(plain, 0)


def test_from_alphas_takes_the_constants_of_the_report():
    alphas = np.linspace(0.999, 0.95, 300)
    for given in (alphas, alphas.tolist(), torch.from_numpy(alphas)):
        scheduler = AlphaDDPMScheduler.from_alphas(given, variance_type="fixed_large")
        assert len(scheduler) == 300
        assert scheduler.variance_type == "fixed_large"
        kept = scheduler.forward_mean_variance(torch.ones(1, 1, 1, 1, dtype=torch.float64), 299).mean
        assert kept.item() ** 2 == pytest.approx(0.95, rel=1e-14)
        assert scheduler.config.trained_betas == (1 - alphas).tolist()


def test_step_output_is_diffusers_own_in_every_use():
    sample, output = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    step = AlphaDDPMScheduler().step(output, 500, sample, generator=torch.Generator().manual_seed(0))
    assert isinstance(step, DDPMSchedulerOutput)
    assert list(step.keys()) == ["prev_sample", "pred_original_sample"]
    assert step["prev_sample"] is step.prev_sample is step[0] is step.to_tuple()[0]
    assert copy.deepcopy(step).pred_original_sample.equal(step[1])
    leaves, structure = torch.utils._pytree.tree_flatten(step)
    assert len(leaves) == 2 and torch.utils._pytree.tree_unflatten(leaves, structure)[0] is step.prev_sample


def test_clipping_leaves_the_networks_output_alone():
    scheduler = AlphaDDPMScheduler(prediction_type="sample")
    output = torch.full((1, 1, 2, 2), 3.0)
    scheduler.step(output, 500, torch.zeros(1, 1, 2, 2))
    assert (output == 3).all()
