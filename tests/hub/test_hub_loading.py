"""What is in a repository loads from the Hub: with diffusers alone, with trust, with the package, offline, and back again.

Each group of checks runs in a process of its own with an empty cache, as that of a stranger or of somebody who installed the
package; a check in it is a test here.
"""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import HfApi

import ddpm_pipeline
import hub_models as models
import hub_server
from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMTextToImagePipeline
from ddpm_pipeline.hub import build_card, export, push
from hub_fixtures import environment, run_checks
from hub_models import CALLS, KEPT, OWN, STEPS, images, scheduler, tiny_unet
from text_models import make

SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
# repositories with one file that cannot be meant, and a word of what is said of each
MALFORMED = {
    "endless": (SCHEDULER, {"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000"),
    "nan": (SCHEDULER, {"beta_start": float("nan")}, "NaN"),
    "wide": ("unet/config.json", {"block_out_channels": [10**12, 8]}, "block_out_channels=1000000000000"),
    "typed": ("unet/config.json", {"sample_size": "8"}, "wrong type"),
    "climbing": (INDEX, {"../../climbed": ["diffusers", "UNet2DModel"]}, "climbed"),
    "executing": (INDEX, {"unet": ["os", "system"]}, "os"),
    "torn": (SCHEDULER, b"{", "scheduler_config.json"),
    "torn-index": (INDEX, b"{", "model_index.json is not a valid config"),
    "listed": (INDEX, b"[]", "must hold a JSON object, not a list"),
}


def malformed(hub: hub_server.Hub, sound: Path) -> None:
    """Put those on the Hub, made of a sound folder, and one that lists files outside of itself."""
    files = {path.relative_to(sound).as_posix(): path.read_bytes() for path in sound.rglob("*") if path.is_file()}
    for name, (file, change, _) in MALFORMED.items():
        changed = change if isinstance(change, bytes) else json.dumps(json.loads(files[file]) | change).encode()
        hub.write(f"org/{name}", {**files, file: changed})
    climbing = {f"scheduler/{'../' * depth}climbed-{depth}.json": b"{}" for depth in range(1, 9)}
    hub.write("org/tricky", {**files, **climbing})


@pytest.fixture(scope="module")
def published(hub: hub_server.Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Repositories on the Hub, and the folder with the images that they must give."""
    folder = tmp_path_factory.mktemp("published")
    api = HfApi(endpoint=hub.url, token=hub_server.WRITE_TOKEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        pipe = AlphaDDPMPipeline(tiny_unet(), scheduler())
        expected = {"ddpm": images(pipe)}
        export(pipe, folder / "ddpm", build_card(pipe, name="ddpm"))
        pipe.to(torch.float16).save_pretrained(folder / "ddpm", variant="fp16")
        push(folder / "ddpm", "org/ddpm", api=api)
        other = tiny_unet()
        with torch.no_grad():
            other.conv_out.bias.add_(1.0)
        moved = {"ddpm": AlphaDDPMPipeline(other, scheduler()), "text": models.text_pipeline(seed=1)}
        pipes = {
            "own": AlphaDDPMPipeline(tiny_unet(), scheduler(**OWN)), "class": models.class_pipeline(),
            "text": models.text_pipeline(), "image": models.image_pipeline(),
        }  # fmt: skip
        for name, pipe in pipes.items():
            expected[name] = images(pipe, name)
            export(pipe, folder / name, build_card(pipe, name=name))
            pipe.to(torch.float16).save_pretrained(folder / name, variant="fp16")
        described = {"text-fixed": make(scheduler=scheduler()), "dotted.v1-5": pipes["class"]}
        described |= {"rgba": models.rgba_pipeline(), "deep": models.deep_pipeline()}
        for name, pipe in described.items():
            export(pipe, folder / name, build_card(pipe, name=name))
            push(folder / name, f"org/{name}", api=api)
        for name, pipe in moved.items():  # another model before, under a tag
            expected[f"{name}-before"] = images(pipe, name)
            export(pipe, folder / f"{name}-before")
            push(folder / f"{name}-before", f"org/{name}-moved", api=api)
            api.create_tag(f"org/{name}-moved", tag="before")
            push(folder / name, f"org/{name}-moved", api=api)
        for name in pipes:
            push(folder / name, f"org/{name}", api=api)
        expected["early"] = models.early_repository(folder / "early")
        api.create_repo("org/early")
        api.upload_folder(repo_id="org/early", folder_path=folder / "early")
        malformed(hub, folder / "ddpm")
        DDPMPipeline(tiny_unet(), DDPMScheduler(STEPS)).save_pretrained(folder / "pickled", safe_serialization=False)
        api.create_repo("org/pickled")
        api.upload_folder(repo_id="org/pickled", folder_path=folder / "pickled")
    np.savez(folder / "expected.npz", **expected)
    return folder


COMMON = f"""
import os, sys, json
from pathlib import Path
from typing import Any
import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, IFPipeline
from numpy import array, uint8  # in CALLS
STEPS, OWN, CALLS, KEPT = {STEPS}, {OWN!r}, {CALLS!r}, {KEPT!r}
EXPECTED = np.load(os.environ["EXPECTED"])

{inspect.getsource(images)}

def same(pipe, name="ddpm", within=1e-6, expected=None):
    difference = np.abs(images(pipe, name) - EXPECTED[expected or name]).max()
    assert difference <= within, difference

def is_half(pipe, plain, *components):  # of the components, the weights of plain in half precision
    for component in components:
        for found, whole in zip(getattr(pipe, component).parameters(), getattr(plain, component).parameters(), strict=True):
            assert found.dtype == torch.float32 and torch.equal(found, whole.half().float()), component

def raises(kind, call, *words):
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"no {{kind.__name__}} was raised")

def all_kept(folder, name):
    for component, settings in KEPT[name].items():
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        found = json.loads(Path(folder, component, file).read_text())["_alpha_ddpm"]
        assert found == settings, (component, found)
"""

STRANGER = (
    COMMON
    + """
from diffusers import ComponentsManager, ModularPipeline
TRUST = {"trust_remote_code": True}

def check_first_of_all_the_trusted_call():
    for name in ("text", "class", "image"):
        same(DiffusionPipeline.from_pretrained(f"org/{name}", custom_pipeline=f"org/{name}", **TRUST), name)
    for _ in range(2):
        same(DiffusionPipeline.from_pretrained("org/ddpm", custom_pipeline="org/ddpm", **TRUST))
    same(DiffusionPipeline.from_pretrained("org/ddpm"), within=1e-3)

def check_plain_calls_sample():
    for name, kind in {"ddpm": DDPMPipeline, "text": IFPipeline}.items():
        pipe = DiffusionPipeline.from_pretrained(f"org/{name}")
        assert type(pipe) is kind and type(pipe.scheduler) is DDPMScheduler
        same(pipe, name, within=1e-3)
        pipe.save_pretrained(f"plain/{name}")
        same(DiffusionPipeline.from_pretrained(f"plain/{name}"), name, within=1e-3)
    assert not any(name.startswith("diffusers_modules") for name in sys.modules), "code of the repository was run"

def check_code_is_not_run_without_trust():
    raises(ValueError, lambda: DiffusionPipeline.from_pretrained("org/ddpm", custom_pipeline="org/ddpm"), "trust_remote_code")
    raises(ValueError, lambda: ModularPipeline.from_pretrained("org/ddpm"), "trust_remote_code")
    assert not any(name.startswith("diffusers_modules") for name in sys.modules)

def check_plain_call_of_a_class_model_loads_but_says_that_it_needs_labels():
    pipe = DiffusionPipeline.from_pretrained("org/class")
    assert type(pipe) is DDPMPipeline and pipe.unet.config.num_class_embeds == 4
    raises(ValueError, lambda: pipe(num_inference_steps=2), "class_labels")

def check_trusted_call_after_the_plain_one():
    pipe = DiffusionPipeline.from_pretrained("org/ddpm", custom_pipeline="org/ddpm", **TRUST)
    assert type(pipe).__name__ == "AlphaDDPMPipeline" and type(pipe.scheduler).__name__ == "AlphaDDPMScheduler"
    assert type(pipe).__module__.startswith("diffusers_modules")
    same(pipe)
    seen = []
    pipe(1, num_inference_steps=4, output_type="pt", callback_on_step_end=lambda p, i, t, tensors: seen.append(int(t)) or {})
    assert len(seen) == 4
    assert pipe.scheduler.q_posterior(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), 0).mean.shape == (1, 1, 8, 8)

