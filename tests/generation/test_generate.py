"""generate: image i is always the same, in one process or two, at any batch size, resumed or not; whose folder it is."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from datasets import load_dataset
from PIL import Image

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.generation import GenerationOptions, generate
from ddpm_pipeline.generation.options import SCHEDULERS, OutputOptions
from ddpm_pipeline.generation.pipelines import load_pipeline, scheduler_for
from ddpm_pipeline.support.draws import RandomStream, seeds
from ddpm_pipeline.support.errors import ConfigError
from helpers import ROOT, tiny_unet

COUNT, SEED = 9, 4


def saved_model(folder: Path, seed: int = 0) -> Path:
    scheduler = AlphaDDPMScheduler(num_train_timesteps=12, beta_start=0.02, beta_end=0.6)
    AlphaDDPMPipeline(tiny_unet(seed), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def options(model, tmp_path) -> GenerationOptions:
    return GenerationOptions(
        model=str(model), output_dir=str(tmp_path / "images"), num_images=COUNT, seed=SEED, num_cpu_threads=1
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> dict[str, bytes]:
    """Each image by a call of its own, with the generator of its own seed."""
    pipe, folder = load_pipeline(str(model)), tmp_path_factory.mktemp("expected")
    for number, seed in enumerate(seeds(SEED, RandomStream.PREVIEW, 0, COUNT)):
        generator = torch.Generator().manual_seed(int(seed))
        pixels = pipe(1, generator, num_inference_steps=12, output_type="pt").images[0, 0].mul(255).round()
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{number:06d}.png")
    found = files(folder)
    assert len(set(found.values())) == COUNT
    return found


def test_images_are_those_of_direct_calls_and_a_stopped_run_continues(options, expected):
    folder = generate(options)
    assert files(folder) == expected
    for number in (0, 5, 8):
        (folder / f"{number:06d}.png").unlink()
    kept = folder / "000003.png"
    before = kept.stat().st_mtime_ns
    generate(options.with_values(batch_size=2))
    assert files(folder) == expected and kept.stat().st_mtime_ns == before
    assert generate(options.with_values(num_images=3)) == folder, "nothing to do"
    assert files(folder) == expected


def _generate_in_a_fork(options: GenerationOptions) -> None:
    AcceleratorState._reset_state(True)  # that of the process which was forked
    generate(options)


@pytest.mark.parametrize("count", [COUNT, 1])
def test_two_processes_sample_the_same_images(options, expected, count):
    options = options.with_values(batch_size=2, num_images=count)
    debug_launcher(_generate_in_a_fork, (options,), num_processes=2)
    assert files(Path(options.output.output_dir)) == dict(list(expected.items())[:count])


def test_parquet_holds_the_same_images(options, expected, tmp_path):
    folder = generate(options.with_values(format="parquet", batch_size=4))
    assert files(folder) == {}
    rows = load_dataset("parquet", data_files=str(folder / "images.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["number"] == list(range(COUNT))
    (tmp_path / "seven.png").write_bytes(expected["000007.png"])
    with Image.open(tmp_path / "seven.png") as image:
        assert rows[7]["image"].tobytes() == image.tobytes()
    generate(options.with_values(num_images=5))  # they are there
    with pytest.raises(ConfigError, match=r"images\.parquet with 9 images"):
        generate(options.with_values(num_images=10))


def test_folder_of_other_images_is_refused(options, tmp_path):
    folder = generate(options.with_values(num_images=2))
    before = files(folder)
    other_model = saved_model(tmp_path / "other", seed=1)
    for other in ({"seed": SEED + 1}, {"model": str(other_model)}, {"num_inference_steps": 6}, {"scheduler": "ddim"}):
        with pytest.raises(ConfigError, match="another model, sampler, number of steps or seed"):
            generate(options.with_values(**other))
    assert files(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="did not write"):
        generate(options.with_values(output_dir=str(tmp_path / "mine")))
    with pytest.raises(ConfigError, match="--num_images 0 must be at least 1"):
        replace(options.output, num_images=0)
    with pytest.raises(ConfigError, match="png, parquet"):
        OutputOptions("x", format="jpeg")


def test_every_sampler_has_the_configuration_of_the_model_s_own(model):
    pipe = load_pipeline(str(model))
    assert scheduler_for(pipe, "keep") is pipe.scheduler
    for name, class_name in SCHEDULERS.items():
        scheduler = scheduler_for(pipe, name)
        assert type(scheduler).__name__ == class_name
        assert scheduler.config.beta_end == 0.6 and scheduler.config.num_train_timesteps == 12


def test_command_samples_and_reports_mistakes_in_one_line(options, expected, monkeypatch):
    def run(*flags: str) -> None:
        monkeypatch.setattr("sys.argv", ["generate.py", *flags])
        runpy.run_path(str(ROOT / "training" / "generate.py"), run_name="__main__")

    run(*(f"--{name}={value}" for name, value in options.flat().items() if value))
    assert files(Path(options.output.output_dir)) == expected
    with pytest.raises(SystemExit, match=r"^error: unknown option --output_dri\. Did you mean --output_dir\?"):
        run("--model", "m", "--output_dri", "x")
    with pytest.raises(SystemExit, match=r"^error: --output_dir is required"):
        run("--model", "m")
