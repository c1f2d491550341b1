"""evaluate: its figures against direct calls, by one process and by two, in JSON and in the card; what it refuses."""

import errno
import itertools
import json
import os
import re
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, EDMEulerScheduler, PNDMScheduler
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import text_models
from data_helpers import rgb, write_image
from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler, describe_conditions
from ddpm_pipeline.data import ConditionColumns, DataOptions, load_images
from ddpm_pipeline.evaluation import EvaluationOptions, ImageQuality, evaluate, likelihood_of, run
from ddpm_pipeline.evaluation.__main__ import main
from ddpm_pipeline.evaluation.digits import fit_digits_classifier
from ddpm_pipeline.evaluation.figures import measurements
from ddpm_pipeline.evaluation.options import parse_options
from ddpm_pipeline.evaluation.results import write_results
from ddpm_pipeline.generation import load_pipeline, sample_uint8, scheduler_for
from ddpm_pipeline.hub import TrainingFacts, build_card, export
from ddpm_pipeline.likelihood import bits_per_dim
from ddpm_pipeline.ranges_alpha_ddpm import ValueRange
from ddpm_pipeline.support.draws import RandomStream, image_indices, seeds
from ddpm_pipeline.support.errors import ConfigError, MissingExtraError
from helpers import ROOT, killed_at, run_python, tiny_unet

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
            pipe.unet, pipe.scheduler, ValueRange().normalize(data.pixels([place])), two_term=True, progress=False,
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
        "seed": SEED, "real_images": 40,
    }  # fmt: skip
    assert entries["kid"].metric_args["std_over_subsets"] == pytest.approx(results["quality"]["kid_std"], rel=0.1)
    bits = entries["bits-dim"].metric_args
    assert {name: bits[name] for name in ("num_images", "steps", "bound", "seed")} == {
        "num_images": 11, "steps": 12, "bound": "upper", "seed": SEED,
    }  # fmt: skip
    assert f" ± {results['bits_per_dim']['total_standard_error']:.2g} |" in card.text
    assert "| bits/dim |" in card.text and "from_pretrained" in card.text and card.data.library_name == "diffusers"


def test_each_figure_in_the_card_goes_by_its_own_name_and_says_what_it_is_an_estimate_from(tmp_path, capsys):
    quality = {"fid": 12.345678, "kid": 2.0, "kid_std": 0.5, "precision": 0.3, "recall": 0.4, "num_generated": 5, "steps": 6}
    bits = {"total": 8.0, "num_images": 9, "steps": 1000, "network_calls": 20, "total_standard_error": 0.21}
    results = {
        "dataset": "d", "split": "s", "seed": 7, "bits_per_dim": bits,
        "quality": {**quality, "scheduler": "S", "features": "F", "num_real": 11},
    }  # fmt: skip
    measured = {one.metric: one for one in measurements(results)}
    values = {name: one.value for name, one in measured.items()}
    assert values == {"bits/dim": 8.0, "FID": 12.345678, "KID": 2.0, "precision": 0.3, "recall": 0.4}
    assert {(one.dataset, one.split) for one in measured.values()} == {("d", "s")}
    bound = measured.pop("bits/dim")
    assert (bound.num_images, bound.standard_error, bound.settings["network_calls"]) == (9, 0.21, "20 of 1000 per image")
    assert {(one.num_images, one.settings["real_images"], one.settings["steps"]) for one in measured.values()} == {(5, 11, 6)}
    write_results(EvaluationOptions(model=str(tmp_path), dataset="d"), results)  # and says those of samples, in few digits
    assert capsys.readouterr().err.splitlines()[:2] == ["FID 12.35, of 5 images", "KID 2, of 5 images"]
    assert str(bound) == "bits/dim 8 ± 0.21, of 9 images"
    bits["network_calls"] = 1000
    assert "network_calls" not in measurements(results)[0].settings


def _evaluate_in_a_fork(options: EvaluationOptions) -> None:
    AcceleratorState._reset_state(True)  # that of the process which was forked
    sys.argv = ["evaluate.py", *(f"--{name}={value}" for name, value in options.flat().items() if value is not None)]
    main()  # the command, which needs to know the main process before it evaluates


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