def check_trusted_text_model_has_all_features():
    pipe = DiffusionPipeline.from_pretrained("org/text", custom_pipeline="org/text", **TRUST)
    assert type(pipe).__name__ == "AlphaDDPMTextToImagePipeline" and type(pipe.scheduler).__name__ == "AlphaDDPMScheduler"
    assert type(pipe).__module__.startswith("diffusers_modules")
    same(pipe, "text")
    picture = torch.full((1, 1, 8, 8), 0.5)
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    drawn = pipe("zero", 3, negative_prompt="the digit 7", guidance_rescale=0.5, image=picture, mask_image=mask,
                 output_type="pt", output_trajectory=True)
    assert drawn.trajectory.shape == (4, 1, 1, 8, 8) and torch.equal(drawn.images[..., 4:, :], picture[..., 4:, :])
    assert pipe.scheduler.timesteps.tolist() == [19, 7, 0]
    assert len(pipe.interpolate(picture, 1 - picture, 9, num_inference_steps=4, prompt="zero", output_type="pt").images) == 5

def check_trusted_class_model_has_all_features():
    pipe = DiffusionPipeline.from_pretrained("org/class", custom_pipeline="org/class", **TRUST)
    assert type(pipe).__name__ == "AlphaDDPMPipeline" and pipe.id2label == {0: "zero", 1: "one", 2: "two"}
    same(pipe, "class")
    raises(ValueError, lambda: pipe(class_labels="tow"), "near it: 'two'")
    assert len(pipe(class_labels=["one", None], num_inference_steps=3).images) == 2

