"""Any configuration and any shape: finite numbers or a ValueError that says what to do, never NaN, and no waiting."""

import logging
import math
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_pipeline import AlphaDDPMScheduler
from ddpm_pipeline.tables_alpha_ddpm import (
    BETA_SCHEDULES,
    MAX_TRAIN_TIMESTEPS,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    VARIANCE_TYPES,
)

pytestmark = pytest.mark.filterwarnings("ignore:the forward process ends")

QUICK = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# ---- configurations -------------------------------------------------------------------------------

betas = st.floats(0, 1) | st.sampled_from([5e-324, 1e-320, 1e-300, 1e-40, 1e-16, 1e-9, 0.5, 0.999, 1 - 2**-53])
small_tables = st.integers(1, 12).flatmap(lambda n: st.lists(betas, min_size=n, max_size=n))

absurd = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers(-3, 3)
    | st.sampled_from([10**12, -(10**12), 10**400, 1e308, "linear", "", b"x", 1j, (), [], {}, [1], {"2": "x"}, object()])
    | st.sampled_from([np.float32("nan"), np.complex128(1), np.zeros(3), np.int64(7), torch.tensor(0.5), torch.ones(2)])
)


@st.composite
def sound_configs(draw) -> dict:
    """Values that a person might choose, at extremes too."""
    config = {
        "num_train_timesteps": draw(st.integers(1, 60)),
        "beta_start": draw(betas),
        "beta_end": draw(betas),
        "beta_schedule": draw(st.sampled_from(BETA_SCHEDULES)),
        "variance_type": draw(st.sampled_from(VARIANCE_TYPES)),
        "clip_sample": draw(st.booleans()),
        "clip_sample_range": draw(st.sampled_from([1e-45, 0.1, 1.0, 1e30])),
        "prediction_type": draw(st.sampled_from(PREDICTION_TYPES)),
        "thresholding": draw(st.booleans()),
        "dynamic_thresholding_ratio": draw(st.floats(1e-9, 1)),
        "sample_max_value": draw(st.sampled_from([1e-300, 1e-20, 0.5, 1.0, 7.0, 1e30])),
        "timestep_spacing": draw(st.sampled_from(TIMESTEP_SPACINGS)),
        "steps_offset": draw(st.integers(0, 2)),
        "rescale_betas_zero_snr": draw(st.booleans()),
    }
    if draw(st.booleans()):
        config["trained_betas"] = draw(small_tables)
        config["num_train_timesteps"] = len(config["trained_betas"])
    if config["variance_type"] == "analytic":
        total = config["num_train_timesteps"]
        moment = st.floats(0, 2) | st.sampled_from([0.0, 1.0, 1e300])
        config["noise_second_moments"] = draw(st.lists(moment, min_size=total, max_size=total))
    return config


@st.composite
def absurd_configs(draw) -> dict:
    """A sound configuration with one to three values that are not."""
    config = draw(sound_configs())
    names = [*config, "trained_betas", "noise_second_moments", "inference_timesteps"]
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        config[name] = draw(absurd)
    return config


def build(config: dict) -> AlphaDDPMScheduler | None:
    """The scheduler, or None where it was refused in due form."""
    try:
        return AlphaDDPMScheduler(**config)
    except ValueError as error:
        assert len(str(error)) > 20, error
        return None


