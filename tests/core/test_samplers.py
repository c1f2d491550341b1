"""Every scheduler that diffusers exports, in our pipeline, with an exact predictor: it samples rightly or is refused."""

import copy
import inspect
import threading

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.samplers_alpha_ddpm import SAMPLERS
from helpers import tiny_unet

MEAN, STD, STEPS = 0.3, 0.2, 30
LOG_SNR = torch.logit(AlphaDDPMScheduler().alphas_cumprod.double())
EXPORTED = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler") and inspect.isclass(kind := getattr(diffusers, name)) and issubclass(kind, SchedulerMixin)
)
USABLE = [name for name in EXPORTED if name in SAMPLERS]
# Their chains are the probability-flow ODE: an image follows from the noise it begins with
DETERMINISTIC = (
    "DDIMScheduler", "DDIMParallelScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "LMSDiscreteScheduler",
    "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip


class GaussianUNet(ModelMixin, ConfigMixin):
    """The best noise predictor, also between timesteps, for pixels from N(MEAN, STD²); of one value per image if `flat`."""

    @register_to_config
    def __init__(self, flat=False, sample_size=16, in_channels=1):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.timesteps, self.deviations = [], []  # those of the left half, relative to its marginal's

    def forward(self, sample, timestep):
        alpha, x_t = signal_at(timestep), sample.double()
        self.timesteps.append(float(timestep))
        self.deviations.append((x_t[..., :8].std() / (alpha * STD**2 + 1 - alpha).sqrt()).item())
        mean, pixels = x_t, 1
        if self.config.flat:
            mean, pixels = x_t.mean((1, 2, 3), keepdim=True).expand_as(x_t), sample[0].numel()
        gain = alpha.sqrt() * STD**2 * pixels / (alpha * STD**2 * pixels + 1 - alpha)
        x_0 = MEAN + gain * (mean - alpha.sqrt() * MEAN)
        return UNet2DOutput(sample=((x_t - alpha.sqrt() * x_0) / (1 - alpha).sqrt()).to(sample.dtype))


def signal_at(timestep) -> torch.Tensor:
    """ᾱ at a timestep, or between two by their log-SNR."""
    low = min(int(timestep), len(LOG_SNR) - 2)
    return torch.lerp(LOG_SNR[low], LOG_SNR[low + 1], float(timestep) - low).sigmoid()


def pipe_with(name: str, unet=None, **config) -> AlphaDDPMPipeline:
    pipe = AlphaDDPMPipeline(unet or GaussianUNet(), AlphaDDPMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **config)
    return pipe


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


DATA = (torch.randn(16, 1, 16, 16, generator=seeded(7)) * STD + MEAN).clamp(-1, 1)


def from_image(pipe, strength: float) -> tuple[float, float]:
    """The standard deviation of what comes of DATA, and its distance from the exact solution, in units of STD."""
    pipe.unet.timesteps.clear()
    options = {"num_inference_steps": STEPS, "generator": seeded(), "output_type": "latent", "output_trajectory": True}
    output = pipe(image=DATA / 2 + 0.5, strength=strength, **options)
    assert output.images.mean().item() == pytest.approx(MEAN, abs=0.02)
    alpha, x_t = signal_at(pipe.unet.timesteps[0]), output.trajectory[0].double()
    if pipe.scheduler.init_noise_sigma > 1.1:  # its x_t is x_0 + σ z
        x_t = x_t * alpha.sqrt()
    exact = MEAN + STD / (alpha * STD**2 + 1 - alpha).sqrt() * (x_t - alpha.sqrt() * MEAN)
    return output.images.std().item(), ((output.images - exact).square().mean().sqrt() / STD).item()


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exported_scheduler_samples_rightly_or_is_refused(name):
    """From noise, from an image at any strength, and around kept pixels."""
    try:
        pipe = pipe_with(name)
    except (TypeError, ValueError):  # asks for arguments that no DDPM config has
        assert name not in SAMPLERS
        return
    if name not in SAMPLERS:
        with pytest.raises(ValueError, match=f"{name} cannot .* AlphaDDPMScheduler"):
            pipe(num_inference_steps=4)
        return
    x = pipe(16, num_inference_steps=STEPS, generator=seeded(), output_type="latent").images
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    whole, distance = x.std().item(), 0.0
    assert 0.09 < whole < 0.25  # each has its own error in so few steps
    if not SAMPLERS[name].middle:
        with pytest.raises(ValueError, match=f"{name} cannot begin in the middle .* AlphaDDPMScheduler"):
            pipe(image=DATA.abs(), strength=0.5)
        return
    if name in DETERMINISTIC:
        distance = from_image(pipe, 1.0)[1]
        assert distance < 0.2
    for strength in (0.3, 0.35):  # with 59 timesteps, an even and an odd one to begin with
        std, off = from_image(pipe, strength)
        assert std == pytest.approx(whole, abs=0.01)  # neither noise is left in it, nor is it washed out
        assert name not in DETERMINISTIC or off == pytest.approx(distance, abs=0.005)


@pytest.mark.parametrize("name", USABLE)
def test_what_is_painted_fits_what_is_kept(name):
    pipe, mask, grey = pipe_with(name, GaussianUNet(flat=True, sample_size=8)), torch.zeros(8, 8), 0.8
    mask[:, 4:] = 1
    options = {"strength": 0.5 if SAMPLERS[name].middle else 1.0, "num_inference_steps": STEPS, "generator": seeded()}
    options |= {"image": torch.full((1, 8, 8), grey), "mask_image": mask}
    x = pipe(4, output_type="pt", **options).images
    assert (x[..., :4] - grey).abs().max() < 1e-6
    assert (x[..., 4:] - grey).abs().max() < 0.06
    with pytest.raises(ValueError, match=f"{name} lacks; use AlphaDDPMScheduler"):
        pipe(num_resamples=2, **options)


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "DPMSolverSDEScheduler"])
def test_kept_pixels_have_the_noise_of_every_call_also_in_the_middle_of_a_step(name):
    pipe, mask = pipe_with(name), torch.zeros(16, 16)
    mask[:, 8:] = 1
    pipe(image=DATA / 2 + 0.5, mask_image=mask, num_inference_steps=8, generator=seeded())
    assert len(pipe.unet.deviations) == 15
    for deviation in pipe.unet.deviations[:-2]:  # the middle of the last step but one is far from both its ends
        assert deviation == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", USABLE)
