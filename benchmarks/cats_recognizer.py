"""How exact is the recognizer of cats, and what does it call a cat? Real cats, with noise, and pictures that are no cats.

    python benchmarks/cats_recognizer.py --output cats_recognizer.json

Of real cats it counts the parts that are found wrongly, by kind, and the pictures that are refused. Of pictures that are no
cats it counts those that are called valid all the same: the mean of two cats that differ in one part, or of any two; cats
without eyes or mouth; the left or upper half of one cat beside that of another; and noise. A mean of two parts that look alike
is near both.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_pipeline.data.cats import COUNTS, KINDS, NOTHING, SCARVES, all_cats, draw, layers, over
from ddpm_pipeline.evaluation.cats import CatRecognizer
from ddpm_pipeline.support.provenance import provenance

SIDES, NOISES, BATCH_SIZE = (16, 24, 32, 64), (0.0, 0.03, 0.05), 500


def pictures(cats: np.ndarray, side: int) -> Tensor:
    """[N, 3, side, side] in [0, 1]."""
    return torch.from_numpy(draw(cats, side)).permute(0, 3, 1, 2).float() / 255


def without(cats: np.ndarray, missing: str, side: int) -> Tensor:
    """Pictures of cats that lack a kind of part."""
    picture = np.ones((len(cats), side, side, 3), np.float32)
    for place, kind in enumerate(KINDS):
        if kind != missing:
            picture = over(picture, layers(side)[kind][cats[:, place]])
    return torch.from_numpy(picture).permute(0, 3, 1, 2)


def halves(first: Tensor, second: Tensor, axis: int) -> Tensor:
    middle = first.shape[axis] // 2
    return torch.cat([first.narrow(axis, 0, middle), second.narrow(axis, middle, first.shape[axis] - middle)], dim=axis)


def no_cats(count: int, side: int, seed: int) -> dict[str, Tensor]:
    """Pictures that are no cats by what was done to them, [count, 3, side, side] in [0, 1]."""
    random = np.random.default_rng(seed)
    cats, others = all_cats()[random.choice(len(all_cats()), (2, count), replace=False)]
    cats[np.isin(cats[:, 4], SCARVES), 4] = NOTHING  # so that each has a mouth
    first, second = pictures(cats, side), pictures(others, side)
    found = {}
    for place, kind in enumerate(KINDS):
        one_other = cats.copy()
        one_other[:, place] = (cats[:, place] + random.integers(1, COUNTS[place], count)) % COUNTS[place]
        found[f"mean of two that differ in {kind}"] = (first + pictures(one_other, side)) / 2
    found["mean of any two"] = (first + second) / 2
    found |= {f"without {kind}": without(cats, kind, side) for kind in ("eyes", "mouth")}
    found |= {"halves side by side": halves(first, second, 3), "halves one over the other": halves(first, second, 2)}
    return found | {"noise": torch.rand(first.shape, generator=torch.Generator().manual_seed(seed))}


def real_cats(recognizer: CatRecognizer, cats: np.ndarray, noise: float, seed: int) -> dict[str, Any]:
    """What is found wrongly, by kind, and refused; of cats with noise of this standard deviation."""
    generator, wrong, refused, seconds = torch.Generator().manual_seed(seed), np.zeros(len(KINDS), int), 0, 0.0
    for batch in np.array_split(cats, max(1, len(cats) // BATCH_SIZE)):
        images = pictures(batch, recognizer.side)
        images = (images + noise * torch.randn(images.shape, generator=generator)) * 2 - 1
        began = time.process_time()
        found = recognizer(images)
        seconds += time.process_time() - began
        wrong, refused = wrong + (found.cats.numpy() != batch).sum(axis=0), refused + int((~found.valid).sum())
    return {
        "wrong": dict(zip(KINDS, wrong.tolist(), strict=True)),
        "refused": refused,
        "pictures_per_core_second": len(cats) / seconds,
    }


def table(report: dict[str, Any]) -> str:
    sides, count = report["sides"], report["num_images"]
    lines = [f"| of {count:,} real cats | {' | '.join(f'{side}x{side}' for side in sides)} |", "|---" * (len(sides) + 1) + "|"]
    for noise in map(str, NOISES):
        found = [side["real"][noise] for side in sides.values()]
        what = "as they are" if noise == "0.0" else f"with noise of {noise}"
        wrong = [", ".join(f"{n} {kind}" for kind, n in one["wrong"].items() if n) or "none" for one in found]
        lines.append(f"| parts found wrongly, {what} | {' | '.join(wrong)} |")
        lines.append(f"| called invalid, {what} | {' | '.join(str(one['refused']) for one in found)} |")
    lines += ["", f"| of {report['num_no_cats']:,}, called valid | {' | '.join(f'{side}x{side}' for side in sides)} |"]
    lines.append("|---" * (len(sides) + 1) + "|")
    for name in next(iter(sides.values()))["called_valid"]:
        shares = [f"{100 * side['called_valid'][name]:.1f} %" for side in sides.values()]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=int, default=10_000, help="real cats for each size and noise")
    parser.add_argument("--num_no_cats", type=int, default=2_000, help="pictures of each kind that are no cats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write; a table beside it ends in .md")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    chosen = np.random.default_rng(arguments.seed).choice(len(all_cats()), arguments.num_images, replace=False)
    sides = {}
    for side in SIDES:
        recognizer = CatRecognizer(side)
        real = {str(noise): real_cats(recognizer, all_cats()[chosen], noise, arguments.seed) for noise in NOISES}
        others = no_cats(arguments.num_no_cats, side, arguments.seed)
        valid = {name: recognizer(images * 2 - 1).valid.double().mean().item() for name, images in others.items()}
        sides[side] = {"real": real, "called_valid": valid}
    told = {name: getattr(arguments, name) for name in ("num_images", "num_no_cats", "seed")}
    words = " ".join(f"--{name} {value}" for name, value in told.items())
    report = {"command": f"python benchmarks/cats_recognizer.py {words}", **provenance(torch.device("cpu")), **told}
    report["sides"] = sides
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
