"""The blocks of Modular Diffusers give what the pipelines give, to the bit, with any guider of diffusers in its place."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, ModularPipeline, SequentialPipelineBlocks
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, TangentialClassifierFreeGuidance
from torch import Tensor

import condition_models
from ddpm_pipeline import AlphaDDPMBlocks, AlphaDDPMImageToImageBlocks, AlphaDDPMPipeline, AlphaDDPMTextBlocks, ImageCondition
from ddpm_pipeline.modular_alpha_ddpm import Block, DecodeStep
from hub_models import class_pipeline, scheduler, text_pipeline, tiny_unet

MAKERS = {
    "plain": lambda: AlphaDDPMPipeline(tiny_unet(), scheduler()), "class": class_pipeline, "text": text_pipeline,
    "image": lambda: condition_models.pipeline(1, ImageCondition(1, classes=3), condition_models.POSE, sample_size=8),
}  # fmt: skip
CONDITIONS = {
    "plain": {"batch_size": 2},
    "class": {"class_labels": ["two", "zero"]},
    "text": {"prompt": ["a seven", "One"], "negative_prompt": "three"},
    "image": {
        "condition_image": torch.arange(128).view(2, 1, 8, 8) % 3,
        "condition_vector": [{"angle": 9, "height": 1.6}, {"angle": -20, "smiling": 1}],
        "guidance_conditions": ["condition_image", "angle"],
    },
}
BLOCKS = {"text": AlphaDDPMTextBlocks, "image": AlphaDDPMImageToImageBlocks}
PICTURES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
MASK = torch.zeros(1, 1, 8, 8).index_fill(3, torch.arange(4), 1)
STARTS = {
    "noise": {},
    "latents": {"latents": PICTURES * 4 - 2},
    "image": {"image": PICTURES, "strength": 0.6},
    "mask": {"image": PICTURES, "mask_image": MASK, "num_resamples": 2},
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ModularPipeline, Path]]:
    """Of each kind, the pipeline, the modular one and the folder that both were loaded from."""
    loaded = {}
    for name, make in MAKERS.items():
        folder = tmp_path_factory.mktemp(name)
        made = make()
        made.save_pretrained(folder)
        blocks = BLOCKS.get(name, AlphaDDPMBlocks)()
        loaded[name] = type(made).from_pretrained(folder), blocks.init_pipeline(str(folder)), folder
        loaded[name][1].load_components()
        for pipe in loaded[name][:2]:
            pipe.set_progress_bar_config(disable=True)
    return loaded


def call(**arguments: Any) -> dict[str, Any]:
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    return {"num_inference_steps": 6, "generator": generators, "output_type": "pt", **arguments}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("name", "scale"), [("plain", 1.0), ("class", 1.0), ("class", 3.0), ("text", 1.0), ("text", 3.0), ("image", 3.0)]
)
def test_blocks_give_the_images_of_the_pipelines(pipelines: dict, name: str, scale: float, start: str) -> None:
    pipe, modular, _ = pipelines[name]
    modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=scale))
    arguments = CONDITIONS[name] | STARTS[start]
    expected = pipe(**call(**arguments, guidance_scale=scale)).images
    assert torch.equal(modular(**call(**arguments), output="images"), expected)


@pytest.mark.parametrize("name", MAKERS)
def test_defaults_are_those_of_the_pipelines(pipelines: dict, name: str) -> None:
    pipe, _, folder = pipelines[name]
    modular = BLOCKS.get(name, AlphaDDPMBlocks)().init_pipeline(str(folder))
    modular.load_components()
    arguments = {"generator": torch.Generator().manual_seed(1), "output_type": "np", **CONDITIONS[name]}
    expected = pipe(**arguments).images
    arguments["generator"].manual_seed(1)
    assert (modular(**arguments, output="images") == expected).all()


@pytest.mark.parametrize("guider", [AdaptiveProjectedGuidance, TangentialClassifierFreeGuidance])
def test_other_guiders_guide(pipelines: dict, guider: type) -> None:
    """Towards the condition: with a scale of 1, or the network's two halves alike, they change nothing."""
    _, modular, _ = pipelines["class"]
    results = []
    for scale in (1.0, 4.0):
        modular.update_components(guider=guider(guidance_scale=scale))
        results.append(modular(**call(class_labels=["two", "zero"]), output="images"))
        assert torch.isfinite(results[-1]).all()
    modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    plain = modular(**call(class_labels=["two", "zero"]), output="images")
    torch.testing.assert_close(results[0], plain)
    assert (results[1] - plain).abs().max() > 0.01
    modular.update_components(guider=guider(guidance_scale=4.0))
    without = modular(**call(batch_size=2), output="images")  # "no class" against itself
    modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    torch.testing.assert_close(without, modular(**call(batch_size=2), output="images"), atol=1e-4, rtol=1e-4)


def test_a_guider_that_changes_the_network_is_asked_for_each_prediction(pipelines: dict) -> None:
    """As those that skip layers do: between its calls the network is another one."""
    _, modular, _ = pipelines["class"]
    changes = []

    class Halving(ClassifierFreeGuidance):
        def prepare_models(self, denoiser: torch.nn.Module) -> None:
            super().prepare_models(denoiser)
            if not self.is_conditional:
                changes.append(denoiser.register_forward_hook(lambda *call: type(call[-1])(sample=call[-1].sample / 2)))

        def cleanup_models(self, denoiser: torch.nn.Module) -> None:
            if not self.is_conditional:
                changes[-1].remove()

    def seen(guider: ClassifierFreeGuidance) -> Tensor:
        modular.update_components(guider=guider)
        return modular(**call(class_labels=["two", "zero"]), output="images")

    halved, plain = seen(Halving(guidance_scale=3.0)), seen(ClassifierFreeGuidance(guidance_scale=3.0))
    assert len(changes) == 6
    assert (halved - plain).abs().max() > 0.01
    assert torch.equal(seen(ClassifierFreeGuidance(guidance_scale=3.0)), plain)  # the network is as it was


