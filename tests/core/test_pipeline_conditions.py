"""Pipelines whose condition is an image or numbers, and images in the units of their data."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image

from condition_models import AGE, POSE, call, pipeline
from ddpm_pipeline import AlphaDDPMImageToImagePipeline, AlphaDDPMScheduler, ImageCondition, ValueRange
from ddpm_pipeline.encoding_alpha_ddpm import embedding_width

IDS = torch.randint(0, 4, (2, 1, 8, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
LABELS, GREY = ImageCondition(1, classes=4), ImageCondition(1)
PICTURES = torch.rand(2, 1, 8, 16, generator=torch.Generator().manual_seed(3))
COLOURS = torch.randint(0, 256, (2, 3, 8, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
CT = ValueRange((-1024.0,), (3071.0,), "int16")
NAN = math.nan


def seen(pipe: Any, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the network gets at the first step of a call: its input and its labels."""
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True)
    pipe(**{**call(), "num_inference_steps": 1, **arguments})
    hook.remove()
    return calls[0][0], calls[0][1].get("class_labels")


def palette(ids: torch.Tensor) -> Image.Image:
    image = Image.fromarray(ids[0].numpy(), mode="L").convert("P")
    image.putdata(ids.flatten().tolist())
    image.putpalette([255, 0, 0, 0, 255, 0, 9, 9, 9, 1, 2, 3])
    return image


def turned(ids: torch.Tensor) -> Image.Image:
    """As a camera stores it that was held on its side, and in colours that are all grey."""
    image = Image.fromarray(ids[0].numpy()).convert("RGB").transpose(Image.Transpose.ROTATE_90)
    image.getexif()[0x112] = 6
    return image


ARRAYS = [ids[0].numpy() for ids in IDS]


@pytest.mark.parametrize(
    "given", [IDS, IDS.long(), IDS.movedim(1, -1).numpy(), list(IDS), ARRAYS, [*map(palette, IDS)], [*map(turned, IDS)]]
)
def test_label_maps_in_any_form_are_what_the_network_gets(given):
    x, _ = seen(pipeline(1, LABELS), condition_image=given)
    assert torch.equal(x[:, 1:], LABELS.encode(IDS))


def test_pictures_in_any_form_are_what_the_network_gets():
    expected = GREY.value_range.normalize(COLOURS[:, :1])
    grey = COLOURS[:, :1]
    for given in (grey, grey.float() / 255, grey.movedim(1, -1).numpy(), [Image.fromarray(each[0].numpy()) for each in grey]):
        x, _ = seen(pipeline(1, GREY), condition_image=given)
        torch.testing.assert_close(x[:, 1:], expected, atol=1e-6, rtol=0)


def test_tasks_take_what_a_user_has():
    low = [Image.fromarray(each.movedim(0, -1).numpy()).resize((8, 4), Image.Resampling.BICUBIC) for each in COLOURS]
    condition = ImageCondition(3, task="downscale:2")
    x, _ = seen(pipeline(3, condition), condition_image=low)
    whole, _ = seen(pipeline(3, condition), condition_image=COLOURS)
    torch.testing.assert_close(whole[:, 3:], condition.encode(COLOURS), atol=1e-2, rtol=0)
    assert abs(x[:, 3:] - whole[:, 3:]).mean() < 0.03  # PIL's filter is another one than torch's, if hardly
    grey, _ = seen(
        pipeline(3, ImageCondition(3, task="gray")), condition_image=[image.resize((16, 8)).convert("L") for image in low]
    )
    coloured, _ = seen(pipeline(3, ImageCondition(3, task="gray")), condition_image=[image.resize((16, 8)) for image in low])
    assert torch.equal(grey[:, 3:], coloured[:, 3:])
    condition, mask = ImageCondition(3, task="inpaint"), torch.zeros(1, 1, 8, 16)
    mask[..., 8:] = 1
    x, _ = seen(pipeline(3, condition), condition_image=COLOURS, condition_mask=mask)
    torch.testing.assert_close(x[:, 3:], condition.encode(COLOURS, mask.bool().expand(2, -1, -1, -1)), atol=1e-6, rtol=0)


