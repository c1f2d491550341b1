"""Which choice trains best? Variants of a run on cats, each given the same updates or the same minutes.

    python benchmarks/ablations.py recipe runs --updates 700 --output benchmarks/results/ablations_recipe
    python benchmarks/ablations.py architecture runs --minutes 5 --output benchmarks/results/ablations_architecture

The updates that fit into the minutes are counted in a first short run of the same options, so that the learning rate falls to
zero within them. Each model is then evaluated with a few calls. A model that is finished in the folder is kept, so a second run
continues, and several commands can share the variants.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ddpm_pipeline.evaluation import EvaluationOptions, evaluate
from ddpm_pipeline.support.provenance import provenance
from ddpm_pipeline.training import TrainingOptions, train

ROW = "ablation.json"
TRIAL, FIRST = 60, 20  # updates of the short run, and those of them that are not counted
COMMON = {
    "dataset": "cats", "dataset_config": "num_images=10000,seed=0", "resolution": 16, "beta_schedule": "squaredcos_cap_v2",
    "model": "tiny", "batch_size": 64, "learning_rate": 1e-3, "lr_warmup_steps": 100, "adam_beta2": 0.99, "weight_decay": 0.01,
    "ema_decay": 0.998, "mixed_precision": "bf16", "preview_every": 0, "checkpoint_every": 0, "num_samples": 64,
    "sample_inference_steps": 25, "fit_noises": 0,
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
        "32-64-128, attention": {"model": unet(32, 64, 128, attention=2)},
        "32-64-128, attention, scale and shift (small)": {
            "model": unet(32, 64, 128, attention=2, resnet_time_scale_shift="scale_shift")
        },
        "32-128-128": {"model": unet(32, 128, 128)},
        "32-128-256, attention": {"model": unet(32, 128, 256, attention=2)},
        "64-128": {"model": unet(64, 128)},
        "32-128": {"model": unet(32, 128)},
    },
    "recipe": {
        "noise prediction": {},
        "noise, Min-SNR": {"snr_gamma": 5.0},
        "v-prediction": {"prediction_type": "v_prediction"},
        "v, Min-SNR": {"prediction_type": "v_prediction", "snr_gamma": 5.0},
        "x_0 prediction": {"prediction_type": "sample"},
        "v, Min-SNR, linear schedule": {"prediction_type": "v_prediction", "snr_gamma": 5.0, "beta_schedule": "linear"},
        "v, Min-SNR, learning rate 0.002": {"prediction_type": "v_prediction", "snr_gamma": 5.0, "learning_rate": 2e-3},
    },
}


def updates_per_second(options: TrainingOptions, folder: Path) -> float:
    train(options.with_values(output_dir=str(folder), max_train_steps=TRIAL, log_every=FIRST, lr_warmup_steps=0, num_samples=1))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    per_second = [line["images_per_second"] for line in lines if line["step"] > FIRST]
    return sum(per_second) / len(per_second) / options.optimisation.batch_size


def one_variant(name: str, changed: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate, or read what an earlier command found."""
    folder = arguments.folder / f"{arguments.study}-{''.join(c if c.isalnum() else '-' for c in name)}"
    if (folder / ROW).is_file():
        return json.loads((folder / ROW).read_text())
    given = {**COMMON, **changed, "seed": arguments.seed, "num_cpu_threads": arguments.threads}
    if isinstance(given.get("model"), dict):
        config = folder.with_suffix(".json")
        config.write_text(json.dumps(given["model"]))
        given["model"] = str(config)
    options, updates = TrainingOptions(**given), arguments.updates
    if updates is None:
        rate = updates_per_second(options, folder.with_name(f"{folder.name}-trial"))
        updates = int(arguments.minutes * 60 * rate)
    began = time.monotonic()
    train(options.with_values(output_dir=str(folder), max_train_steps=updates, overwrite=True))
    seconds = time.monotonic() - began
    found = evaluate(
        EvaluationOptions(
            model=str(folder), dataset="cats", dataset_config=COMMON["dataset_config"], num_likelihood_images=0,
            num_images=arguments.num_images, scheduler="dpm-solver++", num_inference_steps=COMMON["sample_inference_steps"],
            num_cpu_threads=arguments.threads,
        )
    )  # fmt: skip
    figures = {"distance": found["cats"]["distance"], "valid": found["cats"]["valid"], "fid": found["quality"]["fid"]}
    row = {"variant": name, "updates": updates, "seconds": round(seconds, 1), **figures}
    (folder / ROW).write_text(json.dumps(row))
    return row


def table(report: dict[str, Any]) -> str:
    lines = ["| variant | updates | distance to the nearest cat | FID | valid |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        figures = f"{row['distance']:.4f} | {row['fid']:.1f} | {100 * row['valid']:.1f} %"
        lines.append(f"| {row['variant']} | {row['updates']:,} | {figures} |")
    steps = COMMON["sample_inference_steps"]
    words = f"Of {report['num_images']:,} samples by DPM-Solver++ in {steps} steps, seed {report['seed']}."
    lines += ["", f"{words} `{report['command']}`, {report['date']}, {report['processor']}, {report['threads']} threads."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("folder", type=Path, help="where the models go")
    parser.add_argument("--only", nargs="+", help="variants; by default all")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--updates", type=int, help="of each variant")
    budget.add_argument("--minutes", type=float, help="of each variant")
    parser.add_argument("--num_images", type=int, default=500, help="samples of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="without suffix; a .json and a .md are written")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    study = {name: STUDIES[arguments.study][name] for name in arguments.only or STUDIES[arguments.study]}
    given = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    report = {"command": f"python benchmarks/ablations.py {shlex.join(given)}", **provenance(torch.device("cpu"))}
    report |= {name: getattr(arguments, name) for name in ("study", "updates", "minutes", "num_images", "threads", "seed")}
    report["rows"] = [one_variant(name, changed, arguments) for name, changed in study.items()]
    print(table(report))
    if arguments.output:
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
