"""Every table of the scheduler against 50 digits: the definitions in mpmath, written without looking at the scheduler."""

import functools
import itertools
import warnings

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mpf

from ddpm_pipeline import AlphaDDPMScheduler
from ddpm_pipeline.tables_alpha_ddpm import PREDICTION_TYPES

mpmath.mp.dps = 50

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "alphas", "trained_betas")
TABLE_CASES = [
    (schedule, length, zero_snr)
    for schedule, length, zero_snr in itertools.product(SCHEDULES, (1, 2, 1000, 4000), (False, True))
    if length > 1 or not zero_snr
]
# what is computed from the tables is the same for every schedule: one that ends with signal, and one that hardly does
CASES = [("linear", 1), ("linear", 2), ("linear", 1000), ("squaredcos_cap_v2", 2), ("squaredcos_cap_v2", 1000)]
BETA_START, BETA_END = 0.0001, 0.02
RELATIVE = 1e-12
STEP_RELATIVE = 1e-10


def given_betas(length: int) -> np.ndarray:
    return np.geomspace(3e-5, 0.3 if length < 1000 else 0.03, length) * np.random.default_rng(1).uniform(0.5, 1, length)


def given_alphas(length: int) -> np.ndarray:
    return 1 - given_betas(length)


# ---- 50 digits ------------------------------------------------------------------------------------


def exact_betas(schedule: str, length: int) -> list[mpf]:
    """β_1..β_T as diffusers defines them; the decimals of its alpha_bar functions taken as they are printed."""
    start, end = mpf(BETA_START), mpf(BETA_END)
    fractions = [mpf(i) / (length - 1) if length > 1 else mpf(0) for i in range(length)]
    if schedule == "linear":
        return [start + (end - start) * u for u in fractions]
    if schedule == "scaled_linear":
        return [(mpmath.sqrt(start) + (mpmath.sqrt(end) - mpmath.sqrt(start)) * u) ** 2 for u in fractions]
    if schedule == "sigmoid":
        return [(end - start) / (1 + mpmath.exp(6 - 12 * u)) + start for u in fractions]
    if schedule == "alphas":
        return [1 - mpf(float(alpha)) for alpha in given_alphas(length)]
    if schedule == "trained_betas":
        return [mpf(float(beta)) for beta in given_betas(length)]
    alpha_bar = {"squaredcos_cap_v2": exact_cosine, "laplace": exact_laplace}[schedule]
    values = [alpha_bar(mpf(i) / length) for i in range(length + 1)]
    return [min(1 - after / before, mpf("0.999")) for before, after in itertools.pairwise(values)]


def exact_cosine(u: mpf) -> mpf:
    return mpmath.cos((u + mpf("0.008")) / mpf("1.008") * mpmath.pi / 2) ** 2


def exact_laplace(u: mpf) -> mpf:
    sign = 1 if u <= mpf(1) / 2 else -1
    half_log_snr = -mpf(sign) / 2 * mpmath.log(1 - 2 * abs(mpf(1) / 2 - u) + mpf("1e-6"))
    snr = mpmath.exp(half_log_snr)
    return mpmath.sqrt(snr / (1 + snr))


@functools.lru_cache
def exact_alphas_cumprod(schedule: str, length: int, zero_snr: bool) -> list[mpf]:
    """ᾱ_t for every timestep, with ᾱ = 1 of clean data as the last entry, so that index -1 is clean data."""
    product, products = mpf(1), []
    for beta in exact_betas(schedule, length):
        product *= 1 - beta
        products.append(product)
    if zero_snr:
        roots = [mpmath.sqrt(p) for p in products]
        scale = roots[0] / (roots[0] - roots[-1])
        products = [((root - roots[-1]) * scale) ** 2 for root in roots]
    return [*products, mpf(1)]


