"""How well does a model upscale digits that it has not seen, beside bicubic upscaling and a model that was not trained for it?

    accelerate launch training/train.py --config digits_upscale
    accelerate launch training/train.py --config digits --split "train[:1500]" --output_dir ddpm-digits-1500
    python benchmarks/super_resolution.py ddpm-digits-upscale --unconditional ddpm-digits-1500 --output super_resolution.json

The digits after the first 1,500 are scaled down and back up. Of each method: the class accuracy of a classifier of real digits;
the PSNR against the true image; and the PSNR of the result scaled down against the low-resolution image, which shows whether
the method kept to what it was told. The unconditional model is told the image in two ways that need no training: SDEdit (Meng
et al. 2022) noises the bicubic image and denoises it, and ILVR (Choi et al. 2021) replaces the low frequencies of every x_t by
those of the noised bicubic image.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ddpm_pipeline import AlphaDDPMImageToImagePipeline, AlphaDDPMPipeline
from ddpm_pipeline.data import DataOptions, load_images
from ddpm_pipeline.evaluation.digits import fit_digits_classifier
from ddpm_pipeline.support.pictures import grid, save_picture
from ddpm_pipeline.support.provenance import provenance

HELD_OUT = "train[1500:]"  # of the digits
BATCH_SIZE = 100


@dataclass(frozen=True)
class Result:
    """PSNRs in dB, of all values together with a peak of 1; accuracy in [0, 1]."""

    method: str
    class_accuracy: float
    psnr: float | None  # against the true images; None for these themselves
    psnr_at_low_resolution: float | None  # of the result scaled down, against what the method was told
    seconds: float


def low_pass(x: Tensor, factor: int) -> Tensor:
    """Images [B, C, H, W] scaled down by the factor and back up: linear, so that it also applies to noised images."""
    return interpolate(scaled_down(x, factor), x.shape[-2:], mode="bicubic")


def scaled_down(x: Tensor, factor: int) -> Tensor:
    return interpolate(x, [side // factor for side in x.shape[-2:]], mode="bicubic", antialias=True)


def psnr(ours: Tensor, theirs: Tensor) -> float:
    """Of images in [0, 1], in dB."""
    return -10 * torch.log10((ours.double() - theirs.double()).square().mean()).item()


def ilvr(factor: int, upscaled: Tensor, generator: torch.Generator) -> Callable[..., dict[str, Tensor]]:
    """A callback that replaces the low frequencies of x_s by those of the noised upscaled images [B, C, H, W] in [-1, 1]
    (Choi et al. 2021, eq. 8).
    """

    def replace(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        x, following = tensors["latents"], pipe.scheduler.timesteps[index + 1 :]
        reference = upscaled
        if len(following):
            noise = torch.randn(x.shape, generator=generator)
            reference = pipe.scheduler.add_noise(upscaled, noise, following[0].repeat(len(x)))
        return {"latents": x + low_pass(reference - x, factor)}

    return replace


@torch.no_grad()
def in_batches(method: Callable[[slice, list[torch.Generator]], Tensor], count: int, seed: int) -> Tensor:
    """What a method makes of images in slices, [count, C, H, W] in [0, 1]; image i has the generator of seed + i."""
    made = []
    for start in range(0, count, BATCH_SIZE):
        rows = range(start, min(start + BATCH_SIZE, count))
        made.append(method(slice(rows.start, rows.stop), [torch.Generator().manual_seed(seed + row) for row in rows]).float())
    return torch.cat(made)


def methods_of(pipe: Any, arguments: argparse.Namespace, images: Tensor) -> dict[str, Callable[..., Tensor]]:
    """The methods by name, each a function of a slice of the images [N, 1, 8, 8] in [0, 1] and of generators."""
    factor, how = pipe.image_condition.factor, {"num_inference_steps": arguments.steps, "output_type": "pt"}
    bicubic = pipe.image_condition.arrange(images * 2 - 1) / 2 + 0.5
    low = scaled_down(images, factor).clamp(0, 1)

    def trained(rows: slice, generators: list[torch.Generator]) -> Tensor:
        return pipe(condition_image=low[rows], generator=generators, **how).images

    def mean_of_trained(rows: slice, generators: list[torch.Generator]) -> Tensor:
        return torch.stack([trained(rows, generators) for _ in range(arguments.num_averaged)]).mean(dim=0)

    methods = {
        "the true image": lambda rows, _: images[rows],
        "bicubic": lambda rows, _: bicubic[rows],
        "trained for it": trained,
        f"trained for it, mean of {arguments.num_averaged} samples": mean_of_trained,
    }
    if arguments.unconditional:
        plain = AlphaDDPMPipeline.from_pretrained(arguments.unconditional)
        plain.set_progress_bar_config(disable=True)

        def with_ilvr(rows: slice, generators: list[torch.Generator]) -> Tensor:
            callback = ilvr(factor, bicubic[rows] * 2 - 1, torch.Generator().manual_seed(arguments.seed + rows.start))
            count = {"batch_size": rows.stop - rows.start}
            return plain(generator=generators, callback_on_step_end=callback, **count, **how).images

        def with_sdedit(rows: slice, generators: list[torch.Generator]) -> Tensor:
            return plain(image=bicubic[rows], strength=arguments.strength, generator=generators, **how).images

        methods |= {"unconditional, ILVR": with_ilvr, f"unconditional, SDEdit {arguments.strength:g}": with_sdedit}
    return methods


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| method | class accuracy | PSNR | PSNR at low resolution |", "|---|---|---|---|"]
    for row in results:
        decibels = ("" if row[name] is None else f"{row[name]:.1f} dB" for name in ("psnr", "psnr_at_low_resolution"))
        lines.append(f"| {row['method']} | {100 * row['class_accuracy']:.1f} % | {' | '.join(decibels)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of the recipe digits_upscale")
    parser.add_argument("--unconditional", type=Path, help="output folder of a model without a condition")
    parser.add_argument("--split", default=HELD_OUT, help="digits to upscale")
    parser.add_argument("--steps", type=int, default=100, help="reverse steps")
    parser.add_argument("--strength", type=float, default=0.2, help="of SDEdit")
    parser.add_argument("--num_averaged", type=int, default=8, help="samples whose mean is judged as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--picture", type=Path, help="PNG file to write: the first 16 digits, a row for each method")
    arguments = parser.parse_args()

    data = load_images(DataOptions(split=arguments.split))
    images, labels = data.pixels(range(len(data))) / 255, torch.tensor(list(data.values(data.label_column)))
    classifier, results, rows = fit_digits_classifier(), [], []
    pipe = AlphaDDPMImageToImagePipeline.from_pretrained(arguments.folder)
    pipe.set_progress_bar_config(disable=True)
    factor = pipe.image_condition.factor
    for name, method in methods_of(pipe, arguments, images).items():
        began = time.monotonic()
        made = in_batches(method, len(images), arguments.seed)
        seconds = time.monotonic() - began
        accuracy = (classifier(made * 2 - 1).argmax(dim=1) == labels).double().mean().item()
        low = [scaled_down(image, factor).clamp(0, 1) for image in (made, images)]
        figures = (None, None) if torch.equal(made, images) else (psnr(made, images), psnr(*low))
        results.append(asdict(Result(name, accuracy, *figures, seconds)))
        rows.append(made[:16])
    print(table(results))
    if arguments.picture:
        save_picture(grid(torch.cat(rows), columns=16), arguments.picture)
    if arguments.output:
        told = {name: getattr(arguments, name) for name in ("split", "steps", "strength", "num_averaged", "seed")}
        words = " ".join(f"--{name} {value}" for name, value in told.items() if value != parser.get_default(name))
        beside = f" --unconditional {arguments.unconditional.name}" if arguments.unconditional else ""
        command = f"python benchmarks/super_resolution.py {arguments.folder.name}{beside} {words}".strip()
        report = {"command": command, **provenance(torch.device("cpu")), **told, "num_images": len(images)}
        report |= {"classifier_accuracy": classifier.held_out_accuracy, "results": results}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
