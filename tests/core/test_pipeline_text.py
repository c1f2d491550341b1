"""The text pipeline: the same images as stock's IFPipeline, from any encoder, and captions of every kind."""

import logging
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline, IFPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler, AlphaDDPMTextToImagePipeline
from helpers import tiny_unet
from text_models import make, make_unet

STRANGE = ["", "七个手写数字", "seven 🎉👩‍👩‍👧", "x" * 10_000, " \n\t ", "\x00\ud7ff"]


def draw(pipe, prompt, seed=0, **options) -> torch.Tensor:
    options = {"num_inference_steps": 5, "output_type": "np", **options}
    return torch.from_numpy(pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images)


def test_images_that_are_not_square(tmp_path):
    """The plain call has to be told their size, which IFPipeline does not read from a list."""
    made = make()
    unet = make_unet(sample_size=(8, 16)).eval()
    AlphaDDPMTextToImagePipeline(unet, made.text_encoder, made.tokenizer, made.scheduler).save_pretrained(tmp_path)
    pipe, stock = AlphaDDPMTextToImagePipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)
    ours = draw(pipe, "seven", guidance_scale=2.0)
    assert ours.shape == (1, 8, 16, 1)
    stocks = draw(stock, "seven", guidance_scale=2.0, height=8, width=16)
    torch.testing.assert_close(ours, stocks, atol=2e-4, rtol=0)
    with pytest.raises(TypeError):
        draw(stock, "seven")


@pytest.mark.parametrize("kind", ["clip", "t5", "bert"])
def test_the_plain_call_draws_the_same_images_as_stock(kind, tmp_path, caplog):
    pipe = make(kind)
    pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock).__name__ == "IFPipeline" and type(stock.scheduler).__name__ == "DDPMScheduler"
    stock.set_progress_bar_config(disable=True)
    again = AlphaDDPMTextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    prompts = [" A handwritten SEVEN ", "three, in ink"]
    for options in (
        {"guidance_scale": 3.0, "num_images_per_prompt": 2},
        {"guidance_scale": 1.0},
        {"guidance_scale": 2.0, "negative_prompt": ["zero", "the digit 7"], "num_images_per_prompt": 2},
    ):
        expected = draw(stock, prompts, **options)
        assert expected.std() > 0.05
        torch.testing.assert_close(draw(pipe, prompts, **options), expected, atol=2e-4, rtol=0)
        torch.testing.assert_close(draw(again, prompts, **options), expected, atol=2e-4, rtol=0)


def test_prompts_matter_and_embeddings_stand_for_them():
    pipe = make()
    seven = draw(pipe, "a handwritten seven")
    assert not torch.allclose(seven, draw(pipe, "zero"), atol=1e-3)
    states, negative = pipe.encode_prompt("a handwritten seven")
    torch.testing.assert_close(draw(pipe, None, prompt_embeds=states), seven)
    torch.testing.assert_close(draw(pipe, None, prompt_embeds=states, negative_prompt_embeds=negative), seven)


@pytest.mark.parametrize("count", [1, 2])
def test_encode_prompt_is_stock_s(count):
    pipe = make("t5")
    stock = IFPipeline(**pipe.components, safety_checker=None, feature_extractor=None, watermarker=None,
                       requires_safety_checker=False)  # fmt: skip
    prompts = [" A SEVEN ", "three"]
    for options in ({}, {"negative_prompt": ["zero", "one"]}, {"do_classifier_free_guidance": False}):
        found = pipe.encode_prompt(prompts, num_images_per_prompt=count, **options)
        for states, expected in zip(found, stock.encode_prompt(prompts, num_images_per_prompt=count, **options), strict=True):
            assert states is expected is None or torch.equal(states, expected)


def test_one_prompt_serves_for_several_images_and_latents():
    pipe, images = make(), torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipe("zero", image=images, strength=0, output_type="pt").images, images)
    assert len(pipe("zero", latents=torch.randn(4, 1, 8, 8), num_images_per_prompt=2, num_inference_steps=1).images) == 4
    again = pipe("zero", image=images, strength=0, num_images_per_prompt=2, output_type="pt").images
    assert torch.equal(again, images.repeat_interleave(2, dim=0))


def test_parts_of_a_pipeline_encode_and_sample_by_themselves():
    pipe = make()
    expected = draw(pipe, "zero")
    parts = pipe.components
    states, negative = AlphaDDPMTextToImagePipeline(**(parts | {"unet": None, "scheduler": None})).encode_prompt("zero")
    rest = AlphaDDPMTextToImagePipeline(**(parts | {"text_encoder": None, "tokenizer": None}))
    rest.set_progress_bar_config(disable=True)
    assert torch.equal(draw(rest, None, prompt_embeds=states, negative_prompt_embeds=negative), expected)
    for options in ({"prompt": "zero"}, {"prompt_embeds": states}):  # the second is guided, by the empty prompt
        with pytest.raises(ValueError, match="text encoder"):
            rest(**options)


