"""The unconditional pipeline: the same images as stock, from the same seeds, however it was saved and loaded."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from diffusers.utils.dynamic_modules_utils import get_relative_imports

import condition_models
import text_models
from ddpm_pipeline import AlphaDDPMImageToImagePipeline, AlphaDDPMPipeline, AlphaDDPMScheduler, AlphaDDPMTextToImagePipeline
from helpers import tiny_unet


def make(scheduler=None, **unet) -> AlphaDDPMPipeline:
    pipe = AlphaDDPMPipeline(unet=tiny_unet(**unet), scheduler=scheduler or AlphaDDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, seed=0, batch_size=2, **options) -> torch.Tensor:
    options = {"num_inference_steps": 20, "output_type": "pt", **options}
    return torch.as_tensor(pipe(batch_size, generator=torch.Generator().manual_seed(seed), **options).images)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make().save_pretrained(folder)
    return folder


def test_saved_folders_load_with_diffusers_and_with_the_package(saved):
    """By the code beside the weights alone: see test_hub_loading."""
    stock, own = DiffusionPipeline.from_pretrained(saved), AlphaDDPMPipeline.from_pretrained(saved)
    assert type(stock) is DDPMPipeline and type(stock.scheduler) is DDPMScheduler
    assert isinstance(own.scheduler, AlphaDDPMScheduler)
    theirs, ours, before = (draw(pipe, num_inference_steps=50, output_type="np") for pipe in (stock, own, make()))
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    torch.testing.assert_close(ours, before, atol=1e-6, rtol=0)


def test_saved_folder_names_stock_classes_and_no_path(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert json.loads((saved / "scheduler/scheduler_config.json").read_text())["_class_name"] == "DDPMScheduler"
    assert (saved / "unet/diffusion_pytorch_model.safetensors").is_file()
    for file in saved.rglob("*.json"):
        assert str(saved.parent) not in file.read_text()


def test_outputs_are_the_same_picture_in_three_forms():
    pipe = make()
    tensor = draw(pipe)
    array = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=20, output_type="np").images
    pictures = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=20).images
    assert tensor.shape == (2, 1, 8, 8) and array.shape == (2, 8, 8, 1)
    assert tensor.min() >= 0 and tensor.max() <= 1
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert [picture.mode for picture in pictures] == ["L", "L"]
    np.testing.assert_array_equal(np.asarray(pictures[0]), (array[0, ..., 0] * 255).round().astype("uint8"))
    assert pipe(1, num_inference_steps=2, return_dict=False)[0][0].size == (8, 8)


@pytest.mark.parametrize("channels, mode", [(3, "RGB"), (4, "RGBA")])
def test_colour_images(channels, mode):
    image = make(in_channels=channels, out_channels=channels)(num_inference_steps=2).images[0]
    assert image.mode == mode


def test_ddim_draws_the_images_of_stock_s_ddim_pipeline():
    pipe = make(DDIMScheduler())
    stock = DDIMPipeline(unet=pipe.unet, scheduler=DDIMScheduler())
    stock.set_progress_bar_config(disable=True)
    expected = stock(2, torch.Generator().manual_seed(0), num_inference_steps=20, output_type="np").images
    np.testing.assert_allclose(draw(pipe, output_type="np").numpy(), expected, atol=1e-6)


def test_learned_variance_is_used_by_ddpm_alone():
    pipe = make(AlphaDDPMScheduler(variance_type="learned_range"), out_channels=2)
    learned = draw(pipe)
    pipe.scheduler = DDPMScheduler(variance_type="learned_range")
    torch.testing.assert_close(draw(pipe), learned, atol=1e-4, rtol=0)
    pipe.scheduler = DDPMScheduler()
    fixed = draw(pipe)
    assert not torch.allclose(fixed, learned, atol=1e-2)
    pipe.scheduler = AlphaDDPMScheduler()
    torch.testing.assert_close(fixed, draw(pipe), atol=1e-4, rtol=0)


def test_half_precision_network_keeps_a_float32_chain():
    pipe = make()
    reference = draw(pipe, num_inference_steps=100)
    seen = []
    pipe.unet.to(torch.bfloat16)
    images = draw(pipe, num_inference_steps=100, callback_on_step_end=lambda p, i, t, kw: seen.append(kw["image"].dtype) or kw)
    assert set(seen) == {torch.float32}
    assert (images - reference).abs().mean() < 0.02


@pytest.mark.parametrize("name", ["latents", "image"])
def test_callback_sees_each_step_and_can_replace_the_image(name):
    """Under the name of diffusers' convention, or the older one."""
    steps = []

    def stop_at_grey(pipe, index, t, tensors):
        steps.append(int(t))
        assert tensors["pred_original_sample"].shape == tensors[name].shape
        return tensors | ({name: torch.zeros_like(tensors[name])} if index == pipe.num_timesteps - 1 else {})

    for names in ([name, "pred_original_sample"], AlphaDDPMPipeline._callback_tensor_inputs):
        images = draw(make(), callback_on_step_end=stop_at_grey, callback_on_step_end_tensor_inputs=names)
        assert (images == 0.5).all()
    assert steps == 2 * list(range(950, -1, -50))


