"""How large a run gets: memory, checkpoint, data rate and throughput of models for 32, 64 and 256 pixels on 1 to 64 devices.

    python benchmarks/scale.py --output benchmarks/results/scale

Measures one device, the one that it runs on, and calculates the rest from that; docs/scale.md says how.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_pipeline.support.provenance import provenance
from ddpm_pipeline.training.models import PRESETS

MODELS = {"CIFAR-10, 32x32": ("32", 32), "64x64": ("64", 64), "256x256": ("256", 256)}
DEVICES = (1, 8, 64)
BATCH_PER_DEVICE = {"32": 128, "64": 32, "256": 4}
BATCH_ON_CPU = {"32": 16, "64": 4, "256": 1}  # of the measured update
STATE_BYTES = {"weights": 4, "gradients": 4, "Adam's two averages": 8, "EMA weights": 4}  # per parameter, float32
CHECKPOINT_BYTES = 16  # per parameter: all of these but the gradients


def build(preset: str, side: int, device: str) -> UNet2DModel:
    with torch.device(device):
        return UNet2DModel(sample_size=side, in_channels=3, out_channels=3, **PRESETS[preset][1])


def activation_bytes(network: UNet2DModel, side: int) -> int:
    """What one image's forward pass keeps for the backward pass, in the precision that it ran in; weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.randn(1, 3, side, side, device=network.device), torch.zeros(1, device=network.device)).sample.sum()
    return sum(kept.values())


def update_seconds(network: UNet2DModel, side: int, batch: int, repeats: int) -> float:
    """The fastest of some forward and backward passes and Adam steps."""
    device = network.device
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    images, times = torch.randn(batch, 3, side, side, device=device), []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        network(images, torch.zeros(batch, device=device)).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])  # the first one makes Adam's state


def measure(preset: str, side: int, device: str, batch: int | None, repeats: int) -> dict[str, Any]:
    network = build(preset, side, "meta")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, side, side, device="meta"), torch.zeros(1, device="meta")).sample.sum().backward()
    network = build(preset, side, device)
    batch = batch or (BATCH_PER_DEVICE if device == "cuda" else BATCH_ON_CPU)[preset]
    seconds = update_seconds(network, side, batch, repeats)
    return {
        "parameters": parameters,
        "flops_an_image": counter.get_total_flops(),
        "activation_bytes_an_image": activation_bytes(network, side),
        "batch": batch,
        "update_seconds": seconds,
        "images_per_second": batch / seconds,
        "pixel_bytes_an_image": 3 * side * side,
        "batch_per_device": BATCH_PER_DEVICE[preset],
    }


def on(devices: int, measured: dict[str, Any], bandwidth: float) -> dict[str, float]:
    """The calculation of docs/scale.md: so many devices like the measured one, joined by `bandwidth` bytes per second."""
    batch = measured["batch_per_device"]
    compute = batch / measured["images_per_second"]
    reduce = 2 * (devices - 1) / devices * 4 * measured["parameters"] / bandwidth  # ring all-reduce of float32 gradients
    images = devices * batch / (compute + reduce)
    return {
        "devices": devices,
        "images_per_second_overlapped": devices * batch / max(compute, reduce),
        "images_per_second_not_overlapped": images,
        "data_bytes_per_second": images * measured["pixel_bytes_an_image"],
        "checkpoint_bytes": CHECKPOINT_BYTES * measured["parameters"],
        "memory_bytes": sum(STATE_BYTES.values()) * measured["parameters"] + batch * measured["activation_bytes_an_image"],
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        "| model | parameters | GFLOP per image | activations per image | checkpoint | memory per device (its batch) "
        "| devices | images/s | data read |",
        "|---" * 9 + "|",
    ]
    for name, entry in report["models"].items():
        measured = entry["measured"]
        for row in entry["scaled"]:
            low, high = row["images_per_second_not_overlapped"], row["images_per_second_overlapped"]
            lines.append(
                f"| {name} | {measured['parameters'] / 1e6:.1f} M | {measured['flops_an_image'] / 1e9:.0f} | "
                f"{measured['activation_bytes_an_image'] / 2**20:.0f} MiB | {row['checkpoint_bytes'] / 1e9:.2f} GB | "
                f"{row['memory_bytes'] / 2**30:.1f} GiB ({measured['batch_per_device']}) | {row['devices']} | "
                f"{low:.3g} to {high:.3g} | {row['data_bytes_per_second'] / 1e6:.2g} MB/s |"
            )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [
        "",
        f"`{report['command']}`, {report['date']}, {report['processor']}, {report['threads']} threads, {versions}; "
        f"devices joined at {report['bandwidth'] / 1e9:g} GB/s (assumed).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--batch", type=int, help="images of the measured update")
    parser.add_argument("--repeats", type=int, default=3, help="measured updates, of which the fastest counts")
    parser.add_argument("--bandwidth", type=float, default=10e9, help="bytes per second between devices; an assumption")
    parser.add_argument("--output", type=Path, help="without suffix; a .json and a .md are written")
    arguments = parser.parse_args()
    models = {}
    for name, (preset, side) in MODELS.items():
        measured = measure(preset, side, arguments.device, arguments.batch, arguments.repeats)
        models[name] = {"measured": measured, "scaled": [on(count, measured, arguments.bandwidth) for count in DEVICES]}
    report = {
        "command": f"python benchmarks/scale.py {' '.join(sys.argv[1:])}",
        **provenance(torch.device(arguments.device)),
        "bandwidth": arguments.bandwidth,
        "models": models,
    }
    print(table(report))
    if arguments.output:
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
