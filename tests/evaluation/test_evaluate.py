"""evaluate: its figures against direct calls, by one process and by two, in JSON and in the card; what it refuses."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.data import DataOptions, load_images, to_model_range
from ddpm_pipeline.evaluation import EvaluationOptions, ImageQuality, evaluate
from ddpm_pipeline.evaluation.digits import fit_digits_classifier
from ddpm_pipeline.evaluation.figures import measurements
from ddpm_pipeline.evaluation.options import parse_options
from ddpm_pipeline.generation import load_pipeline, sample_uint8, scheduler_for
from ddpm_pipeline.hub import TrainingFacts, build_card, export
from ddpm_pipeline.likelihood import bits_per_dim
from ddpm_pipeline.support.draws import RandomStream, image_indices, seeds
from ddpm_pipeline.support.errors import ConfigError
from helpers import ROOT, run_python, tiny_unet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the FID of so few images
SPLIT, SEED = "train[:40]", 3
NUM_LIKELIHOOD, NUM_SAMPLES = 11, 14


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "digits-model"
    pipe = AlphaDDPMPipeline(tiny_unet(), AlphaDDPMScheduler(num_train_timesteps=12, beta_start=0.02, beta_end=0.6))
    training = TrainingFacts("digits", num_images=9, facts={"updates": 0})
    export(pipe, folder, build_card(pipe, name="digits-model", training=training))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def options_for(model: Path | str, cache: str, **more) -> EvaluationOptions:
    given = {
        "model": str(model), "dataset": "digits", "split": SPLIT, "cache_dir": cache, "batch_size": 4, "seed": SEED,
        "num_likelihood_images": NUM_LIKELIHOOD, "num_images": NUM_SAMPLES, "num_cpu_threads": 1,
    }  # fmt: skip
    return EvaluationOptions(**given | more)


@pytest.fixture(scope="module")
def results(model, cache) -> dict:
    """Of one process, with a batch that divides neither number of images."""
    return evaluate(options_for(model, cache, two_term=True))


def test_likelihoods_are_those_of_each_image_with_its_own_noise(model, cache, results):
    pipe = load_pipeline(str(model))
    data = load_images(DataOptions("digits", split=SPLIT, cache_dir=cache))
    places = image_indices(SEED, len(data), 0, NUM_LIKELIHOOD)
    noise_seeds = seeds(SEED, RandomStream.NOISE, 0, NUM_LIKELIHOOD)
    assert len(set(places)) == len(set(noise_seeds)) == NUM_LIKELIHOOD
    alone = [
        bits_per_dim(
            pipe.unet, pipe.scheduler, to_model_range(data.pixels([place])), two_term=True, progress=False,
            generator=torch.Generator().manual_seed(int(seed)),
        )
        for place, seed in zip(places, noise_seeds, strict=True)
    ]  # fmt: skip
    found = results["bits_per_dim"]
    for name in ("total", "prior", "diffusion", "decoder", "two_term"):
        column = np.array([getattr(one, name).item() for one in alone])
        assert found[name] == pytest.approx(column.mean(), rel=1e-5), name
    totals = np.array([one.total.item() for one in alone])
    error = totals.std(ddof=1) / np.sqrt(NUM_LIKELIHOOD)
    assert found["total_standard_error"] == pytest.approx(error, rel=1e-4)
    assert found["total"] == pytest.approx(found["prior"] + found["diffusion"] + found["decoder"], rel=1e-12)
    assert found["standard_error_of_one_image"] == 0
    assert (found["num_images"], found["steps"], found["network_calls"]) == (NUM_LIKELIHOOD, 12, 12)
    assert (found["num_bins"], found["variance_type"]) == (256, "fixed_small")


def test_quality_is_that_of_samples_with_seeds_of_their_own(model, cache, results):
    pipe = load_pipeline(str(model))
    data = load_images(DataOptions("digits", split=SPLIT, cache_dir=cache))
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds(SEED, RandomStream.PREVIEW, 0, NUM_SAMPLES)]
    samples = [pipe(1, generator, num_inference_steps=12, output_type="pt").images for generator in generators]
    samples = torch.cat(samples).mul(255).round().to(torch.uint8)
    assert len({sample.numpy().tobytes() for sample in samples}) == NUM_SAMPLES
    metric = ImageQuality(fit_digits_classifier(), seed=SEED)
    metric.update(data.pixels(range(40)), real=True)
    metric.update(samples, real=False)
    expected, found = metric.compute()._asdict(), results["quality"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert (found["num_real"], found["num_generated"], found["steps"]) == (40, NUM_SAMPLES, 12)
    assert (found["scheduler"], found["features"]) == ("AlphaDDPMScheduler", "DigitsClassifier")


def test_results_are_in_json_and_card(model, results):
    assert json.loads((model / "evaluation.json").read_text()) == results
    assert list(results)[:4] == ["model", "dataset", "split", "skipped_rows"]
    card = ModelCard.load(str(model / "README.md"))
    entries = {entry.metric_type: entry for entry in card.data.eval_results}
    assert {name: entry.metric_value for name, entry in entries.items()} == {
        "bits-dim": results["bits_per_dim"]["total"],
        **{name: results["quality"][name] for name in ("fid", "kid", "precision", "recall")},
    }
    assert entries["fid"].metric_args == {
        "num_images": NUM_SAMPLES, "steps": 12, "scheduler": "AlphaDDPMScheduler", "features": "DigitsClassifier",
        "seed": SEED,
    }  # fmt: skip
    assert entries["bits-dim"].metric_args == {"num_images": 11, "steps": 12, "bound": "upper", "seed": SEED}
    assert "| bits/dim |" in card.text and "from_pretrained" in card.text and card.data.library_name == "diffusers"


def test_each_figure_in_the_card_goes_by_its_own_name():
    quality = {"fid": 1.0, "kid": 2.0, "precision": 0.3, "recall": 0.4, "num_generated": 5, "steps": 6}
    results = {
        "dataset": "d", "split": "s", "seed": 7, "bits_per_dim": {"total": 8.0, "num_images": 9, "steps": 10},
        "quality": {**quality, "scheduler": "S", "features": "F"},
    }  # fmt: skip
    measured = {one.metric: one.value for one in measurements(results)}
    assert measured == {"bits/dim": 8.0, "FID": 1.0, "KID": 2.0, "precision": 0.3, "recall": 0.4}
    assert {(one.dataset, one.split) for one in measurements(results)} == {("d", "s")}


def _evaluate_in_a_fork(options: EvaluationOptions) -> None:
    AcceleratorState._reset_state(True)  # that of the process which was forked
    evaluate(options)


def test_two_processes_find_the_same(model, cache, results, tmp_path):
    output = tmp_path / "two.json"
    options = options_for(model, cache, two_term=True, output=str(output), update_card=False)
    debug_launcher(_evaluate_in_a_fork, (options,), num_processes=2)
    two = json.loads(output.read_text())
    assert (results["processes"], two["processes"]) == (1, 2)
    differing = ("processes", "seconds")
    assert {k: v for k, v in two.items() if k not in differing} == {k: v for k, v in results.items() if k not in differing}


def test_another_sampler_and_an_estimated_bound(model, cache, tmp_path):
    before = (model / "README.md").read_bytes()
    result = evaluate(
        options_for(
            model, cache, num_likelihood_images=3, likelihood_calls=6, num_images=8, num_inference_steps=4,
            scheduler="ddim", output=str(tmp_path / "e.json"), update_card=False,
        )
    )  # fmt: skip
    assert result["quality"]["scheduler"] == "DDIMScheduler" and result["quality"]["steps"] == 4
    assert result["bits_per_dim"]["network_calls"] == 6 and result["bits_per_dim"]["steps"] == 12
    assert result["bits_per_dim"]["standard_error_of_one_image"] > 0
    assert (model / "README.md").read_bytes() == before


def test_first_images_of_a_stream(model, cache, tmp_path):
    result = evaluate(
        options_for(
            model, cache, streaming=True, split="train", num_images=6, num_likelihood_images=8,
            output=str(tmp_path / "stream.json"), update_card=False,
        )
    )  # fmt: skip
    assert (result["quality"]["num_real"], result["bits_per_dim"]["num_images"]) == (8, 8)


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no/such"}, "cannot be loaded"),
        ({"features": "nonsense:f"}, "MODULE:FUNCTION"),
        ({"num_images": 3}, "--num_images 3 must be 0 or at least 5"),
        ({"num_images": 0, "num_likelihood_images": 0}, "nothing"),
        ({"resolution": 16}, "--resolution 16 differs from the model's, 8"),
        ({"channels": 3}, "--channels 3 differs from the model's, 1"),
        ({"scheduler": "magic"}, "--scheduler magic must be one of keep, ddpm"),
    ],
)
def test_what_cannot_be_evaluated_is_said(model, cache, options, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=message):
        evaluate(options_for(options.pop("model", model), cache, **options))


def test_conditional_models_and_missing_weights_are_named(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    del weights["conv_in.bias"]
    save_file(weights, folder / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match=r"no weights for conv_in\.bias of its UNet"):
        load_pipeline(str(folder))
    conditional = AlphaDDPMPipeline(tiny_unet(num_class_embeds=3), AlphaDDPMScheduler(12))
    conditional.save_pretrained(tmp_path / "conditional")
    with pytest.raises(ConfigError, match="is a conditional model"):
        load_pipeline(str(tmp_path / "conditional"))


def test_images_that_are_not_numbers_are_no_images(model):
    """Diffusers 0.42.1: the last two timesteps of UniPC are the same where there are as many steps as timesteps."""
    pipe = load_pipeline(str(model))
    pipe.scheduler = scheduler_for(pipe, "unipc")
    with pytest.raises(ConfigError, match=r"UniPCMultistepScheduler cannot run 12 steps.*--scheduler"):
        sample_uint8(pipe, range(2), seed=0, num_inference_steps=12)


# ---- the command ----------------------------------------------------------------------------------


def test_command_prints_the_results_and_errors_in_one_line(model, cache, tmp_path, monkeypatch, capsys):
    def run(*flags: str) -> None:
        monkeypatch.setattr("sys.argv", ["evaluate.py", "--dataset", "digits", *flags])
        runpy.run_path(str(ROOT / "training" / "evaluate.py"), run_name="__main__")

    flags = ["--model", str(model), "--split", SPLIT, "--cache_dir", cache, "--num_images", "0", "--update_card", "false"]
    run(*flags, "--num_likelihood_images", "2", "--likelihood_steps", "2", "--output", str(tmp_path / "found.json"))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "found.json").read_text()) and "quality" not in printed
    with pytest.raises(SystemExit, match=r"^error: --model .* cannot be loaded"):
        run("--model", str(tmp_path / "no"))


def test_flags_and_python_mean_the_same_and_parsing_needs_no_torch():
    options = parse_options(["--model", "m", "--dataset", "d", "--num_images=7", "--no_update_card", "--two_term"])
    assert options == EvaluationOptions(model="m", dataset="d", num_images=7, update_card=False, two_term=True)
    run_python(
        "import sys\n"
        "from ddpm_pipeline.evaluation import EvaluationOptions\n"
        "from ddpm_pipeline.evaluation.options import parse_options\n"
        "from ddpm_pipeline.evaluation.__main__ import main\n"
        "from ddpm_pipeline.generation.__main__ import main\n"
        "from ddpm_pipeline.generation import GenerationOptions\n"
        "assert parse_options(['--model', 'm', '--dataset', 'd']) == EvaluationOptions(model='m', dataset='d')\n"
        "GenerationOptions(model='m', output_dir='d')\n"
        "assert not {'torch', 'diffusers', 'datasets', 'accelerate'} & set(sys.modules), 'parsing is slow'\n"
    )