def check_modular_pipelines_give_the_same_images():
    manager = ComponentsManager()
    for name, call in {"ddpm": {"batch_size": 2}, "text": {"prompt": "zero"}}.items():
        modular = ModularPipeline.from_pretrained(f"org/{name}", components_manager=manager, collection=name, **TRUST)
        modular.load_components(dtype=torch.float32)
        pipe = DiffusionPipeline.from_pretrained(f"org/{name}", custom_pipeline=f"org/{name}", **TRUST)
        call |= {"num_inference_steps": 3, "output_type": "pt"}
        expected = pipe(**call, generator=torch.Generator().manual_seed(7)).images
        assert torch.equal(modular(**call, generator=torch.Generator().manual_seed(7), output="images"), expected), name
    assert len(manager.components) == 6, manager.components.keys()

def check_code_of_another_repository_does_not_get_in_the_way():
    first = DiffusionPipeline.from_pretrained("org/own", custom_pipeline="org/own", **TRUST)
    second = DiffusionPipeline.from_pretrained("org/ddpm", custom_pipeline="org/ddpm", **TRUST)
    same(first, "own")
    same(second)
    assert "org--ddpm" in type(second.scheduler).__module__ and "org--own" in type(first.scheduler).__module__

def check_trusted_pipeline_saves_a_folder_that_loads_everywhere():
    for name in KEPT:
        pipe = DiffusionPipeline.from_pretrained(f"org/{name}", custom_pipeline=f"org/{name}", **TRUST)
        pipe.save_pretrained(f"again/{name}")
        all_kept(f"again/{name}", name)
        assert {"pipeline.py", "sampling_alpha_ddpm.py", "scheduling_alpha_ddpm.py"} <= set(os.listdir(f"again/{name}"))
        stock = DiffusionPipeline.from_pretrained(f"again/{name}")
        assert type(stock) is (IFPipeline if name == "text" else DDPMPipeline)
        same(DiffusionPipeline.from_pretrained(f"again/{name}", custom_pipeline=f"again/{name}", **TRUST), name)