def test_a_callback_ends_the_chain_and_its_index_counts_the_steps_that_are_run():
    seen = []

    def end(pipe, index, t, tensors):
        seen.append((index, tensors["latents"]))
        pipe._interrupt = index == 2
        return {}

    options = {"image": torch.zeros(1, 8, 8), "strength": 0.5, "callback_on_step_end": end}
    pipe = make()
    x = draw(pipe, output_type="latent", **options)
    assert [index for index, _ in seen] == [0, 1, 2] and pipe.num_timesteps == 10 and pipe.interrupt
    assert torch.equal(x, seen[-1][1])
    draw(pipe, num_inference_steps=2)
    assert not pipe.interrupt


def test_latents_are_the_noise_to_start_from_and_come_out_unclipped():
    pipe, noise = make(), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = draw(pipe, batch_size=3, num_inference_steps=1)  # one step has no other noise
    for latents in (noise, noise.double(), noise.numpy(), list(noise)):
        assert torch.equal(pipe(latents=latents, num_inference_steps=1, output_type="pt").images, expected)
    x = pipe(latents=noise, num_inference_steps=1, output_type="latent").images
    assert x.max() > 1e-3 and torch.equal((x / 2 + 0.5).clamp(0, 1), expected)
    pipe.scheduler = EulerDiscreteScheduler()
    expected = draw(pipe, batch_size=3, num_inference_steps=3)
    assert torch.equal(pipe(latents=noise, num_inference_steps=3, output_type="pt").images, expected)
    image = torch.rand(1, 1, 8, 8)
    expected = draw(pipe, batch_size=3, image=image, num_inference_steps=2)  # one step is run
    assert torch.equal(draw(pipe, batch_size=None, image=image, latents=noise, num_inference_steps=2), expected)


def test_timesteps_and_sigmas_are_the_chain_itself():
    pipe = make()
    spaced = draw(pipe, num_inference_steps=4)
    assert torch.equal(draw(pipe, num_inference_steps=None, timesteps=[750, 500, 250, 0]), spaced)
    pipe.scheduler = EulerDiscreteScheduler()
    plain = draw(pipe, num_inference_steps=5)
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    torch.testing.assert_close(draw(pipe, num_inference_steps=None, sigmas=sigmas), plain, atol=1e-4, rtol=0)


def test_a_list_of_images_makes_a_batch_of_its_length():
    pipe = make()
    images = pipe(3, num_inference_steps=2).images
    assert len(pipe(image=images, num_inference_steps=2).images) == 3
    assert len(pipe(image=images[0], mask_image=images, num_inference_steps=2).images) == 3
    drawn = pipe(image=images[:2], strength=0.0, num_images_per_prompt=2).images
    assert [np.array_equal(np.asarray(a), np.asarray(drawn[i])) for a in images[:2] for i in range(4)] == [
        True, True, False, False, False, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["compile", "layerwise casting"])
