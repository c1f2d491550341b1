"""Does a run that is killed and resumed end in the same bytes? Kills runs with SIGKILL at random moments and counts.

    python benchmarks/kill_and_resume.py --kills 100 --output benchmarks/results/kill_and_resume.json

For each kind of run there is one that nothing disturbs. Others are killed again and again, half of the time at a moment drawn
over the whole run, half of the time while a checkpoint is being written, and resumed with `--resume latest` until they end.
Weights, EMA weights, optimiser, pictures and logged losses must then be the same to the last bit. Runs are forked
from this process, which has imported everything, so that they take seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from ddpm_pipeline.support.provenance import provenance
from ddpm_pipeline.training import TrainingOptions, train

UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "layers_per_block": 1,
    "norm_num_groups": 4, "dropout": 0.1,
}  # fmt: skip
PLAIN = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False}
TEXT = {
    "_class_name": "UNet2DConditionModel", "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
COMMON = {
    "dataset": "digits", "split": "train[:100]", "resolution": 8, "num_train_timesteps": 20, "beta_end": 0.4,
    "batch_size": 16, "max_train_steps": 24,
    "learning_rate": 1e-3, "lr_warmup_steps": 3, "mixed_precision": "no", "checkpoint_every": 3,
    "preview_every": 8, "preview_images": 4, "preview_inference_steps": 5, "num_samples": 4, "fit_noises": 6, "log_every": 1,
    "num_cpu_threads": 1, "random_flip": True, "resume": "latest",
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "importance, workers": {
        "variance_type": "learned_range", "objective": "bound", "timestep_sampling": "importance",
        "dataloader_num_workers": 2,
    },
    "captions, workers": {"condition": "text", "dataloader_num_workers": 2, "word_dropout": 0.2},
    "stream, workers": {"streaming": True, "shuffle_buffer": 40, "channels": 1, "dataloader_num_workers": 2},
    "two processes": {"gradient_accumulation_steps": 2},
    "two processes, stream": {"streaming": True, "shuffle_buffer": 40, "channels": 1},
}  # fmt: skip
TWO_PROCESSES = frozenset(("two processes", "two processes, stream"))
LONGEST_RUN = 300  # seconds until a run counts as hanging


class Processes:
    """The forked processes of a run. They end with 0, or with 1 and a traceback in the log."""

    def __init__(self, children: list[int]):
        self.children = children
        self._statuses: dict[int, int] = {}

    def wait(self, seconds: float) -> list[int | None]:
        """Exit statuses, negative for signals; None for what still runs after so many seconds."""
        until = time.monotonic() + seconds
        while True:
            for child in set(self.children) - set(self._statuses):
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    self._statuses[child] = os.waitstatus_to_exitcode(status)
            if len(self._statuses) == len(self.children) or time.monotonic() >= until:
                return [self._statuses.get(child) for child in self.children]
            time.sleep(0.001)

    def finish(self, folder: Path) -> None:
        """Raises RuntimeError unless they all end well."""
        statuses = self.wait(LONGEST_RUN)
        if any(status != 0 for status in statuses):
            raise RuntimeError(f"a run ended with {statuses}; its output:\n{folder.with_suffix('.log').read_text()[-3000:]}")

    def kill(self, rng: random.Random) -> None:
        """One after another, in any order."""
        for child in rng.sample(self.children, len(self.children)):
            if self._statuses.get(child) is None:
                os.kill(child, signal.SIGKILL)
                self.wait(rng.choice([0.0, 0.1]))
        self.wait(LONGEST_RUN)


def start(config: TrainingOptions, processes: int, log: Path) -> Processes:
    """A run in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(ACCELERATE_USE_CPU="true")
            if processes > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
            train(config)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return Processes(children)


def writes_a_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".step-*"))