def check_stock_saves_our_settings_again():
    for name in KEPT:
        DiffusionPipeline.from_pretrained(f"org/{name}").save_pretrained(f"stock/{name}")
        all_kept(f"stock/{name}", name)
        same(DiffusionPipeline.from_pretrained(f"stock/{name}", custom_pipeline=f"org/{name}", **TRUST), name)
    same(DiffusionPipeline.from_pretrained("stock/text"), "text", within=1e-3)

def check_trusted_pipeline_pushes():
    pipe = DiffusionPipeline.from_pretrained("org/ddpm", custom_pipeline="org/ddpm", **TRUST)
    pipe.push_to_hub("org/forked")
    same(DiffusionPipeline.from_pretrained("org/forked", custom_pipeline="org/forked", **TRUST))
    DiffusionPipeline.from_pretrained("org/text", custom_pipeline="org/text", **TRUST).push_to_hub("org/forked-text")
    same(DiffusionPipeline.from_pretrained("org/forked-text", custom_pipeline="org/forked-text", **TRUST), "text")
    same(DiffusionPipeline.from_pretrained("org/forked-text"), "text", within=1e-3)
"""
)

INSTALLED = (
    COMMON
    + """
import diffusers, huggingface_hub
from ddpm_pipeline import AlphaDDPMImageToImagePipeline, AlphaDDPMPipeline, AlphaDDPMScheduler, AlphaDDPMTextToImagePipeline
OURS = dict.fromkeys(("class", "own", "ddpm"), AlphaDDPMPipeline)
OURS |= {"text": AlphaDDPMTextToImagePipeline, "image": AlphaDDPMImageToImagePipeline}
STOCK = {name: IFPipeline if name == "text" else DDPMPipeline for name in KEPT}

def check_our_calls():
    for name in ("ddpm", "text", "class"):
        pipe = OURS[name].from_pretrained(f"org/{name}")
        assert type(pipe) is OURS[name] and type(pipe.scheduler) is AlphaDDPMScheduler
        same(pipe, name)

def check_other_text_encoders():
    from text_models import make
    for kind, encoder in {"t5": "T5EncoderModel", "bert": "BertModel"}.items():
        pipe = make(kind)
        pipe.push_to_hub(f"org/{kind}")
        expected = images(pipe, "text")
        ours, stock = (cls.from_pretrained(f"org/{kind}") for cls in (AlphaDDPMTextToImagePipeline, DiffusionPipeline))
        assert type(ours.text_encoder).__name__ == type(stock.text_encoder).__name__ == encoder
        assert np.abs(images(ours, "text") - expected).max() <= 1e-6
        assert np.abs(images(stock, "text") - expected).max() <= 1e-3

def check_loading_warns_of_nothing():
    import io, logging
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("diffusers").addHandler(handler)
    for name in KEPT:
        OURS[name].from_pretrained(f"org/{name}")
        DiffusionPipeline.from_pretrained(f"org/{name}")
    logging.getLogger("diffusers").removeHandler(handler)
    assert "arn" not in stream.getvalue() and "ignored" not in stream.getvalue(), stream.getvalue()

def check_trusted_call_with_the_package_there():
    pipe = DiffusionPipeline.from_pretrained("org/ddpm", custom_pipeline="org/ddpm", trust_remote_code=True)
    assert type(pipe).__module__.startswith("diffusers_modules")
    same(pipe)

