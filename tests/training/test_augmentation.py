"""Augmentations that do not leak: what is drawn, what it does to images, and a network that forgets it afterwards."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file
from scipy import stats

from data_helpers import write_image
from ddpm_pipeline.data import load_images
from ddpm_pipeline.data.options import TrainingDataOptions
from ddpm_pipeline.data.views import STILL, Views
from ddpm_pipeline.training import TrainingOptions, train
from ddpm_pipeline.training.augmentation import AugmentedNetwork, draw_parameters, flips_of, motions_of
from ddpm_pipeline.training.batches import BatchPlan, MicroBatches
from ddpm_pipeline.training.export import export_checkpoint
from ddpm_pipeline.training.image_conditions import ImageInput
from ddpm_pipeline.training.options import ConditionOptions
from helpers import tiny_unet
from training_helpers import quick_options, weights, whole_batch


def parameters(**known: float) -> np.ndarray:
    names = ("mirrored", "upside_down", "scale", "cos", "sin", "stretch_along", "stretch_across", "right", "down")
    return np.array([[known.get(name, 0.0) for name in names]])


def test_every_augmentation_happens_as_often_as_asked():
    drawn = draw_parameters(whole_batch(3, 20_000), 0.12)
    groups = [[0], [1], [2], [3, 4], [5, 6], [7, 8]]
    shares = [(drawn[:, group] != 0).all(axis=1).mean() for group in groups]
    assert all(abs(share - 0.12) < 0.01 for share in shares)
    untouched = (drawn == 0).all(axis=1)
    assert abs(untouched.mean() - 0.88**6) < 0.015
    assert (motions_of(drawn)[untouched] == STILL).all() and not flips_of(drawn)[untouched].any()
    for column in (2, 5, 6, 7, 8):
        assert stats.kstest(drawn[drawn[:, column] != 0, column], "norm").pvalue > 1e-3


def test_parameters_say_all_about_a_motion():
    """Scale 2^(0.2 s); a rotation; a stretch of area 1 along its direction, which is a squeeze across it; a shift."""
    assert np.allclose(motions_of(parameters(scale=5))[0], STILL / 2)
    assert np.allclose(motions_of(parameters(cos=-1, sin=1))[0], [[0, -1, 0], [1, 0, 0]])
    assert np.allclose(motions_of(parameters(stretch_along=5))[0], [[0.5, 0, 0], [0, 2, 0]])
    assert np.allclose(motions_of(parameters(stretch_along=-5))[0], [[2, 0, 0], [0, 0.5, 0]])
    diagonal = motions_of(parameters(stretch_across=5))[0, :, :2]
    assert np.allclose(diagonal @ [1, 1], [0.5, 0.5]) and np.allclose(diagonal @ [1, -1], [2, -2])
    image = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    shifted = Views((8, 8), motions=motions_of(parameters(right=1, down=-2))).apply(image)[0, 0].numpy()
    assert np.array_equal(shifted[:6, 1:], image[0, 2:, :-1, 0])  # by an eighth to the right, a quarter up
    assert flips_of(parameters(mirrored=1)).tolist() == [[False, True]]
    assert flips_of(parameters(upside_down=1)).tolist() == [[True, False]]


def test_no_augmentation_is_none():
    unet = tiny_unet()
    sample, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([3, 8])
    plain = unet(sample, timesteps).sample
    network = AugmentedNetwork(unet, unet)
    torch.nn.init.normal_(network.weight)
    told = torch.tensor([[0.0] * 9, [0, 0, 1, 0, 0, 0, 0, 0, 0]])
    found = network(sample, timesteps, told).sample
    assert torch.equal(found[0], plain[0]) and not torch.allclose(found[1], plain[1])
    assert torch.equal(network(sample, timesteps).sample, plain) and torch.equal(unet(sample, timesteps).sample, plain)
    assert unet.state_dict().keys() == tiny_unet().state_dict().keys()


@pytest.mark.parametrize(("crop", "classes"), [("random_crop", 3), ("random_resized_crop", None)])
def test_an_image_and_its_condition_image_are_seen_alike(crop, classes, tmp_path):
    """Images beside the same images; and levels 0, 100 and 200 beside maps of their classes, in windows at their own scale."""
    for seed in range(8):
        ids = np.random.default_rng(seed).integers(0, 3, (8, 8)).astype(np.uint8)
        write_image(tmp_path / "x/images" / f"{seed}.png", ids * 100)
        write_image(tmp_path / "x/masks" / f"{seed}.png", ids if classes else ids * 100)
    asked = ConditionOptions("image", condition_column="masks", condition_classes=classes, condition_dropout=0.0)
    given = TrainingDataOptions(str(tmp_path / "x"), resolution=6, cache_dir=str(tmp_path / "cache"), **{crop: 0.75})
    data = load_images(given, asked.columns)
    plan = BatchPlan(0, 64, random_flip=True, window_share=0.75, augment=None if classes else 0.5)
    batch = MicroBatches(data, plan, ImageInput(asked, data))[0]
    second = batch["condition"]["image"]
    assert torch.equal(batch["pixels"], second * 100 if classes else second)
    assert len(batch["pixels"].flatten(1).unique(dim=0)) > 40


@pytest.mark.parametrize(
    "changed",
    [
        {"condition": "class", "random_resized_crop": 0.7, "gradient_checkpointing": True},
        pytest.param(
            {"condition": "text", "caption_templates": "src/ddpm_pipeline/recipes/digits_captions.yaml", "ema_decay": 0.0},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["class", "text"],
)
def test_an_augmented_run_resumes_and_leaves_a_stock_model(changed, tmp_path):
    options = quick_options(tmp_path, augment=0.5, max_train_steps=4, checkpoint_every=2, lr_warmup_steps=1, **changed)
    if changed["condition"] == "text":
        options["model"] = "tiny"
    options = TrainingOptions(**options, resolution=8, output_dir=str(tmp_path / "whole"))
    whole = train(options)
    shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000004")
    again = train(options.with_values(output_dir=str(tmp_path / "again"), resume="latest"))
    exported = export_checkpoint(again / "checkpoints/step-00000004", tmp_path / "exported")
    for folder in (again, exported):
        for name, weight in weights(whole).items():
            assert torch.equal(weights(folder)[name], weight), name
    told = load_file(again / "checkpoints/step-00000004/model.safetensors")["weight"]
    assert told.shape[1] == 9 and told.abs().max() > 0
    unet_class = UNet2DModel if changed["condition"] == "class" else UNet2DConditionModel
    unet, found = unet_class.from_pretrained(whole / "unet", output_loading_info=True)
    assert not any(found.values()) and type(unet) is unet_class


@pytest.mark.slow
def test_an_augmented_network_can_be_compiled():
    """Compiling takes most of a minute."""
    unet = tiny_unet()
    network = AugmentedNetwork(unet, unet)
    torch.nn.init.normal_(network.weight)
    sample, timesteps, told = torch.randn(2, 1, 8, 8), torch.tensor([3, 8]), torch.randn(2, 9)
    found, expected = (model(sample, timesteps, told).sample for model in (torch.compile(network, fullgraph=True), network))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(unet(sample, timesteps).sample, network(sample, timesteps).sample)