def test_any_number_of_steps_is_run_or_refused_and_nothing_comes_out_that_is_not_finite(name):
    pipe = pipe_with(name, tiny_unet(), num_train_timesteps=20, beta_end=0.5)
    for steps in (1, 2, 3, None, 21):
        try:
            assert pipe(num_inference_steps=steps, output_type="latent").images.isfinite().all()
        except ValueError as error:
            assert steps == 21 or f"{name} cannot run {steps or 20} steps" in str(error)
            assert steps == 21 or "AlphaDDPMScheduler" in str(error)


@pytest.mark.parametrize("name", USABLE)
def test_predictions_of_x_0_and_thresholding_are_done_or_refused(name):
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_out.bias.fill_(3.0)
    options, config = {"num_inference_steps": 4, "output_type": "latent"}, {"num_train_timesteps": 20, "beta_end": 0.5}
    config["original_inference_steps"] = 20
    pipe = pipe_with(name, unet, prediction_type="sample", **config)
    if SAMPLERS[name].sample_prediction:
        assert pipe(generator=seeded(), **options).images.mean().item() == pytest.approx(3, abs=0.5)
    else:
        with pytest.raises(ValueError, match=f"{name} cannot use .* AlphaDDPMScheduler"):
            pipe(**options)
    prediction = "sample" if SAMPLERS[name].sample_prediction else "epsilon"
    pipe = pipe_with(name, unet, prediction_type=prediction, **config)
    pipe.scheduler = type(pipe.scheduler).from_config(dict(pipe.scheduler.config) | {"thresholding": True})
    if SAMPLERS[name].thresholding:
        assert pipe(generator=seeded(), **options).images.abs().max() < 1.05
    else:
        with pytest.raises(ValueError, match=f"{name} cannot do the thresholding .* AlphaDDPMScheduler"):
            pipe(**options)


@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler", "SASolverScheduler"])
def test_all_randomness_comes_from_the_generators(name):
    pipe, options = pipe_with(name, tiny_unet()), {"num_inference_steps": 4, "output_type": "latent"}
    x = pipe(3, generator=[seeded(i) for i in range(3)], **options).images
    torch.manual_seed(1)
    assert torch.equal(pipe(3, generator=[seeded(i) for i in range(3)], **options).images, x)
    torch.testing.assert_close(pipe(generator=[seeded(2)], **options).images, x[2:], atol=1e-4, rtol=0)
    assert torch.equal(pipe(generator=seeded(5), **options).images, pipe(generator=seeded(5), **options).images)


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"])
def test_interpolation_begins_at_the_first_step_at_or_below_its_timestep(name):
    pipe, greys = pipe_with(name, GaussianUNet(flat=True, sample_size=16)), (0.3, 0.7)
    a, b = (torch.full((1, 16, 16), grey) for grey in greys)
    for at, first in ((350, 350), (347, 300)):
        pipe.unet.timesteps.clear()
        options = {"at": at, "weights": (0.0, 0.5, 1.0), "num_inference_steps": 20, "generator": seeded()}
        x = pipe.interpolate(a, b, output_type="pt", **options).images
        assert pipe.unet.timesteps[0] == first
        assert x.std((1, 2, 3)).max() < 0.05  # flat again
        assert x.mean((1, 2, 3)).diff().min() > 0.12


