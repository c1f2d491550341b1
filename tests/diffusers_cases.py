"""diffusers' own tests, with a class of ours or of stock in place: `diffusers_suites.py` runs this.

The package `tests` is that of a checkout of diffusers, and DIFFUSERS_CASES says whose classes are tested: "ours" or "stock".
"""

import os
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, IFPipeline, ImagePipelineOutput, ModularPipeline, UNet2DModel
from tests.modular_pipelines.testing_utils import (
    BaseModularPipelineTesterConfig,
    ModularGuiderTesterMixin,
    ModularLoadingTesterMixin,
    ModularPipelineTesterMixin,
    ModularWorkflowTesterMixin,
)
from tests.pipelines import deepfloyd_if
from tests.pipelines.ddpm import test_ddpm
from tests.pipelines.deepfloyd_if import test_if
from tests.pipelines.pipeline_params import (
    CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS,
    CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS,
    TEXT_TO_IMAGE_BATCH_PARAMS,
    TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS,
    TEXT_TO_IMAGE_PARAMS,
    UNCONDITIONAL_IMAGE_GENERATION_PARAMS,
)
from tests.pipelines.testing_utils import BasePipelineTesterConfig, PipelineTesterMixin
from tests.schedulers import test_scheduler_ddpm
from transformers import T5Config

from ddpm_pipeline import (
    AlphaDDPMBlocks,
    AlphaDDPMPipeline,
    AlphaDDPMScheduler,
    AlphaDDPMTextBlocks,
    AlphaDDPMTextToImagePipeline,
    describe_conditions,
)
from text_models import make_encoder, make_tokenizer, make_unet

OURS = os.environ["DIFFUSERS_CASES"] == "ours"


class StockPipeline(DDPMPipeline):
    """Stock gives arrays [B, H, W, C] at best, and diffusers' tests compare tensors [B, C, H, W]."""

    def __call__(
        self,
        batch_size: int = 1,
        generator: Any = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        images = super().__call__(batch_size, generator, num_inference_steps, output_type, return_dict)[0]
        images = torch.from_numpy(images).permute(0, 3, 1, 2) if output_type == "np" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)


diffusers.pipelines.AlphaDDPMTextToImagePipeline = AlphaDDPMTextToImagePipeline  # where their tests look for its source
Unconditional = AlphaDDPMPipeline if OURS else StockPipeline
Text = AlphaDDPMTextToImagePipeline if OURS else IFPipeline

pytestmark = pytest.mark.filterwarnings("ignore")
warnings.simplefilter("ignore")


def unet_of(**config: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **config,
    )  # fmt: skip


STOCK_ONLY = ("safety_checker", "feature_extractor", "watermarker")  # components of its text pipeline
OPTIONAL = BasePipelineTesterConfig.optional_input_params - (
    set() if OURS else {"latents"}
)  # which neither stock pipeline takes
ABSENT = dict.fromkeys(() if OURS else STOCK_ONLY)


class TestScheduler(test_scheduler_ddpm.DDPMSchedulerTest):
    scheduler_classes = (AlphaDDPMScheduler if OURS else DDPMScheduler,)
    test_variance = None  # calls a private method


class TestFast(test_ddpm.DDPMPipelineFastTests):
    @pytest.fixture(autouse=True)
    def classes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(test_ddpm, "DDPMPipeline", AlphaDDPMPipeline if OURS else DDPMPipeline)


class TestUnconditional(BasePipelineTesterConfig, PipelineTesterMixin):
    pipeline_class = Unconditional
    required_input_params_in_call_signature = UNCONDITIONAL_IMAGE_GENERATION_PARAMS
    batch_input_params = frozenset()
    optional_input_params = OPTIONAL - {"num_images_per_prompt"}
    output_shape = (3, 8, 8)
    test_cfg = test_callback_cfg = None  # there is nothing to guide towards
    test_num_images_per_prompt = None  # nor a prompt to batch

    def get_dummy_components(self) -> dict[str, Any]:
        return {"unet": unet_of(), "scheduler": DDPMScheduler()}

    def get_dummy_inputs(self) -> dict[str, Any]:
        output_type = "pt" if OURS else "np"
        return {"batch_size": 1, "generator": self.get_generator(), "num_inference_steps": 2, "output_type": output_type}


class TestClass(TestUnconditional):
    required_input_params_in_call_signature = CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS
    batch_input_params = CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
    test_cfg, test_callback_cfg = PipelineTesterMixin.test_cfg, PipelineTesterMixin.test_callback_cfg
    test_num_images_per_prompt = PipelineTesterMixin.test_num_images_per_prompt

    def get_dummy_components(self) -> dict[str, Any]:
        unet = unet_of(num_class_embeds=4)
        describe_conditions(unet, class_names=["zero", "one", "two"], condition_dropout=0.1)
        return {"unet": unet, "scheduler": DDPMScheduler()}

    def get_dummy_inputs(self) -> dict[str, Any]:
        inputs = super().get_dummy_inputs()
        del inputs["batch_size"]
        return inputs | {"class_labels": 1}


