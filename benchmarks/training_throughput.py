"""Training beside others: a bare loop, diffusers' train_unconditional.py, denoising-diffusion-pytorch. In ratios of throughput
and memory, in what samples are worth after so much time, and in how its cost grows.

    python benchmarks/training_throughput.py --stock train_unconditional.py --python others/bin/python

The bare loop repeats forward pass, backward pass and optimizer step of the same UNet on one batch in memory, without clipping,
EMA, data or log; it takes turns with a run in one process. The others train the same UNet on the same folder of images, each in
a process of its own, in turn; `--python` is of an environment that has them (diffusers, datasets, tensorboard, torchvision,
denoising-diffusion-pytorch), `--stock` the script from diffusers' examples/unconditional_image_generation. All compute in
float32 on the same number of threads, and denoising-diffusion-pytorch reads images in a further process for each core.

Quality by time has the digits at 8x8 and the same UNet for all, each with its defaults and with the settings of our recipe
`digits`. Time is that of the training process on its CPUs, from the first update on, so that other work on the machine does not
count; all schedules end with the last update, and all are sampled in the same way.
"""

from __future__ import annotations  # this file is also run by --python, which has neither the package nor matplotlib

import argparse
import copy
import itertools
import json
import operator
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = {8: ("tiny", 64), 16: ("tiny", 64), 32: ("small", 32)}  # by image side: preset and batch size
BARE, STOCK, LUCIDRAINS = "bare loop", "train_unconditional.py", "denoising-diffusion-pytorch"
TUNED = "itself without --autotune"
SIDES = {TUNED: (8, 16), STOCK: (8, 16, 32), LUCIDRAINS: (16,)}  # at which each of the others is run
GOALS = {BARE: 0.97, STOCK: 1.3}  # of updates per second, as a multiple of the other's
UNCOUNTED = 4  # updates at the beginning of each process
TURN = 5  # updates of a turn beside the bare loop
GROWTH = {  # what changes, and the factor
    "batch size": ({"batch_size": 256}, 4), "image side": ({"resolution": 16, "model": "tiny"}, 2), "images": ({}, 20),
    "timesteps": ({"num_train_timesteps": 4000}, 4),
}  # fmt: skip


DIGITS = {  # of the recipe `digits`, in the words of each
    "own": {
        "how": {
            "beta_schedule": "squaredcos_cap_v2", "learning_rate": 2e-3, "lr_warmup_steps": 100, "adam_beta2": 0.99,
            "weight_decay": 0.01, "ema_decay": 0.998, "mixed_precision": "bf16",
        },
    },
    STOCK: {
        "how": {
            "ddpm_beta_schedule": "squaredcos_cap_v2", "learning_rate": 2e-3, "lr_warmup_steps": 100, "adam_beta1": 0.9,
            "adam_beta2": 0.99, "adam_weight_decay": 0.01, "ema_max_decay": 0.998, "mixed_precision": "bf16",
        },
    },
    LUCIDRAINS: {
        "how": {
            "train_lr": 2e-3, "adam_betas": [0.9, 0.99], "ema_decay": 0.998, "ema_update_every": 1, "amp": True,
            "mixed_precision_type": "bf16",
        },
        "diffusion": {"beta_schedule": "cosine", "objective": "pred_noise"},
    },
}  # fmt: skip
RECIPES = {  # whose training, and how; the defaults with the batch size that each has by default
    "own, recipe digits": ("own", DIGITS["own"]),
    "own, defaults": ("own", {"options": {"batch_size": 128}}),
    f"{STOCK}, as recipe digits": (STOCK, DIGITS[STOCK]),
    f"{STOCK}, defaults": (STOCK, {"options": {"batch_size": 16}}),
    f"{LUCIDRAINS}, as recipe digits": (LUCIDRAINS, DIGITS[LUCIDRAINS]),
    f"{LUCIDRAINS}, defaults": (LUCIDRAINS, {"options": {"batch_size": 16}}),
}
MARKS = (8, 4, 2, 1)  # parts of a run after which its samples are judged
NEVER = 10**9
Model = Callable[[], tuple[Any, Any]]  # gives the averaged UNet and the scheduler