class ExactStep:
    """The formulas of report §4 and §5 between s < t, from ᾱ alone."""

    def __init__(self, alpha_cumprod: mpf, alpha_cumprod_prev: mpf):
        self.signal = mpmath.sqrt(alpha_cumprod)
        self.variance = 1 - alpha_cumprod
        self.std = mpmath.sqrt(self.variance)
        self.alpha = alpha_cumprod / alpha_cumprod_prev
        self.beta = 1 - self.alpha
        self.posterior_x0 = mpmath.sqrt(alpha_cumprod_prev) * self.beta / self.variance
        self.posterior_xt = mpmath.sqrt(self.alpha) * (1 - alpha_cumprod_prev) / self.variance
        self.posterior_variance = (1 - alpha_cumprod_prev) / self.variance * self.beta

    def analytic_variance(self, noise_second_moment: float) -> mpf:
        return self.posterior_variance + self.beta**2 / (self.alpha * self.variance) * (1 - mpf(noise_second_moment))

    def x0(self, prediction_type: str, x_t: mpf, output: mpf) -> mpf:
        if prediction_type == "epsilon":
            return (x_t - self.std * output) / self.signal
        return output if prediction_type == "sample" else self.signal * x_t - self.std * output

    def mean(self, x0: mpf, x_t: mpf) -> mpf:
        return self.posterior_x0 * x0 + self.posterior_xt * x_t


# ---- the scheduler --------------------------------------------------------------------------------


def scheduler_for(schedule: str, length: int, zero_snr: bool = False, **config) -> AlphaDDPMScheduler:
    defaults = {"clip_sample": False, "prediction_type": "v_prediction" if zero_snr else "epsilon"}
    config = defaults | {"rescale_betas_zero_snr": zero_snr} | config
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the forward process ends")
        if schedule == "alphas":
            return AlphaDDPMScheduler.from_alphas(given_alphas(length), **config)
        if schedule == "trained_betas":
            return AlphaDDPMScheduler(num_train_timesteps=length, trained_betas=given_betas(length), **config)
        return AlphaDDPMScheduler(num_train_timesteps=length, beta_schedule=schedule, **config)


