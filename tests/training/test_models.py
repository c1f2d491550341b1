"""The UNet and the schedule that a run starts from."""

import json

import pytest
import torch

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.training.models import PRESETS, build_model, preset_for_cpus
from ddpm_pipeline.training.options import TrainingOptions
from helpers import TINY_UNET


def model(resolution: int, channels: int, **options):
    given = TrainingOptions(**options)
    return build_model(given.model, given.diffusion, (resolution, resolution), channels)


@pytest.mark.parametrize("resolution, channels", [(8, 1), (16, 3), (32, 3), (64, 4)])
def test_presets_fit_their_resolutions(resolution, channels):
    with torch.device("meta"):
        unet, scheduler = model(resolution, channels)
        size = (1, channels, resolution, resolution)
        assert unet(torch.zeros(size), torch.zeros(1, dtype=torch.long)).sample.shape == size
    assert scheduler.config.prediction_type == "epsilon"


def test_larger_presets_have_valid_block_types():
    for name in ("128", "256"):
        blocks = PRESETS[name][1]
        assert len(blocks["block_out_channels"]) == len(blocks["down_block_types"]) == len(blocks["up_block_types"])


@pytest.mark.parametrize("name, smallest, largest", [("small", 1e6, 3e6), ("medium", 8e6, 12e6)])
def test_presets_for_cpus_lie_between_the_others(name, smallest, largest):
    with torch.device("meta"):
        unet, _ = model(32, 3, model=name)
        assert smallest <= sum(weight.numel() for weight in unet.parameters()) <= largest
        assert unet(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)).sample.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    "options, size, preset",
    [
        ({}, (32, 32), "small"), ({}, (20, 48), "medium"), ({}, (16, 16), None), ({}, (128, 128), None),
        ({"model": "32"}, (32, 32), None), ({"init_from": "somewhere"}, (32, 32), None),
    ],
)  # fmt: skip
def test_a_run_on_a_cpu_hears_of_a_network_for_it(options, size, preset):
    assert preset_for_cpus(TrainingOptions(**options).model, size) == preset


def test_schedule_options_reach_the_scheduler():
    schedule = {"num_train_timesteps": 50, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    scheduler = model(8, 1, **schedule)[1]
    assert len(scheduler) == 50 and scheduler.config.prediction_type == "v_prediction"


def test_model_from_a_config_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY_UNET, "_class_name": "UNet2DModel"}))
    unet, _ = model(8, 1, model=str(tmp_path), dropout=0.25)
    assert unet.config.block_out_channels == [8, 16] and unet.config.dropout == 0.25


@pytest.mark.parametrize("size", [None, 8.0, [8, 8]])
def test_what_a_config_file_leaves_open_follows_from_the_images(size, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY_UNET, "sample_size": size, "in_channels": None}))
    unet, scheduler = model(8, 1, model=str(tmp_path))
    assert (unet.config.sample_size, unet.config.in_channels) == (8, 1)
    assert AlphaDDPMPipeline(unet, scheduler)(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"sample_size": [8, 16]}, "8x16"),
        ({"sample_size": "8"}, "--resolution 8"),
        ({"class_embed_type": "timestep"}, "class_embed_type=timestep"),
        ({"time_embedding_type": "fourier"}, "fourier"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 10}, "10 timesteps"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"norm_num_groups": 0}, "modulo by zero"),
        ({"layers_per_block": 0}, "cannot be used"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_unusual_values_in_a_config_file_are_told_before_the_run(changed, named, tmp_path):
    (tmp_path / "unet.json").write_text(json.dumps({**TINY_UNET, **changed}))
    with pytest.raises(ConfigError, match=named):
        model(8, 1, model=str(tmp_path / "unet.json"))


def test_init_from_takes_weights_and_schedule(tmp_path):
    unet, _ = model(8, 1, model="tiny")
    stored = AlphaDDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=200)
    AlphaDDPMPipeline(unet=unet, scheduler=stored).save_pretrained(tmp_path)
    again, scheduler = model(8, 1, init_from=str(tmp_path))
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2" and len(scheduler) == 200
    for old, new in zip(unet.parameters(), again.parameters(), strict=True):
        assert torch.equal(old, new)
    override = {"init_from": str(tmp_path), "beta_schedule": "linear", "num_train_timesteps": 1000}
    assert model(8, 1, **override)[1].config.beta_schedule == "linear"


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"class_embed_type": "timestep"}, "class_embed_type=timestep"),
        ({"num_class_embeds": 5}, "num_class_embeds=5"),
        ({"layers_per_block": 1_000, "block_out_channels": [8] * 40, "down_block_types": ["DownBlock2D"] * 40,
          "up_block_types": ["UpBlock2D"] * 40}, "more than training takes"),
        ({"block_out_channels": [2**24, 2**24]}, "more than training takes"),
        ({"block_out_channels": []}, "cannot be used"),
        ({"norm_num_groups": 0}, "cannot be used"),
        ({"norm_num_groups": 3}, "cannot be used"), ({"norm_eps": -1e-5}, "norm_eps=-1e-05"), ({"norm_eps": 0}, "norm_eps=0"),
        ({"layers_per_block": "two"}, "cannot be used"),
        ({"down_block_types": ["DownBlock2D", "NoBlock2D"]}, "cannot be used"),
        ({"up_block_types": ["UpBlock2D"]}, "cannot be used"),
        ({"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, "cannot be used"),
        ({"time_embedding_type": "fourrier"}, "cannot be used"),
        ({"act_fn": "loud"}, "cannot be used"),
        ({"sample_size": [8, 16]}, "8x16"),
        ({"sample_size": "8"}, "8"),
    ],
    ids=str,
)  # fmt: skip
def test_model_files_that_cannot_be_trained_are_refused_in_one_line(changed, named, tmp_path):
    (tmp_path / "unet.json").write_text(json.dumps({**TINY_UNET, **changed}))
    with pytest.raises(ConfigError, match=named) as error:
        model(8, 1, model=str(tmp_path / "unet.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config, resolution, channels, named",
    [
        ({"model": "tiny"}, 9, 1, "use 8 or 10"),
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
        model(resolution, channels, **config)


def test_what_options_change_about_a_model_to_start_from_is_said(tmp_path, caplog):
    unet, scheduler = model(8, 1, model="tiny")
    AlphaDDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    again, _ = model(8, 1, init_from=str(tmp_path), model="32", prediction_type="sample", beta_end=0.02, dropout=0.3)
    assert "--prediction_type sample replaces epsilon" in caplog.text and "--model 32 has no effect" in caplog.text
    assert "beta_end" not in caplog.text  # the same as before
    assert again.mid_block.resnets[0].dropout.p == again.config.dropout == 0.3
    assert all(torch.equal(*pair) for pair in zip(unet.parameters(), again.parameters(), strict=True))


def test_init_from_with_other_channels_or_size_is_named(tmp_path):
    unet, scheduler = model(8, 1, model="tiny")
    AlphaDDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="--channels 1"):
        model(8, 3, init_from=str(tmp_path))
    with pytest.raises(ConfigError, match="--resolution 8"):
        model(16, 1, init_from=str(tmp_path))