def kill(run: Processes, folder: Path, rng: random.Random, usual: float) -> str | None:
    """Kill a run at a random moment; when that was. None where it had ended before."""
    in_write, began, delay = rng.random() < 0.5, time.monotonic(), rng.uniform(0, usual)
    while time.monotonic() - began < delay or (in_write and not writes_a_checkpoint(folder)):
        if None not in run.wait(0.001):
            run.finish(folder)
            return None
    if in_write:
        run.wait(rng.uniform(0, 0.03))
    writing = writes_a_checkpoint(folder)
    run.kill(rng)
    return "while a checkpoint was written" if writing else "between checkpoints"


def result(folder: Path) -> dict[str, str]:
    """Hashes of everything that must not depend on how a run came about."""
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    files = [
        last / "model.safetensors", last / "ema.safetensors", last / "optimizer.bin", last / "parts.pt",
        folder / "unet/diffusion_pytorch_model.safetensors", folder / "samples.png", folder / "process.png",
        *(folder / "samples").glob("*.png"), *(folder / "text_encoder").glob("*.safetensors"),
    ]  # fmt: skip
    hashes = {str(file.relative_to(folder)): hashlib.blake2b(file.read_bytes()).hexdigest() for file in files}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        hashes[f"metrics {metrics['step']}"] = str([metrics[name] for name in ("loss", "grad_norm", "learning_rate")])
    return hashes


def make_config(kind: str, folder: Path, scratch: Path) -> TrainingOptions:
    options = COMMON | KINDS[kind]
    unet = UNET | (TEXT | {"cross_attention_dim": 64} if options.get("condition") == "text" else PLAIN)
    if options.get("variance_type") == "learned_range":
        unet = unet | {"out_channels": 2}
    path = scratch / f"{hashlib.blake2b(json.dumps(unet).encode(), digest_size=4).hexdigest()}.json"
    path.write_text(json.dumps(unet))
    return TrainingOptions(**{**options, "model": str(path), "output_dir": str(folder), "cache_dir": str(scratch / "cache")})


def run(kills: int, kinds: list[str], seed: int, kills_a_run: int, scratch: Path) -> dict[str, Any]:
    rng = random.Random(seed)
    report: dict[str, Any] = {"runs": 0, "runs_that_match": 0, "kills": 0, "kills_by_moment": {}, "by_kind": {}}
    references, usual = {}, {}
    while report["kills"] < kills:
        kind = kinds[report["runs"] % len(kinds)]
        processes = 2 if kind in TWO_PROCESSES else 1
        if kind not in references:
            folder = scratch / f"reference-{len(references)}"
            began = time.monotonic()
            start(make_config(kind, folder, scratch), processes, folder.with_suffix(".log")).finish(folder)
            references[kind], usual[kind] = result(folder), time.monotonic() - began
        folder = scratch / f"run-{report['runs']}"
        config, log = make_config(kind, folder, scratch), folder.with_suffix(".log")
        for _ in range(kills_a_run):
            moment = kill(start(config, processes, log), folder, rng, usual[kind])
            if moment is not None:
                report["kills"] += 1
                report["kills_by_moment"][moment] = report["kills_by_moment"].get(moment, 0) + 1
        start(config, processes, log).finish(folder)
        found = result(folder)
        different = sorted(name for name in found | references[kind] if found.get(name) != references[kind].get(name))
        report["runs"] += 1
        report["runs_that_match"] += not different
        counts = report["by_kind"].setdefault(kind, {"runs": 0, "match": 0})
        counts["runs"] += 1
        counts["match"] += not different
        if different:
            report.setdefault("differences", []).append({"run": report["runs"], "kind": kind, "files": different})
            print(f"run {report['runs']} ({kind}) differs in {different}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
        print(f"{report['kills']} kills, {report['runs_that_match']} of {report['runs']} runs match", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="at least so many SIGKILLs")
    parser.add_argument("--kills_a_run", type=int, default=3, help="at most, before a run may end")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        report = run(arguments.kills, arguments.kinds, arguments.seed, arguments.kills_a_run, Path(scratch))
    report = {
        "command": f"python benchmarks/kill_and_resume.py {' '.join(sys.argv[1:])}",
        **provenance(torch.device("cpu")),
        **report,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(0 if report["runs_that_match"] == report["runs"] else 1)


if __name__ == "__main__":
    main()