def test_guidance_leaves_out_all_or_what_it_names():
    pipe, both = pipeline(1, LABELS, POSE), {"condition_image": IDS, "condition_vector": [0.0, 1.7, 1.0], "guidance_scale": 3.0}
    told = POSE.encode(torch.tensor([[0.0, 1.7, 1.0]], dtype=torch.float64), embedding_width(pipe.unet))

    def halves(**arguments: Any) -> tuple[torch.Tensor, ...]:
        x, labels = seen(pipe, **both, **arguments)
        assert torch.equal(x[2:, 1:], LABELS.encode(IDS)) and torch.equal(labels[2:], told.expand(2, -1))
        return x[:2, 1:], labels[:2]

    image, numbers = halves()
    assert not image.any() and not numbers.any()
    image, numbers = halves(guidance_conditions="condition_image")
    assert not image.any() and torch.equal(numbers, told.expand(2, -1))
    with pytest.warns(UserWarning, match="no effect without condition_image"):  # a single pass
        x, _ = seen(
            pipe, batch_size=2, condition_vector=[0, 1.7, 1], guidance_scale=2.0, guidance_conditions=["condition_image"]
        )
    assert len(x) == 2
    image, numbers = halves(guidance_conditions=["smiling"])
    partly = POSE.encode(torch.tensor([[0.0, 1.7, NAN]], dtype=torch.float64), told.shape[1])
    assert torch.equal(image, LABELS.encode(IDS)) and torch.equal(numbers, partly.expand(2, -1))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (35, [35, 35]),
        ([35.0, None], [35, NAN]),
        (np.float32([20, 30]), [20, 30]),
        (torch.tensor([[20], [30]]), [20, 30]),
        ({"age": 20}, [20, 20]),
        ([{"age": np.int64(20)}, {}], [20, NAN]),
        (None, [NAN, NAN]),
    ],
)
def test_a_number_in_any_form_is_what_the_network_gets(given, expected):
    _, labels = seen(pipeline(1, None, AGE), condition_vector=given, batch_size=2)
    assert torch.equal(labels, AGE.encode(torch.tensor(expected, dtype=torch.float64)[:, None], 32))


def test_several_numbers_in_any_form():
    pipe, row = pipeline(1, None, POSE), [5.0, 1.8, NAN]
    expected = POSE.encode(torch.tensor([row, row], dtype=torch.float64), 32)
    for given in (
        row,
        [5, 1.8, None],
        [row, tuple(row)],
        {"angle": 5, "height": 1.8},
        [torch.tensor(row, dtype=torch.float64)] * 2,
    ):
        assert torch.equal(seen(pipe, condition_vector=given, batch_size=2)[1], expected)


