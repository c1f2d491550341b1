"""Beside diffusers' `DDPMScheduler`: equal wherever it is right, and its faults named where it is not.

Its tables are float32, so its code is also run on float64 tables put into it: then nothing but the formulas can differ.
"""

import itertools
import json
import logging
import math
import warnings
from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_pipeline import AlphaDDPMScheduler
from ddpm_pipeline.tables_alpha_ddpm import BETA_SCHEDULES, PREDICTION_TYPES, TIMESTEP_SPACINGS

SHAPE = (2, 3, 4, 4)
SOUND_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
CHAINS = {"full": None, "10 steps": 10, "7 steps": 7, "custom": [990, 500, 499, 30, 0]}


def images(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact_alphas_cumprod(scheduler: AlphaDDPMScheduler) -> torch.Tensor:
    total = len(scheduler)
    one = torch.ones(total, 1, 1, 1, dtype=torch.float64)
    return scheduler.q_mean_variance(one, torch.arange(total)).mean.flatten() ** 2


def pair(*, float64: bool = True, chain: str = "full", **config) -> tuple[AlphaDDPMScheduler, DDPMScheduler]:
    """Ours and stock of the same configuration and chain; `float64`: with our ᾱ in stock's formulas."""
    ours, stock = AlphaDDPMScheduler(**config), DDPMScheduler(**config)
    if float64:
        stock.alphas_cumprod = exact_alphas_cumprod(ours)
        stock.one = torch.tensor(1.0, dtype=torch.float64)
    for scheduler in (ours, stock):
        if isinstance(CHAINS[chain], int):
            scheduler.set_timesteps(CHAINS[chain])
        elif CHAINS[chain]:
            scheduler.set_timesteps(timesteps=CHAINS[chain])
    return ours, stock


def network(x: torch.Tensor, t: int, variance_type: str) -> torch.Tensor:
    """Stands for a UNet: any smooth function of x_t and t, with a variance half in (-1, 1) where one is wanted."""
    prediction = torch.sin(3 * x + 0.01 * t)
    return torch.cat([prediction, torch.cos(5 * x)], dim=1) if variance_type.startswith("learned") else prediction


def sampled(scheduler, *, dtype: torch.dtype = torch.float64, limit: int | None = None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = images(1, dtype=dtype)
    for t in scheduler.timesteps[:limit]:
        output = network(x, int(t), scheduler.config.variance_type)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


# ---- where stock is right -------------------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", SOUND_VARIANCE_TYPES)
def test_step_equals_stock(variance_type, prediction_type, chain):
    """Every step along the chain, same generator. 1e-9: stock takes 1 - ᾱ from a float64 ᾱ near 1."""
    ours, stock = pair(chain=chain, variance_type=variance_type, prediction_type=prediction_type)
    x = images(1)
    timesteps = ours.timesteps.tolist()
    for t in timesteps[:: max(1, len(timesteps) // 12)] + timesteps[-1:]:
        output = network(x, t, variance_type)
        found = ours.step(output, t, x, generator=torch.Generator().manual_seed(t))
        expected = stock.step(output, t, x, generator=torch.Generator().manual_seed(t))
        torch.testing.assert_close(found.prev_sample, expected.prev_sample, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.pred_original_sample, expected.pred_original_sample, rtol=1e-9, atol=1e-9)


CLIPPINGS = (
    {"clip_sample": False},
    {"clip_sample_range": 0.4},
    {"clip_sample_range": 3.0},
    {"thresholding": True},
    {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.8},
    {"thresholding": True, "sample_max_value": 0.5, "clip_sample": False},
)


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=str)
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_chain_equals_stock_for_every_schedule_and_clipping(schedule, clipping):
    ours, stock = pair(chain="10 steps", beta_schedule=schedule, **clipping)
    torch.testing.assert_close(sampled(ours), sampled(stock), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("chain", CHAINS)
def test_zero_terminal_snr_equals_stock(chain, prediction_type):
    config = {"rescale_betas_zero_snr": True, "prediction_type": prediction_type, "timestep_spacing": "trailing"}
    ours, stock = pair(chain=chain, **config)
    torch.testing.assert_close(sampled(ours, limit=50), sampled(stock, limit=50), rtol=1e-8, atol=1e-8)
    plain = DDPMScheduler(**config)
    torch.testing.assert_close(ours.alphas_cumprod, plain.alphas_cumprod, rtol=0, atol=2e-6)
    assert ours.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("variance_type", SOUND_VARIANCE_TYPES)
@pytest.mark.parametrize("chain", ["full", "10 steps"])
def test_whole_chains_equal_untouched_stock(chain, variance_type):
    """float32 from end to end, stock as it is: its tables are the only difference, and it stays small."""
    ours, stock = pair(float64=False, chain=chain, variance_type=variance_type)
    found, expected = sampled(ours, dtype=torch.float32), sampled(stock, dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("total", [10, 1000])
def test_tables_equal_untouched_stock(schedule, total):
    """A float32 product of T factors is good to about T · 2^-24 relative, and β = 1 - ᾱ'/ᾱ to 2^-23 absolute."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the forward process ends")
        ours, stock = (cls(num_train_timesteps=total, beta_schedule=schedule) for cls in (AlphaDDPMScheduler, DDPMScheduler))
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert getattr(ours, name).dtype == getattr(stock, name).dtype
        torch.testing.assert_close(getattr(ours, name), getattr(stock, name), rtol=3e-5, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noising_equals_stock(dtype):
    ours, stock = pair()
    timesteps = torch.tensor([0, 999])
    x_0, noise = images(1, dtype=dtype), images(2, dtype=dtype)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(ours.add_noise(x_0, noise, timesteps), stock.add_noise(x_0, noise, timesteps), **close)
    torch.testing.assert_close(ours.get_velocity(x_0, noise, timesteps), stock.get_velocity(x_0, noise, timesteps), **close)
    one = timesteps[:1]  # for the whole batch, as img2img pipelines do it
    torch.testing.assert_close(ours.add_noise(x_0, noise, one), stock.add_noise(x_0, noise, one), **close)


@pytest.mark.filterwarnings("ignore:the forward process ends")
@pytest.mark.parametrize("total", [1000, 37, 1])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_timesteps_equal_stock(spacing, total):
    config = {"num_train_timesteps": total, "timestep_spacing": spacing, "trained_betas": [0.1] * total}
    ours, stock = AlphaDDPMScheduler(**config), DDPMScheduler(**config)
    assert len(ours) == len(stock) == total
    assert torch.equal(ours.timesteps, stock.timesteps)
    for count in sorted({1, 2, 3, 7, 10, 36, 50, 250, 333, 999, 1000} & set(range(1, total + 1))):
        ours.set_timesteps(count)
        stock.set_timesteps(count)
        assert ours.timesteps.dtype == stock.timesteps.dtype == torch.int64
        assert torch.equal(ours.timesteps, stock.timesteps), count
        assert ours.num_inference_steps == stock.num_inference_steps
        for t in ours.timesteps.tolist():
            assert ours.previous_timestep(t) == stock.previous_timestep(t)


def test_steps_offset_and_custom_timesteps_equal_stock():
    ours, stock = AlphaDDPMScheduler(steps_offset=1), DDPMScheduler(steps_offset=1)
    for call in ({"num_inference_steps": 50}, {"timesteps": [900, 20, 3]}):
        ours.set_timesteps(**call)
        stock.set_timesteps(**call)
        assert torch.equal(ours.timesteps, stock.timesteps)
        assert ours.custom_timesteps == stock.custom_timesteps
    with pytest.raises(ValueError):
        stock.set_timesteps(timesteps=[3, 20])
    with pytest.raises(ValueError):
        ours.set_timesteps(timesteps=[3, 20])


def test_the_surface_of_stock_is_there():
    ours, stock = AlphaDDPMScheduler(), DDPMScheduler()
    public = {name for name in dir(stock) if not name.startswith("_")}
    missing = public - set(dir(ours)) - {"one"}  # a float32 1.0 that nothing outside stock reads
    assert not missing
    assert ours.order == stock.order
    assert ours.init_noise_sigma == stock.init_noise_sigma
    assert ours.scale_model_input(images(1), 3).equal(images(1))
    assert ours._compatibles == stock._compatibles
    assert {k: v for k, v in ours.config.items() if not k.startswith("_")} == {
        k: v for k, v in stock.config.items() if not k.startswith("_")
    }


# ---- where stock is wrong, and we are right -------------------------------------------------------
# Stock is held to its faults in the versions where they were seen; another version may have repaired them.

SEEN = diffusers.__version__.startswith("0.42.")


def stock_fault(shows: Callable[[], object]) -> None:
    """What docs/scheduler.md lists. If this fails, diffusers has repaired it, and the list may lose a line."""
    assert not SEEN or bool(shows())


def test_fixed_large_log_is_nan_in_stock():
    """It takes the root of a logarithm."""
    output, x_t = images(1), images(2)
    stock_fault(lambda: DDPMScheduler(variance_type="fixed_large_log").step(output, 500, x_t).prev_sample.isnan().all())
    found, expected = (
        AlphaDDPMScheduler(variance_type=v).step(output, 500, x_t, torch.Generator().manual_seed(0)).prev_sample
        for v in ("fixed_large_log", "fixed_large")
    )
    assert torch.equal(found, expected)


def test_learned_takes_a_log_variance_for_a_variance_in_stock():
    """The network's half is a log-variance everywhere else (improved-diffusion's LEARNED): std = exp(half of it)."""
    x_t = torch.zeros(1, 1, 100, 100)
    output = torch.cat([torch.zeros_like(x_t), torch.full_like(x_t, -6.0)], dim=1)
    stock_fault(lambda: DDPMScheduler(variance_type="learned").step(output, 500, x_t).prev_sample.isnan().all())
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0))
    found = AlphaDDPMScheduler(variance_type="learned").step(output, 500, x_t, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.prev_sample, math.exp(-3) * noise)


def trailing_counts(cls, counts) -> list[int]:
    """The numbers of steps that do not give that many timesteps from T - 1 down to at least 0."""
    scheduler = cls(timestep_spacing="trailing")
    wrong = []
    for count in counts:
        scheduler.set_timesteps(count)
        timesteps = scheduler.timesteps
        if len(timesteps) != count or timesteps[0] != 999 or timesteps[-1] < 0 or (timesteps.diff() >= 0).any():
            wrong.append(count)
    return wrong


def test_trailing_spacing_emits_timestep_minus_one_in_stock():
    wrong = [61, 103, 121, 122, 201]
    stock_fault(lambda: trailing_counts(DDPMScheduler, wrong) == wrong)
    assert trailing_counts(AlphaDDPMScheduler, range(1, 1001)) == []


def test_the_step_into_clean_data_adds_noise_in_stock():
    """Where the chain's last timestep is above 0, as with trailing spacing, its samples end noisy."""
    output, x_t = images(1), images(2)
    ours, stock = AlphaDDPMScheduler(), DDPMScheduler()
    for scheduler in (ours, stock):
        scheduler.set_timesteps(timesteps=[999, 500])
    a, b = (stock.step(output, 500, x_t, torch.Generator().manual_seed(i)).prev_sample for i in (0, 1))
    stock_fault(lambda: not torch.equal(a, b))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    found = ours.step(output, 500, x_t, generator)
    assert torch.equal(found.prev_sample, found.pred_original_sample)
    assert torch.equal(generator.get_state(), before)


def test_bfloat16_images_get_no_noise_at_small_timesteps_in_stock():
    x_0, noise = images(1, dtype=torch.bfloat16), images(2, dtype=torch.bfloat16)
    timesteps = torch.tensor([0, 3])
    stock_fault(lambda: torch.equal(DDPMScheduler().add_noise(x_0, noise, timesteps), x_0))
    found = AlphaDDPMScheduler().add_noise(x_0, noise, timesteps)
    assert torch.equal(found, AlphaDDPMScheduler().add_noise(x_0.float(), noise.float(), timesteps).bfloat16())
    assert (found != x_0).any(dim=(1, 2, 3)).all()


def test_float32_tables_are_off_by_thousandths_in_stock():
    """β̃ and 1-ᾱ are differences of numbers near 1 there."""
    ours, stock = AlphaDDPMScheduler(), DDPMScheduler()
    one = torch.ones(999, 1, 1, 1, dtype=torch.float64)
    exact = ours.q_posterior(one, one, torch.arange(1, 1000)).variance.flatten()
    found = torch.stack([stock._get_variance(t) for t in range(1, 1000)]).double()
    stock_fault(lambda: 1e-4 < (found / exact - 1).abs().max() < 1e-2)
    ours_in_float32 = ours.q_posterior(one.float(), one.float(), torch.arange(1, 1000)).variance.flatten()
    torch.testing.assert_close(ours_in_float32.double(), exact, rtol=1.2e-7, atol=0)


def test_epsilon_at_zero_terminal_snr_divides_by_zero_in_stock():
    stock = DDPMScheduler(rescale_betas_zero_snr=True, clip_sample=False)
    stock_fault(lambda: not stock.step(images(1), 999, images(2)).prev_sample.isfinite().all())
    with pytest.raises(ValueError, match=r"epsilon.*'v_prediction'"):
        AlphaDDPMScheduler(rescale_betas_zero_snr=True)


def test_an_unknown_variance_type_is_accepted_by_stock():
    stock_fault(lambda: DDPMScheduler(variance_type="fixed_smal").step(images(1), 500, images(2)))
    with pytest.raises(ValueError, match=r"variance_type='fixed_smal' is not one of .*fixed_small.*learned_range"):
        AlphaDDPMScheduler(variance_type="fixed_smal")


def test_a_timestep_an_image_is_not_supported_by_stock():
    timesteps = torch.tensor([10, 900])
    if SEEN:
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            DDPMScheduler().step(images(1), timesteps, images(2))
    assert AlphaDDPMScheduler().step(images(1), timesteps, images(2)).prev_sample.isfinite().all()


@pytest.mark.parametrize("total", [1, 10, 100, 200])
def test_a_short_linear_schedule_that_never_reaches_noise_goes_unremarked_in_stock(total):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stock_fault(lambda: DDPMScheduler(num_train_timesteps=total).alphas_cumprod[-1] > 0.05)
        AlphaDDPMScheduler(num_train_timesteps=1000)
        AlphaDDPMScheduler(num_train_timesteps=total, beta_schedule="squaredcos_cap_v2")
    with pytest.warns(UserWarning, match=r"alphas_cumprod=.*far from pure noise.*squaredcos_cap_v2"):
        AlphaDDPMScheduler(num_train_timesteps=total)


# ---- configurations there and back ----------------------------------------------------------------

OWN = {"noise_second_moments": np.linspace(0.1, 1, 1000).tolist(), "inference_timesteps": {"2": [999, 12]}}
CONFIGS = (
    {},
    {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "clip_sample_range": 2.0},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist(), "steps_offset": 1, "thresholding": True},
    {"beta_start": 1e-3, "beta_end": 0.015, "beta_schedule": "scaled_linear", "variance_type": "fixed_large"},
)


def settings(scheduler) -> dict:
    return {k: v for k, v in scheduler.config.items() if k not in ("_class_name", "_name_or_path", "_use_default_values")}


@pytest.fixture
def nothing_logged(caplog):
    """diffusers keeps its messages from pytest by not propagating; this hears them, and warnings too."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configs_go_to_stock_and_back(config, nothing_logged):
    ours = AlphaDDPMScheduler(**config)
    stock = DDPMScheduler.from_config(ours.config)
    assert settings(stock) == settings(ours)
    assert settings(AlphaDDPMScheduler.from_config(stock.config)) == settings(ours)
    assert settings(AlphaDDPMScheduler.from_config(DDPMScheduler(**config).config)) == settings(ours)
    torch.testing.assert_close(stock.alphas_cumprod, ours.alphas_cumprod, rtol=3e-5, atol=2e-6)


def test_own_settings_travel_through_stock_configs(nothing_logged):
    ours = AlphaDDPMScheduler(**OWN)
    stock = DDPMScheduler.from_config(ours.config)
    back = AlphaDDPMScheduler.from_config(stock.config)
    assert back.noise_second_moments == OWN["noise_second_moments"]
    assert back.inference_timesteps == OWN["inference_timesteps"]
    assert stock.config["_alpha_ddpm"] == OWN
    assert not set(OWN) & set(stock.config)
    analytic = AlphaDDPMScheduler.from_config(stock.config, variance_type="analytic", inference_timesteps={"1": [5]})
    assert analytic.noise_second_moments == OWN["noise_second_moments"]
    assert analytic.inference_timesteps == {"1": [5]}
    emptied = AlphaDDPMScheduler.from_config(stock.config, noise_second_moments=None, inference_timesteps=None)
    assert (emptied.noise_second_moments, emptied.inference_timesteps) == (None, {})
    assert "_alpha_ddpm" not in emptied.config


@pytest.mark.parametrize("config", [*CONFIGS, OWN], ids=range(len(CONFIGS) + 1))
def test_saved_folders_load_in_either_class_and_back(config, tmp_path, nothing_logged):
    """Through JSON, ours -> stock -> ours, with nothing lost and nothing said."""
    ours = AlphaDDPMScheduler(**config)
    ours.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "DDPMScheduler"
    assert not set(OWN) & set(saved)

    stock = DDPMScheduler.from_pretrained(tmp_path / "ours")
    assert type(stock) is DDPMScheduler
    assert settings(stock) == settings(ours)
    stock.save_pretrained(tmp_path / "stock")
    for folder in ("ours", "stock"):
        back = AlphaDDPMScheduler.from_pretrained(tmp_path / folder)
        assert type(back) is AlphaDDPMScheduler
        assert settings(back) == settings(ours)
        assert back.noise_second_moments == config.get("noise_second_moments")
        assert back.inference_timesteps == config.get("inference_timesteps", {})
        back.set_timesteps(2)
        ours.set_timesteps(2)
        assert torch.equal(back.timesteps, ours.timesteps)
        assert torch.equal(back.add_noise(images(1), images(2), 9), ours.add_noise(images(1), images(2), 9))
    AlphaDDPMScheduler.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "scheduler_config.json").read_text() == (
        tmp_path / "ours" / "scheduler_config.json"
    ).read_text()


def test_a_saved_config_forgets_where_it_was_loaded_from(tmp_path):
    """Some configs on the Hub hold it, and diffusers hands it on from config to config."""
    config = DDPMScheduler.from_config({**DDPMScheduler().config, "_name_or_path": "/home/somebody/model"}).config
    assert config["_name_or_path"] == "/home/somebody/model"
    AlphaDDPMScheduler.from_config(config).save_pretrained(tmp_path)
    assert "somebody" not in (tmp_path / "scheduler_config.json").read_text()


def test_from_alphas_loads_in_stock(tmp_path, nothing_logged):
    alphas = np.linspace(0.9999, 0.97, 500)
    AlphaDDPMScheduler.from_alphas(alphas).save_pretrained(tmp_path)
    torch.testing.assert_close(
        DDPMScheduler.from_pretrained(tmp_path).alphas_cumprod.double(), torch.from_numpy(alphas.cumprod()), rtol=3e-5, atol=0
    )


def test_numpy_configurations_are_saved(tmp_path):
    config = {"num_train_timesteps": np.int64(10), "beta_end": np.float32(0.9), "trained_betas": np.linspace(0.1, 0.5, 10)}
    AlphaDDPMScheduler(**config).save_pretrained(tmp_path)
    loaded = AlphaDDPMScheduler.from_pretrained(tmp_path)
    assert loaded.config.num_train_timesteps == 10
    assert loaded.config.beta_end == pytest.approx(0.9)
    assert loaded.config.trained_betas == config["trained_betas"].tolist()


@pytest.mark.parametrize("name", AlphaDDPMScheduler._compatibles)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compatible_schedulers_take_our_config(name):
    """DDIM, DPM-Solver++, UniPC and the others: the same ᾱ, whatever their own defaults, and all settings back again."""
    for config in (CONFIGS[0], CONFIGS[3], CONFIGS[4]):
        ours = AlphaDDPMScheduler(**config)
        other = getattr(diffusers, name).from_config(ours.config)
        if name != "EDMEulerScheduler":  # by sigmas alone
            torch.testing.assert_close(other.alphas_cumprod, ours.alphas_cumprod, rtol=3e-5, atol=2e-6)
        back = AlphaDDPMScheduler.from_config(other.config)
        assert settings(back).items() >= {(k, v) for k, v in settings(ours).items() if k != "trained_betas"}
        assert back.config.trained_betas == ours.config.trained_betas
    saved = json.loads(getattr(diffusers, name)().to_json_string())  # as a repository has it that never had a scheduler of ours
    assert AlphaDDPMScheduler.from_config(saved).config.variance_type == "fixed_small"


@pytest.mark.parametrize(
    ("former", "present"),
    [
        (
            {"timesteps": 500, "clip_predicted_image": False, "tensor_format": "np"},
            {"num_train_timesteps": 500, "clip_sample": False},
        ),
        ({"predict_epsilon": False, "tensor_format": "pt"}, {"prediction_type": "sample"}),
        ({"predict_epsilon": True, "prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}),
    ],
)
def test_settings_of_2022_keep_their_meaning(former, present, tmp_path, nothing_logged):
    """Stock drops them with a warning, and takes its defaults."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"} | former))
    for scheduler in (AlphaDDPMScheduler.from_config(former), AlphaDDPMScheduler.from_pretrained(tmp_path)):
        assert {name: scheduler.config[name] for name in present} == present
        assert not former.keys() - present.keys() & set(scheduler.config)


def test_a_round_trip_marks_no_value_as_a_default(tmp_path):
    """As diffusers' own tests expect: the key is there if values were left to defaults, and not after loading."""
    scheduler = AlphaDDPMScheduler(beta_end=0.03)
    assert scheduler.config["_use_default_values"] == []
    scheduler.save_pretrained(tmp_path)
    loaded = dict(AlphaDDPMScheduler.from_pretrained(tmp_path).config)
    assert loaded == {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}


def test_configs_of_a_newer_version_are_refused():
    with pytest.raises(ValueError, match=r"shiny.*upgrade"):
        AlphaDDPMScheduler.from_config(AlphaDDPMScheduler().config | {"_alpha_ddpm": {"shiny": 1}})


def test_every_pair_of_options_that_stock_takes_is_taken():
    options = itertools.product(BETA_SCHEDULES, SOUND_VARIANCE_TYPES, PREDICTION_TYPES, TIMESTEP_SPACINGS)
    for schedule, variance_type, prediction_type, spacing in options:
        AlphaDDPMScheduler(
            num_train_timesteps=500,
            beta_schedule=schedule,
            variance_type=variance_type,
            prediction_type=prediction_type,
            timestep_spacing=spacing,
        )