def test_a_chain_begins_at_its_noise_level_even_where_timesteps_are_rounded_alike():
    pipe, steps, zero = pipe_with("DPMSolverMultistepScheduler", use_karras_sigmas=True), 100, torch.full((1, 16, 16), 0.5)
    pipe.scheduler.set_timesteps(steps)
    first = int((pipe.scheduler.timesteps.diff() == 0).nonzero()[0])
    options = {"num_inference_steps": steps, "strength": (steps - first) / steps, "output_trajectory": True}
    start = pipe(image=zero, generator=seeded(), **options).trajectory[0]
    sigma = pipe.scheduler.sigmas[first]
    torch.testing.assert_close(start, torch.randn(1, 1, 16, 16, generator=seeded()) * sigma / (1 + sigma**2).sqrt())
    assert len(pipe.unet.timesteps) == steps - first


def test_flow_matching_is_refused_also_where_a_sampler_offers_it():
    for config in ({"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}):
        with pytest.raises(ValueError, match="flow"):
            pipe_with("DPMSolverMultistepScheduler", **config)(num_inference_steps=4)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize(
    ("config", "steps", "problem"),
    [
        ({"timestep_spacing": "trailing"}, 794, "timesteps from -1 to 999"),  # diffusers rounds to one timestep too many
        ({"timestep_spacing": "leading", "steps_offset": 1}, 1000, "timesteps from 1 to 1000"),
        ({"rescale_betas_zero_snr": True}, 10, "ends without signal"),
    ],
)
def test_chains_that_leave_what_was_trained_are_refused(kind, config, steps, problem):
    pipe = AlphaDDPMPipeline(tiny_unet(), kind(**config))
    with pytest.raises(ValueError, match=f"{kind.__name__} .*{problem}"):
        pipe(num_inference_steps=steps)


@pytest.mark.parametrize("levels", [[0, 5], [5, 5, 1], [5, -1], [], "ab", [float("nan")], 5])
@pytest.mark.parametrize("name", ["timesteps", "sigmas"])
def test_levels_that_do_not_go_down_from_noise_are_refused(name, levels):
    pipe = AlphaDDPMPipeline(tiny_unet(), EulerDiscreteScheduler())
    with pytest.raises(ValueError, match=f"{name}=.* strictly descending"):
        pipe(**{name: levels})


def test_a_scheduler_of_one_s_own_is_taken_if_it_has_what_a_chain_needs():
    class Mine(DDIMScheduler):
        pass

    class Lone:
        config = DDIMScheduler().config

    pipe = pipe_with("DDIMScheduler")
    pipe.scheduler = Mine.from_config(pipe.scheduler.config)
    pipe(num_inference_steps=2)
    pipe.scheduler = Lone()
    with pytest.raises(ValueError, match="Lone cannot"):
        pipe(num_inference_steps=2)


def test_values_that_are_not_finite_are_never_returned():
    """The error names the step, the sampler and where they came from."""
    pipe = pipe_with("EulerDiscreteScheduler", tiny_unet())

    class Broken(EulerDiscreteScheduler):
        def step(self, *arguments, **options):
            output = super().step(*arguments, **options)
            if self.step_index == 3:
                output.prev_sample[0, 0, 0, 0] = torch.inf
            return output

    pipe.scheduler = Broken.from_config(pipe.scheduler.config)
    with pytest.raises(FloatingPointError, match=r"Broken .* step 3 of 5 \(timestep 400\).* sampler.*AlphaDDPMScheduler"):
        pipe(num_inference_steps=5)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(FloatingPointError, match=r"step 1 of 5 .* output"):
        hook = pipe.unet.register_forward_hook(lambda module, given, output: UNet2DOutput(sample=output.sample / 0))
        pipe(num_inference_steps=5)
    hook.remove()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"step 1 of 5 .* weights"):
        pipe(num_inference_steps=5)


def test_a_scheduler_is_in_one_chain_at_a_time():
    pipe, errors = pipe_with("DDIMScheduler", tiny_unet()), []
    options, picture = {"num_inference_steps": 3, "output_type": "latent"}, torch.zeros(1, 1, 8, 8)

    def again(pipe, index, t, tensors):
        def elsewhere():
            with pytest.raises(RuntimeError, match="another call") as caught:
                pipe(**options)
            errors.append(caught.value)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        for call in (lambda: pipe(**options), lambda: pipe.interpolate(picture, picture, 500, num_inference_steps=3)):
            with pytest.raises(RuntimeError, match="another call"):
                call()
        other = AlphaDDPMPipeline(pipe.unet, copy.deepcopy(pipe.scheduler))
        other.set_progress_bar_config(disable=True)
        other(**options)
        return {}

    expected = pipe(generator=seeded(), **options).images
    assert torch.equal(pipe(generator=seeded(), callback_on_step_end=again, **options).images, expected)
    assert len(errors) == 3
    with pytest.raises(ZeroDivisionError):
        pipe(callback_on_step_end=lambda *_: 1 / 0, **options)
    assert torch.equal(pipe(generator=seeded(), **options).images, expected)


def test_the_warm_up_of_pndm_is_refused_in_too_few_steps():
    pipe = pipe_with("PNDMScheduler", tiny_unet())
    assert isinstance(pipe.scheduler, PNDMScheduler)
    with pytest.raises(ValueError, match="PNDMScheduler cannot run 2 steps"):
        pipe(num_inference_steps=2)