def test_models_with_samplers_of_others_have_the_same_likelihood(model, cache, tmp_path):
    pipe, found = AlphaDDPMPipeline.from_pretrained(model), []
    for kind in (DDPMScheduler, DDIMScheduler, PNDMScheduler):
        scheduler = kind(num_train_timesteps=12, beta_start=0.02, beta_end=0.6)
        DDPMPipeline(pipe.unet, scheduler).save_pretrained(tmp_path / kind.__name__)
        options = {"num_images": 0, "num_likelihood_images": 2, "likelihood_calls": 3}
        found.append(evaluate(options_for(tmp_path / kind.__name__, cache, **options))["bits_per_dim"])
    assert found[0] == found[1] == found[2] and found[0]["variance_type"] == "fixed_small"
    DDPMPipeline(pipe.unet, EDMEulerScheduler()).save_pretrained(tmp_path / "edm")
    with pytest.raises(ConfigError, match="is no DDPM: EDMEulerScheduler"):  # of which a bound would be of another process
        evaluate(options_for(tmp_path / "edm", cache, num_images=0))


def test_first_images_of_a_stream(model, cache, tmp_path):
    (tmp_path / "link.json").symlink_to("stream.json")
    result = evaluate(
        options_for(
            model, cache, streaming=True, split="train", num_images=6, num_likelihood_images=8,
            output=str(tmp_path / "link.json"), update_card=False,
        )
    )  # fmt: skip
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "stream.json").read_text()) == result
    assert (result["quality"]["num_real"], result["bits_per_dim"]["num_images"]) == (8, 8)


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no/such"}, "no/such is no folder here, and so was looked for on the Hub; it cannot be loaded"),
        ({"features": "nonsense:f"}, "MODULE:FUNCTION"),
        ({"num_images": 3}, "--num_images 3 must be 0 or at least 5"),
        ({"num_images": 0, "num_likelihood_images": 0}, "nothing"),
        ({"resolution": 16}, "--resolution 16 differs from the model's, 8"),
        ({"channels": 3}, "--channels 3 differs from the model's, 1"),
        ({"guidance_scale": 2.0}, "--guidance_scale 2.0 needs a conditional model"),
        ({"label_column": "label"}, "--label_column does not fit"),
        ({"likelihood_calls": 2}, "--likelihood_calls 2 must be at least 3"),
        ({"likelihood_calls": 5, "two_term": True}, "--two_term"),
        ({"num_bins": 16}, "levels"),
        ({"num_inference_steps": 13}, "--num_inference_steps 13"),
        ({"likelihood_steps": 13}, "--likelihood_steps 13 exceeds the 12 steps"),
        *(({"split": f"train[:{count}]"}, f"{count} images; sample quality needs at least 5") for count in (1, 2, 4)),
        ({"scheduler": "magic"}, "--scheduler magic must be one of keep, ddpm"),
    ],
)
def test_what_cannot_be_evaluated_is_said(model, cache, options, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=message):
        evaluate(options_for(options.pop("model", model), cache, **options))


def test_missing_weights_are_named(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    del weights["conv_in.bias"]
    save_file(weights, folder / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match=r"no weights for conv_in\.bias of its UNet"):
        load_pipeline(str(folder))


def test_images_that_are_not_numbers_are_no_images(model):
    """Diffusers 0.42.1: the last two timesteps of UniPC are the same where there are as many steps as timesteps."""
    pipe = load_pipeline(str(model))
    pipe.scheduler = scheduler_for(pipe, "unipc")
    with pytest.raises(ConfigError, match=r"UniPCMultistepScheduler cannot run 12 steps.*--scheduler"):
        sample_uint8(pipe, range(2), seed=0, num_inference_steps=12)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sample_size": (8, 12)}, r"DigitsClassifier fails on images \[2, 1, 8, 12\]"),
        ({"sample_size": None}, "no sample_size"),
    ],
)
def test_models_of_images_that_the_data_cannot_have_are_refused(cache, tmp_path, config, message):
    scheduler = AlphaDDPMScheduler(num_train_timesteps=12, beta_end=0.6)
    AlphaDDPMPipeline(tiny_unet(**config), scheduler).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        evaluate(options_for(tmp_path / "model", cache))


