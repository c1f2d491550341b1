"""The training command as people type it: in subprocesses, on real data, with what it leaves behind."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.support.errors import ConfigError, DataError
from ddpm_pipeline.training import TrainingOptions, train
from ddpm_pipeline.training.__main__ import main
from ddpm_pipeline.training.processes import default_output_dir
from helpers import run_command
from training_helpers import metrics, quick_options, weights


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """A file with the options of a run of seconds, with flips, accumulation and previews."""
    folder = tmp_path_factory.mktemp("options")
    run = quick_options(
        folder, batch_size=16, gradient_accumulation_steps=2, random_flip=True, dropout=0.0, checkpoint_every=4,
        preview_every=4, preview_images=4, preview_inference_steps=5, num_samples=4, log_every=3,
    )  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return ["--config", str(folder / "run.yaml")]


def launched(folder: Path, options: list[str], processes: int) -> Path:
    """On the CPU, where accelerate 1.15 starts several processes with --multi_gpu only: with --cpu it is always one."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]  # `accelerate` need not be on the PATH
    command = [*launcher, "--multi_gpu", "--num_processes", str(processes), "training/train.py", *options]
    done = run_command(*command, "--output_dir", str(folder), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0 and "\r" not in done.stderr, done.stderr
    return folder


def last_checkpoint(folder: Path) -> dict[str, bytes]:
    parts = ("model.safetensors", "ema.safetensors", "optimizer.bin")
    return {name: (folder / "checkpoints/step-00000012" / name).read_bytes() for name in parts}


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory) -> Path:
    """By the command, in two processes."""
    return launched(tmp_path_factory.mktemp("run") / "model", options, 2)


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory) -> Path:
    """The same in this process."""
    return train(TrainingOptions(config=options[1], output_dir=str(tmp_path_factory.mktemp("alone") / "model")))


def test_what_a_run_leaves(finished):
    present = {path.name for path in finished.iterdir()}
    assert present == {
        "model_index.json", "modular_config.json", "unet", "scheduler", *AlphaDDPMPipeline.shipped_files(),
        "README.md", "samples.png", "process.png",
        "samples", "training_config.yaml", "train.log", "metrics.jsonl", "checkpoints",
    }  # fmt: skip
    assert [path.name for path in sorted((finished / "samples").iterdir())] == ["step-00000004.png", "step-00000008.png"]
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"step-00000008", "step-00000012"}
    assert Image.open(finished / "samples.png").size == (108, 108)
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert lines[0]["learning_rate"] == pytest.approx(1e-3)
    assert lines[-1]["learning_rate"] == pytest.approx(0, abs=1e-9)
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines)
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
    monkeypatch.setattr("sys.argv", ["train.py", *options, "--output_dir", str(finished), "--resume", "latest", "--seed", "9"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert "--seed was 0 and is 9" in str(stop.value)
    assert (finished / "samples.png").is_file()


def test_a_resumed_run_ends_in_the_same_bytes(alone, options, tmp_path):
    """Eight updates, then the rest: weights, averages, optimiser and pictures are the same bytes."""
    folder = Path(shutil.copytree(alone, tmp_path / "model"))
    shutil.rmtree(folder / "checkpoints/step-00000012")
    train(TrainingOptions(config=options[1], output_dir=str(folder), resume="latest"))
    assert "updates 8 to 12" in (folder / "train.log").read_text()
    assert last_checkpoint(folder) == last_checkpoint(alone)
    assert (folder / "samples.png").read_bytes() == (alone / "samples.png").read_bytes()


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_the_same_model(processes, finished, alone, options, tmp_path):
    """Twelve updates: the same images, timesteps and noise as on one, and so weights but for the order of sums."""
    folder = finished if processes == 2 else launched(tmp_path / "model", options, processes)
    assert f"| hardware | {processes} x cpu |" in (folder / "README.md").read_text()
    one = weights(alone)
    for name, tensor in weights(folder).items():
        assert (tensor - one[name]).abs().max() <= 1e-4 * one[name].abs().max(), name
    losses = [[line["loss"] for line in metrics(each)] for each in (alone, folder)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_own_images_and_fine_tuning(options, tmp_path):
    """A folder of colour pictures, and then another run that goes on from the model of the first."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for index in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(tmp_path / f"pictures/{index}.png")
    common = {
        "dataset": str(tmp_path / "pictures"), "resolution": 8, "batch_size": 4, "num_cpu_threads": 1,
        "cache_dir": str(tmp_path / "cache"), "fit_noises": 0,
    }  # fmt: skip
    first = {"num_train_timesteps": 20, "beta_end": 0.4, "model": "tiny", "max_train_steps": 2, "num_samples": 2}
    train(TrainingOptions(**common, **first, report_to="tensorboard", output_dir=str(tmp_path / "a")))
    assert list((tmp_path / "a/ddpm-pipeline").rglob("events.out.tfevents.*"))
    second = {"max_train_steps": 1, "num_samples": 1, "learning_rate": 1e-12, "ema_decay": 0}
    train(TrainingOptions(**common, **second, init_from=str(tmp_path / "a"), output_dir=str(tmp_path / "b")))
    for name, tensor in weights(tmp_path / "a").items():
        torch.testing.assert_close(weights(tmp_path / "b")[name], tensor, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "changed, error, named",
    [
        ({"dataset": "/nowhere"}, DataError, "/nowhere"),
        ({"image_column": "picture"}, DataError, "picture"),
        ({"batch_size": 15, "gradient_accumulation_steps": 2}, ConfigError, "multiple of 2"),
        ({"resolution": 9}, ConfigError, "use 8 or 10"),
        ({"output_dir": "/proc/nowhere"}, ConfigError, "/proc/nowhere"),
        ({"resume": "/nowhere/step-1"}, ConfigError, "/nowhere/step-1"),
    ],
)
def test_bad_input_is_named_before_training_starts(changed, error, named, tmp_path):
    with pytest.raises(error, match=named):
        train(TrainingOptions(**{"output_dir": str(tmp_path / "model"), "cache_dir": str(tmp_path), **changed}))


def test_an_unknown_option_ends_the_command_with_the_nearest_one():
    done = run_command(sys.executable, "training/train.py", "--learning_rat", "1")
    assert done.returncode != 0
    assert "Did you mean --learning_rate?" in done.stderr and "Traceback" not in done.stderr


def test_the_default_folder_is_named_after_the_data():
    names = {"digits": "ddpm-digits", "org/flowers": "ddpm-flowers", "data/cats/": "ddpm-cats", "x/*.parquet": "ddpm-model"}
    assert {dataset: default_output_dir(dataset) for dataset in names} == names
