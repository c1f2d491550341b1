"""Training beside others, in ratios: a bare loop, diffusers' train_unconditional.py, denoising-diffusion-pytorch; how it grows.

    python benchmarks/training_throughput.py --stock train_unconditional.py --python others/bin/python

The bare loop repeats forward pass, backward pass and optimizer step of the same UNet on one batch in memory, without clipping,
EMA, data or log; it takes turns with a run in one process. The others train the same UNet on the same folder of images, each in
a process of its own, in turn; `--python` is of an environment that has them (diffusers, datasets, tensorboard, torchvision,
denoising-diffusion-pytorch), `--stock` the script from diffusers' examples/unconditional_image_generation. All compute in
float32 on the same number of threads, and denoising-diffusion-pytorch reads images in a further process for each core.
"""

from __future__ import annotations  # this file is also run by --python, which has neither the package nor matplotlib

import argparse
import json
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


# ---- in processes of their own: each trains and calls `note` after every update, until that raises Enough ---------------


def train_own(spec: dict[str, Any], note: Callable[[], None]) -> None:
    from ddpm_pipeline.training import TrainingOptions, loop, train

    whole = loop.update

    def update(*arguments: Any) -> Any:
        result = whole(*arguments)
        note()
        return result

    loop.update = update
    train(TrainingOptions(**spec["options"]))


def train_stock(spec: dict[str, Any], note: Callable[[], None]) -> None:
    from accelerate import Accelerator

    options, whole = spec["options"], Accelerator.log

    def log(*arguments: Any, **more: Any) -> None:
        whole(*arguments, **more)
        note()

    Accelerator.log = log  # it is called after every update
    flags = {
        "train_data_dir": options["dataset"], "model_config_name_or_path": spec["unet"], "resolution": options["resolution"],
        "train_batch_size": options["batch_size"], "num_epochs": 1, "output_dir": options["output_dir"],
        "cache_dir": options["cache_dir"],
    }  # fmt: skip
    sys.argv = [spec["stock"], "--use_ema", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    runpy.run_path(spec["stock"], run_name="__main__")


def train_lucidrains(spec: dict[str, Any], note: Callable[[], None]) -> None:
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer
    from diffusers import UNet2DModel
    from torch import nn

    class Denoiser(nn.Module):
        channels = out_dim = 3
        self_condition = False

        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DModel.from_config(UNet2DModel.load_config(spec["unet"]))

        def forward(self, images: Any, timesteps: Any, _: Any = None) -> Any:
            return self.unet(images, timesteps).sample

    options = spec["options"]
    diffusion = GaussianDiffusion(Denoiser(), image_size=options["resolution"])
    batch, never = options["batch_size"], 10**9
    how = {"train_batch_size": batch, "save_and_sample_every": never, "calculate_fid": False}
    trainer = Trainer(diffusion, options["dataset"], results_folder=options["output_dir"], **how)
    whole = trainer.ema.update

    def update() -> None:
        whole()
        note()

    trainer.ema.update = update
    trainer.train()


CONTENDERS = {"own": train_own, TUNED: train_own, STOCK: train_stock, LUCIDRAINS: train_lucidrains}


def contend(spec: dict[str, Any]) -> None:
    """What a process of its own does: prints the seconds of an update and until the first one was done, and the peak memory."""
    import torch

    torch.set_num_threads(spec["threads"])
    times: list[float] = []

    def note() -> None:
        times.append(time.time())
        if len(times) == spec["updates"]:
            raise Enough

    try:
        CONTENDERS[spec["name"]](spec, note)
    except Enough:
        counted = list(zip(times[UNCOUNTED:], times[UNCOUNTED + 1 :], strict=False))
        update = statistics.median(after - before for before, after in counted)
        status = Path("/proc/self/status").read_text()  # ru_maxrss begins with the peak of the parent
        peak = int(re.search(r"VmHWM:\s*(\d+)", status)[1])
        print("\n" + json.dumps({"update": update, "start": times[0] - spec["began"], "peak": peak}), flush=True)
    else:
        raise RuntimeError(f"{spec['name']} ended after {len(times)} of {spec['updates']} updates")


def measured(name: str, spec: dict[str, Any], python: str, scratch: Path) -> dict[str, float]:
    spec = {**spec, "name": name, "began": time.time()}
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


def beside_others(side: int, arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
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
    common = {"unet": unet, "stock": arguments.stock, "threads": arguments.threads, "updates": arguments.updates}
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


def shown(word: str) -> str:
    """A word of the command line, of a path that says where on a disk only its last part."""
    return Path(word).name if Path(word).is_absolute() else word


def table(report: dict[str, Any]) -> str:
    """The ratios as Markdown."""
    lines = [
        "Updates per second as a multiple of the other's, and start-up time and peak memory as a part of the other's:", "",
        "| beside | images | batch | precision | updates per second | goal | start-up | peak memory |", "|---" * 8 + "|",
    ]  # fmt: skip
    for entry in report["rows"]:
        goal = f"at least {entry['goal']:g}" if entry["goal"] else ""
        start, memory = (f"{entry[name]:.2f}" if name in entry else "" for name in ("start", "memory"))
        place = f"{entry['side']}x{entry['side']} | {entry['batch']} | {entry['precision']}"
        lines.append(f"| {entry['beside']} | {place} | {entry['throughput']:.2f} | {goal} | {start} | {memory} |")
    lines += [
        "", f"At 8x8, a batch of {CASES[8][1]}, {report['images']} images and 1000 timesteps, one thing made larger:", "",
        "| larger | by | time of an update | start-up | peak memory |", "|---" * 5 + "|",
    ]  # fmt: skip
    for entry in report["growth"]:
        ratios = " | ".join(f"x {entry[name]:.2f}" for name in ("update", "start", "peak"))
        lines.append(f"| {entry['what']} | x {entry['factor']} | {ratios} |")
    lines += [
        "",
        f"`{report['command']}`, {report['date']}, {report['processor']}, {report['threads']} threads, "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    names = list(dict.fromkeys((entry["beside"], entry["precision"]) for entry in report["rows"]))
    for number, (beside, precision) in enumerate(names):
        found = [entry for entry in report["rows"] if (entry["beside"], entry["precision"]) == (beside, precision)]
        places = [list(CASES).index(entry["side"]) + (number - len(names) / 2) * 0.15 for entry in found]
        axis.bar(places, [entry["throughput"] for entry in found], 0.14, label=f"{beside}, {precision}")
    axis.axhline(1, color="black", lw=0.8)
    axis.set(xticks=range(len(CASES)), xticklabels=[f"{side}x{side}" for side in CASES], ylabel="updates per second, ratio")
    figure.legend(fontsize=7, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)


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
    parser.add_argument("--output", type=Path, help="without suffix; a .json, a .md and a .png are written")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        contend(json.loads(arguments.contender))
        return
    import torch

    from ddpm_pipeline.support.provenance import provenance

    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for side in arguments.sides:
            write_images(scratch / f"images-{side}", side, arguments.images)
            for precision in ("no", "bf16"):
                ratio = beside_bare(side, precision, arguments.seconds, arguments.threads, scratch)
                rows.append(row(BARE, side, "float32" if precision == "no" else precision, ratio))
        for side in arguments.sides:
            rows += beside_others(side, arguments, scratch)
        larger = growth(arguments, scratch)
    report = {
        "command": f"python benchmarks/training_throughput.py {' '.join(map(shown, sys.argv[1:]))}",
        **provenance(torch.device("cpu")),
        "images": arguments.images,
        "rows": rows,
        "growth": larger,
    }
    print(table(report))
    if arguments.output:
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(report))
        plot(report, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
