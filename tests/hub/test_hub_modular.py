"""Without the package, modular pipelines of a repository whose code is trusted give the images of its pipelines, to the bit."""

from pathlib import Path

from huggingface_hub import HfApi

import hub_server
from ddpm_pipeline.hub import push
from hub_fixtures import environment, run_checks
from hub_models import smallest_pipeline, text_pipeline

SCRIPT = """
import torch
from diffusers import ComponentsManager, DiffusionPipeline, ModularPipeline

CALLS = {"plain": {"batch_size": 2}, "text": {"prompt": "zero"}}
TRUST = {"trust_remote_code": True}

def check_code_is_not_run_without_trust():
    try:
        ModularPipeline.from_pretrained("org/plain")
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    else:
        raise AssertionError("it was run")

def check_images_are_those_of_the_pipelines():
    manager = ComponentsManager()
    for name, call in CALLS.items():
        modular = ModularPipeline.from_pretrained(f"org/{name}", components_manager=manager, collection=name, **TRUST)
        modular.load_components(dtype=torch.float32)
        pipe = DiffusionPipeline.from_pretrained(f"org/{name}", custom_pipeline=f"org/{name}", **TRUST)
        call |= {"num_inference_steps": 3, "output_type": "pt"}
        expected = pipe(**call, generator=torch.Generator().manual_seed(7)).images
        assert torch.equal(modular(**call, generator=torch.Generator().manual_seed(7), output="images"), expected), name
    assert len(manager.components) == 6, manager.components.keys()
"""


def test_modular_pipelines_come_from_the_hub(hub: hub_server.Hub, client: HfApi, tmp_path: Path) -> None:
    for name, pipe in {"plain": smallest_pipeline(), "text": text_pipeline()}.items():
        pipe.save_pretrained(tmp_path / name)
        push(tmp_path / name, f"org/{name}", api=client)
    outcomes = run_checks(SCRIPT, environment(hub, tmp_path / "home"), tmp_path / "work", with_package=False)
    del outcomes["stderr"]
    assert set(outcomes.values()) == {"passed"}, outcomes