def check_our_settings_survive_a_stock_round_trip():
    for name in KEPT:
        OURS[name].from_pretrained(f"org/{name}").save_pretrained(f"own/{name}")
        STOCK[name].from_pretrained(f"own/{name}").save_pretrained(f"stock/{name}")
        pipe = OURS[name].from_pretrained(f"stock/{name}")
        pipe.save_pretrained(f"third/{name}")
        for folder in ("own", "stock", "third"):
            all_kept(f"{folder}/{name}", name)
        same(pipe, name)
        pipe.scheduler.set_timesteps(3)
        assert pipe.scheduler.timesteps.tolist() == [19, 7, 0]

def check_scheduler_override():
    scheduler = diffusers.DDIMScheduler.from_pretrained("org/ddpm", subfolder="scheduler")
    pipe = AlphaDDPMPipeline.from_pretrained("org/ddpm", scheduler=scheduler)
    assert pipe.scheduler is scheduler
    pipe.save_pretrained("ddim")
    assert type(DiffusionPipeline.from_pretrained("ddim").scheduler) is diffusers.DDIMScheduler
    assert type(AlphaDDPMPipeline.from_pretrained("ddim").scheduler) is diffusers.DDIMScheduler
    plain = DDPMPipeline.from_pretrained("org/ddpm", scheduler=scheduler)
    assert np.abs(images(plain) - images(pipe)).max() <= 1e-3
    for name in ("text", "class"):
        scheduler = diffusers.DDIMScheduler.from_pretrained(f"org/{name}", subfolder="scheduler")
        pipe = OURS[name].from_pretrained(f"org/{name}", scheduler=scheduler)
        assert pipe.scheduler is scheduler
        drawn = images(pipe, name)
        pipe.save_pretrained(f"ddim/{name}")
        pipe = OURS[name].from_pretrained(f"ddim/{name}")
        assert type(pipe.scheduler) is diffusers.DDIMScheduler and np.abs(images(pipe, name) - drawn).max() <= 1e-6
        same(OURS[name].from_pretrained(f"ddim/{name}", scheduler=AlphaDDPMScheduler.from_config(pipe.scheduler.config)), name)

def check_scheduler_alone_and_its_compatibles():
    ours = AlphaDDPMScheduler.from_pretrained("org/own", subfolder="scheduler")
    assert ours.noise_second_moments == OWN["noise_second_moments"] and ours.inference_timesteps == OWN["inference_timesteps"]
    ours = AlphaDDPMScheduler.from_pretrained("org/ddpm", subfolder="scheduler")
    names = [name for name in AlphaDDPMScheduler._compatibles if hasattr(diffusers, name)]
    assert len(names) >= 10
    for name in names:
        other = getattr(diffusers, name).from_config(ours.config)
        other.set_timesteps(5)
        assert other.config.num_train_timesteps == STEPS and other.config.beta_schedule == "squaredcos_cap_v2", name

def check_from_pipe():
    stock = DDPMPipeline.from_pretrained("org/ddpm")
    ours = AlphaDDPMPipeline.from_pipe(stock)
    assert type(ours.scheduler) is AlphaDDPMScheduler and ours.unet is stock.unet
    same(ours)
    same(DDPMPipeline.from_pipe(ours), within=1e-3)
    stock = DiffusionPipeline.from_pretrained("org/text")
    ours = AlphaDDPMTextToImagePipeline.from_pipe(stock)
    assert type(ours.scheduler) is AlphaDDPMScheduler and ours.text_encoder is stock.text_encoder
    same(ours, "text")
    same(AlphaDDPMTextToImagePipeline.from_pipe(ours), "text")
    same(IFPipeline.from_pipe(ours, safety_checker=None, feature_extractor=None, watermarker=None,
                              requires_safety_checker=False), "text", within=1e-3)
    same(AlphaDDPMPipeline.from_pipe(DiffusionPipeline.from_pretrained("org/class")), "class")

def check_dtype():
    for name, dtype in {"ddpm": torch.bfloat16, "text": torch.bfloat16, "class": torch.float64}.items():
        pipe = OURS[name].from_pretrained(f"org/{name}", dtype=dtype)
        assert {part.dtype for part in pipe.components.values() if hasattr(part, "dtype")} == {dtype}
        drawn = images(pipe, name)
        moved = images(OURS[name].from_pretrained(f"org/{name}").to(dtype), name)
        assert np.isfinite(drawn).all() and np.abs(drawn - moved).max() <= 1e-6, (name, dtype)

