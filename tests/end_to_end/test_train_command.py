"""The training command as people type it: in subprocesses, on real data, with what it leaves behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.data.mapped import load_images
from ddpm_pipeline.support.errors import ConfigError, DataError
from ddpm_pipeline.training.batches import MicroBatches
from ddpm_pipeline.training.loop import default_output_dir, losses_of, main, train
from ddpm_pipeline.training.options import TrainingConfig
from helpers import TINY_UNET, run_command


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """A run of seconds: twelve updates of a tiny UNet over a chain of twenty steps, with flips and accumulation."""
    folder = tmp_path_factory.mktemp("options")
    (folder / "unet.json").write_text(json.dumps({**TINY_UNET, "dropout": 0.1}))
    run = {
        "dataset": "digits", "model": str(folder / "unet.json"), "num_train_timesteps": 20, "beta_end": 0.4,
        "batch_size": 16, "gradient_accumulation_steps": 2, "random_flip": True, "max_train_steps": 12,
        "learning_rate": 1e-3, "lr_warmup_steps": 3, "mixed_precision": "no", "checkpoint_every": 4, "preview_every": 4,
        "preview_images": 4, "preview_inference_steps": 5, "num_samples": 4, "log_every": 3, "num_cpu_threads": 1,
        "cache_dir": str(folder / "cache"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return ["--config", str(folder / "run.yaml")]


def launch(*arguments: str, processes: int = 1):
    """On the CPU, where accelerate 1.15 starts several processes with --multi_gpu only: with --cpu it is always one."""
    several = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
    command = ["accelerate", "launch", *several, "training/train.py", *arguments]
    return run_command(*command, ACCELERATE_USE_CPU="true")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def last_checkpoint(folder: Path) -> dict[str, bytes]:
    parts = ("model.safetensors", "ema.safetensors", "optimizer.bin")
    return {name: (folder / "checkpoints/step-00000012" / name).read_bytes() for name in parts}


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "model"
    done = launch(*options, "--output_dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_what_a_run_leaves(finished):
    present = {path.name for path in finished.iterdir()}
    assert present == {
        "model_index.json", "unet", "scheduler", "pipeline.py", "sampling_alpha_ddpm.py", "scheduling_alpha_ddpm.py",
        "stock_format.py", "README.md", "samples.png", "process.png", "samples", "training_config.yaml", "train.log",
        "metrics.jsonl", "checkpoints",
    }  # fmt: skip
    assert [path.name for path in sorted((finished / "samples").iterdir())] == [
        "step-00000004.png",
        "step-00000008.png",
    ]
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"step-00000008", "step-00000012"}
    assert Image.open(finished / "samples.png").size == (108, 108)
    metrics = metrics_of(finished)
    assert [line["step"] for line in metrics] == [3, 6, 9, 12]
    assert metrics[0]["learning_rate"] == pytest.approx(1e-3) and metrics[-1]["learning_rate"] == pytest.approx(
        0, abs=1e-9
    )
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in metrics)
    assert yaml.safe_load((finished / "training_config.yaml").read_text())["resolution"] == 8
    pipe = AlphaDDPMPipeline.from_pretrained(finished)
    assert isinstance(pipe.scheduler, AlphaDDPMScheduler) and len(pipe.scheduler) == 20


def test_the_saved_weights_are_the_averaged_ones(finished):
    ema = load_file(finished / "checkpoints/step-00000012/ema.safetensors")
    raw = load_file(finished / "checkpoints/step-00000012/model.safetensors")
    saved = list(weights(finished).values())
    by_shape = lambda tensors: sorted(tensor.double().sum().item() for tensor in tensors)  # noqa: E731
    assert by_shape(saved) == pytest.approx(by_shape(ema.values()), abs=0)
    assert by_shape(saved) != by_shape(raw.values())


def test_the_card_says_nothing_private(finished):
    card = (finished / "README.md").read_text()
    assert "1,797 images of `digits`" in card and "| updates | 12 |" in card
    assert str(finished.parent) not in card and str(Path.home()) not in card


def test_a_second_run_refuses_and_resume_and_overwrite_go_on(finished, options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", *options, "--output_dir", str(finished)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert "--resume latest" in str(stop.value) and "--overwrite" in str(stop.value)
    monkeypatch.setattr(
        "sys.argv", ["train.py", *options, "--output_dir", str(finished), "--resume", "latest", "--seed", "9"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert "--seed was 0 and is 9" in str(stop.value)
    assert (finished / "samples.png").is_file()


def test_a_resumed_run_ends_in_the_same_bytes(finished, options, tmp_path):
    """Eight updates, then another process for the rest: weights, averages, optimiser and pictures are the same bytes."""
    folder = tmp_path / "model"
    first = launch(*options, "--output_dir", str(folder))
    assert first.returncode == 0, first.stderr
    shutil.rmtree(folder / "checkpoints/step-00000012")
    second = launch(*options, "--output_dir", str(folder), "--resume", "latest")
    assert second.returncode == 0, second.stderr
    assert "updates 8 to 12" in (folder / "train.log").read_text()
    assert last_checkpoint(folder) == last_checkpoint(finished)
    assert (folder / "samples.png").read_bytes() == (finished / "samples.png").read_bytes()


def test_several_processes_train_the_same_model(options, tmp_path):
    """Fifty updates on 1, 2 and 4: the same images, timesteps and noise, and so weights but for the order of sums."""
    flags = ["--max_train_steps", "50", "--dropout", "0", "--gradient_accumulation_steps", "1", "--preview_every", "0"]
    for processes in (1, 2, 4):
        folder = tmp_path / str(processes)
        done = launch(*options, *flags, "--output_dir", str(folder), processes=processes)
        assert done.returncode == 0, done.stderr
        assert f"| hardware | {processes} x cpu |" in (folder / "README.md").read_text()
    one = weights(tmp_path / "1")
    losses = {n: [line["loss"] for line in metrics_of(tmp_path / str(n))] for n in (1, 2, 4)}
    for processes in (2, 4):
        for name, tensor in weights(tmp_path / str(processes)).items():
            assert (tensor - one[name]).abs().max() <= 1e-4 * one[name].abs().max(), name
        assert losses[processes] == pytest.approx(losses[1], rel=1e-4)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_own_images_and_fine_tuning(options, tmp_path):
    """A folder of colour pictures, and then another run that goes on from the model of the first."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for index in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(tmp_path / f"pictures/{index}.png")
    common = [
        "--dataset",
        str(tmp_path / "pictures"),
        "--resolution",
        "8",
        "--num_train_timesteps",
        "20",
        "--beta_end",
        "0.4",
    ]
    common += [
        "--model",
        "tiny",
        "--batch_size",
        "4",
        "--max_train_steps",
        "2",
        "--num_samples",
        "2",
        "--num_cpu_threads",
        "1",
    ]
    common += ["--cache_dir", str(tmp_path / "cache"), "--report_to", "tensorboard"]
    done = run_command("accelerate", "launch", "training/train.py", *common, "--output_dir", str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "a/logs").rglob("events.out.tfevents.*")) or list((tmp_path / "a").rglob("events.out.*"))
    train(TrainingConfig(
        dataset=str(tmp_path / "pictures"), resolution=8, batch_size=4, max_train_steps=1, num_samples=1,
        num_cpu_threads=1, cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path / "b"),
        init_from=str(tmp_path / "a"), learning_rate=1e-12, ema_decay=0,
    ))  # fmt: skip
    for name, tensor in weights(tmp_path / "a").items():
        torch.testing.assert_close(weights(tmp_path / "b")[name], tensor, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "changed, error, named",
    [
        ({"dataset": "/nowhere"}, DataError, "/nowhere"),
        ({"image_column": "picture"}, DataError, "picture"),
        ({"batch_size": 15, "gradient_accumulation_steps": 2}, ConfigError, "multiple of 2"),
        ({"resolution": 9}, ConfigError, "--resolution 8 or 10"),
        ({"output_dir": "/proc/nowhere"}, ConfigError, "/proc/nowhere"),
        ({"resume": "/nowhere/step-1"}, ConfigError, "/nowhere/step-1"),
    ],
)
def test_bad_input_is_named_before_training_starts(changed, error, named, tmp_path):
    with pytest.raises(error, match=named):
        train(TrainingConfig(**{"output_dir": str(tmp_path / "model"), "cache_dir": str(tmp_path), **changed}))


