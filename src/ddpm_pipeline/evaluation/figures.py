"""The figures of an evaluation: bits per dimension of given images, means over images, and all figures as the card has them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..hub import Measurement
from ..likelihood import BitsPerDim, bits_per_dim
from ..ranges_alpha_ddpm import ValueRange

DENSITY = "per value, of data scaled to [-1, 1]"  # what bits per dimension are of floats
CATS = {"valid": "valid cats", "copies": "copies of training cats", "new": "new cats"}  # shares of samples
FOLLOWED = {"psnr": "PSNR", "ssim": "SSIM", "class_accuracy": "class accuracy"}  # how near samples come to their conditions


def likelihood_of(
    unet: Any, scheduler: Any, pixels: torch.Tensor, value_range: ValueRange, noise_seeds: Sequence[int], **options: Any
) -> BitsPerDim:
    """`bits_per_dim` of images [B, C, H, W] in own units, each with noise of its own, from its seed in `noise_seeds` [B]. By
    default they are on the levels of their range.
    """
    generators = [torch.Generator().manual_seed(int(seed)) for seed in noise_seeds]
    options = {"num_bins": value_range.num_bins, **options}
    return bits_per_dim(unet, scheduler, value_range.normalize(pixels), generator=generators, **options)


def summary(columns: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The means of `BitsPerDim`'s fields, each a list with a value per image, and the standard error of the mean total."""
    values = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
    of_one_image, count = values.pop("standard_error").square().mean().sqrt().item(), len(values["total"])
    result = {"num_images": count} | {name: column.mean().item() for name, column in values.items()}
    # images draw their own timesteps, so the spread of totals includes what evaluating a subset of timesteps adds
    if count > 1:
        result["total_standard_error"] = values["total"].std().item() / math.sqrt(count)
    return result | {"standard_error_of_one_image": of_one_image}


def means(columns: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each list with a value per image, and its standard error."""
    found = {}
    for name, column in columns.items():
        values = torch.tensor(column, dtype=torch.float64)
        found[name] = values.mean().item()
        if len(values) > 1:
            found[f"{name}_standard_error"] = values.std().item() / math.sqrt(len(values))
    return found


def measurements(results: Mapping[str, Any]) -> list[Measurement]:
    """The figures in the results of `evaluate`, as the model card has them: with their standard errors, and with all that says
    what they are estimates from.
    """
    data, seed = {name: results[name] for name in ("dataset", "split")}, {"seed": results["seed"]}
    measured = []
    if bits := results.get("bits_per_dim"):
        calls, steps = bits["network_calls"], bits["steps"]
        estimate = {"network_calls": f"{calls} of {steps} per image"} if calls < steps else {}
        levels = {name: bits[name] for name in ("num_bins", "density") if bits.get(name, 256) != 256}
        settings = {"steps": steps, "bound": "upper", **estimate, **levels} | seed
        about = {"standard_error": bits.get("total_standard_error"), "settings": settings, **data}
        measured.append(Measurement("bits/dim", bits["total"], bits["num_images"], **about))
    if quality := results.get("quality"):
        settings = _how(quality, "features") | {"real_images": quality["num_real"]} | seed
        spread = {"KID": {"std_over_subsets": float(f"{quality['kid_std']:.2g}")}}
        measured += [
            Measurement(name, quality[name.lower()], quality["num_generated"], settings=settings | spread.get(name, {}), **data)
            for name in ("FID", "KID", "precision", "recall")
        ]
    if cats := results.get("cats"):
        settings = _how(cats, "training_cats") | seed
        shares = {CATS[name]: (cats[name], cats[f"{name}_standard_error"], {}) for name in CATS}
        for kind, found in cats.get("attributes", {}).items():
            of = "" if kind == "all" else f" of {kind}"
            shares[f"attribute accuracy{of}"] = (found["accuracy"], found["standard_error"], {"asked": found["asked"]})
        measured += [
            Measurement(name, share, cats["num_images"], standard_error=error, settings=settings | more, **data)
            for name, (share, error, more) in shares.items()
        ]
    if followed := results.get("conditions"):
        settings = _how(followed) | seed
        for name in filter(followed.__contains__, FOLLOWED):
            error, bicubic = (followed.get(key) for key in (f"{name}_standard_error", f"bicubic_{name}"))
            how = settings if bicubic is None else {**settings, "bicubic": float(f"{bicubic:.4g}")}
            about = {"num_images": followed["num_images"], "standard_error": error, "settings": how, **data}
            measured.append(Measurement(FOLLOWED[name], followed[name], **about))
    if "memorisation" in results:
        measured += _of_memorisation(results, data, seed)
    return measured


def _how(section: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """How its samples were made, and more of its settings."""
    return {name: section[name] for name in ("steps", "scheduler", "guidance_scale", *more) if name in section}


def _of_memorisation(results: Mapping[str, Any], data: Mapping[str, Any], seed: Mapping[str, int]) -> list[Measurement]:
    found, measured = results["memorisation"], []
    shared = {"held_out": found["validation_split"], **seed}
    if gap := found.get("bits_per_dim"):
        means = {f"{kind}_bits": float(f"{gap[kind]:.4g}") for kind in ("training", "held_out")}
        about = {"standard_error": gap.get("difference_standard_error"), "settings": means | shared, **data}
        measured.append(Measurement("bits/dim, held-out minus training", gap["difference"], gap["num_held_out"], **about))
    for space in filter(found.__contains__, ("pixels", "features")):
        figures, extractor = found[space], {"features": results["quality"]["features"]} if space == "features" else {}
        how = {"held_out_images": figures["num_held_out"], **_how(found), **extractor, **shared}
        chance = f"{figures['chance']:.2g} ± {figures['chance_standard_error']:.1g}"
        names = {"distance_ratio": ("distance ratio", 1), "share_unusually_near": ("unusually near", chance)}
        for key in filter(figures.__contains__, names):
            name, of_new = names[key]
            settings = {"if_nothing_is_copied": of_new, **how}
            about = {"standard_error": figures[f"{key}_standard_error"], "settings": settings, **data}
            measured.append(Measurement(f"{name}, {space}", figures[key], figures["num_samples"], **about))
    return measured