def check_variant():
    for name, components in {"ddpm": ["unet"], "class": ["unet"], "text": ["unet", "text_encoder"]}.items():
        plain = OURS[name].from_pretrained(f"org/{name}")
        pipe = OURS[name].from_pretrained(f"org/{name}", variant="fp16")
        is_half(pipe, plain, *components)
        same(pipe, name, within=0.05)
        pipe.save_pretrained(f"variant/{name}", variant="fp16")
        assert Path(f"variant/{name}/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
        is_half(OURS[name].from_pretrained(f"variant/{name}", variant="fp16"), plain, *components)
        is_half(DiffusionPipeline.from_pretrained(f"org/{name}", variant="fp16"), plain, *components)
        pipe.push_to_hub(f"org/{name}-variant")
        pipe.push_to_hub(f"org/{name}-variant", variant="fp16")
        is_half(OURS[name].from_pretrained(f"org/{name}-variant", variant="fp16"), plain, *components)
        is_half(OURS[name].from_pretrained(f"org/{name}-variant"), plain, *components)

def check_revision():
    for name in ("ddpm", "text"):
        same(OURS[name].from_pretrained(f"org/{name}-moved"), name)
        same(OURS[name].from_pretrained(f"org/{name}-moved", revision="before"), name, expected=f"{name}-before")

def check_saved_again_it_holds_no_local_path():
    AlphaDDPMPipeline.from_pretrained("org/ddpm").save_pretrained("clean/ddpm")
    AlphaDDPMTextToImagePipeline.from_pretrained("org/text").save_pretrained("clean/text")
    for path in Path("clean").rglob("*.json"):
        assert str(Path.cwd()) not in path.read_text() and "name_or_path" not in path.read_text(), path

def check_early_repository():
    pipe = AlphaDDPMPipeline.from_pretrained("org/early")
    assert pipe.scheduler.config.variance_type == "fixed_large"
    same(pipe, "early")
    pipe.save_pretrained("early")
    same(DiffusionPipeline.from_pretrained("early"), "early", within=1e-3)

def check_pickled_weights_are_refused():
    raises(OSError, lambda: AlphaDDPMPipeline.from_pretrained("org/pickled"), "pickle", "safetensors")
    raises(ValueError, lambda: AlphaDDPMPipeline.from_pretrained("org/ddpm", use_safetensors=False), "pickle")
    same(AlphaDDPMPipeline.from_pretrained("org/ddpm", use_safetensors=None))
    AlphaDDPMPipeline.from_pretrained("org/ddpm").push_to_hub("org/safe", safe_serialization=False)
    same(DiffusionPipeline.from_pretrained("org/safe", use_safetensors=True), within=1e-3)

def check_other_schedulers_with_infinite_defaults_or_a_module_of_their_own():
    names = ("DPMSolverMultistepScheduler", "SASolverScheduler", "FlowMatchEulerDiscreteScheduler", "KarrasVeScheduler")
    pipe = AlphaDDPMPipeline.from_pretrained("org/ddpm")
    for name in names:
        pipe.register_modules(scheduler=getattr(diffusers, name)())
        pipe.push_to_hub(f"org/{name}")
        for loader in (AlphaDDPMPipeline, DiffusionPipeline):
            assert type(loader.from_pretrained(f"org/{name}").scheduler).__name__ == name

def check_malformed_repositories_end_in_an_error_and_write_nothing_outside():
    outside = Path(huggingface_hub.constants.HF_HOME).parents[2]  # of the caches and of where this process works
    for name, word in json.loads(os.environ["MALFORMED"]).items():
        raises((ValueError, OSError), lambda: AlphaDDPMPipeline.from_pretrained(f"org/{name}"), word)
    try:
        AlphaDDPMPipeline.from_pretrained("org/tricky")
    except (ValueError, OSError):
        pass
    found = [name for _, folders, files in os.walk(outside) for name in folders + files]  # other tests write there too
    assert not [name for name in found if name.startswith("climbed")]

def check_push_to_hub_of_a_pipeline():
    pipe = AlphaDDPMPipeline.from_pretrained("org/own")
    pipe.push_to_hub("org/pushed", private=True)
    same(AlphaDDPMPipeline.from_pretrained("org/pushed"), "own")
    pipe.save_pretrained("saved-and-pushed", push_to_hub=True, repo_id="org/pushed-too")
    same(AlphaDDPMPipeline.from_pretrained("org/pushed-too"), "own")
    AlphaDDPMTextToImagePipeline.from_pretrained("org/text").push_to_hub("org/pushed-text")
    same(AlphaDDPMTextToImagePipeline.from_pretrained("org/pushed-text"), "text")
    assert not Path("saved-and-pushed", "README.md").exists()

def check_examples_of_the_card_run():
    import re
    from huggingface_hub import hf_hub_download
    from PIL import Image
    Image.fromarray(np.arange(128, dtype=np.uint8).reshape(8, 16) % 5).save("condition.png")
    calls = {"ddpm": 3, "own": 3, "rgba": 3, "deep": 3, "text": 3, "class": 2, "text-fixed": 2, "dotted.v1-5": 2, "image": 2}
    for name, count in calls.items():
        text = Path(hf_hub_download(f"org/{name}", "README.md")).read_text()
        examples = re.findall(r"```python\\n(.*?)```", text, re.DOTALL)
        assert len(examples) == 3
        for place, example in enumerate(examples):
            names = {}
            exec(example, names)
            assert ("image" in names or "images" in names) == (place >= 3 - count), (name, example)
            assert "image" not in names or names["image"].size == ((16, 8) if name in ("rgba", "image") else (8, 8))
            if name == "deep":
                assert names["images"].shape == (1, 8, 16, 2) and names["images"].max() <= 1
                assert place != 1 or (names["values"].shape == (1, 8, 16, 2) and 1 < names["values"].max() <= 4095)
            elif "image" not in names and name != "image":  # as the card says
                arguments = ["seven"] if name == "text-fixed" else []
                raises((ValueError, TypeError, RuntimeError), lambda: names["pipe"](*arguments, num_inference_steps=2))
                assert "cannot be told a class" in text or "learned variance" in text
        modular = {"ddpm_pipeline": __import__("ddpm_pipeline")}
        exec("; ".join(re.search(r"`(pipe = .*init_pipeline.*)`, then `(.*)`", text).groups()), modular)
        assert torch.equal(modular["pipe"].unet.conv_out.weight, names["pipe"].unet.conv_out.weight)

def check_text_models_load_through_the_auto_class():
    from diffusers import AutoPipelineForText2Image
    pipe = AutoPipelineForText2Image.from_pretrained("org/text")
    assert type(pipe) is IFPipeline
    same(pipe, "text", within=1e-3)
    same(AlphaDDPMTextToImagePipeline.from_pipe(pipe), "text")

def check_stock_pipeline_pushed_then_ours():
    DDPMPipeline.from_pretrained("org/own").push_to_hub("org/by-stock")
    same(AlphaDDPMPipeline.from_pretrained("org/by-stock"), "own")
    AlphaDDPMPipeline.from_pretrained("org/by-stock").push_to_hub("org/by-stock")
    IFPipeline.from_pretrained("org/text").push_to_hub("org/text-by-stock")
    same(AlphaDDPMTextToImagePipeline.from_pretrained("org/text-by-stock"), "text")

def check_offline_after_all():
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"  # where nobody answers
    same(AlphaDDPMPipeline.from_pretrained("org/ddpm"))
    same(AlphaDDPMPipeline.from_pretrained("org/class"), "class")
    same(AlphaDDPMTextToImagePipeline.from_pretrained("org/text"), "text")
    same(DiffusionPipeline.from_pretrained("org/ddpm"), within=1e-3)
    same(DiffusionPipeline.from_pretrained("org/text"), "text", within=1e-3)
    assert len(AlphaDDPMScheduler.from_pretrained("org/ddpm", subfolder="scheduler")) == STEPS
    raises(OSError, lambda: AlphaDDPMPipeline.from_pretrained("org/never-seen"), "")
"""
)

GROUPS = {"stranger": STRANGER, "installed": INSTALLED}
CHECKS = [
    (group, line.removeprefix("def ").split("(")[0])
    for group, script in GROUPS.items()
    for line in script.splitlines()
    if line.startswith("def check_")
]


class Groups:
    """Runs a group when its first test asks for it."""

    def __init__(self, hub: hub_server.Hub, published: Path, folder: Path):
        self.hub, self.published, self.folder = hub, published, folder
        self.outcomes: dict[str, dict] = {}

    def __getitem__(self, group: str) -> dict:
        if group not in self.outcomes:
            env = environment(
                self.hub, self.folder / group / "home", hub_server.WRITE_TOKEN,
                EXPECTED=str(self.published / "expected.npz"),
                MALFORMED=json.dumps({name: word for name, (*_, word) in MALFORMED.items()}),
            )  # fmt: skip
            self.outcomes[group] = run_checks(GROUPS[group], env, self.folder / group, group == "installed")
        return self.outcomes[group]


@pytest.fixture(scope="module")
def groups(hub: hub_server.Hub, published: Path, tmp_path_factory: pytest.TempPathFactory) -> Groups:
    return Groups(hub, published, tmp_path_factory.mktemp("groups"))


@pytest.mark.parametrize(("group", "check"), CHECKS, ids=[f"{group}-{check[6:]}" for group, check in CHECKS])
def test_loads(groups: Groups, group: str, check: str) -> None:
    outcome = groups[group][check]
    assert outcome == "passed", outcome


@pytest.mark.parametrize(
    ("repo_id", "pipeline_class"), [("org/ddpm", AlphaDDPMPipeline), ("org/text", AlphaDDPMTextToImagePipeline)]
)
def test_shipped_code_is_the_package_s_own(hub: hub_server.Hub, published: Path, repo_id: str, pipeline_class: type) -> None:
    sources = pipeline_class.shipped_files()
    assert {"pipeline.py", "sampling_alpha_ddpm.py", "scheduling_alpha_ddpm.py", "stock_format.py"} <= sources.keys()
    assert {name for name in hub.files(repo_id) if name.endswith(".py")} == sources.keys()
    for name, source in sources.items():
        assert source.parent == Path(ddpm_pipeline.__file__).parent
        assert hub.read(repo_id, name).replace(b"from.", b"from .") == source.read_bytes().replace(b"from.", b"from .")


def test_repository_holds_the_stock_format_and_nothing_else(hub: hub_server.Hub, published: Path) -> None:
    assert hub.files("org/class") == {
        ".gitattributes", "README.md", "model_index.json", "modular_config.json", *AlphaDDPMPipeline.shipped_files(),
        "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    }  # fmt: skip
    index = json.loads(hub.read("org/class", "model_index.json"))
    assert index.pop("_diffusers_version")
    assert index == {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }


def test_cards_on_the_hub_name_their_repository(hub: hub_server.Hub, groups: Groups) -> None:
    assert groups["installed"]["check_push_to_hub_of_a_pipeline"] == "passed"
    assert hub.repos["models", "org/pushed"]["private"]
    for repo_id in ("org/ddpm", "org/class", "org/pushed", "org/pushed-too", "org/by-stock"):
        card = hub.read(repo_id, "README.md").decode()
        assert f'AlphaDDPMPipeline.from_pretrained("{repo_id}")' in card, repo_id
        assert f'custom_pipeline="{repo_id}", trust_remote_code=True' in card, repo_id