class Enough(Exception):
    """Ends a run whose updates have been timed."""


# ---- in one process, in turn --------------------------------------------------------------------------


def beside_bare(side: int, precision: str, seconds: float, threads: int, scratch: Path) -> float:
    """Updates per second as a multiple of those of the bare loop."""
    import torch

    from ddpm_pipeline.training import TrainingOptions, loop, train

    preset, batch = CASES[side]
    whole, began, own, bare = loop.update, time.perf_counter(), [], []
    network: Any = None
    mark = 0.0

    def bare_updates(run: Any) -> None:
        nonlocal network
        if network is None:
            torch.manual_seed(0)
            unet = type(run.state.unet).from_config(run.state.unet.config)
            shape = (batch, run.data.channels, *run.data.size)
            drawn = torch.randn(shape), torch.randint(1000, (batch,)), torch.randn(shape)
            network = unet, torch.optim.AdamW(unet.parameters(), fused=True), *drawn
        unet, optimizer, images, timesteps, noise = network
        for _ in range(TURN):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                predicted = unet(images, timesteps).sample
            (predicted.float() - noise).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def update(run: Any, objective: Any, step: int) -> Any:
        nonlocal mark
        if step % TURN == 0:
            now = time.perf_counter()
            own.append(now - mark)
            if now - began > seconds and len(own) > UNCOUNTED:
                raise Enough
            bare_updates(run)
            mark = time.perf_counter()
            bare.append(mark - now)
        return whole(run, objective, step)

    options = TrainingOptions(**own_options(side, batch, preset, threads, scratch), mixed_precision=precision, overwrite=True)
    loop.update = update
    try:
        train(options)
    except Enough:
        return statistics.median(b / o for b, o in list(zip(bare, own[1:], strict=True))[1:])
    finally:
        loop.update = whole


def own_options(side: int, batch: int, network: str, threads: int, scratch: Path, **more: Any) -> dict[str, Any]:
    return {
        "dataset": str(scratch / f"images-{side}"), "resolution": side, "channels": 3, "model": network, "batch_size": batch,
        "max_train_steps": 3000, "num_cpu_threads": threads, "preview_every": 0, "cache_dir": str(scratch / "cache"),
        "output_dir": str(scratch / "own"),
    } | more  # fmt: skip


# ---- in processes of their own: each trains and calls `note` with a way to its averaged UNet and its schedule after every
# ---- update, until that raises Enough


def train_own(spec: dict[str, Any], note: Callable[[Model], None]) -> None:
    from ddpm_pipeline.training import TrainingOptions, loop, train

    whole = loop.update

    def update(run: Any, *arguments: Any) -> Any:
        def model() -> tuple[Any, Any]:
            with run.state.ema_weights():
                return copy.deepcopy(run.state.unet), run.scheduler

        result = whole(run, *arguments)
        note(model)
        return result

    loop.update = update
    train(TrainingOptions(**spec["options"], **spec.get("how", {})))


