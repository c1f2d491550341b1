"""What all pipelines share, held against exact noise predictors: guidance, images as input, masks, mixtures, trajectories."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler, describe_conditions
from ddpm_pipeline.editing_alpha_ddpm import Edit
from ddpm_pipeline.sampling_alpha_ddpm import guide
from ddpm_pipeline.support.pictures import save_gif, save_strip, strip
from helpers import tiny_unet

MEANS = torch.tensor([-0.5, 0.5, 0.0])  # of two classes, and of "no class"
STD = 0.2
ALPHAS_CUMPROD = AlphaDDPMScheduler().alphas_cumprod


class Oracle(ModelMixin, ConfigMixin):
    """The best predictor for images whose pixels are N(m, s²) of their class, or, if `flat`, all equal to one N(0, s²)."""

    @register_to_config
    def __init__(self, prediction_type="epsilon", std=STD, flat=False, num_class_embeds=3, sample_size=4, in_channels=1):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.batches, self.seen = [], []

    def forward(self, sample, timestep, class_labels=None):
        self.batches.append(len(sample))
        self.seen.append((int(timestep), sample.clone()))
        alpha = ALPHAS_CUMPROD[int(timestep)].double()
        x_t = sample.double()
        if self.config.flat:
            pixels, power = sample[0].numel(), self.config.std**2
            mean = x_t.mean(dim=(1, 2, 3), keepdim=True).expand_as(x_t)
            x_0 = mean * alpha.sqrt() * power * pixels / (alpha * power * pixels + 1 - alpha)
        else:
            m = MEANS[class_labels].double().view(-1, 1, 1, 1)
            x_0 = m + alpha.sqrt() * STD**2 / (alpha * STD**2 + 1 - alpha) * (x_t - alpha.sqrt() * m)
        noise = (x_t - alpha.sqrt() * x_0) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * x_0
        output = {"epsilon": noise, "sample": x_0, "v_prediction": velocity}[self.config.prediction_type]
        return UNet2DOutput(sample=output.to(sample.dtype))


def oracle_pipe(prediction_type="epsilon", **config) -> AlphaDDPMPipeline:
    unet = Oracle(prediction_type=prediction_type, **config)
    if not config.get("flat"):
        describe_conditions(unet, class_names=["low", "high"], condition_dropout=0.1)
    pipe = AlphaDDPMPipeline(unet, AlphaDDPMScheduler(prediction_type=prediction_type, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network_pipe(scheduler=None, **config) -> AlphaDDPMPipeline:
    unet = tiny_unet(**config)
    if config.get("num_class_embeds"):
        names = [f"class {i}" for i in range(config["num_class_embeds"] - 1)]
        describe_conditions(unet, class_names=names, condition_dropout=0.1)
    pipe = AlphaDDPMPipeline(unet, scheduler or AlphaDDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed=0, count=1) -> torch.Tensor:
    """Random bytes as [count, 1, 8, 8] in [0, 1]."""
    return torch.randint(0, 256, (count, 1, 8, 8), generator=seeded(seed)) / 255


# ---- guidance ---------------------------------------------------------------------------------------


def test_guided_samples_are_the_same_for_epsilon_x0_and_v():
    drawn = [
        oracle_pipe(kind)(class_labels=["low", "high"], guidance_scale=1.5, generator=seeded(), num_inference_steps=50,
                          output_trajectory=True).trajectory[-1]
        for kind in ("epsilon", "sample", "v_prediction")
    ]  # fmt: skip
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], atol=2e-4, rtol=0)


def test_guidance_moves_the_distribution_as_its_formula_says():
    # guiding N(m, s²) away from N(0, s²) by w is predicting for N(w m, s²)
    for scale, mean in ((1.0, 0.5), (1.6, 0.8), (0.0, 0.0)):
        pipe = oracle_pipe(sample_size=32)
        x = pipe(8, class_labels="high", guidance_scale=scale, generator=seeded(), output_trajectory=True).trajectory[-1]
        assert x.mean().item() == pytest.approx(mean, abs=0.01)
        assert x.std().item() == pytest.approx(STD, rel=0.05)


def test_guidance_is_one_batched_pass_and_only_where_it_is_wanted():
    pipe = oracle_pipe()
    cases = {
        (1.0, (0.0, 1.0)): [3] * 8,
        (2.0, (0.0, 1.0)): [6] * 8,
        (2.0, (0.25, 0.75)): [3, 3, 6, 6, 6, 6, 3, 3],
        (2.0, (0.5, 0.5)): [3] * 8,
    }
    for (scale, interval), batches in cases.items():
        pipe.unet.batches.clear()
        pipe(class_labels=[0, 1, 0], guidance_scale=scale, guidance_interval=interval, num_inference_steps=8)
        assert pipe.unet.batches == batches


def test_the_variance_half_is_not_guided_and_rescaling_restores_the_deviation():
    u, c = torch.randn(2, 3, 4, 8, 8, generator=seeded())  # two channels and their variances
    plain = u[:, :2] + 3 * (c[:, :2] - u[:, :2])
    for rescale in (0.0, 0.3, 1.0):
        guided = guide(u, c, channels=2, scale=3.0, rescale=rescale)
        assert torch.equal(guided[:, 2:], c[:, 2:])
        deviation = torch.lerp(plain.std((1, 2, 3)), c[:, :2].std((1, 2, 3)), rescale)
        torch.testing.assert_close(guided[:, :2].std((1, 2, 3)), deviation)
        torch.testing.assert_close(guided[:, :2] / plain, (guided[:, :1, :1, :1] / plain[:, :1, :1, :1]).expand_as(plain))


def test_learned_range_with_guidance_follows_the_two_pass_loop():
    scheduler = AlphaDDPMScheduler(variance_type="learned_range")
    pipe = network_pipe(scheduler, num_class_embeds=4, out_channels=2)
    drawn = pipe(class_labels=[0, 2], guidance_scale=2.5, generator=seeded(), num_inference_steps=6, output_type="pt")
    generator = seeded()
    scheduler = AlphaDDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(6)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            c = pipe.unet(x, t, class_labels=torch.tensor([0, 2])).sample
            u = pipe.unet(x, t, class_labels=torch.tensor([3, 3])).sample
            output = torch.cat([u[:, :1] + 2.5 * (c[:, :1] - u[:, :1]), c[:, 1:]], dim=1)
            x = scheduler.step(output, t, x, generator=generator).prev_sample
    torch.testing.assert_close(drawn.images, (x / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


# ---- labels -----------------------------------------------------------------------------------------


def test_labels_are_ids_or_names_and_none_is_no_class():
    pipe = network_pipe(num_class_embeds=4)
    options = {"generator": [seeded(i) for i in range(3)], "num_inference_steps": 4, "output_type": "pt"}
    by_id = pipe(class_labels=torch.tensor([0, 2, 1]), **options).images
    options["generator"] = [seeded(i) for i in range(3)]
    assert torch.equal(pipe(class_labels=["class 0", "class 2", "class 1"], **options).images, by_id)
    options["generator"] = [seeded(i) for i in range(3)]
    unconditional = pipe(3, **options).images
    options["generator"] = [seeded(i) for i in range(3)]
    assert torch.equal(pipe(class_labels=[None] * 3, **options).images, unconditional)
    assert not torch.equal(by_id, unconditional)


@pytest.mark.parametrize("scalar", [np.float32, np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_are_numbers(scalar):
    pipe, of = network_pipe(num_class_embeds=4), (np.int64 if scalar is np.float32 else scalar)
    options = {"class_labels": 1, "batch_size": 2, "guidance_scale": 2.0, "guidance_rescale": 0.5, "num_inference_steps": 4,
               "guidance_interval": (0.0, 0.5), "strength": 0.5, "num_images_per_prompt": 2, "num_resamples": 2}  # fmt: skip
    given = {name: of(value) if isinstance(value, int) else scalar(value) for name, value in options.items()}
    given["guidance_interval"] = tuple(map(scalar, (0.0, 0.5)))
    more = {"image": picture(), "mask_image": torch.ones(8, 8), "output_type": "latent"}
    expected = pipe(generator=seeded(), **options, **more).images
    assert torch.equal(pipe(generator=seeded(), **given, **more).images, expected)
    more = {"output_type": "pt", "num_inference_steps": of(4), "class_labels": (of(1), "class 1")}
    a, b = picture(count=2)
    weights = [scalar(0.0), scalar(1.0)]
    expected = pipe.interpolate(a, b, 500, [0, 1], seeded(), **(more | {"class_labels": [1, 1]})).images
    assert torch.equal(pipe.interpolate(a, b, of(500), weights, seeded(), **more).images, expected)
    chains = [pipe.forward_trajectory(a, timesteps, seeded()) for timesteps in ([-1, 5], [of(-1), of(5)], np.array([-1, 5]))]
    assert torch.equal(chains[0], chains[1]) and torch.equal(chains[0], chains[2])


@pytest.mark.parametrize("generator", [0, "cuda", [0, 1], np.random.default_rng(0)])
def test_a_generator_is_torch_s(generator):
    for call in (network_pipe(), lambda size, generator: network_pipe().forward_trajectory(picture(), [3], generator)):
        with pytest.raises(TypeError, match=r"torch\.Generator\(\)\.manual_seed"):
            call(2, generator=generator)
    assert len(network_pipe()(2, generator=(seeded(0), seeded(1)), num_inference_steps=2).images) == 2


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [([], "at least one"), ([5, 2], "ascending"), ([3, 3], "ascending"), ([5, 1000], "-1 to 999"), ([-2, 5], "-1 to 999"),
     ([0.5], "integer")],
)  # fmt: skip
def test_timesteps_of_a_forward_trajectory(timesteps, message):
    with pytest.raises(ValueError, match=message):
        network_pipe().forward_trajectory(picture(), timesteps)


@pytest.mark.parametrize(
    "settings",
    [{"class_names": 3}, {"class_names": {"a": 1}}, {"class_names": "ab"}, {"class_names": [1, 2]},
     {"class_names": list("abcde")}, {"condition_dropout": "0.1"}, {"condition_dropout": 2}, ["a"]],
)  # fmt: skip
def test_conditions_that_a_unet_cannot_have_are_refused_when_the_pipeline_is_built(settings):
    unet = tiny_unet(num_class_embeds=4)
    unet.register_to_config(_alpha_ddpm=settings)
    with pytest.raises(ValueError, match="config"):
        AlphaDDPMPipeline(unet, AlphaDDPMScheduler())


def test_a_wrapped_unet_is_refused():
    pipe = network_pipe()
    with pytest.raises(ValueError, match=r"unet\.module"):
        AlphaDDPMPipeline(torch.nn.DataParallel(pipe.unet), pipe.scheduler)
    pipe.unet = torch.nn.DataParallel(pipe.unet)
    with pytest.raises(ValueError, match=r"unet\.module"):
        pipe()


def test_a_model_trained_without_dropout_warns_when_guided():
    pipe = network_pipe(num_class_embeds=3)
    describe_conditions(pipe.unet, class_names=["a", "b"], condition_dropout=0.0)
    with pytest.warns(UserWarning, match="without condition dropout"):
        pipe(class_labels="a", guidance_scale=2.0, num_inference_steps=2)


def test_guidance_without_labels_warns_and_draws_without_it():
    for config in ({}, {"num_class_embeds": 4}):
        pipe = network_pipe(**config)
        expected = pipe(2, num_inference_steps=2, generator=seeded(), output_type="pt").images
        with pytest.warns(UserWarning, match="without class_labels" if config else "of which this model has none"):
            drawn = pipe(2, guidance_scale=2.0, num_inference_steps=2, generator=seeded(), output_type="pt").images
        assert torch.equal(drawn, expected)


def test_a_callback_changes_the_guidance_of_the_steps_to_come():
    pipe, options = network_pipe(num_class_embeds=4), {"class_labels": 1, "num_inference_steps": 4, "output_type": "pt"}
    guided = pipe(guidance_scale=2.0, generator=seeded(), **options).images

    def more(pipe, index, t, tensors):
        assert pipe.guidance_scale == (2.0 if index == 0 else 9.0) and pipe.do_classifier_free_guidance
        pipe._guidance_scale = 9.0
        return {}

    changed = pipe(guidance_scale=2.0, generator=seeded(), callback_on_step_end=more, **options).images
    assert not torch.allclose(changed, guided, atol=1e-3)
    assert not torch.allclose(changed, pipe(guidance_scale=9.0, generator=seeded(), **options).images, atol=1e-3)
    plain = pipe(generator=seeded(), **options).images
    assert not pipe.do_classifier_free_guidance and not torch.allclose(plain, guided, atol=1e-3)


def test_labels_images_and_masks_have_one_row_each_per_prompt():
    pipe = network_pipe(num_class_embeds=4)
    options = {"num_inference_steps": 4, "output_type": "pt", "image": picture(count=2), "strength": 0.5}
    generators = [seeded(i) for i in range(4)]
    drawn = pipe(class_labels=[0, 1], num_images_per_prompt=2, generator=generators, **options).images
    for i, x in enumerate(drawn):
        alone = options | {"image": options["image"][i // 2 :][:1]}
        expected = pipe(class_labels=i // 2, generator=[seeded(i)], **alone).images
        torch.testing.assert_close(x[None], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": "clas 1"}, "near it: .*'class 1'"),
        ({"class_labels": 3}, "ids are 0 to 2"),
        ({"class_labels": True}, "not a class of this model"),
        ({"class_labels": []}, "at least one label"),
        ({"class_labels": [0, 1, 2], "batch_size": 2}, "3 class_labels for a batch of 2"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators for 2 images"),
        ({"class_labels": 0, "guidance_scale": float("nan")}, "finite"),
        ({"class_labels": 0, "guidance_rescale": 2}, "from 0"),
        ({"class_labels": 0, "guidance_interval": (0.5, 0.2)}, "start <= end"),
        ({"strength": 0.5}, "needs an image"),
        ({"mask_image": torch.ones(8, 8)}, "needs an image"),
        ({"image": picture(), "strength": 1.5}, "from 0"),
        ({"image": torch.zeros(1, 1, 4, 4)}, r"this model needs \(1, 8, 8\)"),
        ({"image": torch.full((1, 1, 8, 8), -1.0)}, r"must be in \[0, 1\]"),
        ({"image": picture(count=3), "batch_size": 2}, "3 images for a batch of 2"),
        ({"image": picture(), "mask_image": torch.ones(4, 4)}, "mask_image has shape"),
        ({"image": picture(), "num_resamples": 2}, "with a mask_image only"),
        ({"image": "seven.png"}, "give PIL images"),
    ],
)
def test_what_cannot_be_used_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        network_pipe(num_class_embeds=4)(**{"num_inference_steps": 2, **options})


# ---- images in, images out --------------------------------------------------------------------------


def test_strength_is_a_share_of_the_steps_whatever_its_rounding():
    for steps in (7, 10, 100, 1000):
        for taken in range(steps + 1):
            assert Edit(picture(), taken / steps).first_step(steps) == steps - taken
    assert Edit(picture(), 0.299).first_step(100) == 71  # no step is taken in part
    pipe = oracle_pipe(sample_size=8)
    pipe(class_labels=0, image=picture(), strength=0.29, num_inference_steps=100)
    assert [t for t, _ in pipe.unet.seen] == list(range(280, -1, -10))


@pytest.mark.parametrize("kind", [AlphaDDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_a_chain_starts_from_the_image_noised_to_its_first_timestep(kind):
    pipe, x = network_pipe(), picture()
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    started = pipe(image=x, strength=0.5, num_inference_steps=10, generator=seeded(), output_trajectory=True).trajectory
    assert len(started) == 6
    scheduler = kind.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(10)
    noise = torch.randn(x.shape, generator=seeded())
    torch.testing.assert_close(started[0], scheduler.add_noise(x * 2 - 1, noise, scheduler.timesteps[5:6]))


def test_every_network_call_sees_the_marginal_of_its_timestep():
    """Data N(0, s²) and its exact predictor: from noise, from images, and again after RePaint has gone back."""
    data = torch.randn(64, 1, 16, 16, generator=seeded(5)) * STD
    mask, steps = torch.zeros(16, 16), 20
    mask[:, 8:] = 1
    alphas_cumprod = AlphaDDPMScheduler().alphas_cumprod.double()
    moments = (1 - alphas_cumprod) / (alphas_cumprod * STD**2 + 1 - alphas_cumprod)
    for options in ({}, {"image": data / 2 + 0.5}, {"image": data / 2 + 0.5, "mask_image": mask, "num_resamples": 3}):
        pipe = oracle_pipe(sample_size=16)  # analytic: its chain is exact for any number of steps
        config = {"variance_type": "analytic", "noise_second_moments": moments.tolist(), "clip_sample": False}
        pipe.scheduler = AlphaDDPMScheduler(**config)
        pipe(64, class_labels=[None] * 64, num_inference_steps=steps, generator=seeded(), **options)
        calls = {(): 20, ("image",): 10}.get(tuple(options), 19 * 3 + 1)  # the last step is not repeated
        assert len(pipe.unet.seen) == calls
        for t, x_t in pipe.unet.seen:
            variance = (alphas_cumprod[t] * STD**2 + 1 - alphas_cumprod[t]).item()
            assert x_t.var().item() == pytest.approx(variance, rel=5 * (2 / x_t.numel()) ** 0.5 + 2e-3), (t, list(options))


@pytest.mark.parametrize("out_channels", [1, 2])
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_run_as_in_diffusers_own_loop(kind, out_channels):
    """With what they start from and what they show the network; without the variance half unless they learn it."""
    pipe = network_pipe(out_channels=out_channels)
    config = {**AlphaDDPMScheduler().config, "variance_type": "fixed_small" if kind is DDPMScheduler else "learned_range"}
    pipe.scheduler = kind.from_config(config)
    drawn = pipe(2, num_inference_steps=6, generator=seeded(), output_type="pt").images
    scheduler, generator = kind.from_config(config), seeded()
    scheduler.set_timesteps(6)
    x = torch.randn(2, 1, 8, 8, generator=generator) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = pipe.unet(scheduler.scale_model_input(x, t), t).sample[:, :1]
            x = scheduler.step(output, t, x, generator=generator).prev_sample
    torch.testing.assert_close(drawn, (x / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)


def test_strength_0_gives_the_image_back_and_more_of_it_leaves_less():
    pipe, x = oracle_pipe(sample_size=8), picture()
    original = Image.fromarray((x[0, 0] * 255).round().byte().numpy())
    back = pipe(image=original, strength=0.0).images[0]
    assert np.array_equal(np.asarray(back), np.asarray(original))
    drawn = [
        pipe(class_labels=0, image=x, strength=s, generator=seeded(), output_trajectory=True).trajectory[-1]
        for s in (0.01, 0.05, 1.0)
    ]
    left = [torch.corrcoef(torch.stack([y.flatten(), x.flatten()]))[0, 1].item() for y in drawn]
    assert 1 > left[0] > left[1] > 0.6 > 0.4 > left[2]


@pytest.mark.parametrize("resamples", [1, 3])
def test_kept_pixels_are_kept_to_the_byte_and_the_others_are_painted(resamples):
    original = [Image.fromarray((picture(i)[0, 0] * 255).round().byte().numpy()) for i in range(2)]
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 4:] = 255
    pipe = network_pipe()
    painted = pipe(
        2, image=original, mask_image=Image.fromarray(mask), num_resamples=resamples, num_inference_steps=5, generator=seeded()
    ).images  # fmt: skip
    for before, after in zip(original, painted, strict=True):
        before, after = np.asarray(before), np.asarray(after)
        assert np.array_equal(before[:, :4], after[:, :4])
        assert not np.array_equal(before[:, 4:], after[:, 4:])


def test_what_is_painted_fits_what_is_kept():
    # flat grey images: the kept half tells the grey of the other
    pipe = oracle_pipe(flat=True, num_class_embeds=None, sample_size=8, std=0.5)
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    for grey in (0.2, 0.9):
        x = pipe(4, image=torch.full((1, 8, 8), grey), mask_image=mask, num_resamples=2, num_inference_steps=100,
                 generator=seeded(), output_type="pt").images  # fmt: skip
        assert (x[..., 4:] - grey).abs().max() < 0.06


def test_interpolation_shares_its_noise_and_reconstructs_at_its_ends():
    pipe, (a, b) = network_pipe(), picture(count=2)
    steps = []
    options = {"at": 320, "num_inference_steps": 20, "output_type": "pt"}
    options["callback_on_step_end"] = lambda pipe, index, t, tensors: steps.append(int(t))
    same = pipe.interpolate(a, a, weights=(0.0, 0.3, 1.0), generator=seeded(), **options).images
    torch.testing.assert_close(same[1:], same[:1].expand(2, -1, -1, -1), atol=1e-5, rtol=0)
    assert steps == [300, 250, 200, 150, 100, 50, 0]
    mixed = pipe.interpolate(a, b, generator=seeded(), **options).images
    assert len(mixed) == 5
    torch.testing.assert_close(mixed[0], same[0], atol=1e-5, rtol=0)  # at weight 0, b has no say
    ends = pipe.interpolate(b, b, weights=(0.0,), generator=seeded(), **options).images
    torch.testing.assert_close(mixed[-1], ends[0], atol=1e-5, rtol=0)
    steps.clear()
    pipe.interpolate(a, b, **(options | {"num_inference_steps": None, "timesteps": [999, 300, 200, 0]}))
    assert steps == [300, 200, 0]


def test_interpolation_of_flat_images_gives_the_grey_between_them():
    pipe = oracle_pipe(flat=True, num_class_embeds=None, sample_size=16, std=0.5)
    a, b = torch.full((1, 16, 16), 0.2), torch.full((1, 16, 16), 0.8)
    x = pipe.interpolate(a, b, at=100, weights=(0.0, 0.5, 1.0), generator=seeded(), output_type="pt").images
    greys = x.mean((1, 2, 3))  # the shared noise moves all of them alike
    torch.testing.assert_close(greys, torch.tensor([0.2, 0.5, 0.8]), atol=0.05, rtol=0)
    torch.testing.assert_close(greys.diff(), torch.full((2,), 0.3), atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="at=1000"):
        pipe.interpolate(a, b, at=1000)
    with pytest.raises(ValueError, match="from 0"):
        pipe.interpolate(a, b, at=5, weights=(2.0,))


# ---- seeing the process -----------------------------------------------------------------------------


def test_forward_trajectory_is_one_chain_with_the_right_marginals():
    pipe = network_pipe()
    scheduler, image = AlphaDDPMScheduler(), picture()
    timesteps = (-1, 10, 200, 999)
    x = torch.cat([pipe.forward_trajectory(image, timesteps, seeded(seed)) for seed in range(300)], dim=1)  # [4, 300, 1, 8, 8]
    x_0 = image * 2 - 1
    torch.testing.assert_close(x[0], x_0.expand(300, -1, -1, -1))
    noise = {}
    for x_t, t in zip(x[1:], timesteps[1:], strict=True):
        q = scheduler.q_mean_variance(x_0, t)
        noise[t] = (x_t - q.mean) / q.variance.sqrt()
        assert abs(noise[t].mean()) < 0.03 and abs(noise[t].var() - 1) < 0.03
    # x_200 comes from x_10: their noises correlate by √(ᾱ_200/ᾱ_10 · (1-ᾱ_10)/(1-ᾱ_200))
    alpha = scheduler.alphas_cumprod
    expected = (alpha[200] / alpha[10] * (1 - alpha[10]) / (1 - alpha[200])).sqrt().item()
    assert (noise[10] * noise[200]).mean().item() == pytest.approx(expected, abs=0.03)
    with pytest.raises(ValueError, match="ascending"):
        pipe.forward_trajectory(image, (5, 2))


def test_the_reverse_trajectory_ends_in_the_images_and_becomes_pictures(tmp_path):
    output = network_pipe()(2, num_inference_steps=10, generator=seeded(), output_type="pt", output_trajectory=True)
    assert output.trajectory.shape == (11, 2, 1, 8, 8)
    torch.testing.assert_close((output.trajectory[-1] / 2 + 0.5).clamp(0, 1), output.images)
    assert torch.equal(output.trajectory[0], torch.randn(2, 1, 8, 8, generator=seeded()))
    save_strip(output.trajectory, tmp_path / "strip.png", count=5)
    save_gif(output.trajectory, tmp_path / "process.gif", count=7)
    five = Image.open(tmp_path / "strip.png")
    assert five.size == strip(output.trajectory, 5).size and five.width > 2 * five.height
    gif = Image.open(tmp_path / "process.gif")
    assert gif.n_frames == 7 and gif.info["loop"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["process.gif", "strip.png"]
