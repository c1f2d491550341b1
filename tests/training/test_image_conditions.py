"""Images as conditions in training: what the network sees, what is dropped, and which options go together."""

import shutil

import numpy as np
import pytest
import torch

from ddpm_pipeline.data.options import ConditionColumns
from ddpm_pipeline.support.draws import image_indices
from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.support.masks import inpainting_masks
from ddpm_pipeline.support.pictures import Display
from ddpm_pipeline.training import train
from ddpm_pipeline.training.conditions import build_condition
from ddpm_pipeline.training.models import build_model
from ddpm_pipeline.training.options import ConditionOptions, TrainingOptions
from training_helpers import digits as load_digits
from training_helpers import metrics, weights, whole_batch


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load_digits(tmp_path_factory.mktemp("cache"))


def condition_on(digits, kind: str = "image", source: str = "downscale:2", **options):
    return build_condition(ConditionOptions(kind, condition_from=source, **options), digits)


def inputs_of(condition, data, step: int, count: int, positions: slice = slice(None)) -> dict[str, torch.Tensor]:
    """The arguments of the network for some positions of a global batch."""
    indices = image_indices(0, len(data), step, count)[positions]
    drawn = condition.draw(condition.read(data, indices), whole_batch(step, count, positions))
    return condition.inputs(drawn, data.value_range.normalize(data.pixels(indices)))


@pytest.mark.parametrize("source", ["downscale:2", "downscale:4", "inpaint"])
def test_the_network_sees_the_condition_beside_x_t_or_zeros(source, digits):
    """The same however the batch is divided."""
    condition = condition_on(digits, "class+image", source, condition_dropout=0.5)
    given = TrainingOptions()
    unet, _ = build_model(given.model, given.diffusion, digits.size, digits.channels, condition)
    assert (unet.config.in_channels, unet.config.out_channels) == (1 + condition.input_channels, 1)
    whole = inputs_of(condition, digits, 3, 32)
    parts = [inputs_of(condition, digits, 3, 32, slice(start, start + 8)) for start in range(0, 32, 8)]
    assert all(torch.equal(values, torch.cat([part[name] for part in parts])) for name, values in whole.items())
    labels, seen = whole["class_labels"], whole["condition_image"]
    assert seen.shape == (32, condition.input_channels, 8, 8) and seen.abs().max() <= 1
    gone = (seen == 0).flatten(1).all(dim=1)
    assert 6 < gone.sum() < 26
    network = condition.network(unet)
    with torch.no_grad():
        x_t, t = torch.randn(32, 1, 8, 8), torch.full((32,), 500)
        assert torch.equal(network(x_t, t, **whole).sample, unet(torch.cat([x_t, seen], dim=1), t, labels).sample)


def test_class_and_image_are_dropped_together_and_each_on_its_own(digits):
    condition = condition_on(digits, "class+image", condition_dropout=0.2)
    assert condition.unet_config() == {"num_class_embeds": 11} and condition.input_channels == 1
    drawn = [condition.draw(condition.read(digits, range(1000)), whole_batch(step, 1000)) for step in range(4)]
    no_class = torch.cat([label for label, _ in drawn]) == 10
    no_image = torch.cat([image["dropped"] for _, image in drawn])
    both, one = (no_class & no_image).double().mean(), (no_class & ~no_image).double().mean()
    assert abs(both - (0.2 + 0.8 * 0.04)) < 0.03 and abs(one - 0.8 * 0.16) < 0.03
    request, columns = condition.preview(20)
    assert len(request) == 20 and columns == 2 and request.arguments.keys() == {"class_labels", "condition_image"}
    shown = condition.left(request, columns, Display())
    assert shown.shape == (10, 1, 8, 8)
    assert torch.equal(condition.left(request, columns, Display(stretch=True)), Display(stretch=True).show(shown))
    assert condition.row_names(request, columns)[3] == "3"
    assert condition.facts()["condition"] == "10 classes; images made of the images themselves (downscale:2)"
    assert condition.example() == "class_labels='9', condition_image=condition_image, guidance_scale=2"


