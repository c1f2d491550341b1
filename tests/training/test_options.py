"""The parts of the training script that need no run: randomness, options, models, weights of the loss, pictures."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy import stats

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.generation import drawing
from ddpm_pipeline.support.draws import Stream, image_indices, noise_of, seeds, uniform
from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.training.checkpoints import prepare_output_folder
from ddpm_pipeline.training.models import PRESETS, build_model
from ddpm_pipeline.training.objectives import mean_squared_error, min_snr_weights
from ddpm_pipeline.training.options import CONFIGS, TrainingConfig, options_table, parse_config
from helpers import TINY_UNET

# ---- randomness


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own():
    num_images, batch_size = 50, 16
    seen = np.concatenate([image_indices(3, num_images, step, batch_size) for step in range(25)])
    epochs = seen[: 8 * num_images].reshape(8, num_images)
    assert all(sorted(epoch) == list(range(num_images)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert not np.array_equal(
        seen, np.concatenate([image_indices(4, num_images, step, batch_size) for step in range(25)])
    )


def test_batches_larger_than_the_data():
    assert sorted(image_indices(0, 3, 5, 12)) == sorted([0, 1, 2] * 4)


def test_draws_are_functions_of_seed_step_and_stream():
    first = uniform(1, Stream.TIMESTEP, 7, 100)
    np.testing.assert_array_equal(first[:10], uniform(1, Stream.TIMESTEP, 7, 10))
    for other in (
        uniform(2, Stream.TIMESTEP, 7, 100),
        uniform(1, Stream.FLIP, 7, 100),
        uniform(1, Stream.TIMESTEP, 8, 100),
    ):
        assert not np.isin(first, other).any()
    many = np.concatenate([uniform(1, Stream.TIMESTEP, step, 64) for step in range(500)])
    assert stats.kstest(many, "uniform").pvalue > 1e-3


def test_noise_is_each_images_own_and_standard_normal():
    image_seeds = seeds(0, Stream.NOISE, 0, 200)
    noise = noise_of(image_seeds, (3, 8, 8), torch.device("cpu"))
    torch.testing.assert_close(
        noise_of(image_seeds[50:60], (3, 8, 8), torch.device("cpu")), noise[50:60], atol=0, rtol=0
    )
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1] == pytest.approx(0, abs=0.3)


# ---- options


def test_without_dataset_and_config_the_digits_recipe_runs():
    config = parse_config([])
    recipe = yaml.safe_load((CONFIGS / "digits.yaml").read_text())
    assert {name: getattr(config, name) for name in recipe} == recipe
    assert parse_config(["--max_train_steps", "7"]).batch_size == recipe["batch_size"]
    assert parse_config(["--dataset", "folder"]) == TrainingConfig(dataset="folder")


def test_flags_override_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 12\nlearning_rate: 1e-3\nrandom_flip: true\nmax_train_steps: null\n")
    config = parse_config(["--config", str(file), "--batch_size", "6", "--random_flip", "false"])
    assert (config.batch_size, config.learning_rate, config.random_flip) == (6, 1e-3, False)


def test_a_resolved_configuration_is_a_config_file(tmp_path):
    config = TrainingConfig(dataset="somewhere", learning_rate=2e-5, random_flip=True, resolution=16)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert parse_config(["--config", str(tmp_path / "c.yaml")]) == config


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe):
    assert parse_config(["--config", str(recipe)]).max_train_steps


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--learning_rat", "1"], "--learning_rate"),
        (["--batchsize=4"], "--batch_size"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--batch_size", "0"], "at least 1"),
        (["--learning_rate", "nan"], "above 0"),
        (["--channels", "2"], "1, 3 or 4"),
        (["--mixed_precision", "int8"], "no, bf16, fp16"),
        (["--lr_scheduler", "cosin"], "cosine"),
        (["--variance_type", "learned"], "learned_range"),
        (["--variance_type", "analytic"], "measured after training"),
        (["--objective", "vlb"], "simple, hybrid, bound"),
        (["--timestep_sampling", "random"], "uniform, stratified, importance"),
        (["--objective", "bound", "--snr_gamma", "5"], "snr_gamma"),
        (["--bound_weight", "0"], "above 0"),
        (["--resume", "latest", "--overwrite"], "exclude"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--adam_beta1", "1"], "below 1"),
    ],
)
def test_bad_options_are_named(argv, named):
    with pytest.raises(ConfigError, match=named):
        parse_config(argv)


@pytest.mark.parametrize("text, named", [("batch: 3", "--batch_size"), ("- a", "option: value"), ("a: [", "YAML")])
def test_bad_config_files_are_named(tmp_path, text, named):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=named):
        parse_config(["--config", str(tmp_path / "bad.yaml")])


def test_every_option_has_a_help_text_and_stands_in_the_docs():
    table = options_table()
    assert all(entry.metadata["help"] and f"`--{entry.name}`" in table for entry in dataclasses.fields(TrainingConfig))
    assert table in (CONFIGS.parents[1] / "docs/training.md").read_text(), "write options_table() into docs/training.md"


# ---- output folder


def test_somebody_elses_folder_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for config in (TrainingConfig(), TrainingConfig(overwrite=True), TrainingConfig(resume="latest")):
        with pytest.raises(ConfigError, match=r"thesis\.tex"):
            prepare_output_folder(tmp_path, config)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_overwrite_removes_only_what_runs_write(tmp_path):
    (tmp_path / "training_config.yaml").write_text("")
    (tmp_path / "samples.png").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    prepare_output_folder(tmp_path, TrainingConfig(overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        prepare_output_folder(tmp_path / "file", TrainingConfig())
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare_output_folder(tmp_path / "file" / "below", TrainingConfig())


# ---- models


@pytest.mark.parametrize("resolution, channels", [(8, 1), (16, 3), (32, 3), (64, 4)])
def test_presets_fit_their_resolutions(resolution, channels):
    with torch.device("meta"):
        unet, scheduler = build_model(TrainingConfig(), resolution, channels)
        size = (1, channels, resolution, resolution)
        assert unet(torch.zeros(size), torch.zeros(1, dtype=torch.long)).sample.shape == size
    assert scheduler.config.prediction_type == "epsilon"


def test_larger_presets_have_valid_block_types():
    for name in ("128", "256"):
        blocks = PRESETS[name][1]
        assert len(blocks["block_out_channels"]) == len(blocks["down_block_types"]) == len(blocks["up_block_types"])


def test_schedule_options_reach_the_scheduler():
    config = TrainingConfig(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    scheduler = build_model(config, 8, 1)[1]
    assert len(scheduler) == 50 and scheduler.config.prediction_type == "v_prediction"


def test_model_from_a_config_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY_UNET, "_class_name": "UNet2DModel"}))
    unet, _ = build_model(TrainingConfig(model=str(tmp_path), dropout=0.25), 8, 1)
    assert unet.config.block_out_channels == [8, 16] and unet.config.dropout == 0.25


def test_init_from_takes_weights_and_schedule(tmp_path):
    unet, _ = build_model(TrainingConfig(model="tiny"), 8, 1)
    stored = AlphaDDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=200)
    AlphaDDPMPipeline(unet=unet, scheduler=stored).save_pretrained(tmp_path)
    again, scheduler = build_model(TrainingConfig(init_from=str(tmp_path)), 8, 1)
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2" and len(scheduler) == 200
    for old, new in zip(unet.parameters(), again.parameters(), strict=True):
        assert torch.equal(old, new)
    override = TrainingConfig(init_from=str(tmp_path), beta_schedule="linear", num_train_timesteps=1000)
    assert build_model(override, 8, 1)[1].config.beta_schedule == "linear"


@pytest.mark.parametrize(
    "config, resolution, channels, named",
    [
        ({"model": "tiny"}, 9, 1, "--resolution 8 or 10"),
        ({"model": "nowhere.json"}, 8, 1, "nowhere.json"),
        ({"init_from": "/nowhere/at/all"}, 8, 1, "--init_from /nowhere/at/all"),
        ({"beta_schedule": "quadratic"}, 8, 1, "squaredcos_cap_v2"),
        ({"prediction_type": "noise"}, 8, 1, "epsilon"),
        ({"rescale_betas_zero_snr": True}, 8, 1, "v_prediction"),
        ({}, 512, 3, "no preset"),
    ],
)
def test_models_that_do_not_fit_are_named(config, resolution, channels, named):
    with pytest.raises(ConfigError, match=named):
        build_model(TrainingConfig(**config), resolution, channels)


def test_init_from_with_other_channels_or_size_is_named(tmp_path):
    unet, scheduler = build_model(TrainingConfig(model="tiny"), 8, 1)
    AlphaDDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="--channels 1"):
        build_model(TrainingConfig(init_from=str(tmp_path)), 8, 3)
    with pytest.raises(ConfigError, match="--resolution 8"):
        build_model(TrainingConfig(init_from=str(tmp_path)), 16, 1)


# ---- losses


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weights_amount_to_one_weight_on_the_x0_error(prediction_type):
    scheduler = AlphaDDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    x_0, noise, error = (torch.randn(4, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    timesteps = torch.tensor([10, 200, 500, 900])
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    prediction = scheduler.training_target(x_0, noise, timesteps) + 0.1 * error
    loss = mean_squared_error(scheduler, prediction, x_0, noise, timesteps)
    x0_error = (scheduler.predict_original_sample(prediction, timesteps, x_t) - x_0).square().flatten(1).mean(1)
    snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
    weighted = loss * min_snr_weights(scheduler, timesteps, gamma=5.0)
    torch.testing.assert_close(weighted.double(), snr.clamp(max=5).double() * x0_error, rtol=1e-3, atol=0)


def test_the_loss_is_float32_whatever_the_network_computes_in():
    scheduler = AlphaDDPMScheduler()
    noise = torch.full((1, 1, 2, 2), 1.001)
    loss = mean_squared_error(scheduler, torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), noise, noise, torch.tensor([5]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e-6, rel=1e-3)


# ---- pictures


def test_grid_shows_each_image_enlarged_in_reading_order():
    images = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    picture = np.asarray(drawing.grid(images, columns=3))
    side, gap = 48, drawing.GAP
    assert picture.shape == (2 * (side + gap) + gap, 3 * (side + gap) + gap)
    centres = [
        picture[gap + row * (side + gap) + 24, gap + column * (side + gap) + 24]
        for row in (0, 1)
        for column in range(3)
    ]
    assert centres == [0, 51, 102, 153, 204, 255]


def test_pictures_appear_whole(tmp_path):
    drawing.save_picture(Image.new("L", (4, 4)), tmp_path / "a" / "p.png")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["p.png"]
