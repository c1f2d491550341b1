"""evaluate.py and generate.py by one process and by two; the two are started as people start them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.evaluation import run
from ddpm_pipeline.generation import run
from ddpm_pipeline.generation.drawing import sample_uint8
from ddpm_pipeline.generation.pipelines import load_pipeline, use_scheduler
from ddpm_pipeline.hub import build_card, export
from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.training import loop
from ddpm_pipeline.training.options import TrainingOptions, parse_options
from helpers import run_command, tiny_unet

QUICK = ["--num_cpu_threads", "1"]


def launch(script: str, *arguments: str, processes: int = 1):
    """By torch's launcher where there are several: accelerate's starts a single process on the CPU, whatever it is told."""
    several = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    return run_command(sys.executable, *several, f"training/{script}.py", *arguments, *QUICK, ACCELERATE_USE_CPU="true")


def run_evaluate(*arguments: str, processes: int = 1) -> None:
    """In this process where one is enough: starting another takes longer than what it does."""
    if processes == 1:
        run.evaluate(run.parse([*arguments, *QUICK]))
    else:
        done = launch("evaluate", *arguments, processes=processes)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "digits-model"
    scheduler = AlphaDDPMScheduler(num_train_timesteps=12, beta_start=0.02, beta_end=0.6)
    pipe = AlphaDDPMPipeline(tiny_unet(), scheduler)
    export(pipe, folder)
    card = build_card(pipe, name="digits-model", dataset="digits", num_images=9, training={"updates": 0})
    (folder / "README.md").write_text(str(card))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def test_one_and_two_processes_find_the_same(model, cache, tmp_path):
    results = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.json"
        run_evaluate(
            "--model", str(model), "--dataset", "digits", "--split", "train[:40]", "--two_term",
            "--num_likelihood_images", "11", "--num_images", "14", "--batch_size", "4", "--cache_dir", cache,
            "--output", str(output), processes=processes,
        )  # fmt: skip
        results.append(json.loads(output.read_text()))
    assert [result.pop("processes") for result in results] == [1, 2]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    bits, quality = results[0]["bits_per_dim"], results[0]["quality"]
    assert bits["total"] == pytest.approx(bits["prior"] + bits["diffusion"] + bits["decoder"], rel=1e-12)
    assert (bits["num_images"], bits["steps"], bits["network_calls"]) == (11, 12, 12)
    assert (quality["num_real"], quality["num_generated"], quality["steps"]) == (40, 14, 12)
    assert quality["features"] == "DigitsClassifier"

    card = ModelCard.load(str(model / "README.md"))
    entries = {entry.metric_type: entry for entry in card.data.eval_results}
    assert set(entries) == {"bits-dim", "fid", "kid", "precision", "recall"}
    assert entries["fid"].metric_value == pytest.approx(quality["fid"])
    assert entries["fid"].metric_args == {
        "num_images": 14, "steps": 12, "scheduler": "AlphaDDPMScheduler", "features": "DigitsClassifier", "seed": 0
    }  # fmt: skip
    assert "| bits/dim |" in card.text and "from_pretrained" in card.text
    assert card.data.library_name == "diffusers"


def test_another_sampler_and_an_estimated_bound(model, cache, tmp_path):
    run_evaluate(
        "--model", str(model), "--dataset", "digits", "--split", "train[:40]", "--num_likelihood_images", "3",
        "--likelihood_calls", "6", "--num_images", "8", "--num_inference_steps", "4", "--scheduler", "ddim",
        "--cache_dir", cache, "--output", str(tmp_path / "e.json"), "--update_card", "false",
    )  # fmt: skip
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["quality"]["scheduler"] == "DDIMScheduler"
    assert result["bits_per_dim"]["network_calls"] == 6
    assert result["bits_per_dim"]["standard_error_of_one_image"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such", "--dataset", "digits"], "cannot be loaded"),
        (["--model", "MODEL", "--dataset", "digits", "--features", "nonsense:f"], "MODULE:FUNCTION"),
        (["--model", "MODEL", "--dataset", "digits", "--num_images", "3"], "--num_images 3 are too few"),
        (["--model", "MODEL", "--dataset", "digits", "--num_images", "0", "--num_likelihood_images", "0"], "nothing"),
    ],
)
def test_what_cannot_be_evaluated_is_said(model, cache, arguments, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = [str(model) if argument == "MODEL" else argument for argument in arguments]
    with pytest.raises(ConfigError, match=message):
        run_evaluate("--likelihood_steps", "1", "--cache_dir", cache, *arguments)


def test_missing_weights_are_named(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    del weights["conv_in.bias"]
    save_file(weights, folder / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match=r"no weights for conv_in\.bias of its network"):
        load_pipeline(str(folder))


def test_images_that_are_not_numbers_are_no_images(model, cache):
    """Diffusers 0.42.1: the last two timesteps of UniPC are the same where there are as many steps as timesteps."""
    pipe = load_pipeline(str(model))
    use_scheduler(pipe, "unipc")
    with pytest.raises(ConfigError, match="UniPCMultistepScheduler gives values that are not numbers in 12 steps"):
        sample_uint8(pipe, range(2), seed=0, steps=12)


def test_error_is_one_line(cache):
    done = launch("evaluate", "--model", "no/such", "--dataset", "digits", "--cache_dir", cache)
    assert done.returncode == 1
    assert "error: --model no/such cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr


def test_image_i_is_always_the_same(model, tmp_path):
    def draw(name, batch_size, processes=1, *more):
        arguments = [
            "--model", str(model), "--output_dir", str(tmp_path / name), "--num_images", "9", "--batch_size", str(batch_size),
            *more,
        ]  # fmt: skip
        if processes == 1:
            run.generate(run.parse([*arguments, *QUICK]))
        else:
            done = launch("generate", *arguments, processes=processes)
            assert done.returncode == 0, done.stderr
        return {path.name: path.read_bytes() for path in sorted((tmp_path / name).glob("*.png"))}

    one, two = draw("one", 9), draw("two", 2, 2)
    assert list(one) == [f"{number:06d}.png" for number in range(9)]
    assert one == two
    for number in (0, 5, 8):  # a run that was stopped goes on
        (tmp_path / "two" / f"{number:06d}.png").unlink()
    kept = tmp_path / "two/000003.png"
    before = kept.stat().st_mtime_ns
    assert draw("two", 4) == one
    assert kept.stat().st_mtime_ns == before

    assert draw("whole", 4, 1, "--format", "parquet") == {}
    rows = load_dataset(
        "parquet", data_files=str(tmp_path / "whole/images.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert rows["number"] == list(range(9))
    with Image.open(tmp_path / "one/000007.png") as expected:
        assert rows[7]["image"].tobytes() == expected.tobytes()

    with pytest.raises(ConfigError, match="another model, sampler, number of steps or seed"):
        draw("one", 4, 1, "--seed", "1")


def test_training_evaluates_on_the_way(tmp_path, cache):
    (tmp_path / "unet.json").write_text(json.dumps({**dict(tiny_unet().config), "out_channels": 2}))
    flags = {
        "dataset": "digits", "split": "train[:40]", "model": tmp_path / "unet.json", "num_train_timesteps": 12,
        "beta_end": 0.6, "batch_size": 8, "max_train_steps": 6, "preview_every": 0, "checkpoint_every": 3, "num_samples": 1,
        "lr_warmup_steps": 1, "learning_rate": 0.001, "mixed_precision": "no", "log_every": 3, "cache_dir": cache,
        "variance_type": "learned_range", "objective": "bound", "timestep_sampling": "importance",
        "eval_every": 3, "eval_images": 6, "eval_calls": 5, "eval_samples": 6, "preview_inference_steps": 3,
    }  # fmt: skip
    logs = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        if processes == 1:
            loop.train(parse_options([*arguments, "--output_dir", str(folder), *QUICK]))
        else:
            done = launch("train", *arguments, "--output_dir", str(folder), processes=processes)
            assert done.returncode == 0, done.stderr
        logs.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    evaluated = [[entry["eval_bits_per_dim"] for entry in log if "eval_bits_per_dim" in entry] for log in logs]
    assert len(evaluated[0]) == 2
    for log in logs:
        judged = [entry for entry in log if "eval_bits_per_dim" in entry]
        assert all(0 < entry["eval_fid"] < 1000 and 0 <= entry["eval_precision"] <= 1 for entry in judged)
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-3)
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    pipe = AlphaDDPMPipeline.from_pretrained(tmp_path / "2")
    assert pipe.scheduler.config.variance_type == "learned_range"
    assert pipe(1, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="pt").images.isfinite().all()
    arguments = [f"--{name}={value}" for name, value in flags.items() if name not in ("objective", "variance_type")]
    with pytest.raises(ConfigError, match="learned_range"):
        loop.train(parse_options([*arguments, "--objective", "hybrid", "--output_dir", str(tmp_path / "wrong")]))
    with pytest.raises(ConfigError, match=r"--eval_features nonsense:f: .* MODULE:FUNCTION"):
        loop.train(
            TrainingOptions(eval_every=1, eval_samples=5, eval_features="nonsense:f", output_dir=str(tmp_path / "w"))
        )
    with pytest.raises(ConfigError, match="--eval_samples 5"):
        TrainingOptions(eval_samples=5)