def train_stock(spec: dict[str, Any], note: Callable[[Model], None]) -> None:
    from accelerate import Accelerator

    options, whole = spec["options"], Accelerator.log

    def log(*arguments: Any, **more: Any) -> None:
        def model() -> tuple[Any, Any]:
            unet = copy.deepcopy(script["model"])
            script["ema_model"].copy_to(unet.parameters())
            return unet, script["noise_scheduler"]

        whole(*arguments, **more)
        script = sys._getframe(1).f_locals
        note(model)

    Accelerator.log = log  # it is called after every update
    batches = -(-spec["images"] // options["batch_size"])
    flags = {
        "train_data_dir": options["dataset"], "model_config_name_or_path": spec["unet"], "resolution": options["resolution"],
        "train_batch_size": options["batch_size"], "num_epochs": -(-options["max_train_steps"] // batches),
        "output_dir": options["output_dir"], "cache_dir": options["cache_dir"], "save_images_epochs": NEVER,
        "save_model_epochs": NEVER, "checkpointing_steps": NEVER,
        "ddpm_num_inference_steps": 1,  # of the samples after the first epoch
        **spec.get("how", {}),
    }  # fmt: skip
    sys.argv = [spec["stock"], "--use_ema", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    runpy.run_path(spec["stock"], run_name="__main__")


def train_lucidrains(spec: dict[str, Any], note: Callable[[Model], None]) -> None:
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer
    from diffusers import DDPMScheduler, UNet2DModel
    from torch import nn

    class Denoiser(nn.Module):
        channels = out_dim = 3
        self_condition = False

        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DModel.from_config(UNet2DModel.load_config(spec["unet"]))

        def forward(self, images: Any, timesteps: Any, _: Any = None) -> Any:
            return self.unet(images, timesteps).sample

    def model() -> tuple[Any, Any]:
        learned = trainer.ema.ema_model
        predicted = {"pred_noise": "epsilon", "pred_v": "v_prediction"}[learned.objective]
        return learned.model.unet, DDPMScheduler(trained_betas=learned.betas.tolist(), prediction_type=predicted)

    options = spec["options"]
    diffusion = GaussianDiffusion(Denoiser(), image_size=options["resolution"], **spec.get("diffusion", {}))
    how = {
        "train_batch_size": options["batch_size"], "train_num_steps": options["max_train_steps"], "calculate_fid": False,
        "save_and_sample_every": NEVER, "augment_horizontal_flip": False, **spec.get("how", {}),
    }  # fmt: skip
    trainer = Trainer(diffusion, options["dataset"], results_folder=options["output_dir"], **how)
    whole = trainer.ema.update

    def update() -> None:
        whole()
        note(model)

    trainer.ema.update = update
    trainer.train()


CONTENDERS = {"own": train_own, TUNED: train_own, STOCK: train_stock, LUCIDRAINS: train_lucidrains}


def contend(spec: dict[str, Any]) -> None:
    """What a process of its own does: prints the seconds of an update, those until the first one was done, and the peak memory;
    of CPU time, the seconds of an update and those from the first one to each that is marked, after which the model is saved.
    """
    import torch

    torch.set_num_threads(spec["threads"])
    times: list[float] = []
    cpu: list[float] = []
    saving = 0.0

    def note(model: Model) -> None:
        nonlocal saving
        times.append(time.time())
        cpu.append(time.process_time() - saving)
        if len(times) in spec["marks"]:
            for part, what in zip(("unet", "scheduler"), model(), strict=True):
                what.save_pretrained(f"{spec['models']}/{len(times)}/{part}")
            saving = time.process_time() - cpu[-1]
        if len(times) == spec["updates"]:
            raise Enough

    try:
        CONTENDERS[spec["name"]](spec, note)
    except Enough:
        status = Path("/proc/self/status").read_text()  # ru_maxrss begins with the peak of the parent
        found = {
            **{of: statistics.median(map(operator.sub, each[UNCOUNTED + 1 :], each[UNCOUNTED:])) for of, each in
               (("update", times), ("cpu", cpu))},
            "start": times[0] - spec["began"], "peak": int(re.search(r"VmHWM:\s*(\d+)", status)[1]),
            "seconds": [cpu[mark - 1] - cpu[0] for mark in spec["marks"]],
        }  # fmt: skip
        print("\n" + json.dumps(found), flush=True)
    else:
        raise RuntimeError(f"{spec['name']} ended after {len(times)} of {spec['updates']} updates")


def measured(name: str, spec: dict[str, Any], python: str, scratch: Path) -> dict[str, Any]:
    spec = {"marks": [], **spec, "name": name, "began": time.time()}
    folder = Path(tempfile.mkdtemp(dir=scratch))  # for output and caches, so that every process begins with nothing
    autotune = {"autotune": True} if name == TUNED else {}
    spec["options"] = {**spec["options"], "output_dir": str(folder / "out"), "cache_dir": str(folder / "cache"), **autotune}
    settings = {"OMP_NUM_THREADS": str(spec["threads"]), "HF_DATASETS_CACHE": str(folder), "XDG_CACHE_HOME": str(folder)}
    command = [python if name in (STOCK, LUCIDRAINS) else sys.executable, __file__, "--contender", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- the whole --------------------------------------------------------------------------------------


def write_images(folder: Path, side: int, count: int) -> None:
    """The digits in colour, again and again, as PNG files of this size."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder.mkdir()
    digits = [Image.fromarray((16 * image).clip(0, 255).astype("uint8")) for image in load_digits().images]
    for index in range(count):
        digits[index % len(digits)].resize((side, side)).convert("RGB").save(folder / f"{index:06d}.png")


def write_unet(folder: Path, side: int) -> Path:
    from diffusers import UNet2DModel

    from ddpm_pipeline.training.models import PRESETS

    UNet2DModel(sample_size=side, in_channels=3, out_channels=3, **PRESETS[CASES[side][0]][1]).save_config(folder)
    return folder


def beside_bare_loop(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    rows = []
    for side, precision in itertools.product(arguments.sides, ("no", "bf16")):
        ratio = beside_bare(side, precision, arguments.seconds, arguments.threads, scratch)
        rows.append(row(BARE, side, "float32" if precision == "no" else precision, ratio))
    return rows


def beside_others(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    return [found for side in arguments.sides for found in beside_others_at(side, arguments, scratch)]


def beside_others_at(side: int, arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """A row for each of the others that there is."""
    spec = spec_of(side, arguments, scratch)
    there = {TUNED: True, STOCK: arguments.stock, LUCIDRAINS: arguments.python}
    names = [name for name, present in there.items() if present and side in SIDES[name]]
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append({name: measured(name, spec, arguments.python or sys.executable, scratch) for name in ("own", *names)})
    rows = []
    for name in names:
        ours, others = (TUNED, "own") if name == TUNED else ("own", name)
        pairs = [(each[ours], each[others]) for each in rounds]
        parts = {of: statistics.median(our[of] / other[of] for our, other in pairs) for of in ("update", "start", "peak")}
        precision = "as chosen" if name == TUNED else "float32"
        rows.append(row(name, side, precision, 1 / parts["update"], start=parts["start"], memory=parts["peak"]))
    return rows


def spec_of(side: int, arguments: argparse.Namespace, scratch: Path, **more: Any) -> dict[str, Any]:
    """A run with the same UNet for all."""
    unet = str(write_unet(scratch / f"unet-{side}", side))
    options = own_options(side, CASES[side][1], unet, arguments.threads, scratch, **more)
    common = {"unet": unet, "images": arguments.images, "stock": arguments.stock}
    common |= {"threads": arguments.threads, "updates": arguments.updates}
    return {"options": options, **common}


def row(beside: str, side: int, precision: str, throughput: float, **more: float) -> dict[str, Any]:
    figures = {"throughput": throughput, **more}
    rounded = {name: float(f"{value:.3g}") for name, value in figures.items()}
    place = {"beside": beside, "side": side, "batch": CASES[side][1], "precision": precision}
    return {**place, **rounded, "goal": GOALS.get(beside)}


def growth(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """How the time of an update, the start and the peak memory change with one thing at a time, at 8x8."""
    many = scratch / "many"
    write_images(many, 8, GROWTH["images"][1] * arguments.images)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ("own", *GROWTH)}
    for _ in range(arguments.rounds):
        for name in rounds:
            more = GROWTH[name][0] if name in GROWTH else {}
            folder = {"dataset": str(many)} if name == "images" else {}
            rounds[name].append(measured("own", spec_of(8, arguments, scratch, **more, **folder), sys.executable, scratch))
    found = []
    for name, (_, factor) in GROWTH.items():
        pairs = list(zip(rounds[name], rounds["own"], strict=True))
        ratios = {of: statistics.median(one[of] / base[of] for one, base in pairs) for of in ("update", "start", "peak")}
        found.append({"what": name, "factor": factor, **{of: float(f"{ratio:.3g}") for of, ratio in ratios.items()}})
    return found


def quality(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """The Fréchet distance of each recipe's samples by CPU time, on the digits, in the features of a classifier of them."""
    from ddpm_pipeline.evaluation.digits import fit_digits_classifier, load_digits_images
    from ddpm_pipeline.evaluation.quality import frechet_distance

    classifier, rows = fit_digits_classifier(), []
    real = classifier.features(load_digits_images()[0])
    for recipe, (name, how) in RECIPES.items():
        if name != "own" and not (arguments.python and arguments.stock):
            continue
        spec = spec_of(8, arguments, scratch) | {"how": how.get("how", {}), "diffusion": how.get("diffusion", {})}
        spec["options"] |= how.get("options", {})
        python = arguments.python or sys.executable
        updates = int(arguments.quality_seconds / measured(name, spec, python, scratch)["cpu"])
        marks = [updates // part for part in MARKS]
        spec |= {"updates": updates, "marks": marks, "models": str(scratch / recipe)}
        spec["options"]["max_train_steps"] = updates
        seconds = measured(name, spec, python, scratch)["seconds"]
        for mark, spent in zip(marks, seconds, strict=True):
            images = sampled(scratch / recipe / str(mark), arguments.quality_images)
            distance = frechet_distance(real, classifier.features(images))
            rows.append({"recipe": recipe, "updates": mark, "seconds": round(spent, 1), "frechet": round(distance, 2)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def sampled(folder: Path, count: int) -> Any:
    """Grey images [count, 1, 8, 8] in [-1, 1], in 25 steps of DPM-Solver++, from the noise of seed 0."""
    import torch
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

    from ddpm_pipeline import AlphaDDPMPipeline

    pipe = AlphaDDPMPipeline(UNet2DModel.from_pretrained(folder / "unet"), DDPMScheduler.from_pretrained(folder / "scheduler"))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"batch_size": 250, "num_inference_steps": 25, "generator": generator, "output_type": "pt"}
    images = torch.cat([pipe(**call).images for _ in range(count // 250)])
    return images.mean(1, keepdim=True) * 2 - 1


def shown(word: str) -> str:
    """A word of the command line, of a path that says where on a disk only its last part."""
    return Path(word).name if Path(word).is_absolute() else word


def table(report: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = []
    if rows := [*report.get("bare", []), *report.get("others", [])]:
        lines += [
            "Updates per second as a multiple of the other's, and start-up time and peak memory as a part of the other's:", "",
            "| beside | images | batch | precision | updates per second | goal | start-up | peak memory |", "|---" * 8 + "|",
        ]  # fmt: skip
    for entry in rows:
        goal = f"at least {entry['goal']:g}" if entry["goal"] else ""
        start, memory = (f"{entry[name]:.2f}" if name in entry else "" for name in ("start", "memory"))
        place = f"{entry['side']}x{entry['side']} | {entry['batch']} | {entry['precision']}"
        lines.append(f"| {entry['beside']} | {place} | {entry['throughput']:.2f} | {goal} | {start} | {memory} |")
    if "growth" in report:
        lines += [
            "", f"At 8x8, a batch of {CASES[8][1]}, {report['images']} images and 1000 timesteps, one thing made larger:", "",
            "| larger | by | time of an update | start-up | peak memory |", "|---" * 5 + "|",
        ]  # fmt: skip
    for entry in report.get("growth", []):
        ratios = " | ".join(f"x {entry[name]:.2f}" for name in ("update", "start", "peak"))
        lines.append(f"| {entry['what']} | x {entry['factor']} | {ratios} |")
    if "quality" in report:
        lines += [
            "", "Fréchet distance of the digits that each recipe samples, by seconds of CPU time of its training:", "",
            "| recipe | updates |" + " seconds: distance |" * len(MARKS), "|---" * (2 + len(MARKS)) + "|",
        ]  # fmt: skip
    for recipe, entries in itertools.groupby(report.get("quality", []), key=operator.itemgetter("recipe")):
        found = list(entries)
        cells = " | ".join(f"{entry['seconds']:.0f}: {entry['frechet']:.1f}" for entry in found)
        lines.append(f"| {recipe} | {found[-1]['updates']:,} | {cells} |")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [
        "", f"`{report['command']}`, {report['date']}, {report['processor']}, {report['threads']} threads, {versions}.",
    ]  # fmt: skip
    return "\n".join(lines).lstrip() + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (axis, qualities) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    rows = [*report.get("bare", []), *report.get("others", [])]
    names = list(dict.fromkeys((entry["beside"], entry["precision"]) for entry in rows))
    for number, (beside, precision) in enumerate(names):
        found = [entry for entry in rows if (entry["beside"], entry["precision"]) == (beside, precision)]
        places = [list(CASES).index(entry["side"]) + (number - len(names) / 2) * 0.15 for entry in found]
        axis.bar(places, [entry["throughput"] for entry in found], 0.14, label=f"{beside}, {precision}")
    axis.axhline(1, color="black", lw=0.8)
    axis.set(xticks=range(len(CASES)), xticklabels=[f"{side}x{side}" for side in CASES], ylabel="updates per second, ratio")
    for recipe, entries in itertools.groupby(report.get("quality", []), key=operator.itemgetter("recipe")):
        found = list(entries)
        qualities.plot(*([entry[of] for entry in found] for of in ("seconds", "frechet")), marker="o", label=recipe)
    qualities.set(xlabel="seconds of CPU time", ylabel="Fréchet distance", xscale="log", yscale="log")
    for each in (axis, qualities):
        each.legend(fontsize=7)
    figure.savefig(path, dpi=120)


PARTS = {"bare": beside_bare_loop, "others": beside_others, "growth": growth, "quality": quality}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stock", help="diffusers' train_unconditional.py")
    parser.add_argument("--python", help="interpreter of the environment that has the others")
    parser.add_argument("--sides", type=int, nargs="+", choices=list(CASES), default=list(CASES), help="of the images")
    parser.add_argument("--seconds", type=float, default=15, help="beside the bare loop, per size and precision")
    parser.add_argument("--rounds", type=int, default=2, help="turns of the processes, whose median ratios count")
    parser.add_argument("--updates", type=int, default=16, help="of each process")
    parser.add_argument("--images", type=int, default=1797, help="in the folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quality_seconds", type=float, default=120, help="of CPU time that each recipe trains for")
    parser.add_argument("--quality_images", type=int, default=1000, help="of each Fréchet distance, a multiple of 250")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--output", type=Path, help="without suffix; a .json, a .md and a .png are written")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        contend(json.loads(arguments.contender))
        return
    import torch

    from ddpm_pipeline.support.provenance import provenance

    torch.set_num_threads(arguments.threads)
    report = {
        "command": f"python benchmarks/training_throughput.py {' '.join(map(shown, sys.argv[1:]))}",
        **provenance(torch.device("cpu")),
        "images": arguments.images,
    }
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for side in sorted({8, *arguments.sides}):
            write_images(scratch / f"images-{side}", side, arguments.images)
        for part, measure in PARTS.items():
            if part in arguments.parts:
                report[part] = measure(arguments, scratch)
    print(table(report))
    if arguments.output:
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(report))
        plot(report, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