def assert_finite(what: str, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert tensor.isfinite().all(), f"{what}: {tensor.flatten()[:5]}"


def use(scheduler: AlphaDDPMScheduler, chain: int | list[int] | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Everything that computes, on images in [-1, 1] and bounded network outputs, at both ends and in the middle."""
    if isinstance(chain, int):
        try:
            scheduler.set_timesteps(chain)
        except ValueError:
            assert chain > len(scheduler) or scheduler.config.steps_offset > 0
    elif chain:
        scheduler.set_timesteps(timesteps=chain)
    random = torch.Generator().manual_seed(0)
    x_0 = torch.rand(shape, generator=random, dtype=torch.float64).mul(2).sub(1).to(dtype)
    noise, prediction, raw = (torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for _ in range(3))
    learned = scheduler.variance_type.startswith("learned")
    output = torch.cat([prediction, raw.clamp(-1, 1)], dim=1) if learned else prediction

    timesteps = scheduler.timesteps.tolist()
    some = sorted({timesteps[0], timesteps[len(timesteps) // 2], timesteps[-1]})
    for t in [*some, torch.tensor([some[i % len(some)] for i in range(shape[0])])]:
        x_t = scheduler.add_noise(x_0, noise, t)
        assert x_t.shape == torch.Size(shape)
        assert x_t.dtype == dtype
        assert_finite("add_noise", x_t, scheduler.forward_step(x_0, t, noise), scheduler.get_velocity(x_0, noise, t))
        for name in ("q_mean_variance", "forward_mean_variance"):
            moments = getattr(scheduler, name)(x_0, t)
            assert_finite(name, moments.mean, moments.variance, moments.log_variance)
        posterior = scheduler.q_posterior(x_0, x_t, t)
        assert_finite("q_posterior", posterior.mean, posterior.variance)
        assert not posterior.log_variance.isnan().any()
        into_clean = (torch.as_tensor(t).reshape(-1) == timesteps[-1]).view(-1, 1, 1, 1)
        assert torch.equal(posterior.log_variance == -math.inf, into_clean.expand_as(posterior.log_variance))
        reverse = scheduler.p_mean_variance(output, t, x_t)
        assert_finite("p_mean_variance", *vars(reverse).values())
        assert (reverse.variance >= 0).all()
        step = scheduler.step(output, t, x_t, generator=random)
        assert_finite("step", step.prev_sample, step.pred_original_sample)
        assert step.prev_sample.shape == torch.Size(shape)
        assert step.prev_sample.dtype == dtype


shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
dtypes = st.sampled_from([torch.float32, torch.float64])


@QUICK
@given(config=sound_configs(), data=st.data(), shape=shapes, dtype=dtypes)
def test_sound_configurations_are_finite(config, data, shape, dtype):
    scheduler = build(config)
    assume(scheduler is not None)
    total = len(scheduler)
    chain = data.draw(
        st.none()
        | st.integers(1, total)
        | st.sets(st.integers(0, total - 1), min_size=1).map(lambda timesteps: sorted(timesteps, reverse=True))
    )
    use(scheduler, chain, shape, dtype)


@QUICK
@given(config=absurd_configs(), shape=shapes)
def test_absurd_configurations_are_refused_or_finite(config, shape):
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a numpy warning would be a NaN on its way
        warnings.filterwarnings("ignore", "the forward process ends")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        scheduler = build(config)
    if scheduler is not None:
        use(scheduler, None, shape, torch.float32)
    assert time.perf_counter() - started < 20


@QUICK
@given(
    schedule=st.sampled_from(BETA_SCHEDULES),
    total=st.integers(1, 3000),
    spacing=st.sampled_from(TIMESTEP_SPACINGS),
    data=st.data(),
)
def test_every_number_of_steps_gives_that_many(schedule, total, spacing, data):
    scheduler = AlphaDDPMScheduler(
        num_train_timesteps=total, beta_schedule=schedule, timestep_spacing=spacing, prediction_type="sample"
    )
    count = data.draw(st.integers(1, total))
    scheduler.set_timesteps(count)
    timesteps = scheduler.timesteps
    assert len(timesteps) == count == scheduler.num_inference_steps
    assert (timesteps.diff() < 0).all()
    assert timesteps[-1] >= 0
    assert timesteps[0] < total


@QUICK
@given(timesteps=absurd | st.lists(st.integers(-2, 12)) | st.lists(st.floats()), by_number=st.booleans())
def test_absurd_chains_are_refused_and_change_nothing(timesteps, by_number):
    scheduler = AlphaDDPMScheduler(num_train_timesteps=10)
    kept = scheduler.timesteps.clone()
    try:
        scheduler.set_timesteps(**{"num_inference_steps" if by_number else "timesteps": timesteps})
    except ValueError:
        assert torch.equal(scheduler.timesteps, kept)
        assert scheduler.num_inference_steps is None
        assert not scheduler.custom_timesteps
        assert scheduler.previous_timestep(9) == 8
    use(scheduler, None, (1, 1, 2, 2), torch.float32)


@QUICK
@given(timestep=st.integers() | st.sampled_from([None, "3", 3.0, math.nan, [3], torch.tensor(2.5), torch.tensor([0.0])]))
def test_timesteps_are_checked(timestep):
    scheduler = AlphaDDPMScheduler(num_train_timesteps=10)
    x = torch.zeros(2, 1, 2, 2)
    calls = [
        lambda: scheduler.step(x, timestep, x),
        lambda: scheduler.add_noise(x, x, timestep),
        lambda: scheduler.p_mean_variance(x, timestep, x),
        lambda: scheduler.q_posterior(x, x, timestep),
    ]
    valid = timestep == [3] or (isinstance(timestep, int) and 0 <= timestep < 10)  # a list is one per image, or one for all
    wrong_type = TypeError if not isinstance(timestep, int | torch.Tensor) else ValueError
    for call in calls:
        if valid:
            call()
        else:
            with pytest.raises(wrong_type):
                call()


@pytest.mark.parametrize("number", [np.int64, np.array, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int16)])
def test_numbers_of_numpy_and_torch_are_numbers(number):
    scheduler = AlphaDDPMScheduler(num_train_timesteps=number(10), beta_end=0.9)
    assert scheduler.config.num_train_timesteps == 10
    scheduler.set_timesteps(number(5))
    assert scheduler.timesteps.tolist() == [8, 6, 4, 2, 0]
    assert int(scheduler.previous_timestep(number(4))) == 2
    x = torch.ones(2, 1, 2, 2)
    assert torch.equal(scheduler.add_noise(x, x, number(4)), scheduler.add_noise(x, x, 4))
    assert torch.equal(scheduler.step(x, number(0), x).prev_sample, scheduler.step(x, 0, x).prev_sample)


@pytest.mark.parametrize("several", [list, tuple, np.array, torch.tensor])
def test_timesteps_per_image_come_in_any_kind_of_list(several):
    scheduler, x = AlphaDDPMScheduler(), torch.ones(2, 1, 2, 2)
    expected = torch.cat([scheduler.add_noise(x[:1], x[:1], t) for t in (7, 500)])
    torch.testing.assert_close(scheduler.add_noise(x, x, several([7, 500])), expected)
    scheduler.set_timesteps(timesteps=several([900, 20]))
    assert scheduler.timesteps.tolist() == [900, 20]


def test_previous_timestep_is_a_tensor_for_a_tensor():
    scheduler = AlphaDDPMScheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 20])
    for timesteps, expected in ((torch.tensor(900), 500), (torch.tensor([20, 900]), [-1, 500])):
        found = scheduler.previous_timestep(timesteps)
        assert (found.tolist(), found.shape, found.dtype) == (expected, timesteps.shape, torch.int64)


def test_gradients_flow_after_a_use_in_inference_mode():
    """What is kept from one call to the next are no inference tensors."""
    with torch.inference_mode():
        scheduler, x = AlphaDDPMScheduler(variance_type="learned_range"), torch.ones(2, 1, 2, 2)
        scheduler.set_timesteps(10)
        scheduler.step(x.repeat(1, 2, 1, 1), torch.tensor([0, 900]), x)
    output = torch.ones(2, 2, 2, 2, requires_grad=True)
    x = torch.ones(2, 1, 2, 2, requires_grad=True)
    moments = scheduler.p_mean_variance(output, scheduler.timesteps[[0, -1]], x)
    (moments.mean + moments.variance + scheduler.alphas_cumprod[0] * x).sum().backward()
    assert output.grad.isfinite().all() and x.grad.isfinite().all()


def test_warnings_follow_diffusers_verbosity(monkeypatch):
    """As DIFFUSERS_VERBOSITY sets it."""
    for quiet, expected in ((False, 1), (True, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            monkeypatch.setattr(logging.getLogger("diffusers"), "level", logging.ERROR if quiet else logging.WARNING)
            AlphaDDPMScheduler(num_train_timesteps=10)
        assert len(caught) == expected
        assert all(warning.filename == __file__ for warning in caught)


@pytest.mark.parametrize("call", ["step", "p_mean_variance", "q_posterior", "forward_step", "previous_timestep"])
def test_timesteps_outside_the_chain_are_value_errors(call):
    scheduler = AlphaDDPMScheduler()
    scheduler.set_timesteps(timesteps=[900, 20])
    x = torch.zeros(2, 1, 2, 2)

    def run(timestep):
        if call == "previous_timestep":
            return scheduler.previous_timestep(timestep)
        last = (x,) if call != "q_posterior" else ()
        return getattr(scheduler, call)(*((x, x) if call == "q_posterior" else (x,)), timestep, *last)

    run(900)
    batches = [] if call == "previous_timestep" else [torch.tensor([900, 21]), torch.tensor([-1, 20])]
    for outside in (21, -1, 1000, torch.tensor(21), *batches):
        with pytest.raises(ValueError, match=r"timestep (21|-1|1000) is not in the chain in use, which has (2|1000) of"):
            run(outside)
    scheduler.add_noise(x, x, 21)  # needs no chain
    with pytest.raises(ValueError, match=r"timestep 1000 .* 0 to 999"):
        scheduler.add_noise(x, x, 1000)


# ---- messages -------------------------------------------------------------------------------------

REFUSALS = (
    ({"num_train_timesteps": 10**12}, rf"num_train_timesteps=1000000000000 must be an integer from 1 to {MAX_TRAIN_TIMESTEPS}"),
    ({"num_train_timesteps": 1000.0}, r"num_train_timesteps=1000.0 must be an integer"),
    ({"num_train_timesteps": True}, r"num_train_timesteps=True"),
    ({"beta_schedule": "cosine"}, r"beta_schedule='cosine' is not one of linear, .*squaredcos_cap_v2.*from_alphas"),
    ({"beta_schedule": "scaled_lineer"}, r"Did you mean 'scaled_linear'"),
    ({"beta_schedule": "cosine"}, r"Did you mean 'squaredcos_cap_v2'"),
    ({"prediction_type": "x_start"}, r"Did you mean 'sample'"),
    ({"prediction_type": ["v"]}, r"prediction_type=\['v'\] is not one of"),
    ({"rescale_betas_zero_snr": "false"}, r"rescale_betas_zero_snr='false' must be True or False"),
    ({"thresholding": 1}, r"thresholding=1 must be True or False"),
    ({"inference_timesteps": {"2": [[5], [1, 2]]}}, r"inference_timesteps\['2'\] must be a list of integers"),
    ({"prediction_type": "eps"}, r"prediction_type='eps' is not one of epsilon, sample, v_prediction"),
    ({"timestep_spacing": "even"}, r"timestep_spacing='even' is not one of leading, linspace, trailing"),
    ({"beta_start": math.nan}, r"beta_start=nan must be a number above 0 and at most 1"),
    ({"beta_end": -0.1}, r"beta_end=-0.1 must be a number above 0"),
    ({"beta_end": "0.02"}, r"beta_end='0.02' must be a number"),
    ({"clip_sample_range": 0}, r"clip_sample_range=0 must be a number above 0"),
    ({"clip_sample_range": 10**400}, r"clip_sample_range=10+ must be"),
    ({"dynamic_thresholding_ratio": 1.5}, r"dynamic_thresholding_ratio=1.5 must be a number above 0 and at most 1"),
    ({"steps_offset": -1}, r"steps_offset=-1 must be an integer from 0"),
    ({"trained_betas": [0.1, 0.2]}, r"trained_betas has shape \(2,\).*num_train_timesteps=1000"),
    ({"trained_betas": [[0.1], [0.1, 0.2]]}, r"trained_betas must be a list of 1000 numbers, not list"),
    ({"trained_betas": [10**400] * 1000}, r"trained_betas must be a list of 1000 numbers"),
    ({"trained_betas": [0.1] * 999 + [math.nan]}, r"trained_betas holds a NaN or an infinity at timestep 999"),
    ({"trained_betas": [0.1, 1.0] + [0.1] * 998}, r"trained_betas gives beta=1.0 at timestep 1;.* below 1"),
    ({"trained_betas": [0.1] * 999 + [1.0]}, r"prediction_type='epsilon' needs sqrt\(alphas_cumprod\[-1\]\).*'v_prediction'"),
    ({"variance_type": "analytic"}, r"variance_type='analytic' needs noise_second_moments"),
    ({"noise_second_moments": [-1.0] * 1000}, r"noise_second_moments holds .*-1.0.*never negative"),
    ({"noise_second_moments": [1.0] * 3}, r"noise_second_moments has shape \(3,\)"),
    ({"inference_timesteps": [1, 2]}, r"inference_timesteps must be a dict of lists, not list"),
    ({"inference_timesteps": {"3": [5, 1]}}, r"inference_timesteps\['3'\] has 2 timesteps.* key must"),
    ({"inference_timesteps": {"2": [1, 5]}}, r"inference_timesteps\['2'\] must be strictly descending timesteps.*999"),
    ({"inference_timesteps": {"1": [1000]}}, r"inference_timesteps\['1'\].*at most 999"),
    ({"rescale_betas_zero_snr": True, "num_train_timesteps": 1, "prediction_type": "sample"}, r"at least 2 timesteps, not 1"),
    (
        {
            "rescale_betas_zero_snr": True,
            "prediction_type": "sample",
            "beta_start": 1e-300,
            "beta_end": 1e-300,
            "num_train_timesteps": 1,
        },
        r"at least 2",
    ),
)


@pytest.mark.parametrize(("config", "message"), REFUSALS, ids=lambda x: str(x)[:40])
def test_refusals_name_the_value_and_what_is_allowed(config, message):
    with pytest.raises(ValueError, match=message):
        AlphaDDPMScheduler(**config)


@pytest.mark.parametrize("alphas", [None, [], 0.5, [0.9, 1.0], [0.9, -0.1], [math.nan], "abc", [[0.9, 0.8]], [[0.9], [1, 2]]])
def test_malformed_alphas_are_refused(alphas):
    with pytest.raises(ValueError):
        AlphaDDPMScheduler.from_alphas(alphas)


@pytest.mark.parametrize("own", [5, "abc", [1], [["noise_second_moments", None]], {"x": 1}, {"noise_second_moments": "x"}])
def test_malformed_own_settings_are_refused(own):
    with pytest.raises(ValueError):
        AlphaDDPMScheduler.from_config({"_alpha_ddpm": own})


def test_chain_messages_stay_short():
    with pytest.raises(ValueError, match="steps_offset=1") as refusal:
        AlphaDDPMScheduler(num_train_timesteps=20_000, prediction_type="sample", steps_offset=1).set_timesteps(20_000)
    assert len(str(refusal.value)) < 300
    for call in ({}, {"num_inference_steps": 3, "timesteps": [2, 1]}):
        with pytest.raises(ValueError, match="either num_inference_steps or timesteps"):
            AlphaDDPMScheduler().set_timesteps(**call)
    for count in (0, -1, 1001, 2.0, True, "10"):
        with pytest.raises(ValueError, match=r"num_inference_steps=.* must be an integer from 1 to 1000"):
            AlphaDDPMScheduler().set_timesteps(count)


@pytest.mark.parametrize(
    ("variance_type", "output", "sample"),
    [
        ("fixed_small", (2, 6, 4, 4), (2, 3, 4, 4)),
        ("learned_range", (2, 3, 4, 4), (2, 3, 4, 4)),
        ("learned_range", (2, 4, 4, 4), (2, 3, 4, 4)),
        ("learned", (2, 1, 4, 4), (2, 1, 4, 4)),
        ("fixed_small", (1, 3, 4, 4), (2, 3, 4, 4)),  # would share one image's noise among all
        ("learned_range", (1, 6, 4, 4), (2, 3, 4, 4)),
        ("fixed_small", (2, 3, 1, 4), (2, 3, 4, 4)),
        ("fixed_small", (3, 4, 4), (2, 3, 4, 4)),
        ("fixed_small", (4,), (4,)),
        ("learned", (), ()),
    ],
)
def test_outputs_that_do_not_fit_the_images_are_refused(variance_type, output, sample):
    scheduler = AlphaDDPMScheduler(variance_type=variance_type)
    for call in (scheduler.step, scheduler.p_mean_variance, scheduler.predict_original_sample):
        with pytest.raises(ValueError, match=r"model_output has shape \(.*out_channels = "):
            call(torch.zeros(output), 5, torch.zeros(sample))


def test_images_of_integers_are_refused():
    """They would come back rounded to -1, 0 and 1."""
    scheduler = AlphaDDPMScheduler()
    pixels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="uint8"):
        scheduler.add_noise(pixels, torch.zeros(1, 3, 4, 4), 5)
    with pytest.raises(ValueError, match="uint8"):
        scheduler.q_mean_variance(pixels, 5)


def test_timestep_tensors_that_do_not_fit_the_images_are_refused():
    scheduler = AlphaDDPMScheduler()
    x = torch.zeros(2, 3, 4, 4)
    for timesteps in (torch.tensor([1, 2, 3]), torch.tensor([[1], [2]]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"timesteps has shape .*one for each of 2"):
            scheduler.add_noise(x, x, timesteps)
    for timesteps in (torch.tensor([1.0, 2.0]), torch.tensor([True, False])):
        with pytest.raises(ValueError, match=r"timesteps has dtype .*integers"):
            scheduler.add_noise(x, x, timesteps)


# ---- synchronisation ------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what is sent to the device, and refuses what would wait for it."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert "_local_scalar_dense" not in name, "a value was read back"
        assert "nonzero" not in name, "a size was read back"
        self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_step_with_a_host_timestep_reads_nothing_back(variance_type, prediction_type, dtype):
    """On meta tensors reading a value is an error; the operations are few: two a formula, the clip and the draw."""
    scheduler = AlphaDDPMScheduler(variance_type=variance_type, prediction_type=prediction_type)
    learned = variance_type.startswith("learned")
    for device in ("cpu", "meta"):
        x = torch.zeros(2, 3, 4, 4, device=device, dtype=dtype)
        output = torch.cat([x, x], dim=1) if learned else x
        scheduler.step(output, 500, x)  # a row is made at its first use
        for t in (500, 0, np.int64(500)):
            scheduler.step(output, int(t), x)
            with Operations() as operations:
                step = scheduler.step(output, t, x)
            assert step.prev_sample.device.type == device
            casts = 5 + learned if dtype == torch.bfloat16 else 0
            assert len(operations.names) <= 7 + 5 * learned + casts, operations.names
        with Operations():
            scheduler.add_noise(x, x, 500)
            scheduler.p_mean_variance(output, 500, x)


def test_timesteps_on_a_device_are_not_read_back():
    """Neither one an image nor one of `scheduler.timesteps` where `set_timesteps` was given the device."""
    scheduler = AlphaDDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(10, device="meta")
    x = torch.empty(2, 3, 4, 4, device="meta")
    output = torch.empty(2, 6, 4, 4, device="meta")
    for timesteps in (torch.empty(2, dtype=torch.long, device="meta"), scheduler.timesteps[0]):
        assert scheduler.step(output, timesteps, x).prev_sample.is_meta
        assert scheduler.p_mean_variance(output, timesteps, x).mean.is_meta
        assert scheduler.add_noise(x, x, timesteps).is_meta
        assert scheduler.get_velocity(x, x, timesteps).is_meta
        assert scheduler.q_posterior(x, x, timesteps).mean.is_meta
