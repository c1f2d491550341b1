"""Which choice trains best in a given time? Each variant of a run gets the same minutes, on the same number of threads.

    python benchmarks/ablations.py architecture --minutes 5 --output benchmarks/results/ablations_architecture

The updates that fit into the time are counted from a first short run of the same options, so that the learning rate falls to zero
within it. Each model is then evaluated as `evaluate` does. A row is written as soon as it is known, and a second run
continues from there. Several commands with one --output share the work.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from ddpm_pipeline.training import TrainingOptions, train

TRIAL, FIRST = 60, 20  # updates of the short run, and those of them that are not counted
COMMON = {
    "dataset": "cats", "dataset_config": "num_images=10000,seed=0", "resolution": 16, "beta_schedule": "squaredcos_cap_v2",
    "batch_size": 64, "learning_rate": 1e-3, "lr_warmup_steps": 100, "adam_beta2": 0.99, "weight_decay": 0.01,
    "ema_decay": 0.998, "mixed_precision": "bf16", "preview_every": 0, "checkpoint_every": 0, "num_samples": 64,
    "sample_inference_steps": 25,
}  # fmt: skip


def unet(*channels: int, layers: int = 1, attention: int | None = None, **config: Any) -> dict[str, Any]:
    """The config of a UNet2DModel with these channels by level, and attention at one of the levels and in the middle."""
    kinds = ["Attn" if level == attention else "" for level in range(len(channels))]
    return {
        "block_out_channels": channels,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": layers,
        "norm_num_groups": 8,
        "add_attention": attention is not None,
        **config,
    }


STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "architecture": {
        "32-64 (tiny)": {"model": unet(32, 64)},
        "32-64-128": {"model": unet(32, 64, 128)},
        "32-128-128": {"model": unet(32, 128, 128)},
        "32-128-256, attention": {"model": unet(32, 128, 256, attention=2)},
        "64-128": {"model": unet(64, 128)},
        "32-128": {"model": unet(32, 128)},
    },
    "recipe": {
        "as it is": {},
        "v": {"prediction_type": "v_prediction"},
        "v, Min-SNR": {"prediction_type": "v_prediction", "snr_gamma": 5.0},
        "Min-SNR": {"snr_gamma": 5.0},
        "x_0": {"prediction_type": "sample"},
        "sigmoid": {"beta_schedule": "sigmoid"},
        "linear": {"beta_schedule": "linear"},
        "learning rate 0.003": {"learning_rate": 3e-3},
        "batch of 32": {"batch_size": 32},
        "batch of 16": {"batch_size": 16},
        "EMA decay 0.995": {"ema_decay": 0.995},
        "beta2 0.999": {"adam_beta2": 0.999},
        "channels last": {"channels_last": True},
        "float32": {"mixed_precision": "no"},
    },
}


def updates_per_second(options: TrainingOptions, folder: Path) -> float:
    train(options.with_values(output_dir=str(folder), max_train_steps=TRIAL, log_every=FIRST, lr_warmup_steps=0, num_samples=1))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    per_second = [line["images_per_second"] for line in lines if line["step"] > FIRST]
    return sum(per_second) / len(per_second) / options.optimisation.batch_size


def run(name: str, variant: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    given = {**COMMON, **variant, **dict(word.split("=") for word in arguments.set)}
    if isinstance(given.get("model"), dict):
        config = folder.with_suffix(".json")
        config.write_text(json.dumps(given["model"]))
        given["model"] = str(config)
    options = TrainingOptions(**given, seed=arguments.seed, num_cpu_threads=arguments.threads)
    rate = updates_per_second(options, folder.with_name(f"{folder.name}-trial"))
    steps = int(arguments.minutes * 60 * rate)
    began = time.monotonic()
    train(options.with_values(output_dir=str(folder), max_train_steps=steps))
    return {"variant": name, "updates_per_second": rate, "updates": steps, "seconds": time.monotonic() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--only", nargs="*", help="variants; by default all")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], help="options of training for all, as name=value")
    parser.add_argument("--folder", type=Path, required=True, help="where the models go")
    arguments = parser.parse_args()
    for name, variant in STUDIES[arguments.study].items():
        if arguments.only and name not in arguments.only:
            continue
        folder = arguments.folder / f"{arguments.study}-{''.join(c if c.isalnum() else '-' for c in name)}"
        row = run(name, variant, arguments, folder)
        (folder / "ablation.json").write_text(json.dumps(row))
        print(row, flush=True)


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    main()
