"""`AlphaDDPMScheduler` beside diffusers' `DDPMScheduler`: `step` and `add_noise`, in one process, in turn.

    python benchmarks/scheduler_speed.py [--seconds 2] [--threads 1] [--output benchmarks/results]

Each case is timed in rounds of one burst of calls per scheduler, in alternating order, so that whatever else the machine
does falls on both alike. The reported times are medians over the rounds, and the ratio is the median of the rounds'
ratios. Required: `step` at least twice as fast at [1, 3, 32, 32], and neither method slower at any size, where "no slower"
allows for `TOLERANCE` of noise.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMScheduler

import ddpm_pipeline
from ddpm_pipeline.scheduling_alpha_ddpm import AlphaDDPMScheduler

STEP_SHAPES = ((1, 1, 2, 2), (1, 3, 32, 32), (16, 3, 64, 64))
ADD_NOISE_SHAPES = (
    (1, 3, 32, 32),
    (16, 3, 32, 32),
    (128, 3, 32, 32),
    (16, 3, 64, 64),
    (64, 3, 64, 64),
    (16, 3, 256, 256),
    (64, 3, 256, 256),
)
REQUIRED = {("step", (1, 3, 32, 32)): 2.0}  # times as fast; all else no slower
TOLERANCE = 0.97  # of a ratio of 1
BURST_SECONDS = 0.001  # shorter than the slices in which a busy machine shares a core
MIN_ROUNDS = 25


def step_call(cls: type, variance_type: str, shape: tuple[int, ...]) -> Callable[[], object]:
    """One reverse step in the middle of the full chain, as sampling does it: after `set_timesteps`, with a host timestep."""
    scheduler = cls(variance_type=variance_type)
    scheduler.set_timesteps(1000)
    batch, channels, height, width = shape
    output_channels = channels * (2 if variance_type == "learned_range" else 1)
    output = torch.randn(batch, output_channels, height, width, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    return lambda: scheduler.step(output, 500, sample, generator=generator)


def add_noise_call(cls: type, shape: tuple[int, ...]) -> Callable[[], object]:
    """As training does it: one timestep per image, a [B] tensor."""
    scheduler = cls()
    x_0 = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    timesteps = torch.randint(0, 1000, shape[:1], generator=torch.Generator().manual_seed(2))
    return lambda: scheduler.add_noise(x_0, noise, timesteps)


def burst(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def compare(ours: Callable[[], object], stock: Callable[[], object], seconds: float) -> dict[str, float]:
    """Microseconds per call of each and how many times as fast ours is."""
    calls = {"ours": ours, "stock": stock}
    repeats = {}
    for name, call in calls.items():
        burst(call, 3)  # first uses allocate
        repeats[name] = max(1, int(BURST_SECONDS / min(burst(call, 3) for _ in range(3))))
    times: dict[str, list[float]] = {"ours": [], "stock": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < MIN_ROUNDS:
        order = ("ours", "stock") if len(times["ours"]) % 2 else ("stock", "ours")
        for name in order:
            times[name].append(burst(calls[name], repeats[name]))
    ratio = statistics.median(b / a for a, b in zip(times["ours"], times["stock"], strict=True))
    medians = {f"{name}_us": statistics.median(values) * 1e6 for name, values in times.items()}
    return {**medians, "times_as_fast": ratio, "rounds": len(times["ours"])}


def measure(seconds: float) -> list[dict]:
    results = []
    cases = [("step", variance, shape) for variance in ("fixed_small", "learned_range") for shape in STEP_SHAPES]
    cases += [("add_noise", "", shape) for shape in ADD_NOISE_SHAPES]
    for method, variance_type, shape in cases:
        arguments = (variance_type, shape) if method == "step" else (shape,)
        maker = step_call if method == "step" else add_noise_call
        result = compare(maker(AlphaDDPMScheduler, *arguments), maker(DDPMScheduler, *arguments), seconds)
        required = REQUIRED.get((method, shape), TOLERANCE)
        case = {"method": method, "variance_type": variance_type, "shape": shape}
        results.append({**case, **result, "required": required, "met": result["times_as_fast"] >= required})
        print(table_row(results[-1]), flush=True)
    return results


HEADER = "| call | shape | ours, µs | stock, µs | times as fast | required |\n|---|---|---:|---:|---:|---|"


def table_row(result: dict) -> str:
    call = f"`{result['method']}`" + (f" {result['variance_type']}" if result["variance_type"] else "")
    required = "no slower" if result["required"] == TOLERANCE else f"at least {result['required']:g}"
    verdict = ", met" if result["met"] else ", **missed**"
    return (
        f"| {call} | {list(result['shape'])} | {result['ours_us']:.1f} | {result['stock_us']:.1f} "
        f"| {result['times_as_fast']:.2f} | {required}{verdict} |"
    )


def processor() -> str:
    """The processor's model, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(arguments: list[str]) -> dict[str, object]:
    return {
        "command": " ".join(["python benchmarks/scheduler_speed.py", *arguments]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "ddpm-pipeline": getattr(ddpm_pipeline, "__version__", None),
        "commit": commit(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time per case")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch computes with")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the records")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", category=DeprecationWarning)

    about = environment(sys.argv[1:])
    print(HEADER)
    results = measure(arguments.seconds)
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {"environment": about, "results": results}
    (arguments.output / "scheduler_speed.json").write_text(json.dumps(record, indent=2) + "\n")
    facts = "\n".join(f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in about.items())
    rows = "\n".join(table_row(result) for result in results)
    text = f"# The scheduler's speed beside diffusers' `DDPMScheduler`\n\n{facts}\n\n{HEADER}\n{rows}\n"
    (arguments.output / "scheduler_speed.md").write_text(text)
    print(f"\n{facts}")
    return 0 if all(result["met"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