@pytest.mark.parametrize("missing", ["the library", "the weights"])
def test_without_an_extractor_the_likelihood_is_evaluated_alone(model, cache, tmp_path, monkeypatch, capsys, missing):
    def fail(weights):
        raise MissingExtraError("torch_fidelity") if missing == "the library" else FileNotFoundError("no weights")

    monkeypatch.setattr("ddpm_pipeline.evaluation.features.InceptionFeatures", fail)
    write_image(tmp_path / "own" / "a.png", rgb(1))
    write_image(tmp_path / "own" / "b.png", rgb(2))
    options = options_for(
        model, cache, dataset=str(tmp_path / "own"), split="train", num_likelihood_images=2, likelihood_calls=3,
        output=str(tmp_path / "e.json"), update_card=False,
    )  # fmt: skip
    results = evaluate(options)
    assert "quality" not in results and results["bits_per_dim"]["num_images"] == 2 and results["split"] is None
    assert "--num_images 0" in capsys.readouterr().err
    for explicit in ({"features": "inception"}, {"num_likelihood_images": 0}):
        with pytest.raises(ConfigError, match="--num_images 0"):
            evaluate(options.with_values(**explicit))


MODULE = """
import torch
from torch import nn

class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
    def forward(self, images):
        return self.function(images)

def flat(images):
    return images.flatten(1)

class Two(Of):
    features = staticmethod(flat)

def leave(*_):
    raise SystemExit(3)

fine = lambda: Of(flat)
constant = lambda: Of(lambda images: torch.ones(len(images), 4))
half = lambda: Of(lambda images: images.flatten(1).half())
random = lambda: Of(lambda images: flat(images) + torch.rand(len(images), 1))
whole = lambda: Of(lambda images: (100 * images.flatten(1)).long())
a_number, a_function = 7, lambda: flat
nothing = lambda: None
with_argument = lambda name: Of(flat)
failing = lambda: 1 / 0
leaving = leave
fails_on_images = lambda: Of(lambda images: images[:, 5])
leaves_on_images = lambda: Of(leave)
maps = lambda: Of(lambda images: images)
a_tuple = lambda: Of(lambda images: (flat(images),))
nan = lambda: Of(lambda images: flat(images) / 0)
complex_ = lambda: Of(lambda images: flat(images).to(torch.complex64))
squeezing = lambda: Of(lambda images: flat(images).squeeze())
of_the_batch = lambda: Of(lambda images: images.mean(dim=(0, 2, 3))[None])
of_few = lambda: Of(lambda images: flat(images)[:1])
with_logits = lambda: Two(lambda images: images[:, 0, 0, :3])
with_maps_as_logits = lambda: Two(lambda images: images)
nan_on_data = lambda: Of(lambda images: torch.where(images[:, 0, 0, :3] == -1, torch.nan, 0.0))
"""
WORKING = ("fine", "half", "whole", "with_logits")
FUNCTIONS = re.findall(r"^(\w+)[, \w]* = ", MODULE, flags=re.MULTILINE)


