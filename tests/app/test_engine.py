"""What the app computes, without a browser: it agrees with the package's own calls, and refuses what it cannot do honestly."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import condition_models
import text_models
from ddpm_pipeline import (
    AlphaDDPMFittedScheduler,
    AlphaDDPMPipeline,
    AlphaDDPMScheduler,
    ImageCondition,
    VectorCondition,
    describe_conditions,
)
from ddpm_pipeline.app.engine import ANCESTRAL, COPIES, FITTED, TABS, WEIGHTS, Engine, Sampling
from ddpm_pipeline.app.worker import Worker
from ddpm_pipeline.data.images import to_array
from ddpm_pipeline.generation.drawing import Request, sample
from ddpm_pipeline.likelihood import bits_per_dim
from ddpm_pipeline.support.draws import RandomStream, seeds
from helpers import tiny_unet

T = 12
SAMPLER = {"timesteps": [11, 5, 0], "coefficients": [[0.9, 0.1, 0, 0], [0.8, 0.1, 0.1, 0], [0, 1, 0, 0]]}
NOTHING = Request()


def scheduler(**config) -> AlphaDDPMScheduler:
    kind = AlphaDDPMFittedScheduler if "fitted_samplers" in config else AlphaDDPMScheduler
    return kind(num_train_timesteps=T, beta_start=0.02, beta_end=0.6, **config)


def pipeline(channels: int = 1, classes: int = 0, **config) -> AlphaDDPMPipeline:
    unet = tiny_unet(in_channels=channels, out_channels=channels, num_class_embeds=classes + 1 if classes else None)
    if classes:
        describe_conditions(unet, class_names=[f"class {i}" for i in range(classes)], condition_dropout=0.1)
    pipe = AlphaDDPMPipeline(unet, scheduler(**config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(pipeline(fitted_samplers={"3": {**SAMPLER, "guidance_scale": 1.0, "rmse": 0.1}}), "digits")


@pytest.fixture(scope="module")
def picture(engine) -> torch.Tensor:
    return torch.randint(0, 256, (1, 1, *engine.size), generator=torch.Generator().manual_seed(1)) / 255


def last(steps) -> torch.Tensor:
    *_, (_, images) = steps
    return images


# ---- what a model can be asked --------------------------------------------------------------------------


def test_samplers_and_their_calls_are_those_that_the_model_takes(engine):
    assert next(iter(engine.samplers)) == FITTED and engine.samplers[FITTED][1] == [3]
    assert engine.samplers[ANCESTRAL][1] == [5, 10, T] and engine.default_calls(ANCESTRAL) == T
    assert FITTED not in engine.editing_samplers
    assert "fitted for 3 network calls" in engine.facts
    assert FITTED not in Engine(pipeline(), "plain").samplers


def test_tabs_that_a_model_cannot_serve_say_why(engine):
    assert [engine.why_not(tab) for tab in TABS] == [None] * len(TABS)
    bands = Engine(pipeline(6), "bands")
    assert bands.why_not("Draw") is None and all("6 channels" in bands.why_not(tab) for tab in TABS[1:])
    assert "channels 1, 2, 3 of 6" in bands.facts
    assert bands.show(last(bands.draw(NOTHING, Sampling(ANCESTRAL, T)))).mode == "RGB"
    mapped = Engine(condition_models.pipeline(1, ImageCondition(1, classes=3)), "maps")
    assert mapped.why_not("Forward process") is None and "condition image" in mapped.why_not("Draw")


def in_model(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(to_array(image, (8, 8), 1)).permute(2, 0, 1)[None] / 255


# ---- pictures -------------------------------------------------------------------------------------------


def test_pictures_are_read_as_by_the_package_and_shown_ones_come_back_exactly(engine, picture, tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (50, 30, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    cases = {
        "rgba.png": Image.fromarray(colours),
        "la.png": Image.fromarray(colours).convert("LA"),
        "grey.png": Image.fromarray(colours[..., 0]),
        "deep.png": Image.fromarray(colours[..., 0].astype(np.uint16) * 257),
        "palette.gif": Image.fromarray(colours[..., :3]).convert("P"),
    }
    for name, image in cases.items():
        image.save(tmp_path / name)
        assert torch.equal(engine.read(tmp_path / name), in_model(Image.open(tmp_path / name))), name
    Image.fromarray(colours[..., 0]).save(tmp_path / "turned.png", exif=turned)
    upright = Image.fromarray(np.rot90(colours[..., 0], -1).copy())
    assert torch.equal(engine.read(tmp_path / "turned.png"), in_model(upright))
    shown = engine.show(picture)
    assert shown.size == (448, 448)
    shown.save(tmp_path / "shown.png")
    assert torch.equal(engine.read(tmp_path / "shown.png"), picture)


def test_what_is_no_picture_is_refused_in_words(engine, tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="picture a cannot be read: cannot identify its format"):
        engine.read(tmp_path / "text.png", "picture a")
    with pytest.raises(ValueError, match="no picture yet"):
        engine.read(None)
    monkeypatch.setattr("ddpm_pipeline.data.images.MAX_PIXELS", 10_000)
    Image.new("1", (101, 100)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="decompression bomb"):
        engine.read(tmp_path / "bomb.png")


def test_the_brush_marks_pixels_of_the_model(engine):
    layer = np.zeros((80, 80, 4), np.uint8)
    layer[10:20, 30:36, 3] = 255  # more than half of pixel (1, 3)
    layer[52:54, 70:80, 3] = 255  # a fifth of pixel (5, 7)
    assert engine.painted([layer]).nonzero().tolist() == [[0, 0, 1, 3]]
    for layers in ([], [np.zeros_like(layer)]):
        with pytest.raises(ValueError, match="Nothing is painted"):
            engine.painted(layers)


# ---- tabs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, calls", [(FITTED, 3), (ANCESTRAL, 5), ("DDIM", 5)])
def test_drawn_pictures_are_those_of_generate(engine, sampler, calls):
    steps = list(engine.draw(NOTHING, Sampling(sampler, calls, seed=4), 3))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps) and steps[-1][0] == calls
    pipe = pipeline()
    pipe.scheduler = engine.samplers[sampler][0]
    assert torch.equal(steps[-1][1], sample(pipe, range(3), 4, calls).images)


def test_prompts_classes_and_numbers_are_told():
    for pipe, told, arguments in (
        (text_models.make(scheduler=scheduler(variance_type="learned_range")), ["seven"], {"prompt": "seven"}),
        (pipeline(classes=3), ["class 2"], {"class_labels": "class 2"}),
        (pipeline(classes=3), [None], {"class_labels": [None]}),
        (condition_models.pipeline(1, None, VectorCondition(("age",), (40.0,), (10.0,))), [30.0], {"condition_vector": [30.0]}),
    ):
        engine = Engine(pipe, "told")
        images = last(engine.draw(engine.request(told, 3.0), Sampling("DDIM", 5, seed=2)))
        generator = torch.Generator().manual_seed(int(seeds(2, RandomStream.PREVIEW, 0, 1)[0]))
        pipe.scheduler = engine.samplers["DDIM"][0]
        call = {"num_inference_steps": 5, "output_type": "pt", "guidance_scale": 3.0}
        assert torch.allclose(images, pipe(generator=generator, **arguments, **call).images, atol=1e-5), engine.kind
    assert Engine(pipeline(classes=3), "x").classes == ["class 0", "class 1", "class 2"]


def test_refusals_are_value_errors(engine, picture):
    for problem, steps in {
        "too many": lambda: engine.draw(NOTHING, Sampling(ANCESTRAL, 5), 17),
        "not one of the samplers": lambda: engine.draw(NOTHING, Sampling("none", 5)),
        "5, 10, 12 network calls, not 13": lambda: engine.draw(NOTHING, Sampling(ANCESTRAL, 13)),
        "3 network calls, not 5": lambda: engine.draw(NOTHING, Sampling(FITTED, 5)),
        "begin in the middle": lambda: engine.interpolate(picture, picture, 5, NOTHING, Sampling(FITTED, 3)),
    }.items():
        with pytest.raises(ValueError, match=problem):
            list(steps())


def test_noising_is_equation_4_10_with_one_noise_for_all_timesteps(engine, picture):
    x_0 = picture * 2 - 1
    assert torch.equal(engine.noised(picture, -1).x, x_0)
    found = [engine.noised(picture, t) for t in (0, 6, T - 1)]
    noises = [(each.x - each.signal * x_0) / each.noise for each in found]
    for each, noise, t in zip(found, noises, (0, 6, T - 1), strict=True):
        assert each.signal**2 == pytest.approx(float(engine.pipe.scheduler.alphas_cumprod[t]))
        assert each.signal**2 + each.noise**2 == pytest.approx(1)
        assert torch.allclose(noise, noises[-1], atol=1e-4)
    with pytest.raises(ValueError, match="-1 to 11"):
        engine.noised(picture, T)


def test_inpainting_keeps_and_interpolation_joins_its_pictures(engine, picture):
    painted = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    painted[..., :3] = True
    images = last(engine.inpaint(picture, painted, NOTHING, Sampling(ANCESTRAL, 5), 2))
    assert images.shape == (2, 1, 8, 8) and torch.allclose(images[..., 3:], picture[..., 3:].expand(2, -1, -1, -1), atol=1e-6)
    assert not torch.equal(images[0, ..., :3], images[1, ..., :3])
    other = 1 - picture
    joined = last(engine.interpolate(picture, other, 6, NOTHING, Sampling("DDIM", 5)))
    assert torch.equal(joined[0], picture[0]) and torch.equal(joined[-1], other[0]) and len(joined) == len(WEIGHTS) + 2
    generator = torch.Generator().manual_seed(0)
    engine.pipe.scheduler = engine.samplers["DDIM"][0]
    expected = engine.pipe.interpolate(picture, other, 6, WEIGHTS, generator, 5, output_type="pt").images
    assert torch.equal(joined[1:-1], expected)


@pytest.mark.parametrize("kind", ["none", "text"])
def test_likelihood_is_the_bound_of_the_package(kind, picture):
    pipe = pipeline() if kind == "none" else text_models.make(scheduler=scheduler(variance_type="learned_range"))
    engine = Engine(pipe, kind)
    *_, bound = engine.likelihood(picture, engine.request(["seven"], 1.0), rounds=2, seed=3)
    states = {} if kind == "none" else {"encoder_hidden_states": pipe.encode_prompt("seven", False)[0].expand(COPIES, -1, -1)}
    own = [torch.Generator().manual_seed(int(each)) for each in seeds(3, RandomStream.NOISE, 1, COPIES)]
    x = (picture * 2 - 1).expand(COPIES, -1, -1, -1)
    expected = bits_per_dim(pipe.unet, pipe.scheduler, x, generator=own, model_kwargs=states, progress=False)
    assert torch.allclose(bound.totals[COPIES:], expected.total)
    timesteps, terms = bound.points()
    assert sorted(set(timesteps)) == [*range(T)] and len(terms) == 2 * COPIES * T
    assert bound.total == pytest.approx(bound.totals.mean().item()) and bound.standard_error > 0


# ---- many at once ---------------------------------------------------------------------------------------


def test_users_at_once_get_what_they_would_alone(engine, picture):
    wanted = [(FITTED, 3), (ANCESTRAL, 5), ("DDIM", 5), ("none", 5)] * 3

    def ask(number: int) -> torch.Tensor | None:
        try:
            name, calls = wanted[number]
            if name == FITTED:
                list(engine.likelihood(picture, NOTHING, 1))
            return last(engine.draw(NOTHING, Sampling(name, calls, number), 2))
        except ValueError:
            return None

    with ThreadPoolExecutor(len(wanted)) as pool:
        together = list(pool.map(ask, range(len(wanted))))
    for number, (name, _) in enumerate(wanted):
        assert together[number] is None if name == "none" else torch.equal(together[number], ask(number))


def test_a_job_whose_user_left_stops():
    worker, steps, stopped = Worker(), [], threading.Event()

    def job(report):
        while not report(len(steps)):
            steps.append(None)
        stopped.set()

    watched = worker.watch(job)
    next(watched)
    watched.close()
    assert stopped.wait(10)
    assert worker.do(lambda: "next") == "next"
    with pytest.raises(ZeroDivisionError):
        list(worker.watch(lambda report: 1 / 0))
