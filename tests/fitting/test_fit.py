"""Fitted samplers: exact where the solution is linear, better than diffusers' where it is not, for every kind of model."""

import json
import re
import runpy
from itertools import combinations
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import PartialState, debug_launcher
from accelerate.state import AcceleratorState
from diffusers import DPMSolverMultistepScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

import condition_models
import text_models
from condition_models import AGE
from ddpm_pipeline import AlphaDDPMFittedScheduler, AlphaDDPMPipeline, AlphaDDPMScheduler, ImageCondition, describe_conditions
from ddpm_pipeline.fitting import FittingOptions, fit, fit_sampler
from ddpm_pipeline.fitting.chains import best_chains, solver_coefficients, step_errors
from ddpm_pipeline.fitting.samplers import _Fit
from ddpm_pipeline.generation import Request
from ddpm_pipeline.support.errors import ConfigError
from helpers import ROOT, TINY_UNET, tiny_unet
from oracles import GaussianData, MixtureData

CONFIG = {"num_train_timesteps": 200, "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
GAUSSIAN = GaussianData(mean=0.3, std=0.4)
MIXTURE = MixtureData(weights=(0.5, 0.3, 0.2), means=(-0.8, 0.1, 0.9), stds=(0.05, 0.1, 0.05))
FEW = {"num_noises": 12, "long_steps": 20}


class KnownUNet(UNet2DModel):
    """The best noise predictor of some data."""

    def forward(self, sample, timestep, **_):
        return UNet2DOutput(self.best(sample, int(timestep)))


def pipeline_of(data) -> AlphaDDPMPipeline:
    scheduler, unet = AlphaDDPMScheduler(**CONFIG), KnownUNet(**TINY_UNET)
    unet.best = data.noise_predictor(scheduler)
    pipe = AlphaDDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_linear_solutions_are_reached_exactly(monkeypatch):
    """With Gaussian data the solution is x_0 = m + s (x_T - √ᾱ_T m)/√(ᾱ_T s² + 1-ᾱ_T), pixel by pixel."""
    pipe = pipeline_of(GAUSSIAN)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    found = fit_sampler(pipe, (1, 2, 5), num_noises=24, long_steps=100)
    assert not AcceleratorState._shared_state, "the next training run chooses its precision"
    for steps, length in found.lengths.items():
        assert length.rmse < 1e-4, steps
        assert length.stock_rmse > 10 * length.rmse and length.is_better
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    pipe.scheduler = found.scheduler
    signal = float(found.scheduler.alphas_cumprod[198]) ** 0.5  # where the long solution begins
    normal = GAUSSIAN.marginal(signal, 1 - signal**2)
    exact = GAUSSIAN.mean + GAUSSIAN.std * (noise - normal.mean) / normal.variance**0.5
    for steps in found.lengths:
        images = pipe(latents=noise, num_inference_steps=steps, output_type="latent").images
        assert (images - exact).abs().max() < 0.01, "as far as the long solution is from the exact one"


def test_mixtures_are_better_than_by_any_stock_solver_and_the_better_the_more_steps():
    found = fit_sampler(pipeline_of(MIXTURE), (3, 6, 12), num_noises=48, long_steps=50)
    rmses = [length.rmse for length in found.lengths.values()]
    assert rmses == sorted(rmses, reverse=True)
    assert all(length.rmse < 0.7 * length.stock_rmse for length in found.lengths.values())
    assert found.scheduler.fitted_samplers.keys() == {"3", "6", "12"}
    assert "| 12 |" in found.table() and "refused" not in found.table()


def test_the_long_solution_is_that_of_dpm_solver():
    scheduler = AlphaDDPMScheduler(**CONFIG)
    stock = DPMSolverMultistepScheduler.from_config(scheduler.config)
    stock.set_timesteps(20)
    timesteps = stock.timesteps
    coefficients = solver_coefficients(scheduler.log_snr(timesteps).numpy())
    sampler = {"timesteps": timesteps.tolist(), "coefficients": coefficients.tolist()}
    ours = AlphaDDPMFittedScheduler(**CONFIG, fitted_samplers={"20": sampler})
    ours.set_timesteps(20)
    predict = MIXTURE.noise_predictor(scheduler)
    expected = found = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in timesteps:
        expected = stock.step(predict(expected, int(t)), t, expected).prev_sample
        found = ours.step(predict(found, int(t)), t, found).prev_sample
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_chain_from_zero_terminal_signal_has_finite_coefficients():
    coefficients = solver_coefficients(np.array([-np.inf, -4.0, 0.0, 5.0]))
    assert np.isfinite(coefficients).all()
    assert coefficients[1, 2] == 0, "no slope from a first point at infinity"
    assert coefficients[-1].tolist() == [0, 1, 0]


def test_errors_of_steps_are_those_of_least_squares_and_chains_the_best_of_all():
    rng, total = np.random.default_rng(0), 6
    vectors = rng.standard_normal((2 * total + 1, 40))
    errors, start = step_errors(vectors @ vectors.T / 40)
    for a, b, c in ((0, 1, 3), (2, 4, 6), (total, 0, 5)):
        used = [b, total + 1 + b] + ([total + 1 + a] if a < total else [])
        residual = np.linalg.lstsq(vectors[used].T, vectors[c], rcond=None)[1][0] / 40
        assert errors[a, b, c] == pytest.approx(residual, rel=1e-5)
    assert start[2] == pytest.approx(np.mean((vectors[2] - vectors[0]) ** 2))
    weights = np.append(0, rng.random(total))  # as of a chain that begins without signal

    def cost(chain) -> float:
        path = [total, *chain, total]
        steps = zip(path, path[1:], path[2:], strict=False)
        return weights[chain[0]] * start[chain[0]] + sum(errors[a, b, c] * weights[c] for a, b, c in steps)

    for steps, chain in best_chains(errors, start, weights, (1, 3, 6)).items():
        every = combinations(range(total), steps)
        assert cost(chain) == pytest.approx(min(map(cost, every))) and len(chain) == steps


def class_pipeline() -> AlphaDDPMPipeline:
    unet = tiny_unet(num_class_embeds=4)
    describe_conditions(unet, class_names=["zero", "one", "two"], condition_dropout=0.1)
    return AlphaDDPMPipeline(unet, AlphaDDPMScheduler(20, beta_schedule="squaredcos_cap_v2"))


PICTURE = torch.rand(1, 8, 16, generator=torch.Generator().manual_seed(0))
KINDS = {
    "class": (class_pipeline, Request({"class_labels": ["zero", "two"]}, 3.0)),
    "text": (text_models.make, Request({"prompt": ["a", "seven", "x"]}, 2.0)),
    "vector": (lambda: condition_models.pipeline(1, None, AGE), Request({"condition_vector": [30.0, 50.0]}, 2.0)),
    "image": (lambda: condition_models.pipeline(1, ImageCondition(1)), Request({"condition_image": [PICTURE]}, 2.0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_conditions_and_guidance_are_those_of_the_request_and_the_pipeline_stays_as_it_was(kind):
    make, request = KINDS[kind]
    pipe = make()
    scheduler, before = pipe.scheduler, dict(vars(pipe.unet))
    found = fit_sampler(pipe, (3,), request, **FEW | {"long_steps": 10})
    assert pipe.scheduler is scheduler and vars(pipe.unet).keys() == before.keys()
    length = found.lengths[3]
    assert np.isfinite(length.rmse) and length.stock_rmse < 2
    at_once = fit_sampler(pipe, (3,), request, batch_size=5, **FEW | {"long_steps": 10}).lengths[3]
    assert at_once.sampler["timesteps"] == length.sampler["timesteps"]
    assert np.allclose(at_once.sampler["coefficients"], length.sampler["coefficients"], atol=1e-2)
    unguided = fit_sampler(pipe, (3,), Request(request.arguments), **FEW | {"long_steps": 10}).lengths[3]
    assert not np.allclose(unguided.sampler["coefficients"], length.sampler["coefficients"], atol=1e-2)


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    "config", [{"variance_type": "learned_range"}, {"prediction_type": "sample", "beta_schedule": "sigmoid"}, ZERO_SNR]
)
def test_every_prediction_and_variance(config):
    channels = 2 if "variance_type" in config else 1
    pipe = AlphaDDPMPipeline(tiny_unet(out_channels=channels), AlphaDDPMScheduler(20, beta_end=0.5, **config))
    found = fit_sampler(pipe, (2, 4), **FEW | {"long_steps": 10})
    assert found.lengths[4].rmse < found.lengths[4].stock_rmse < 1
    pipe.scheduler = found.scheduler
    assert pipe(batch_size=2, num_inference_steps=4, output_type="pt").images.isfinite().all()


def test_numbers_that_cannot_be_are_refused():
    pipe = pipeline_of(GAUSSIAN)
    with pytest.raises(ValueError, match=r"num_inference_steps=30 exceeds the 20 steps"):
        fit_sampler(pipe, (4, 30), **FEW)
    with pytest.raises(ValueError, match="num_noises=2 must be at least 3"):
        fit_sampler(pipe, (4,), **FEW | {"num_noises": 2})
    for lengths in ((4, 4), (2.5,), 4):
        with pytest.raises(ValueError, match=rf"num_inference_steps={re.escape(repr(lengths))} must be whole numbers above 0"):
            fit_sampler(pipe, lengths, **FEW)
    for name, value in {"batch_size": 0, "long_steps": 1000}.items():
        with pytest.raises(ValueError, match=f"{name}={value} must be an integer"):
            fit_sampler(pipe, (4,), **FEW | {name: value})


# ---- the command -------------------------------------------------------------------------------------


def saved(folder: Path) -> Path:
    AlphaDDPMPipeline(tiny_unet(), AlphaDDPMScheduler(20, beta_end=0.5)).save_pretrained(folder)
    return folder


def samplers_in(folder: Path) -> dict:
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return config.get("_alpha_ddpm", {}).get("fitted_samplers", {})


def flags(folder: Path) -> dict:
    return {"model": str(folder), "num_inference_steps": "2,4", "num_noises": 12, "long_steps": 10, "num_cpu_threads": 1}


def test_command_writes_into_the_folder_and_says_what_it_reached(tmp_path, monkeypatch, capsys):
    folder = saved(tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["fit_sampler.py", *(f"--{name}={value}" for name, value in flags(folder).items())])
    runpy.run_path(str(ROOT / "training/fit_sampler.py"), run_name="__main__")
    printed, told = capsys.readouterr()
    assert "| 2 |" in printed and "| 4 |" in printed and "fitting samplers:" not in told
    assert {len(sampler["timesteps"]) for sampler in samplers_in(folder).values()} == {2, 4}
    pipe = AlphaDDPMPipeline.from_pretrained(folder)
    assert isinstance(pipe.scheduler, AlphaDDPMFittedScheduler)
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == samplers_in(folder)["4"]["timesteps"]


def test_mistakes_and_samplers_that_are_not_better_leave_the_folder_as_it_is(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="--num_inference_steps 4,x must be whole numbers"):
        FittingOptions(model=str(folder), num_inference_steps="4,x")
    with pytest.raises(ConfigError, match="is no folder of a pipeline"):
        fit(FittingOptions(model="org/ddpm"))
    with pytest.raises(ConfigError, match=r"exceeds the 10 steps .* Options: --num_inference_steps"):
        fit(FittingOptions(**flags(folder) | {"num_inference_steps": "12"}))
    (folder / "pipeline.py").rename(tmp_path / "pipeline.py")
    (folder / "pipeline.py").mkdir()
    with pytest.raises(FileExistsError, match=r"pipeline\.py"), monkeypatch.context() as patched:
        patched.setattr("ddpm_pipeline.fitting.run.fit_sampler", None)  # is not reached
        fit(FittingOptions(**flags(folder)))
    (folder / "pipeline.py").rmdir()
    (tmp_path / "pipeline.py").rename(folder / "pipeline.py")
    monkeypatch.setattr(_Fit, "best_stock", lambda self, steps, solved: ("a solver", 1e-9))
    with pytest.raises(ConfigError, match="no fitted sampler is better"):
        fit(FittingOptions(**flags(folder)))
    monkeypatch.setattr(_Fit, "solve", Mock(side_effect=FloatingPointError("NaN or infinite values")))
    with pytest.raises(ConfigError, match="NaN or infinite values"):
        fit(FittingOptions(**flags(folder)))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def _fit_in_a_fork(options: FittingOptions, folder: Path) -> None:
    AcceleratorState._reset_state(True)  # that of the process which was forked
    found = fit(options)
    rank = PartialState().process_index
    (folder / f"{rank}.json").write_text(found.scheduler.to_json_string() + found.table())


def test_two_processes_agree_with_each_other_and_with_one(tmp_path):
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    fit(FittingOptions(**flags(one)))
    debug_launcher(_fit_in_a_fork, (FittingOptions(**flags(two)), tmp_path), num_processes=2)
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()
    expected, found = samplers_in(one), samplers_in(two)
    for steps in ("2", "4"):
        assert found[steps]["timesteps"] == expected[steps]["timesteps"]
        assert np.allclose(found[steps]["coefficients"], expected[steps]["coefficients"], atol=1e-3)