@pytest.fixture
def module_here(tmp_path, monkeypatch) -> str:
    """A module of extractors in the current folder, where Python does not search."""
    name = f"extractors_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(f"import {name}_beside\n{MODULE}")
    (tmp_path / f"{name}_beside.py").write_text("")
    (tmp_path / f"{name}_broken.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("function", [f"_broken:{WORKING[0]}", ":", ":no_such", ":fine.deeper", ":a_function", *FUNCTIONS])
def test_extractors_that_fail_do_so_in_one_line_before_anything_is_sampled(model, cache, module_here, monkeypatch, function):
    name = module_here + (function if ":" in function else f":{function}")
    options = options_for(
        model, cache, features=name, num_likelihood_images=3, likelihood_calls=3, num_images=6, num_inference_steps=2,
        output="e.json", update_card=False,
    )  # fmt: skip
    if function in WORKING:
        assert evaluate(options)["quality"]["num_generated"] == 6
        return
    monkeypatch.setattr(run, "likelihood_of", None)  # what takes long
    with pytest.raises(ConfigError) as raised:
        evaluate(options)
    assert "feature" in str(raised.value) and "\n" not in str(raised.value)


# ---- where the figures go ------------------------------------------------------------------------


@pytest.fixture
def own_model(model, tmp_path) -> Path:
    return shutil.copytree(model, tmp_path / "model")


def quick(model: Path, cache: str, **more) -> EvaluationOptions:
    """The likelihood alone, of two images."""
    return options_for(model, cache, num_images=0, num_likelihood_images=2, likelihood_calls=3, **more)


@pytest.mark.parametrize("output", ["folder", "file/e.json", "pipe", "x" * 300])
def test_results_that_cannot_be_written_are_refused_before_anything_is_computed(
    own_model, cache, tmp_path, monkeypatch, output
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")  # which, as /dev/stdout, a file must not replace
    monkeypatch.setattr(run, "likelihood_of", None)
    with pytest.raises(ConfigError, match="--output"):
        evaluate(quick(own_model, cache, output=str(tmp_path / output)))


@pytest.mark.parametrize("readme", ["caf\xe9".encode("latin-1"), b"---\n[not: closed\n---\n", b"---\n- a\n- list\n---\nmine\n"])
def test_no_readme_costs_the_figures(own_model, cache, monkeypatch, readme):
    """It is updated, left as it is, or refused before anything is computed."""
    original, calls = (own_model / "README.md").read_bytes(), []
    monkeypatch.setattr(run, "likelihood_of", lambda *args, **how: calls.append(1) or likelihood_of(*args, **how))
    for content in (readme, readme + original[original.index(b"\n# ") :]):
        (own_model / "README.md").write_bytes(content)
        (own_model / "evaluation.json").unlink()
        calls.clear()
        try:
            evaluate(quick(own_model, cache))
        except ConfigError as error:
            assert "--update_card false" in str(error) and not calls
            evaluate(quick(own_model, cache, update_card=False))
        assert json.loads((own_model / "evaluation.json").read_text())["bits_per_dim"]["num_images"] == 2


def test_figures_are_printed_where_they_cannot_be_written_after_all(own_model, cache, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ddpm_pipeline.evaluation.results.write_text", full)
    with pytest.raises(ConfigError, match="No space left"):
        evaluate(quick(own_model, cache))
    assert json.loads(capsys.readouterr().out)["bits_per_dim"]["num_images"] == 2


def test_killed_at_any_operation_the_files_of_an_evaluation_are_whole(own_model, cache, results):
    options, own = quick(own_model, cache), [own_model / name for name in ("evaluation.json", "README.md")]
    before = {path: path.read_bytes() for path in own}
    changed = {**results, "seed": 77}
    write_results(options, changed)
    after = {path: path.read_bytes() for path in own}
    for operation in itertools.count(1):
        for path in own:
            path.write_bytes(before[path])
        killed = killed_at(operation, own_model, partial(write_results, options, changed))
        assert all(path.read_bytes() in (before[path], after[path]) and before[path] != after[path] for path in own)
        if not killed:
            break
    assert operation > 8 and all(path.read_bytes() == after[path] for path in own)


# ---- conditional models --------------------------------------------------------------------------


def class_model(folder: Path) -> Path:
    """Of the digits' classes in another order, and of one that the digits lack."""
    unet = tiny_unet(num_class_embeds=12)
    describe_conditions(unet, class_names=[*"9876543210", "none"])
    scheduler = AlphaDDPMScheduler(num_train_timesteps=12, beta_start=0.02, beta_end=0.6)
    AlphaDDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def text_model(folder: Path) -> Path:
    scheduler = AlphaDDPMScheduler(12, beta_start=0.02, beta_end=0.6, variance_type="learned_range")
    text_models.make(scheduler=scheduler).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["class", "text"])
def test_conditional_models_are_evaluated_under_the_conditions_of_the_data(cache, tmp_path, kind):
    folder = (class_model if kind == "class" else text_model)(tmp_path / "model")
    more = {} if kind == "class" else {"caption_template": "the digit {name}"}
    results = evaluate(options_for(folder, cache, num_likelihood_images=5, num_images=6, guidance_scale=1.5, **more))
    pipe = load_pipeline(str(folder))
    data = load_images(DataOptions("digits", split=SPLIT, cache_dir=cache), ConditionColumns("class"))

    def asked(places) -> list:
        labels = data.column("label", places).tolist()
        return [9 - label for label in labels] if kind == "class" else [f"the digit {label}" for label in labels]

    places, noise_seeds = image_indices(SEED, len(data), 0, 5), seeds(SEED, RandomStream.NOISE, 0, 5)
    values = asked(places)
    assert len(set(values)) > 2
    if kind == "class":
        inputs = {"class_labels": torch.tensor(values)}
    else:
        tokens = pipe.tokenizer(values, padding="max_length", max_length=77, return_tensors="pt")
        inputs = {"encoder_hidden_states": pipe.text_encoder(tokens.input_ids, tokens.attention_mask)[0].detach()}
    images = data.pixels(places), data.value_range
    found = likelihood_of(pipe.unet, pipe.scheduler, *images, noise_seeds, model_kwargs=inputs, progress=False)
    assert results["bits_per_dim"]["total"] == pytest.approx(found.total.mean().item(), rel=1e-6)

    call = {"class_labels" if kind == "class" else "prompt": asked(image_indices(SEED, len(data), 0, 6)), "guidance_scale": 1.5}
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds(SEED, RandomStream.PREVIEW, 0, 6)]
    samples = pipe(**call, generator=generators, output_type="pt").images
    metric = ImageQuality(fit_digits_classifier(), seed=SEED)
    metric.update(data.pixels(range(40)), real=True)
    metric.update(samples.mul(255).round().to(torch.uint8), real=False)
    assert results["quality"]["fid"] == pytest.approx(metric.compute().fid, rel=1e-4)
    assert results["quality"]["guidance_scale"] == 1.5
    digits = data.column("label", image_indices(SEED, len(data), 0, 6))
    right = fit_digits_classifier()(samples * 2 - 1).argmax(dim=1) == digits
    found = results["conditions"]
    assert (found["class_accuracy"], found["num_images"], found["guidance_scale"]) == (right.double().mean().item(), 6, 1.5)


def test_conditions_that_the_data_lack_are_named(cache, tmp_path):
    with pytest.raises(ConfigError, match=r"--text_column, or .* --caption_template"):
        evaluate(options_for(text_model(tmp_path / "text"), cache))
    unet = tiny_unet(num_class_embeds=3)
    describe_conditions(unet, class_names=["cat", "dog"])
    AlphaDDPMPipeline(unet, AlphaDDPMScheduler(12, beta_end=0.6)).save_pretrained(tmp_path / "pets")
    with pytest.raises(ConfigError, match="class '0', which the model does not know; it knows 'cat', 'dog'"):
        evaluate(options_for(tmp_path / "pets", cache))
    write_image(tmp_path / "flat" / "a.png", rgb(1))
    with pytest.raises(ConfigError, match="--label_column"):
        evaluate(options_for(tmp_path / "pets", cache, dataset=str(tmp_path / "flat"), split="train", features="digits"))


# ---- the command ----------------------------------------------------------------------------------


def test_command_prints_the_results_and_errors_in_one_line(model, cache, tmp_path, monkeypatch, capsys):
    def command(*flags: str) -> None:
        monkeypatch.setattr("sys.argv", ["evaluate.py", "--dataset", "digits", *flags])
        runpy.run_path(str(ROOT / "training" / "evaluate.py"), run_name="__main__")

    flags = ["--model", f"{model}/unet/..", "--split", SPLIT, "--cache_dir", cache, "--num_images", "0", "--no_update_card"]
    command(*flags, "--num_likelihood_images", "2", "--likelihood_steps", "2", "--output", str(tmp_path / "found.json"))
    printed, told = capsys.readouterr()
    printed = json.loads(printed)
    assert printed == json.loads((tmp_path / "found.json").read_text()) and "quality" not in printed
    assert not re.search("(likelihood|bits/dim): ", told)  # no bars in files
    assert printed["model"] == model.name
    with pytest.raises(SystemExit, match=r"^error: --model .* cannot be loaded"):
        command("--model", str(tmp_path / "no"))


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
