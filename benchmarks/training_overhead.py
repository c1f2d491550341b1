"""What a run's safety and its measurements cost: checkpoints, times, memory, the check for finite numbers.

    python benchmarks/training_overhead.py --output benchmarks/results/training_overhead.json

Checkpoints: the seconds that training waits for one, and those that making it safe takes in the background, as a share of the
time of as many updates as lie between two by default. Measurements: updates with and without them in turn, in one run.
Imports training/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "training"))
import torch

from eval_parts import provenance
from train import Run
from train_config import TrainingConfig, parse_config
from train_stop import in_any_process

INTERVAL = TrainingConfig.checkpoint_every  # updates between checkpoints by default


class NoTimer:
    """A timer that measures nothing."""

    @contextlib.contextmanager
    def __call__(self, part: str, on_device: bool = True) -> Iterator[None]:
        yield

    def take(self) -> dict[str, float]:
        return {}


def seconds(function: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def measure_updates(run: Run, updates: int, block: int) -> dict[str, float]:
    """Median seconds of an update with measurements and without, in alternating blocks; the log's line counts as a share
    of the updates that it stands for.
    """
    timers = {"measured": run.timer, "bare": NoTimer()}
    taken: dict[str, list[float]] = {name: [] for name in timers}
    lines = []
    run.model.train()
    for done in range(updates):
        name = ("measured", "bare")[done // block % 2]
        run.timer = timers[name]
        taken[name].append(seconds(run.update, done))
        if name == "measured" and (done + 1) % block == 0:
            lines.append(seconds(run.report, done + 1))
        elif (done + 1) % block == 0:
            run.losses = []
    run.timer = timers["measured"]
    medians = {f"{name}_update_seconds": statistics.median(values) for name, values in taken.items()}
    line = statistics.median(lines)
    measured = medians["measured_update_seconds"] + line / run.config.log_every
    return medians | {"log_line_seconds": line, "measurements_cost": measured / medians["bare_update_seconds"] - 1}


def measure_checks(run: Run, repeats: int = 200) -> dict[str, float]:
    """Seconds of the check for finite numbers in an update, beside the norm that is computed anyway."""
    losses, norm = torch.rand(run.config.batch_size), torch.rand(())

    def check() -> None:
        torch.stack([losses.isfinite().all(), norm.isfinite()]).tolist()
        in_any_process(run.accelerator, False, False)

    return {"finite_check_seconds": statistics.median(seconds(check) for _ in range(repeats))}


def measure_checkpoints(run: Run, repeats: int) -> dict[str, float]:
    waited, background = [], []
    for number in range(repeats):
        waited.append(seconds(run.save_checkpoint, number + 1))
        background.append(seconds(run.checkpoints.wait))
    folder = run.folder / "checkpoints"
    size = sum(path.stat().st_size for path in next(folder.glob("step-*")).iterdir())
    return {
        "checkpoint_mb": size / 1e6,
        "checkpoint_waited_seconds": statistics.median(waited),
        "checkpoint_background_seconds": statistics.median(background),
    }


def measure(config: TrainingConfig, updates: int, repeats: int) -> dict[str, Any]:
    run = Run(config)
    result: dict[str, Any] = {
        "parameters": run.parameters, "resolution": run.config.resolution, "batch_size": config.batch_size,
        **measure_updates(run, updates, block=min(25, updates // 4)), **measure_checks(run),
        **measure_checkpoints(run, repeats),
    }  # fmt: skip
    run.loader.close()
    update = result["bare_update_seconds"]
    result["finite_check_cost"] = result["finite_check_seconds"] / update
    result["checkpoint_cost"] = result["checkpoint_waited_seconds"] / (INTERVAL * update)
    busy = result["checkpoint_waited_seconds"] + result["checkpoint_background_seconds"]
    result["checkpoint_cost_if_the_background_were_not_free"] = busy / (INTERVAL * update)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=400, help="of the digits recipe, half of them measured")
    parser.add_argument("--repeats", type=int, default=5, help="checkpoints")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = parse_config([])
        digits = replace(
            recipe, output_dir=f"{scratch}/digits", cache_dir=f"{scratch}/cache", max_train_steps=arguments.updates
        )
        measured = {"digits recipe": measure(digits, arguments.updates, arguments.repeats)}
    report = {
        "command": f"python benchmarks/training_overhead.py {' '.join(sys.argv[1:])}",
        **provenance(torch.device("cpu")),
        "interval": INTERVAL,
        "results": measured,
    }
    print(json.dumps(report, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
