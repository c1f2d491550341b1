"""What lies on the Hub in the tests: one tiny model of each kind, older layouts, and the images that they must give."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from ddpm_pipeline import (
    AlphaDDPMImageToImagePipeline,
    AlphaDDPMPipeline,
    AlphaDDPMScheduler,
    AlphaDDPMTextToImagePipeline,
    ImageCondition,
    ValueRange,
    VectorCondition,
    describe_conditions,
)
from ddpm_pipeline.hub import Measurement, TrainingFacts, build_card
from text_models import make

STEPS = 20
TIMESTEPS = {"3": [19, 7, 0]}
OWN = {
    "variance_type": "analytic",
    "noise_second_moments": [round(0.4 + 0.02 * t, 3) for t in range(STEPS)],
    "inference_timesteps": TIMESTEPS,
}
CLASSES = ["zero", "one", "two"]
LABEL_MAPS, AGES = ImageCondition(1, classes=5), VectorCondition(("age",), (41.25,), (9.0,))
HOUNSFIELD = ValueRange((-1024.0,), (3071.0,), "int16")
# arguments of the calls, by the name of the model; the others are unconditional
CALLS = {
    "text": {"prompt": "A handwritten SEVEN ", "num_images_per_prompt": 2, "guidance_scale": 3.0},
    "class": {"class_labels": ["two", "zero"], "guidance_scale": 3.0},
    "image": {
        "condition_image": np.arange(128, dtype=np.uint8).reshape(8, 16) % 5, "condition_vector": [30, None],
        "guidance_scale": 3.0,
    },
}  # fmt: skip
# settings of ours, by model and component: stock classes must keep them
KEPT = {
    "own": {"scheduler": {name: OWN[name] for name in ("noise_second_moments", "inference_timesteps")}},
    "class": {"scheduler": {"inference_timesteps": TIMESTEPS}, "unet": {"class_names": CLASSES, "condition_dropout": 0.1}},
    "text": {"scheduler": {"inference_timesteps": TIMESTEPS}, "unet": {"condition_dropout": 0.2}},
    "image": {
        "scheduler": {"inference_timesteps": TIMESTEPS},
        "unet": {
            "condition_dropout": 0.1, "condition_image": LABEL_MAPS.to_json(), "condition_vector": AGES.to_json(),
            "value_range": HOUNSFIELD.to_json(),
        },
    },
}  # fmt: skip
# what a card says
FIGURES = [
    Measurement("bits/dim", 2.345678, 1797, "digits", "train", 0.01, {"steps": 1000, "form": "exact KLs"}),
    Measurement("FID", 1.5, 1797, "digits", settings={"steps": 100, "scheduler": "AlphaDDPMScheduler"}),
]
TRAINING = TrainingFacts("digits", 1797, "org/digits", {"updates": 7, "seed": 0}, "accelerate launch x")


def card_of(pipe: AlphaDDPMPipeline, **options: Any) -> ModelCard:
    return build_card(pipe, **{"name": "ddpm", "training": TRAINING, **options})


def smallest_pipeline() -> AlphaDDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return AlphaDDPMPipeline(unet, scheduler())


def tiny_unet(**config) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        attention_head_dim=None, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **config,
    ).eval()  # fmt: skip


def scheduler(**config) -> AlphaDDPMScheduler:
    return AlphaDDPMScheduler(num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2", **config)


def class_pipeline() -> AlphaDDPMPipeline:
    unet = tiny_unet(num_class_embeds=len(CLASSES) + 1)
    describe_conditions(unet, class_names=CLASSES, condition_dropout=0.1)
    return AlphaDDPMPipeline(unet, scheduler(inference_timesteps=TIMESTEPS))


def rgba_pipeline() -> AlphaDDPMPipeline:
    """Of images that are twice as wide as high, over a chain of more steps than examples take."""
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(smallest_pipeline().unet.config, sample_size=(8, 16), in_channels=4, out_channels=4)
    return AlphaDDPMPipeline(unet, AlphaDDPMScheduler(120))


def deep_pipeline() -> AlphaDDPMPipeline:
    """Of two channels of 12 bits, twice as wide as high."""
    unet = UNet2DModel.from_config(smallest_pipeline().unet.config, sample_size=(8, 16), in_channels=2, out_channels=2)
    describe_conditions(unet, value_range=ValueRange((0.0,), (4095.0,), "uint16"))
    return AlphaDDPMPipeline(unet, scheduler())


def image_pipeline() -> AlphaDDPMImageToImagePipeline:
    """Of slices in Hounsfield units, twice as wide as high, for label maps and an age."""
    config = tiny_unet(class_embed_type="timestep").config
    unet = UNet2DModel.from_config(config, sample_size=(8, 16), in_channels=6)
    told = {"condition_image": LABEL_MAPS, "condition_vector": AGES, "value_range": HOUNSFIELD}
    describe_conditions(unet, condition_dropout=0.1, **told)
    return AlphaDDPMImageToImagePipeline(unet, scheduler(inference_timesteps=TIMESTEPS))


def text_pipeline(seed: int = 0) -> AlphaDDPMTextToImagePipeline:
    learned = scheduler(variance_type="learned_range", inference_timesteps=TIMESTEPS)
    return make(dropout=0.2, scheduler=learned, seed=seed)


def images(pipe: Any, name: str = "ddpm") -> np.ndarray:
    """Two of the model of this name, [2, 8, 8, 1]."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    call = CALLS.get(name, {"batch_size": 2})
    return pipe(**call, generator=generators, num_inference_steps=STEPS, output_type="np").images


def early_repository(folder: Path) -> np.ndarray:
    """As google/ddpm-cifar10-32 and its like: all files at the top, few config keys, attention by its former names."""
    unet = tiny_unet(downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6)
    DDPMPipeline(unet, DDPMScheduler(STEPS, variance_type="fixed_large")).save_pretrained(folder)
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    former = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for new, old in former.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    assert any("proj_attn" in name for name in weights)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = json.loads((folder / "unet" / "config.json").read_text())
    newer = ("dropout", "attn_norm_num_groups", "class_embed_type", "num_class_embeds", "num_train_timesteps",
             "resnet_time_scale_shift", "time_embedding_dim", "downsample_type", "upsample_type", "mid_block_type")  # fmt: skip
    config = {name: value for name, value in config.items() if name not in newer}
    (folder / "config.json").write_text(json.dumps(config | {"_diffusers_version": "0.1.1"}))
    kept = ("_class_name", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "clip_sample", "variance_type")
    stored = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler_config.json").write_text(json.dumps({name: stored[name] for name in kept}))
    for name in ("unet", "scheduler"):
        for file in (folder / name).iterdir():
            file.unlink()
        (folder / name).rmdir()
    return images(AlphaDDPMPipeline(unet, AlphaDDPMScheduler(STEPS, variance_type="fixed_large")))