def test_another_scheduler_takes_its_place(pipelines: dict) -> None:
    pipe, _, folder = pipelines["plain"]
    solver = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    other = AlphaDDPMPipeline(pipe.unet, solver)
    other.set_progress_bar_config(disable=True)
    again = AlphaDDPMBlocks().init_pipeline(str(folder))
    again.load_components()
    again.update_components(scheduler=DPMSolverMultistepScheduler.from_config(pipe.scheduler.config))
    assert torch.equal(again(**call(batch_size=2), output="images"), other(**call(batch_size=2)).images)
    again.update_components(scheduler=DDPMScheduler.from_config(pipe.scheduler.config))  # made by hand: it was not loaded
    assert torch.equal(again(**call(batch_size=2), output="images"), pipe(**call(batch_size=2)).images)


def test_a_block_can_be_inserted(pipelines: dict) -> None:
    """The states in between are those of the pipeline's call."""
    pipe, _, folder = pipelines["plain"]

    class Mirrored(Block):
        takes = DecodeStep.takes

        def run(self, components: Any, state: Any) -> None:
            state.latents = state.latents.flip(-1)

    blocks = AlphaDDPMBlocks()
    blocks.sub_blocks.insert("mirror", Mirrored(), len(blocks.sub_blocks) - 1)
    modular = blocks.init_pipeline(str(folder))
    modular.load_components()
    expected = pipe(**call(batch_size=2)).images.flip(-1)
    assert torch.equal(modular(**call(batch_size=2), output="images"), expected)


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_can_be_used_again_and_between_pipelines(pipelines: dict, name: str) -> None:
    """What the caller gave is still in it, and the chain that it holds goes on in a pipeline of the other blocks."""
    _, modular, folder = pipelines[name]
    arguments = call(**CONDITIONS[name]) | {"num_images_per_prompt": 2, "generator": torch.Generator().manual_seed(4)}
    state = modular(**arguments)
    again = modular(state=state, generator=torch.Generator().manual_seed(4), output="images")
    assert torch.equal(again, state.get("images"))
    names, halves = list(modular.blocks.sub_blocks), []
    for part in (names[:-2], names[-2:]):
        blocks = SequentialPipelineBlocks.from_blocks_dict({name: modular.blocks.sub_blocks[name] for name in part})
        halves.append(blocks.init_pipeline(str(folder)))
        halves[-1].load_components()
    halves[1].update_components(guider=modular.guider)
    arguments |= {"generator": torch.Generator().manual_seed(4)}
    middle = halves[0](**{name: value for name, value in arguments.items() if name != "output_type"})
    assert torch.equal(halves[1](state=middle, output_type="pt", output="images"), again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"strength": 0.5}, "strength needs an image"),
        ({"num_resamples": 2}, "num_resamples=2"),
        ({"output_type": "gif"}, "output_type='gif'"),
    ],
)
def test_what_the_pipelines_refuse_is_refused(pipelines: dict, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipelines["plain"][1](**call(batch_size=2, num_inference_steps=1) | changes)


def test_workflows_need_what_they_name() -> None:
    conditions = {
        "class_labels": AlphaDDPMBlocks(),
        "prompt": AlphaDDPMTextBlocks(),
        "condition_image": AlphaDDPMImageToImageBlocks(),
    }
    for condition, blocks in conditions.items():
        assert condition in blocks.input_names
        for name in blocks.available_workflows:
            steps = blocks.get_workflow(name)
            assert ("mask_image" in steps.input_names) == (name == "inpainting")
            assert ("image" in steps.input_names) == (name in ("image2image", "inpainting"))
        assert "TODO" not in blocks.doc  # diffusers' word for an input that is not described


@pytest.mark.parametrize("name", MAKERS)
def test_what_it_saves_loads_with_the_code_of_the_folder(pipelines: dict, name: str, tmp_path: Path) -> None:
    pipe, _, folder = pipelines[name]
    modular = ModularPipeline.from_pretrained(str(folder), trust_remote_code=True)
    modular.load_components()
    assert type(modular.blocks).__module__.startswith("diffusers_modules")
    expected = pipe(**call(**CONDITIONS[name])).images
    assert torch.equal(modular(**call(**CONDITIONS[name]), output="images"), expected)
    modular.save_pretrained(str(tmp_path), overwrite_modular_index=True)  # as diffusers does: the components, without code
    blocks = BLOCKS.get(name, AlphaDDPMBlocks)()
    again = blocks.init_pipeline(str(tmp_path))
    again.load_components()
    assert torch.equal(again(**call(**CONDITIONS[name]), output="images"), expected)


def test_values_in_units_of_the_data_and_blocks_that_do_not_know_the_condition(pipelines: dict) -> None:
    pipe, modular, folder = pipelines["image"]
    own = call(**CONDITIONS["image"], output_type="np", denormalize=True)
    modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    assert (
        modular(**own, output="images") == pipe(**call(**CONDITIONS["image"], output_type="np", denormalize=True)).images
    ).all()
    with pytest.raises(ValueError, match="'pil' cannot show the 2 channels"):
        DecodeStep().run(condition_models.pipeline(2), SimpleNamespace(output_type="pil", denormalize=False, latents=None))
    plain = AlphaDDPMBlocks().init_pipeline(str(folder))
    plain.load_components()
    with pytest.raises(ValueError, match="use AlphaDDPMImageToImageBlocks"):
        plain(**call(batch_size=2))