def test_masks_are_functions_of_their_seeds_and_of_mixed_sizes():
    masks = inpainting_masks(np.arange(200), (24, 48))
    assert masks.shape == (200, 1, 24, 48) and masks.dtype == torch.bool
    assert torch.equal(masks[7:9], inpainting_masks([7, 8], (24, 48)))
    share = masks.double().mean(dim=(1, 2, 3))
    assert share.min() > 0 and share.max() < 1 and share.quantile(0.1) < 0.1 and share.quantile(0.9) > 0.3


@pytest.mark.parametrize(
    "options, named",
    [
        ({"condition": "image"}, "one source"),
        ({"condition": "image", "condition_column": "mask", "condition_from": "inpaint"}, "one source"),
        ({"condition": "vector", "condition_column": "a, b,a"}, "twice"),
        ({"condition": "vector"}, "a,b,c"),
        ({"condition": "class", "condition_column": "mask"}, "needs --condition image or vector, not class"),
        ({"condition": "vector", "condition_column": "a", "condition_from": "gray"}, "needs --condition image, not vector"),
        ({"condition": "image", "condition_from": "inpaint", "condition_classes": 3}, "drop one"),
        ({"condition": "image", "condition_from": "upscale:2"}, "downscale:F"),
        ({"condition": "image", "condition_from": "downscale:1"}, "downscale:F"),
        ({"condition": "image", "condition_from": "inpaint", "text_column": "a"}, "--condition text"),
        ({"condition": "vector+image", "condition_column": "a", "label_column": "b"}, "class or text"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, named):
    with pytest.raises(ConfigError, match=named) as error:
        ConditionOptions(**options)
    assert "\n" not in str(error.value)


def test_what_is_read_beside_the_images(digits):
    assert ConditionOptions("class+image", condition_from="inpaint").columns == ConditionColumns("class")
    assert ConditionOptions("image", condition_from="inpaint").columns == ConditionColumns()
    both = ConditionOptions("vector+image", condition_column="a,b,mask", condition_classes=4).columns
    assert (both.condition, both.condition_column, both.condition_classes) == ("vector+image", "a,b,mask", 4)
    for source, named in {"gray": "3 channels", "downscale:3": "8x8 pixels cannot be downscaled by 3"}.items():
        with pytest.raises(ConfigError, match=named):
            condition_on(digits, source=source)


@pytest.mark.filterwarnings("ignore::UserWarning")  # 30 timesteps do not reach noise
def test_a_run_with_class_and_mask_resumes_bit_for_bit_and_starts_another(tmp_path):
    quick = {
        "config": "digits_upscale", "condition": "class+image", "condition_from": "inpaint", "num_train_timesteps": 30,
        "batch_size": 8, "max_train_steps": 3, "checkpoint_every": 2, "preview_every": 0, "num_samples": 4, "eval_every": 3,
        "eval_images": 4, "sample_inference_steps": 2, "fit_noises": 0, "num_cpu_threads": 1, "mixed_precision": "no",
    }  # fmt: skip
    whole = train(TrainingOptions(**quick, output_dir=str(tmp_path / "whole")))
    shutil.copytree(whole, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000003")
    more = {"resume": "latest", "dataloader_num_workers": 1}
    resumed = train(TrainingOptions(**quick, **more, output_dir=str(tmp_path / "parts")))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert np.isfinite(metrics(whole)[-1]["eval_bits_per_dim"])
    called = "class_labels='9', condition_image=condition_image, condition_mask=condition_mask"
    assert called in (whole / "README.md").read_text()
    with pytest.raises(ConfigError, match="condition_from was inpaint"):
        train(TrainingOptions(**{**quick, "condition_from": "downscale:2"}, resume="latest", output_dir=str(whole)))
    tuned = {**quick, "init_from": str(whole / "checkpoints" / "step-00000002"), "eval_every": 0, "checkpoint_every": 0}
    with pytest.raises(ConfigError, match="1 channels and their condition image 1 and the UNet takes 3"):
        train(TrainingOptions(**{**tuned, "condition_from": "downscale:2"}, output_dir=str(tmp_path / "tuned")))
    for start in (whole, tuned["init_from"]):
        with pytest.raises(ConfigError, match=r"trained with --condition class\+image, and this is --condition image; use"):
            train(
                TrainingOptions(**{**tuned, "condition": "image", "init_from": str(start), "output_dir": str(tmp_path / "no")})
            )
    train(TrainingOptions(**tuned, output_dir=str(tmp_path / "tuned")))