class TestText(BasePipelineTesterConfig, PipelineTesterMixin):
    pipeline_class = Text
    required_input_params_in_call_signature = TEXT_TO_IMAGE_PARAMS - {"width", "height", "cross_attention_kwargs"}
    batch_input_params = TEXT_TO_IMAGE_BATCH_PARAMS
    callback_cfg_params = TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS
    optional_input_params = OPTIONAL
    output_shape = (3, 8, 8)

    def get_dummy_components(self) -> dict[str, Any]:
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        unet, encoder = make_unet(in_channels=3, out_channels=6), make_encoder("clip", len(tokenizer))
        scheduler = DDPMScheduler(variance_type="learned_range")
        return {"unet": unet, "text_encoder": encoder, "tokenizer": tokenizer, "scheduler": scheduler, **ABSENT}

    def get_dummy_inputs(self) -> dict[str, Any]:
        prompt = "A painting of a squirrel eating a burger"
        return {"prompt": prompt, "generator": self.get_generator(), "num_inference_steps": 2, "output_type": "pt"}


class TestIF(test_if.IFPipelineFastTests):
    """With the UNet of those tests, and an encoder and a tokenizer that need not be downloaded."""

    pipeline_class = Text
    params = test_if.IFPipelineFastTests.params - {"cross_attention_kwargs"}

    def get_dummy_components(self) -> dict[str, Any]:
        tokenizer = make_tokenizer()
        config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deepfloyd_if.AutoConfig, "from_pretrained", lambda name: config)
            patch.setattr(deepfloyd_if.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
            components = super().get_dummy_components()
        return {name: part for name, part in components.items() if name not in STOCK_ONLY} | ABSENT


class ModularCases(
    BaseModularPipelineTesterConfig,
    ModularPipelineTesterMixin,
    ModularGuiderTesterMixin,
    ModularLoadingTesterMixin,
    ModularWorkflowTesterMixin,
):
    """On a folder with everything: what a pipeline saves, whose code is trusted, and what a modular pipeline saves."""

    @pytest.fixture(autouse=True, scope="class")
    def folder(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        blocks_class, folder = self.pipeline_blocks_class, str(tmp_path_factory.mktemp("model"))
        load = ModularPipeline.from_pretrained
        request.cls.pretrained_model_name_or_path = folder
        with pytest.MonkeyPatch.context() as patch:
            # where diffusers looks for the blocks of a modular pipeline that was saved, as such, without code
            patch.setattr(diffusers, blocks_class.__name__, blocks_class, raising=False)
            patch.setattr(ModularPipeline, "from_pretrained", lambda path, **kwargs: load(path, True, **kwargs))
            self.model_class(**self.components.get_dummy_components()).save_pretrained(folder)
            self.get_pipeline().save_pretrained(folder, overwrite_modular_index=True)
            yield

    @property
    def expected_workflow_blocks(self) -> dict[str, list[tuple[str, str]]]:
        names = [self.condition[0], "set_timesteps", "start", "denoise", "decode"]
        starts = {self.workflow: "NoiseStep", "image2image": "ImageStep", "inpainting": "MaskStep"}
        steps = {
            name: [self.condition[1], "SetTimestepsStep", start, self.denoise, "DecodeStep"] for name, start in starts.items()
        }
        return {name: list(zip(names, classes, strict=True)) for name, classes in steps.items()}

    def test_modular_index_consistency(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the former default of an argument, as the test expects: the index says where the components came from."""
        save = ModularPipeline.save_pretrained
        monkeypatch.setattr(ModularPipeline, "save_pretrained", lambda *args: save(*args, overwrite_modular_index=False))
        super().test_modular_index_consistency(tmp_path)

    def get_dummy_inputs(self, seed: int = 0) -> dict[str, Any]:
        return self.components.get_dummy_inputs() | {"generator": self.get_generator(seed)}


if OURS:

    class TestModularClass(ModularCases):
        model_class, pipeline_blocks_class, components = AlphaDDPMPipeline, AlphaDDPMBlocks, TestClass()
        params = batch_params = frozenset(["class_labels"])
        workflow, condition, denoise = "unconditional", ("class_labels", "ClassLabelsStep"), "DenoiseStep"

    class TestModularText(ModularCases):
        model_class, pipeline_blocks_class, components = AlphaDDPMTextToImagePipeline, AlphaDDPMTextBlocks, TestText()
        params = batch_params = frozenset(["prompt", "negative_prompt"])
        workflow, condition, denoise = "text2image", ("text_encoder", "TextEncoderStep"), "TextDenoiseStep"