def test_images_depend_on_their_own_condition_only_and_neighbours_share_one():
    pipe = pipeline(1, LABELS, AGE)
    both = pipe(**call(condition_image=IDS, condition_vector=[20, 60])).images
    second = call(generator=torch.Generator().manual_seed(6), condition_image=IDS[1:], condition_vector=60)
    torch.testing.assert_close(pipe(**second).images, both[1:], atol=1e-5, rtol=0)
    assert (
        abs(pipe(**second | {"condition_vector": 20, "generator": torch.Generator().manual_seed(6)}).images - both[1:]).max()
        > 0.01
    )
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 5, 6, 2)]
    four = pipe(**call(condition_image=IDS, condition_vector=[20, 60], num_images_per_prompt=2, generator=generators)).images
    assert four.shape == (4, 1, 8, 16)
    torch.testing.assert_close(four[1:2], both[:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(four[2:3], both[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", [None, DDIMScheduler(20), DPMSolverMultistepScheduler(20, timestep_spacing="trailing")])
def test_editing_trajectories_and_samplers_work_with_condition_images(scheduler):
    pipe, mask = pipeline(1, GREY, scheduler=scheduler, num_class_embeds=3), torch.zeros(1, 1, 8, 16)
    mask[..., 8:] = 1
    told = {"condition_image": 1 - PICTURES, "class_labels": [0, 1]}
    done = pipe(**call(**told, image=PICTURES, mask_image=mask, output_trajectory=True))
    assert torch.equal(done.images[..., :8], (PICTURES * 2 - 1)[..., :8] / 2 + 0.5)
    assert done.trajectory.shape[1:] == (2, 1, 8, 16)
    torch.testing.assert_close(pipe(**call(**told, image=PICTURES, strength=0)).images, PICTURES)
    latents = torch.randn(2, 1, 8, 16)
    assert pipe(**call(**told, latents=latents)).images.shape == (2, 1, 8, 16)
    mixed = pipe.interpolate(PICTURES[:1], PICTURES[1:], 10, (0.0, 1.0), condition_image=PICTURES[:1], class_labels=0)
    assert len(mixed.images) == 2 and mixed.images[0].size == (16, 8)


@pytest.mark.parametrize("vector", [AGE, POSE])
def test_other_precisions(vector):
    pipe = pipeline(1, GREY, vector)
    told = {"condition_image": PICTURES, "condition_vector": {vector.names[0]: 35}, "guidance_scale": 2.0}
    whole = pipe(**call(**told)).images
    double = pipeline(1, GREY, vector).to(torch.float64)(**call(**told)).images
    assert double.dtype == torch.float64 and double.isfinite().all()
    half = pipe.to(torch.bfloat16)(**call(**told)).images
    assert half.dtype == torch.float32 and abs(half - whole).mean() < 0.05


def test_values_in_units_of_the_data():
    pipe = pipeline(own={"value_range": CT})
    slices = np.arange(-1024, -1024 + 2 * 8 * 16, dtype=np.int16).reshape(2, 8, 16, 1) * 16
    start = {"image": slices, "strength": 0}
    given_back = pipe(**call(**start, output_type="np", denormalize=True)).images
    assert given_back.dtype == np.float32
    assert np.abs(given_back - slices.clip(-1024, 3071)).max() < 1e-3
    fractions = pipe(**call(**start, output_type="np")).images
    np.testing.assert_allclose(fractions, (slices.clip(-1024, 3071) + 1024.0) / 4095, atol=1e-6)
    for same in (fractions, list(torch.from_numpy(slices).movedim(-1, 1)), slices.astype(">i2")):
        assert np.abs(pipe(**call(image=same, strength=0, output_type="np")).images - fractions).max() < 1e-6
    own = {"strength": 0, "output_type": "pt", "denormalize": True}
    pictures = [[Image.fromarray(each[..., 0].astype(kind)) for each in slices] for kind in (np.int32, np.float32)]
    for same in (slices.astype(np.float64), slices.astype(np.int64), *pictures):
        torch.testing.assert_close(pipe(**call(image=same, **own)).images, torch.from_numpy(given_back).movedim(-1, 1))
    ends = pipe.interpolate(slices[:1], slices[1:], 0, (0.0, 1.0), num_inference_steps=1, output_type="np", denormalize=True)
    assert ends.images.shape == slices.shape
    start = pipe.forward_trajectory(slices.astype(np.float64), (-1, 3), denormalize=True)[0]
    torch.testing.assert_close(start, CT.normalize(torch.from_numpy(slices).movedim(-1, 1)))


def test_deep_and_many_channels():
    low, high = tuple(float(band) for band in range(13)), tuple(1000.0 + band for band in range(13))
    bands = pipeline(13, own={"value_range": ValueRange(low, high, "uint16")})
    tiles = np.tile(np.arange(13, dtype=np.uint16) + 500, (2, 8, 16, 1))
    back = bands(**call(image=tiles, strength=0, output_type="np", denormalize=True)).images
    assert np.abs(back - tiles).max() < 1e-3 and bands(**call(output_type="np", batch_size=2)).images.shape == (2, 8, 16, 13)
    with pytest.raises(ValueError, match="'pil' cannot show the 13 channels"):
        bands(**call(output_type="pil", batch_size=2))
    deep = pipeline(own={"value_range": ValueRange((0.0,), (4095.0,), "uint16")})
    picture = Image.fromarray(np.full((8, 16), 4095, np.uint16))  # mode I;16
    assert deep(**call(image=picture, strength=0, batch_size=2)).images.min() == 1
    assert deep(**call(output_type="pil", batch_size=2)).images[0].mode == "L"  # a picture to look at
    with pytest.raises(ValueError, match="use output_type='np' or 'pt', not 'pil'"):
        deep(**call(output_type="pil", denormalize=True))


STOCK = """
import torch
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained(FOLDER)
x = torch.randn(2, 1, 8, 16, generator=generator)
pipe.scheduler.set_timesteps(20)
for t in pipe.scheduler.timesteps:
    with torch.no_grad():
        output = pipe.unet(torch.cat([x, condition], dim=1), t, class_labels=labels).sample
    x = pipe.scheduler.step(output, t, x, generator=generator).prev_sample
images = (x / 2 + 0.5).clamp(0, 1)
"""


@pytest.mark.parametrize("learned", [False, True])
def test_stock_classes_sample_in_a_loop_of_their_own(tmp_path, learned):
    """And stock's plain call cannot: where its broadcasting hides that, it gives pictures of too many channels."""
    scheduler = AlphaDDPMScheduler(
        20, beta_schedule="squaredcos_cap_v2", variance_type="learned_range" if learned else "fixed_small"
    )
    pipe = pipeline(1, LABELS, AGE, scheduler=scheduler, out_channels=1 + learned)
    pipe.save_pretrained(tmp_path)
    condition = torch.nn.functional.one_hot(IDS[:, 0].long(), 4).movedim(-1, 1).float()
    labels = 500 + 125 * (torch.tensor([20.0, 45.0]) - 40) / 10
    names = {"FOLDER": str(tmp_path), "condition": condition, "labels": labels, "generator": torch.Generator().manual_seed(0)}
    exec(STOCK, names)
    told = {"condition_image": IDS, "condition_vector": [20, 45], "num_inference_steps": 20, "output_type": "pt"}
    ours = AlphaDDPMImageToImagePipeline.from_pretrained(tmp_path)(**told, generator=torch.Generator().manual_seed(0)).images
    torch.testing.assert_close(names["images"], ours, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="class_labels should be provided"):
        DiffusionPipeline.from_pretrained(tmp_path)(num_inference_steps=1)


INPAINT = ImageCondition(1, task="inpaint")


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ((1, LABELS), {"condition_image": IDS[..., :8]}, "has 8x8 pixels; this model needs 8x16"),
        ((1, LABELS), {"condition_image": IDS.float()}, "it holds float32; a label map holds integers"),
        ((1, LABELS), {"condition_image": IDS + 4}, "labels from 4 to 7; this model's label maps have 0 to 3"),
        (
            (1, LABELS),
            {"condition_image": Image.new("RGB", (16, 8), "red")},
            "it has colours; a label map has one number per pixel",
        ),
        ((1, LABELS), {"condition_image": IDS, "batch_size": 3}, "2 condition_image for a batch of 3"),
        ((1, LABELS, AGE), {"condition_image": IDS, "condition_vector": [1, 2, 3]}, "2 condition_image for a batch of 3"),
        ((1, LABELS), {"condition_image": IDS, "condition_mask": IDS}, "condition_mask goes with .* inpainting"),
        ((1, INPAINT), {"condition_image": PICTURES}, "condition_mask goes with .* inpainting"),
        ((1, INPAINT), {"condition_mask": PICTURES}, "condition_mask goes with .* inpainting"),
        ((1,), {"condition_image": PICTURES}, "condition_image was given to a model without one"),
        ((1,), {"class_labels": 1}, "class_labels were given to a model without classes"),
        ((1,), {"condition_vector": 3}, "condition_vector was given to a model without numbers"),
        ((1, None, AGE), {"condition_vector": {"agee": 3}}, "{'agee': 3} must be one finite number for each of age, None"),
        ((1, None, AGE), {"condition_vector": math.inf}, "inf must be"),
        ((1, None, AGE), {"condition_vector": "old"}, "'old' must be"),
        ((1, None, AGE), {"condition_vector": []}, "condition_vector is empty"),
        ((1, None, POSE), {"condition_vector": [1, 2]}, r"one finite number for each of angle, height, smiling"),
        ((1, None, POSE), {"guidance_conditions": ["age"]}, r"\['age'\] must .*: condition_vector, angle, height, smiling"),
        ((1, LABELS), {"guidance_conditions": []}, r"guidance_conditions=\[\] must name some of: condition_image"),
        ((1,), {"guidance_conditions": 5}, "guidance_conditions=5 must name some of: nothing, since"),
    ],
)
def test_what_cannot_be_meant_is_one_line(model, arguments, message):
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        pipeline(*model)(**call(generator=None, **arguments))


def test_a_condition_that_training_never_left_out_has_to_be_told():
    for model, name in (((1, GREY), "condition_image"), ((1, None, AGE), "condition_vector")):
        with pytest.raises(ValueError, match=f"give {name}"):
            pipeline(*model, own={"condition_dropout": 0})(**call(batch_size=2))
