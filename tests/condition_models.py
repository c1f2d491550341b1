"""Tiny models whose conditions are images or numbers, and loud enough to show it."""

from typing import Any

import torch
from diffusers import UNet2DModel

from ddpm_pipeline import (
    AlphaDDPMImageToImagePipeline,
    AlphaDDPMPipeline,
    AlphaDDPMScheduler,
    ImageCondition,
    VectorCondition,
    describe_conditions,
)

AGE = VectorCondition(("age",), (40.0,), (10.0,))
POSE = VectorCondition(("angle", "height", "smiling"), (0.0, 1.7, 0.0), (30.0, 0.1, 1.0))


def unet(
    channels: int = 1, image: ImageCondition | None = None, vector: VectorCondition | None = None, **config: Any
) -> UNet2DModel:
    """Of 8x16 pixels. `own` in the config are further settings of ours."""
    own = {"condition_dropout": 0.1, **config.pop("own", {})}
    config = {"sample_size": (8, 16), "out_channels": channels, **config}
    torch.manual_seed(0)
    made = UNet2DModel(
        in_channels=channels + (image.input_channels if image else 0), layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        class_embed_type=vector.class_embed_type if vector else None, **config,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    describe_conditions(made, condition_image=image, condition_vector=vector, **own)
    return made


def pipeline(*arguments: Any, scheduler: Any = None, **config: Any) -> AlphaDDPMPipeline:
    """Of a `unet` with these arguments."""
    made = unet(*arguments, **config)
    kind = AlphaDDPMImageToImagePipeline if arguments[1:] and arguments[1] else AlphaDDPMPipeline
    pipe = kind(made, scheduler or AlphaDDPMScheduler(20, beta_schedule="squaredcos_cap_v2"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(**arguments: Any) -> dict[str, Any]:
    """Two images in few steps, from a generator each."""
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    return {"num_inference_steps": 5, "generator": generators, "output_type": "pt", **arguments}