def test_what_diffusers_offers_for_speed_and_memory_works(how):
    numbers = condition_models.pipeline(1, None, condition_models.AGE)  # need help of ours in half precision
    pipe, told = (numbers.to(torch.bfloat16), {"condition_vector": 30}) if how == "compile" else (make(), {})
    expected = draw(pipe, num_inference_steps=4, **told)
    if how == "compile":
        pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    else:
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert (draw(pipe, num_inference_steps=4, **told) - expected).abs().mean() < (1e-5 if how == "compile" else 0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs a GPU")
@pytest.mark.parametrize("kind", [make, text_models.make])
@pytest.mark.parametrize("how", ["model_cpu_offload", "sequential_cpu_offload", "group_offload"])
def test_offloading_draws_the_same_images(how, kind):
    prompt = {} if kind is make else {"prompt": ["zero"] * 2}
    options = {"num_inference_steps": 4, "output_type": "pt", **({"batch_size": 2} if kind is make else prompt)}
    expected = kind().to("cuda")(generator=torch.Generator().manual_seed(0), **options).images
    pipe = kind()
    given = {"onload_device": torch.device("cuda"), "offload_type": "leaf_level"} if how == "group_offload" else {}
    getattr(pipe, f"enable_{how}")(**given)
    images = pipe(generator=torch.Generator().manual_seed(0), **options).images
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_steps_are_by_default_all_that_the_model_was_trained_on():
    count = []
    make(AlphaDDPMScheduler(num_train_timesteps=30, beta_end=0.3))(
        callback_on_step_end=lambda p, i, t, kw: count.append(i) or kw
    )
    assert len(count) == 30


@pytest.mark.parametrize(
    "options, named",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"output_type": "jpg"}, "pil, np, pt, latent"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "1 generators for 2 images"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "latents"),
        ({"latents": torch.zeros(2, 1, 8, 9)}, "1, 8, 8"),
        ({"latents": torch.zeros(2, 1, 8, 8, dtype=torch.int64)}, "floats"),
        ({"batch_size": 3, "latents": torch.zeros(2, 1, 8, 8)}, "2 latents for 3 images"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"num_inference_steps": 5, "timesteps": [9, 4]}, "timesteps"),
        ({"sigmas": [9.0, 4.0]}, "sigmas"),
    ],
)
def test_bad_input_is_named(options, named):
    with pytest.raises(ValueError, match=named):
        make()(**options)


@pytest.mark.parametrize("kind", [AlphaDDPMPipeline, AlphaDDPMImageToImagePipeline, AlphaDDPMTextToImagePipeline])
def test_what_travels_imports_only_what_travels(kind):
    """diffusers' loader copies what pipeline.py imports, and looks no further in a local folder."""
    shipped = kind.shipped_files()
    assert {"pipeline.py", "stock_format.py"} < set(shipped)
    for source in shipped.values():
        imported = get_relative_imports(source) + re.findall(r"^from \. import (\w+)", source.read_text(), re.MULTILINE)
        assert {f"{name}.py" for name in imported} <= set(shipped)

    class Mine(kind):
        pass

    assert Mine.shipped_files() == shipped


@pytest.mark.parametrize("kind", [AlphaDDPMPipeline, AlphaDDPMImageToImagePipeline, AlphaDDPMTextToImagePipeline])
def test_diffusers_loader_asks_the_hub_for_few_files(kind, tmp_path):
    """It looks for what a file imports once for every chain of imports that leads there."""
    for name, code in kind.shipped_code().items():
        (tmp_path / name).write_text(code)

    def asked(name):
        return 1 + sum(asked(f"{imported}.py") for imported in get_relative_imports(tmp_path / name))

    assert asked("pipeline.py") < 30
    assert {f"{name}.py" for name in get_relative_imports(tmp_path / "pipeline.py")} == {*kind.shipped_code()} - {"pipeline.py"}