def test_an_unknown_option_ends_the_command_with_the_nearest_one():
    done = run_command("accelerate", "launch", "--quiet", "training/train.py", "--learning_rat", "1")
    assert done.returncode != 0
    assert "Did you mean --learning_rate?" in done.stderr and "Traceback" not in done.stderr


def test_the_default_folder_is_named_after_the_data():
    names = {
        "digits": "ddpm-digits",
        "org/flowers": "ddpm-flowers",
        "data/cats/": "ddpm-cats",
        "x/*.parquet": "ddpm-model",
    }
    assert {dataset: default_output_dir(dataset) for dataset in names} == names


@pytest.mark.parametrize("world_size, accumulation", [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)])
def test_a_batch_is_the_same_however_it_is_split(world_size, accumulation, tmp_path):
    data = load_images("digits", cache_dir=str(tmp_path))
    whole = MicroBatches(data, TrainingConfig(batch_size=16, random_flip=True), 0, 1)[5]
    config = TrainingConfig(batch_size=16, random_flip=True, gradient_accumulation_steps=accumulation)
    parts = [
        MicroBatches(data, config, rank, world_size)[5 * accumulation + index]
        for index in range(accumulation)
        for rank in range(world_size)
    ]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)


def test_the_loss_is_the_definition(tmp_path):
    """Against x_t and the squared error written out by hand from the scheduler's public tables."""
    data = load_images("digits", cache_dir=str(tmp_path))
    config, scheduler = TrainingConfig(batch_size=4, objective="simple"), AlphaDDPMScheduler()
    batch = MicroBatches(data, config, 0, 1)[0]
    timesteps = (batch["quantiles"] * len(scheduler)).long()
    seen = {}

    class Network(torch.nn.Module):
        def forward(self, noisy, timesteps):
            seen.update(noisy=noisy, timesteps=timesteps)
            return type("Output", (), {"sample": torch.zeros_like(noisy)})

    loss = losses_of(Network(), scheduler, batch, timesteps, config).mean()
    x_0 = batch["pixels"].double() / 127.5 - 1
    alpha = scheduler.alphas_cumprod[timesteps].double().view(-1, 1, 1, 1)
    noise = (seen["noisy"].double() - alpha.sqrt() * x_0) / (1 - alpha).sqrt()
    assert loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-4)
    assert abs(noise.mean()) < 0.3 and noise.std() == pytest.approx(1, abs=0.15)
