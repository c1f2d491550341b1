"""The folder in which test_snippets.py runs what the docs show: by the names that they use, tiny models and a few pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image

import text_models
from data_helpers import encoded, parquet, rgb, write_image
from ddpm_pipeline import (
    AlphaDDPMFittedScheduler,
    AlphaDDPMImageToImagePipeline,
    AlphaDDPMPipeline,
    ImageCondition,
    ValueRange,
    VectorCondition,
    describe_conditions,
)

STEPS, SHORT_CHAIN = 1000, 50  # of a chain
UNET = {
    "block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1,
    "norm_num_groups": 2, "add_attention": False,
}  # fmt: skip
DIGITS = [str(digit) for digit in range(10)]
FACES = VectorCondition(("age", "smile"), (40.0, 0.5), (10.0, 0.5))


def _scheduler(**config: Any) -> AlphaDDPMFittedScheduler:
    """With samplers of as many steps as training fits, which go with the short chain too."""
    fitted = {
        str(n): {"timesteps": np.linspace(SHORT_CHAIN - 1, 0, n).astype(int).tolist(), "coefficients": [[0.5, 0.5]] * n}
        for n in (5, 10, 20)
    }
    return AlphaDDPMFittedScheduler(STEPS, beta_schedule="squaredcos_cap_v2", fitted_samplers=fitted, **config)


def _model(size: int = 8, channels: int = 1, image: ImageCondition | None = None, config: Any = None, **told: Any) -> Any:
    """A pipeline of images of this size. `told` are further conditions."""
    inputs = channels + (image.input_channels if image else 0)
    sizes = {"sample_size": size, "in_channels": inputs, "out_channels": channels}
    unet = UNet2DModel(**{**UNET, **sizes, **(config or {})})
    describe_conditions(unet, condition_image=image, condition_dropout=0.1 if image or told else None, **told)
    return (AlphaDDPMImageToImagePipeline if image else AlphaDDPMPipeline)(unet, _scheduler())


def _models() -> dict[str, Any]:
    by_class = _model(config={"num_class_embeds": 11}, class_names=DIGITS)
    streets = _model(64, 3, ImageCondition(1, classes=12))
    texts = [text_models.make(scheduler=_scheduler(variance_type="learned_range"))]
    colour = text_models.make_unet(sample_size=16, in_channels=3, out_channels=6)
    texts.append(type(texts[0])(**{**texts[0].components, "unet": colour}))
    scans = _model(value_range=ValueRange((-1024.0,), (3071.0,), "int16"))
    return {
        **dict.fromkeys(("ddpm-digits", "ddpm-digits-1500"), _model()),
        **dict.fromkeys(("ddpm-digits-class", "org/ddpm"), by_class), **dict.fromkeys(("ddpm-streets", "org/streets"), streets),
        "ddpm-digits-text": texts[0], "ddpm-cats-text": texts[1], "ddpm-scans": scans, "ddpm-cats": _model(16, 3),
        "ddpm-digits-upscale": _model(image=ImageCondition(1, task="downscale:2")),
        "ddpm-digits-inpaint": _model(image=ImageCondition(1, task="inpaint")),
        "ddpm-faces": _model(16, 3, config={"class_embed_type": FACES.class_embed_type}, condition_vector=FACES),
        "my-model": _model(64, 3),
    }  # fmt: skip


def _data(world: Path) -> None:
    for index in range(1, 13):
        name = f"{index}.png"
        for folder in ("photos", "path/to/folder", "path/to/images", "streets/images"):
            write_image(world / folder / name, rgb(index, 64, 64))
        for folder in ("streets/masks", "masks"):
            write_image(world / folder / name, rgb(index, 64, 64)[..., 0] % 12)
        for folder in ("scans/images", "scans/t1"):
            write_image(world / folder / name, rgb(index, 48, 96).astype(np.uint16)[..., 0] * 257)
    faces = [encoded(rgb(index, 16, 16)) for index in range(12)]
    parquet(world / "faces.parquet", faces, age=[*range(12)], angle=[*range(12)], smile=[0, 1] * 6)
    (world / "prompts.txt").write_text("a handwritten seven\na handwritten two\n")
    (world / "run.yaml").write_text("dataset: digits\n")
    Image.fromarray(rgb(0, 8, 8)).save(world / "photo.png")


def make_world(world: Path) -> None:
    """Write all of it into a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, pipe in _models().items():
            pipe.save_pretrained(world / name)
    _data(world)
