"""generate: image i is always the same, in one process or two, at any batch size, resumed or not; whose folder it is."""

import itertools
import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from datasets import load_dataset
from PIL import Image

import text_models
from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler, describe_conditions
from ddpm_pipeline.generation import GenerationOptions, generate
from ddpm_pipeline.generation import folder as module
from ddpm_pipeline.generation.drawing import sample_values
from ddpm_pipeline.generation.options import SCHEDULERS, OutputOptions
from ddpm_pipeline.generation.pipelines import load_pipeline, sampler_name, scheduler_for
from ddpm_pipeline.support.draws import RandomStream, seeds
from ddpm_pipeline.support.errors import ConfigError
from helpers import ROOT, killed_at, tiny_unet

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
    kept = folder / "000001.png"  # in a batch with one that is missing
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


def test_two_runs_at_once_make_one_parquet_file(options, monkeypatch):
    """The other one writes it, and removes the images, while this one reads them."""
    folder, write = generate(options), module._write_parquet

    def write_second(whole: Path, paths: list[Path]) -> None:
        write(whole, paths)
        for path in paths:
            path.unlink()
        write(whole, paths)

    monkeypatch.setattr(module, "_write_parquet", write_second)
    generate(options.with_values(format="parquet"))
    assert [path.name for path in sorted(folder.iterdir())] == ["generation.json", "images.parquet"]


def test_folder_of_other_images_is_refused(options, tmp_path):
    folder = generate(options.with_values(num_images=2))
    before = files(folder)
    other_model = saved_model(tmp_path / "other", seed=1)
    for other, named in (
        ({"seed": SEED + 1}, "seed 4 rather than seed 5"), ({"model": str(other_model)}, "weights"),
        ({"num_inference_steps": 6}, "num_inference_steps"), ({"scheduler": "ddim"}, "scheduler"),
        ({"scheduler": "stock-ddpm"}, "scheduler"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=named):
            generate(options.with_values(**other))
    assert files(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="did not write"):
        generate(options.with_values(output_dir=str(tmp_path / "mine")))
    with pytest.raises(ConfigError, match="--num_images 0 must be at least 1"):
        replace(options.output, num_images=0)
    with pytest.raises(ConfigError, match="auto, png, npy, tiff, parquet"):
        OutputOptions("x", format="jpeg")


def test_damaged_files_do_not_count(options, expected, capsys):
    folder = generate(options)
    for number, content in ((1, b""), (4, expected["000004.png"][:-20]), (6, b"no picture")):
        (folder / f"{number:06d}.png").write_bytes(content)
    Image.new("L", (8, 8)).save(folder / "000002.png", "JPEG")
    Image.new("L", (9, 8)).save(folder / "000007.png")
    generate(options)
    assert files(folder) == expected
    assert "5 damaged images" in capsys.readouterr().err
    (folder / "000009.png").mkdir()
    with pytest.raises(ConfigError, match=r"000009\.png is a folder"):
        generate(options.with_values(num_images=12))
    (folder / "generation.json").write_bytes((folder / "generation.json").read_bytes()[:30])
    with pytest.raises(ConfigError, match=r"generation\.json is damaged"):
        generate(options)
    whole = generate(options.with_values(format="parquet", output_dir=str(folder.with_name("one"))))
    (whole / "images.parquet").write_bytes((whole / "images.parquet").read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"images\.parquet is damaged.*remove it"):
        generate(options.with_values(format="parquet", output_dir=str(whole)))


def test_killed_at_any_operation_and_resumed_the_folder_has_the_same_bytes(options, tmp_path, monkeypatch):
    pipe = load_pipeline(options.sampling.model)
    monkeypatch.setattr("ddpm_pipeline.generation.run.load_pipeline", lambda model: pipe)
    options = options.with_values(num_images=2, num_inference_steps=1, format="parquet")

    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    whole = content(generate(options))
    assert set(whole) == {"generation.json", "images.parquet"}
    for operation in itertools.count(1):
        again = options.with_values(output_dir=str(tmp_path / str(operation)))
        killed = killed_at(operation, tmp_path / str(operation), partial(generate, again))
        assert content(generate(again)) == whole, operation
        if not killed:
            break
    assert operation > 12


def test_a_run_that_ended_before_its_first_image_takes_nothing(options, expected, monkeypatch):
    def fail(*_, **__):
        raise ConfigError("it cannot sample")

    monkeypatch.setattr("ddpm_pipeline.generation.run.sample_values", fail)
    for other in ({"num_inference_steps": 3}, {"seed": 99}):
        with pytest.raises(ConfigError, match="it cannot sample"):
            generate(options.with_values(**other))
    monkeypatch.undo()
    assert files(generate(options)) == expected


def test_a_folder_that_is_renamed_during_the_run_ends_it(options, expected, monkeypatch):
    folder, sampled = Path(options.output.output_dir), []

    def rename_after_one(*arguments, **how):
        if sampled:
            folder.rename(folder.with_name("renamed"))
        sampled.append(1)
        return sample_values(*arguments, **how)

    monkeypatch.setattr("ddpm_pipeline.generation.run.sample_values", rename_after_one)
    with pytest.raises(ConfigError, match="removed or renamed"):
        generate(options.with_values(batch_size=4))
    assert not folder.exists()
    folder.with_name("renamed").rename(folder)
    monkeypatch.undo()
    assert files(generate(options.with_values(batch_size=4))) == expected


def test_every_sampler_has_the_configuration_of_the_model_s_own(model):
    pipe = load_pipeline(str(model))
    assert scheduler_for(pipe, "keep") is pipe.scheduler
    for name, (class_name, options) in SCHEDULERS.items():
        scheduler = scheduler_for(pipe, name)
        assert type(scheduler).__name__ == class_name
        assert sampler_name(scheduler) == ", ".join([class_name, *options.values()])
        assert options.items() <= scheduler.config.items()
        assert scheduler.config.beta_end == 0.6 and scheduler.config.num_train_timesteps == 12
    for schedule in ("sigmoid", "laplace"):  # which most of diffusers' samplers do not know
        pipe.scheduler = AlphaDDPMScheduler(num_train_timesteps=12, beta_start=0.02, beta_end=0.6, beta_schedule=schedule)
        for name in SCHEDULERS:
            torch.testing.assert_close(scheduler_for(pipe, name).betas, pipe.scheduler.betas)


def test_command_samples_and_reports_mistakes_in_one_line(options, expected, text_model, tmp_path, monkeypatch, capsys):
    def run(*flags: str) -> None:
        monkeypatch.setattr("sys.argv", ["generate.py", *flags])
        runpy.run_path(str(ROOT / "training" / "generate.py"), run_name="__main__")

    run(*(f"--{name}={value}" for name, value in options.flat().items() if value))
    assert files(Path(options.output.output_dir)) == expected and "sampling:" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^error: unknown option --output_dri\. Did you mean --output_dir\?"):
        run("--model", "m", "--output_dri", "x")
    with pytest.raises(SystemExit, match=r"^error: --output_dir is required"):
        run("--model", "m")
    one = ("--num_images", "1", "--num_inference_steps", "1", "--output_dir", str(tmp_path / "text"))
    with pytest.warns(UserWarning, match="more than 77 tokens"):  # which no command keeps to itself
        run("--model", text_model, "--prompts", "seven " * 20, *one)


# ---- conditional models --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def class_model(tmp_path_factory) -> str:
    unet = tiny_unet(num_class_embeds=4)
    describe_conditions(unet, class_names=["cat", "dog", "7"])
    folder = tmp_path_factory.mktemp("classes")
    AlphaDDPMPipeline(unet, AlphaDDPMScheduler(12, beta_end=0.5)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("text")
    text_models.make(scheduler=AlphaDDPMScheduler(12, beta_end=0.5, variance_type="learned_range")).save_pretrained(folder)
    return str(folder)


def pixels_of(folder: Path) -> list[bytes]:
    return [Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))]