def use_chain(scheduler: AlphaDDPMScheduler, name: str) -> list[tuple[int, int]]:
    """Choose a chain and name a dozen of its (s, t), both ends among them."""
    length = len(scheduler)
    if name == "custom":
        random = np.random.default_rng(length).permutation(length)[: max(1, length // 7)]
        scheduler.set_timesteps(timesteps=sorted(random.tolist(), reverse=True))
    elif name != "full":
        scheduler.register_to_config(timestep_spacing=name)
        scheduler.set_timesteps(max(1, length // 3))
    ascending = scheduler.timesteps.tolist()[::-1]
    count = len(ascending)
    positions = {0, 1, 2, 3, count // 3, count // 2, *range(count - 5, count)}
    positions = sorted(p for p in positions if 0 <= p < count)
    return [(ascending[p - 1] if p else -1, ascending[p]) for p in positions]


CHAINS = ("full", "leading", "linspace", "trailing", "custom")


def ones(pairs: list) -> torch.Tensor:
    return torch.ones(len(pairs), 1, 1, 1, dtype=torch.float64)


def assert_exact(found: torch.Tensor, exact: list[mpf], what: str, relative: float = RELATIVE) -> None:
    assert found.dtype == torch.float64
    for position, (a, b) in enumerate(zip(found.flatten().tolist(), exact, strict=True)):
        assert abs(mpf(a) - b) <= relative * abs(b), f"{what}[{position}]: {a!r} is not {mpmath.nstr(b, 20)}"


def assert_exact_log(found: torch.Tensor, exact: list[mpf], what: str) -> None:
    """A logarithm's absolute error is the relative error of what it is the logarithm of."""
    for position, (a, b) in enumerate(zip(found.flatten().tolist(), exact, strict=True)):
        if b == 0:
            assert a == -np.inf, what
        else:
            assert abs(mpf(a) - mpmath.log(b)) <= RELATIVE * max(1, abs(mpmath.log(b))), f"{what}[{position}]"


@pytest.mark.parametrize(("schedule", "length", "zero_snr"), TABLE_CASES)
def test_forward_and_posterior_tables(schedule, length, zero_snr):
    scheduler = scheduler_for(schedule, length, zero_snr)
    alphas_cumprod = exact_alphas_cumprod(schedule, length, zero_snr)
    for chain in CHAINS:
        pairs = use_chain(scheduler, chain)
        timesteps = torch.tensor([t for _, t in pairs])
        exact = [ExactStep(alphas_cumprod[t], alphas_cumprod[s]) for s, t in pairs]
        one, zero = ones(pairs), 0 * ones(pairs)

        marginal = scheduler.q_mean_variance(one, timesteps)
        assert_exact(marginal.mean, [e.signal for e in exact], f"{chain} sqrt ᾱ")
        assert_exact(marginal.variance, [e.variance for e in exact], f"{chain} 1-ᾱ")
        assert_exact_log(marginal.log_variance, [e.variance for e in exact], f"{chain} log 1-ᾱ")
        assert_exact(scheduler.add_noise(zero, one, timesteps), [e.std for e in exact], f"{chain} sqrt 1-ᾱ")

        forward = scheduler.forward_mean_variance(one, timesteps)
        assert_exact(forward.mean, [mpmath.sqrt(e.alpha) for e in exact], f"{chain} sqrt α")
        assert_exact(forward.variance, [e.beta for e in exact], f"{chain} 1-α")

        posterior = scheduler.q_posterior(one, zero, timesteps)
        assert_exact(posterior.mean, [e.posterior_x0 for e in exact], f"{chain} posterior x_0")
        assert_exact(posterior.variance, [e.posterior_variance for e in exact], f"{chain} posterior variance")
        assert_exact_log(posterior.log_variance, [e.posterior_variance for e in exact], f"{chain} log β̃")
        of_sample = scheduler.q_posterior(zero, one, timesteps).mean
        assert_exact(of_sample, [e.posterior_xt for e in exact], f"{chain} posterior x_t")


@pytest.mark.parametrize(
    ("schedule", "length", "zero_snr", "prediction_type"),
    [
        (*case, zero_snr, prediction_type)
        for case, zero_snr, prediction_type in itertools.product(CASES, (False, True), PREDICTION_TYPES)
        if not zero_snr or (case[1] > 1 and prediction_type != "epsilon")  # others are refused: noise does not determine x_0
    ],
)
def test_reverse_mean(schedule, length, zero_snr, prediction_type):
    scheduler = scheduler_for(schedule, length, zero_snr, prediction_type=prediction_type)
    alphas_cumprod = exact_alphas_cumprod(schedule, length, zero_snr)
    for chain in ("full", "trailing", "custom"):
        pairs = use_chain(scheduler, chain)
        timesteps = torch.tensor([t for _, t in pairs])
        exact = [ExactStep(alphas_cumprod[t], alphas_cumprod[s]) for s, t in pairs]
        for x_t, output in ((0, 1), (1, 0)):
            found = scheduler.p_mean_variance(output * ones(pairs), timesteps, x_t * ones(pairs))
            x0 = [e.x0(prediction_type, x_t, output) for e in exact]
            assert_exact(found.pred_original_sample, x0, f"{chain} x_0")
            assert_exact(found.mean, [e.mean(x, x_t) for e, x in zip(exact, x0, strict=True)], f"{chain} mean")


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "analytic", "learned", "learned_range"])
@pytest.mark.parametrize(("schedule", "length"), CASES)
def test_reverse_variance(schedule, length, variance_type):
    second_moments = np.random.default_rng(1).uniform(0, 1, length).tolist()
    config = {"noise_second_moments": second_moments} if variance_type == "analytic" else {}
    scheduler = scheduler_for(schedule, length, variance_type=variance_type, **config)
    alphas_cumprod = exact_alphas_cumprod(schedule, length, False)
    for chain in ("full", "trailing", "custom"):
        pairs = use_chain(scheduler, chain)
        timesteps = torch.tensor([t for _, t in pairs])
        exact = [ExactStep(alphas_cumprod[t], alphas_cumprod[s]) for s, t in pairs]
        # where β̃ is 0, its neighbour stands in: the second entry, as the first pairs are neighbours in the chain
        lower = [e.posterior_variance for e in exact]
        lower[0] = lower[1] if len(exact) > 1 else exact[0].beta
        raw = torch.linspace(-1, 1, len(pairs), dtype=torch.float64).view(-1, 1, 1, 1)
        output = torch.cat([0 * raw, raw], dim=1) if scheduler.variance_type.startswith("learned") else 0 * raw
        moments = scheduler.p_mean_variance(output, timesteps, ones(pairs))
        if variance_type == "fixed_small":
            variance = lower
        elif variance_type == "fixed_large":
            variance = [e.beta for e in exact]
        elif variance_type == "analytic":
            variance = [e.analytic_variance(second_moments[t]) for e, (_, t) in zip(exact, pairs, strict=True)]
        elif variance_type == "learned":
            variance = [mpmath.exp(mpf(r)) for r in raw.flatten().tolist()]
        else:
            shares = [(mpf(r) + 1) / 2 for r in raw.flatten().tolist()]
            variance = [e.beta**v * low ** (1 - v) for e, low, v in zip(exact, lower, shares, strict=True)]
        assert_exact(moments.variance, variance, f"{chain} variance")
        assert_exact_log(moments.log_variance, variance, f"{chain} log variance")


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_step(variance_type, prediction_type, clip_sample):
    """The drawn sample itself: the noise is drawn again here with the same seed, the rest is 50 digits."""
    schedule, length = "scaled_linear", 1000
    scheduler = scheduler_for(
        schedule, length, variance_type=variance_type, prediction_type=prediction_type, clip_sample=clip_sample
    )
    alphas_cumprod = exact_alphas_cumprod(schedule, length, False)
    for chain in ("full", "trailing"):
        scheduler_pairs = use_chain(scheduler, chain)
        first = scheduler.timesteps[-1].item()
        for s, t in scheduler_pairs:
            random = torch.Generator().manual_seed(t)
            learned = variance_type == "learned_range"
            output = torch.randn(1, 1 + learned, 1, 1, generator=random, dtype=torch.float64)
            x_t = torch.randn(1, 1, 1, 1, generator=random, dtype=torch.float64)
            noise = torch.randn(1, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            found = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample

            exact = ExactStep(alphas_cumprod[t], alphas_cumprod[s])
            x0 = exact.x0(prediction_type, mpf(x_t.item()), mpf(output[0, 0].item()))
            if clip_sample:
                x0 = max(mpf(-1), min(mpf(1), x0))
            terms = [exact.posterior_x0 * x0, exact.posterior_xt * mpf(x_t.item())]
            if t != first:
                variance = exact.beta if variance_type == "fixed_large" else exact.posterior_variance
                if learned:
                    share = (mpf(output[0, 1].item()) + 1) / 2
                    variance = exact.beta**share * exact.posterior_variance ** (1 - share)
                terms.append(mpmath.sqrt(variance) * mpf(noise.item()))
            assert abs(mpf(found.item()) - sum(terms)) <= STEP_RELATIVE * sum(map(abs, terms)), (chain, t)


def test_public_float32_tables_are_the_exact_values_rounded_once():
    scheduler = scheduler_for("squaredcos_cap_v2", 1000)
    exact = exact_alphas_cumprod("squaredcos_cap_v2", 1000, False)
    alphas = [exact[t] / exact[t - 1] for t in range(1000)]
    for name, values in {"alphas_cumprod": exact[:-1], "alphas": alphas, "betas": [1 - alpha for alpha in alphas]}.items():
        found = getattr(scheduler, name)
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.tensor([float(value) for value in values], dtype=torch.float64).float()), name
