"""--eval_every: bits per dimension and sample quality during training, in one process and in two."""

import json

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline

from ddpm_pipeline import AlphaDDPMPipeline
from ddpm_pipeline.conditioning_alpha_ddpm import tokenize
from ddpm_pipeline.data import ConditionColumns, DataOptions, load_images
from ddpm_pipeline.evaluation.figures import likelihood_of
from ddpm_pipeline.support.draws import RandomStream, image_indices, seeds
from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.training import TrainingOptions, train
from helpers import tiny_unet
from training_helpers import metrics, quick_options

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of the FID of so few images
    pytest.mark.usefixtures("no_final_pictures"),
]


def _train_in_a_fork(options: TrainingOptions) -> None:
    AcceleratorState._reset_state(True)  # that of the process which was forked
    train(options)


def test_training_evaluates_on_the_way(tmp_path):
    (tmp_path / "unet.json").write_text(json.dumps({**dict(tiny_unet().config), "out_channels": 2}))
    options = TrainingOptions(
        dataset="digits", split="train[:40]", model=str(tmp_path / "unet.json"), num_train_timesteps=12, beta_end=0.6,
        batch_size=8, max_train_steps=6, preview_every=0, checkpoint_every=3, num_samples=1, lr_warmup_steps=1,
        learning_rate=0.001, mixed_precision="no", log_every=3, cache_dir=str(tmp_path / "cache"), num_cpu_threads=1,
        variance_type="learned_range", objective="bound", timestep_sampling="importance",
        eval_every=3, eval_images=6, eval_calls=5, eval_samples=6, preview_inference_steps=3, fit_noises=6,
        validation_split="20%", keep_best=True, checkpoints_total_limit=1,
    )  # fmt: skip
    train(options.with_values(output_dir=str(tmp_path / "1")))
    debug_launcher(_train_in_a_fork, (options.with_values(output_dir=str(tmp_path / "2")),), num_processes=2)
    logs = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in "12"]
    names = ("eval_bits_per_dim", "validation_bits_per_dim", "validation_loss")
    evaluated = [[entry[name] for entry in log if "eval_bits_per_dim" in entry for name in names] for log in logs]
    assert len(evaluated[0]) == 6
    kept = [sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in "12"]
    assert kept[0] == kept[1]
    for log in logs:
        with_figures = [entry for entry in log if "eval_bits_per_dim" in entry]
        assert all(0 < entry["eval_fid"] < 1000 and 0 <= entry["eval_precision"] <= 1 for entry in with_figures)
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-3)
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    pipe = AlphaDDPMPipeline.from_pretrained(tmp_path / "2")
    assert pipe.scheduler.config.variance_type == "learned_range"
    samplers = [AlphaDDPMPipeline.from_pretrained(tmp_path / name).scheduler.fitted_samplers for name in "12"]
    assert samplers[0].keys() == samplers[1].keys() != set()
    assert pipe(1, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="pt").images.isfinite().all()
    with pytest.raises(ConfigError, match="learned_range"):
        train(options.with_values(objective="hybrid", variance_type=None, output_dir=str(tmp_path / "wrong")))


@pytest.mark.parametrize("kind", ["text", "stream of classes"])
def test_a_conditional_model_is_evaluated_under_the_conditions_of_the_data(kind, tmp_path):
    """Its last figure is that of the saved model with the images' own classes or captions."""
    given = {"streaming": True, "resolution": 8} if "stream" in kind else {"eval_samples": 5}
    if kind == "text":
        (tmp_path / "captions.yaml").write_text("templates: ['digit {name}']")
        given |= {"caption_templates": str(tmp_path / "captions.yaml")}
    options = quick_options(
        tmp_path, max_train_steps=2, lr_warmup_steps=1, num_samples=1, eval_every=2, eval_images=6, eval_calls=5, model="tiny",
        condition="text" if kind == "text" else "class", split="train[:40]", preview_inference_steps=3, **given,
    )  # fmt: skip
    folder = train(TrainingOptions(**options, output_dir=str(tmp_path / "model")))
    (logged,) = (line for line in metrics(folder) if "eval_bits_per_dim" in line)
    assert "eval_samples" not in given or logged["eval_fid"] > 0
    pipe = DiffusionPipeline.from_pretrained(folder)
    data = load_images(DataOptions(split="train[:40]", cache_dir=options["cache_dir"]), ConditionColumns("class"))
    indices = image_indices(0, 6 if "stream" in kind else 40, 0, 6)
    labels = data.column("label", indices)
    conditions = {"class_labels": labels}
    if kind == "text":
        tokens = tokenize(pipe.tokenizer, [f"digit {label}" for label in labels.tolist()])
        conditions = {"encoder_hidden_states": pipe.text_encoder(**tokens)[0].detach()}
    noise_seeds = seeds(0, RandomStream.NOISE, 0, 6)
    how = {"num_evaluated": 5, "progress": False, "batch_size": 8}
    images = data.pixels(indices), data.value_range
    bits = likelihood_of(pipe.unet, pipe.scheduler, *images, noise_seeds, model_kwargs=conditions, **how).total
    assert logged["eval_bits_per_dim"] == pytest.approx(float(bits.mean()), rel=1e-6)


def test_evaluation_that_cannot_be_is_said_before_training(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"--eval_features nonsense:f: .* MODULE:FUNCTION"):
        train(TrainingOptions(eval_every=1, eval_samples=5, eval_features="nonsense:f", output_dir=str(tmp_path / "w")))
    with pytest.raises(ConfigError, match=r"--eval_samples 5 .* --eval_every 0"):
        TrainingOptions(eval_samples=5)
    (tmp_path / "maps_of_images.py").write_text("import torch\nmake = torch.nn.Identity\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unet.json").write_text(json.dumps(dict(tiny_unet().config)))
    options = TrainingOptions(
        dataset="digits", split="train[:40]", model="unet.json", cache_dir="cache", output_dir="run", num_cpu_threads=1,
        max_train_steps=2, lr_warmup_steps=1, eval_every=1, eval_samples=5, eval_features="maps_of_images:make",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"--eval_features maps_of_images:make: .*\[2, 1, 8, 8\]"):
        train(options)
    with pytest.raises(ConfigError, match=r"4 images; sample quality needs at least 5"):
        train(options.with_values(split="train[:4]", eval_features="digits", output_dir="few"))
