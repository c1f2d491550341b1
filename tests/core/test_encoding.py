"""Conditions as the network gets them, and the settings that say what they are."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from condition_models import AGE, POSE, pipeline, unet
from ddpm_pipeline import AlphaDDPMPipeline, ImageCondition, ValueRange, VectorCondition, describe_conditions
from ddpm_pipeline.encoding_alpha_ddpm import WithConditionImage
from ddpm_pipeline.tables_alpha_ddpm import OWN_KEY

COLOURS = torch.randint(0, 256, (2, 3, 8, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
NAN = math.nan


def test_label_maps_become_one_channel_per_class():
    ids = torch.tensor([[0, 1, 2, 255], [3, 3, 0, 1]], dtype=torch.uint8)[None, None]
    encoded = ImageCondition(1, classes=4).encode(ids)
    assert encoded.shape == (1, 4, 2, 4) and encoded.dtype == torch.float32
    assert torch.equal(encoded.sum(1)[0], torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1]]))  # 255 is void: no class
    assert torch.equal(encoded.argmax(1)[0, 1], torch.tensor([3, 3, 0, 1]))
    black_and_white = ImageCondition(1, classes=2).encode(torch.tensor([[0, 255]], dtype=torch.uint8)[None, None])
    assert black_and_white.argmax(1).flatten().tolist() == [0, 1]
    with pytest.raises(ValueError, match="labels from 0 to 4; this model's label maps have 0 to 3"):
        ImageCondition(1, classes=4).encode(torch.tensor([[0, 4]], dtype=torch.uint8)[None, None])


def test_grey_is_that_of_pil_to_within_a_level():
    grey = ImageCondition(3, task="gray").encode(COLOURS)
    expected = [np.asarray(Image.fromarray(colours.movedim(0, -1).numpy()).convert("L")) for colours in COLOURS]
    levels = ((grey[:, 0] + 1) * 127.5).round()
    assert torch.equal(grey[:, 0], ValueRange().normalize(levels))  # has the levels of a grey picture
    assert abs(levels - torch.from_numpy(np.stack(expected))).max() <= 1


def test_a_low_resolution_picture_is_what_training_made_of_the_whole_one():
    condition = ImageCondition(3, task="downscale:2")
    whole = condition.encode(COLOURS)
    x = torch.nn.functional.interpolate(condition.value_range.normalize(COLOURS), (4, 8), mode="bicubic", antialias=True)
    levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)  # a picture of 8 bits
    assert torch.equal(condition.arrange(condition.value_range.normalize(levels), size=(8, 16)), whole)
    with pytest.raises(ValueError, match="8x16 pixels cannot be downscaled by 3"):
        ImageCondition(3, task="downscale:3").encode(COLOURS)


def test_an_image_of_which_nothing_is_known_is_the_condition_left_out():
    condition, mask = ImageCondition(3, task="inpaint"), torch.zeros(2, 1, 8, 16, dtype=torch.bool)
    mask[..., 8:] = True
    encoded = condition.encode(COLOURS, mask)
    assert torch.equal(encoded[:, 3:], (~mask).float()) and not encoded[..., 8:].any()
    assert torch.equal(encoded[:, :3, :, :8], condition.value_range.normalize(COLOURS)[..., :8])
    assert not condition.encode(COLOURS, torch.ones_like(mask)).any()


def test_numbers_are_told_apart_and_left_out_one_by_one():
    ages = AGE.encode(torch.tensor([[20.0], [40.0], [NAN], [1000.0]]), 16)
    assert ages.tolist() == [250.0, 500.0, 2000.0, 1000.0]
    told = torch.tensor([[10.0, 1.8, 0.0], [10.0, 1.8, NAN], [NAN, 1.8, 0.0], [NAN] * 3, [10.5, 1.8, 0.0]])
    encoded = POSE.encode(told, 32)
    blocks = encoded[:, :30].unflatten(1, (3, 10))
    assert encoded.shape == (5, 32) and not encoded[3].any() and not encoded[:, 30:].any()
    assert torch.equal(blocks[1, :2], blocks[0, :2]) and not blocks[1, 2].any()
    assert torch.equal(blocks[2, 1:], blocks[0, 1:]) and not blocks[2, 0].any()
    assert (blocks[4, 0] - blocks[0, 0]).abs().max() > 0.1 and torch.equal(blocks[4, 1:], blocks[0, 1:])


def test_a_condition_that_is_left_out_is_all_zeros():
    model, x = WithConditionImage(unet(1, ImageCondition(2))), torch.randn(2, 1, 8, 16)
    t, condition = torch.tensor([3, 9]), torch.randn(2, 2, 8, 16)
    assert torch.equal(model(x, t).sample, model(x, t, condition_image=torch.zeros(2, 2, 8, 16)).sample)
    assert torch.equal(model(x, t, condition_image=condition).sample, model.unet(torch.cat([x, condition], 1), t).sample)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        {"condition_image": [1]},
        {"condition_image": {"channels": 1}},
        *(
            {"condition_image": ImageCondition(1).to_json() | change}
            for change in (
                {"channels": "1"}, {"classes": 2.5}, {"channels": 2, "classes": 3}, {"channels": 10**9}, {"task": "gray"},
                {"value_range": None}, {"value_range": {"low": 0, "high": 1, "dtype": 1}}, {"task": ["gray"]},
                {"task": "downscale:1"}, {"task": f"downscale:{'9' * 5000}"},
            )
        ),
        {"condition_vector": {"names": ["a"], "mean": [0], "std": [1]}},  # which this UNet cannot take
        {"condition_vector": {"names": [], "mean": [], "std": []}},
        {"condition_vector": {"names": ["a"], "mean": [0], "std": [0]}},
        {"condition_vector": {"names": ["a"], "mean": ["x"], "std": [1]}},
        {"condition_vector": {"names": ["a", "a"], "mean": [0, 0], "std": [1, 1]}},
        {"condition_vector": {"names": "ab", "mean": [0, 0], "std": [1, 1]}},
        {"condition_vector": {"names": 3, "mean": 0, "std": 1}},
        {"value_range": {"low": [0, 0], "high": [1, 1], "dtype": "uint8"}},
    ],
)  # fmt: skip
def test_wrong_settings_end_in_one_line(settings):
    pipe = pipeline()
    pipe.unet.register_to_config(**{OWN_KEY: settings or [1]})
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        pipe(num_inference_steps=1)


def test_models_of_others_need_a_description():
    foreign = unet(1, None, AGE)
    foreign.register_to_config(**{OWN_KEY: None})
    with pytest.raises(ValueError, match=r"class_embed_type='timestep', and its config names 0 numbers; .*condition_vector="):
        AlphaDDPMPipeline(foreign, None)
    describe_conditions(foreign, condition_vector=AGE)
    with pytest.raises(ValueError, match="1 class_names for num_class_embeds=0"):
        describe_conditions(foreign, condition_vector=AGE, class_names=["a"])
    assert foreign.config[OWN_KEY].keys() == {"condition_vector"}, "as before"
    wide = unet(1, ImageCondition(2))
    wide.register_to_config(**{OWN_KEY: None})
    with pytest.raises(ValueError, match=r"takes 3 channels, 0 of them for a condition image, and gives 1; .*condition_image="):
        AlphaDDPMPipeline(wide, None)
    with pytest.raises(ValueError, match="use AlphaDDPMImageToImagePipeline"):
        AlphaDDPMPipeline(unet(1, ImageCondition(2)), None)
    with pytest.raises(ValueError, match="40 attributes need a time embedding of width 80"):
        unet(1, None, VectorCondition(tuple(map(str, range(40))), (0.0,) * 40, (1.0,) * 40))