def test_an_image_with_its_own_generator_does_not_depend_on_its_batch():
    pipe = make()
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    options = {"num_inference_steps": 5, "output_type": "pt"}
    batch = pipe(["zero", "the digit 7"], num_images_per_prompt=2, generator=generators, **options).images
    alone = pipe("the digit 7", generator=torch.Generator().manual_seed(3), **options).images
    torch.testing.assert_close(batch[3:], alone, atol=1e-5, rtol=0)


def test_images_masks_and_mixtures_work_with_text():
    pipe, image = make(), torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pipe("zero", image=image, strength=0, output_type="pt").images, image)
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    drawn = pipe("zero", image=image, mask_image=mask, num_inference_steps=4, output_type="pt").images
    torch.testing.assert_close(drawn[..., 4:, :], image[..., 4:, :])
    mixed = pipe.interpolate(image, 1 - image, 500, num_inference_steps=8, prompt="zero", output_type="pt").images
    assert mixed.shape == (5, 1, 8, 8)


def test_captions_of_every_kind_are_drawn_and_what_is_cut_is_shown():
    pipe = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        drawn = draw(pipe, STRANGE, num_inference_steps=2)
    assert drawn.shape == (len(STRANGE), 8, 8, 1) and torch.isfinite(drawn).all()
    with pytest.warns(UserWarning, match="cut from it: 'zero zero"):
        pipe("zero " * 100, num_inference_steps=1)


def test_the_warning_about_guidance_without_dropout():
    with pytest.warns(UserWarning, match="without condition dropout"):
        make(dropout=0.0)("zero", num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(dropout=0.0)("zero", num_inference_steps=1, guidance_scale=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either prompt or prompt_embeds"),
        ({"prompt": []}, "at least one"),
        ({"prompt": ["zero", 7]}, "list of strings"),
        ({"prompt": ["zero"] * 3, "negative_prompt": ["one"] * 2}, "2 negative prompts for a batch of 3"),
        ({"prompt": ["zero"] * 2, "num_images_per_prompt": 2, "generator": [torch.Generator()] * 2}, "2 generators for 4"),
        ({"prompt": "zero", "num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"prompt_embeds": torch.zeros(1, 77, 5)}, r"\[B, tokens, 16\]"),
        ({"prompt": ["zero"] * 2, "image": torch.zeros(3, 1, 8, 8)}, "3 images for a batch of 2"),
    ],
)
def test_what_cannot_be_used_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        make()(num_inference_steps=1, **options)


def test_embeddings_may_be_numpy_s_and_guidance_needs_equal_lengths():
    pipe = make()
    states, negative = pipe.encode_prompt("zero")
    expected = draw(pipe, None, prompt_embeds=states, negative_prompt_embeds=negative)
    given = {"prompt_embeds": states.numpy(), "negative_prompt_embeds": negative.numpy()}
    assert torch.equal(draw(pipe, None, **given), expected)
    assert draw(pipe, None, prompt_embeds=states[:, :9], guidance_scale=1.0).shape == (1, 8, 8, 1)
    with pytest.raises(ValueError, match="9 and 77 tokens"):
        draw(pipe, None, prompt_embeds=states[:, :9])


def test_a_folder_of_the_other_kind_names_the_class_to_use(tmp_path):
    make().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="AlphaDDPMTextToImagePipeline"):
        AlphaDDPMPipeline.from_pretrained(tmp_path / "text")
    AlphaDDPMPipeline(tiny_unet(), AlphaDDPMScheduler()).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"AlphaDDPMPipeline\."):
        AlphaDDPMTextToImagePipeline.from_pretrained(tmp_path / "plain")


def test_parts_that_do_not_fit_are_refused():
    pipe = make()
    parts = {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer, "scheduler": pipe.scheduler}
    with pytest.raises(ValueError, match="UNet2DModel without cross-attention"):
        AlphaDDPMTextToImagePipeline(tiny_unet(), **parts)
    with pytest.raises(ValueError, match="cross_attention_dim is 24"):
        AlphaDDPMTextToImagePipeline(make_unet(cross_attention_dim=24), **parts)
    short = CLIPTextModel(CLIPTextConfig(hidden_size=16, num_attention_heads=2, max_position_embeddings=20))
    with pytest.raises(ValueError, match="takes 20 tokens"):
        AlphaDDPMTextToImagePipeline(pipe.unet, **{**parts, "text_encoder": short})


def test_saved_names_are_stock_and_no_path_is_written(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    make().save_pretrained(tmp_path)
    AlphaDDPMTextToImagePipeline.from_pretrained(tmp_path)
    assert not caplog.records
    index = (tmp_path / "model_index.json").read_text()
    assert '"IFPipeline"' in index and str(tmp_path) not in index and "ddpm_pipeline" not in index