def pixels_called(pipe, count: int, **call) -> list[bytes]:
    """Of single calls, where image i has what is asked for in turn."""
    (argument, values), *_ = call.items()
    found = []
    for number, seed in enumerate(seeds(SEED, RandomStream.PREVIEW, 0, count)):
        asked = {**call, argument: values[number % len(values)]}
        image = pipe(**asked, generator=torch.Generator().manual_seed(int(seed)), output_type="pt").images[0, 0]
        found.append(image.mul(255).round().to(torch.uint8).numpy().tobytes())
    assert len(set(found)) == count
    return found


@pytest.mark.parametrize(
    ("given", "labels"), [(None, [0, 1, 2]), ("dog|cat", ["dog", "cat"]), ("2 | 7|0", [2, 2, 0]), ("dog", ["dog"])]
)
def test_classes_are_sampled_in_turn(options, class_model, given, labels):
    options = options.with_values(model=class_model, class_labels=given, guidance_scale=1.5, num_images=5)
    expected = pixels_called(load_pipeline(class_model), 5, class_labels=labels, guidance_scale=1.5)
    assert pixels_of(generate(options)) == expected


def test_prompts_are_sampled_in_turn(options, text_model, tmp_path):
    prompts = ["a seven", "an eight, please"]
    (tmp_path / "prompts.txt").write_text("a seven\n\nan eight, please\n", "utf-8")
    expected = pixels_called(load_pipeline(text_model), 5, prompt=prompts, guidance_scale=1.0)
    options = options.with_values(model=text_model, num_images=5, batch_size=2)
    for number, given in enumerate(("a seven|an eight, please", str(tmp_path / "prompts.txt"))):
        folder = generate(options.with_values(prompts=given, output_dir=str(tmp_path / f"images{number}")))
        assert pixels_of(folder) == expected
    with pytest.raises(ConfigError, match="prompt"):
        generate(options.with_values(prompts="a seven", output_dir=str(folder)))


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("text", {}, "--prompts is required"),
        ("text", {"prompts": "none.txt"}, r"none\.txt cannot be read"),
        ("text", {"class_labels": "dog"}, "--class_labels does not fit"),
        ("class", {"class_labels": "dgo"}, "near it: 'dog'"),
        ("class", {"class_labels": "3"}, "ids are 0 to 2"),
        ("class", {"class_labels": "²"}, "no class '²'"),
        ("class", {"prompts": "dog"}, "--prompts does not fit"),
        ("none", {"class_labels": "dog"}, "--class_labels does not fit"),
        ("none", {"guidance_scale": 2.0}, "--guidance_scale 2.0 needs a conditional model"),
    ],
)
def test_requests_that_do_not_fit_the_model_are_refused(options, model, class_model, text_model, kind, asked, message):
    folder = {"none": str(model), "class": class_model, "text": text_model}[kind]
    with pytest.raises(ConfigError, match=message):
        generate(options.with_values(model=folder, **asked))
    assert not Path(options.output.output_dir).exists()


@pytest.mark.parametrize("asked", [{"num_inference_steps": 13}, {"num_inference_steps": 13, "scheduler": "ddim"}])
def test_steps_that_the_sampler_cannot_take_are_refused_at_once(options, asked):
    with pytest.raises(ConfigError, match="--num_inference_steps 13"):
        generate(options.with_values(**asked))
    assert not Path(options.output.output_dir).exists()
