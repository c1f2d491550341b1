"""What is in a repository loads from the Hub: with diffusers alone, with trust, with the package, offline, and back again.

Each group of checks runs in a process of its own with an empty cache; a check in it is a test here.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

import hub_server
from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.hub import build_card, export, push
from hub_fixtures import environment, hub, run_checks  # noqa: F401

STEPS = 20
OWN = {
    "variance_type": "analytic",
    "noise_second_moments": [round(0.4 + 0.02 * t, 3) for t in range(STEPS)],
    "inference_timesteps": {"3": [19, 7, 0]},
}


def tiny_unet(**config) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        attention_head_dim=None, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **config,
    ).eval()  # fmt: skip


def scheduler(**config) -> AlphaDDPMScheduler:
    return AlphaDDPMScheduler(num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2", **config)


def images(pipe) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    return pipe(2, generators, num_inference_steps=STEPS, output_type="np").images


def early_repository(folder: Path) -> np.ndarray:
    """As google/ddpm-cifar10-32 and its like: all files at the top, few config keys, attention by its former names."""
    unet = tiny_unet(downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6)
    DDPMPipeline(unet, DDPMScheduler(STEPS, variance_type="fixed_large")).save_pretrained(folder)
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    former = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for new, old in former.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    assert any("proj_attn" in name for name in weights)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = json.loads((folder / "unet" / "config.json").read_text())
    newer = ("dropout", "attn_norm_num_groups", "class_embed_type", "num_class_embeds", "num_train_timesteps",
             "resnet_time_scale_shift", "time_embedding_dim", "downsample_type", "upsample_type", "mid_block_type")  # fmt: skip
    config = {name: value for name, value in config.items() if name not in newer}
    (folder / "config.json").write_text(json.dumps(config | {"_diffusers_version": "0.1.1"}))
    kept = (
        "_class_name",
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "clip_sample",
        "variance_type",
    )
    stored = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler_config.json").write_text(json.dumps({name: stored[name] for name in kept}))
    for name in ("unet", "scheduler"):
        for file in (folder / name).iterdir():
            file.unlink()
        (folder / name).rmdir()
    return images(AlphaDDPMPipeline(unet, AlphaDDPMScheduler(STEPS, variance_type="fixed_large")))


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
        pipe.set_progress_bar_config(disable=True)
        expected = {"ddpm": images(pipe)}
        export(pipe, folder / "ddpm", build_card(pipe, name="ddpm"))
        pipe.save_pretrained(folder / "ddpm", variant="fp16")
        push(folder / "ddpm", "org/ddpm", api=api)
        api.create_tag("org/ddpm", tag="v1")
        other = tiny_unet()
        with torch.no_grad():
            other.conv_out.bias.add_(1.0)
        export(AlphaDDPMPipeline(other, scheduler()), folder / "changed")
        push(folder / "changed", "org/moved", api=api)
        api.create_tag("org/moved", tag="before")
        push(folder / "ddpm", "org/moved", api=api)
        expected["moved"] = images(AlphaDDPMPipeline(other, scheduler()))
        own = AlphaDDPMPipeline(tiny_unet(), scheduler(**OWN))
        expected["own"] = images(own)
        export(own, folder / "own")
        push(folder / "own", "org/own", api=api)
        export(AlphaDDPMPipeline(tiny_unet(num_class_embeds=11), scheduler()), folder / "class")
        push(folder / "class", "org/class", api=api)
        expected["early"] = early_repository(folder / "early")
        api.create_repo("org/early")
        api.upload_folder(repo_id="org/early", folder_path=folder / "early")
        DDPMPipeline(tiny_unet(), DDPMScheduler(STEPS)).save_pretrained(folder / "pickled", safe_serialization=False)
        api.create_repo("org/pickled")
        api.upload_folder(repo_id="org/pickled", folder_path=folder / "pickled")
    np.savez(folder / "expected.npz", **expected)
    return folder


COMMON = f"""
import os, sys, json, warnings
from pathlib import Path
import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
STEPS, OWN = {STEPS}, {OWN!r}
EXPECTED = np.load(os.environ["EXPECTED"])

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    return pipe(2, generators, num_inference_steps=STEPS, output_type="np").images

def same(pipe, name="ddpm", within=1e-6):
    difference = np.abs(draw(pipe) - EXPECTED[name]).max()
    assert difference <= within, difference

def raises(kind, call, *words):
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"no {{kind.__name__}} was raised")

def own_settings(folder):
    return json.loads(Path(folder, "scheduler", "scheduler_config.json").read_text())["_alpha_ddpm"]

KEPT = {{name: OWN[name] for name in ("noise_second_moments", "inference_timesteps")}}
"""

STRANGER = (
    COMMON
    + """
TRUST = {"trust_remote_code": True}

def check_plain_call_samples():
    pipe = DiffusionPipeline.from_pretrained("org/ddpm")
    assert type(pipe) is DDPMPipeline and type(pipe.scheduler) is DDPMScheduler
    same(pipe, within=1e-3)
    assert not any(name.startswith("diffusers_modules") for name in sys.modules), "code of the repository was run"
    pipe.save_pretrained("plain")
    same(DiffusionPipeline.from_pretrained("plain"), within=1e-3)

def check_code_is_not_run_without_trust():
    raises(ValueError, lambda: DiffusionPipeline.from_pretrained("org/ddpm", custom_pipeline="org/ddpm"), "trust_remote_code")
    assert not any(name.startswith("diffusers_modules") for name in sys.modules)

def check_plain_call_of_a_class_model_loads_but_says_that_it_needs_labels():
    pipe = DiffusionPipeline.from_pretrained("org/class")
    assert pipe.unet.config.num_class_embeds == 11
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

def check_code_of_another_repository_does_not_get_in_the_way():
    first = DiffusionPipeline.from_pretrained("org/own", custom_pipeline="org/own", **TRUST)
    second = DiffusionPipeline.from_pretrained("org/ddpm", custom_pipeline="org/ddpm", **TRUST)
    same(first, "own")
    same(second)
    assert "org--ddpm" in type(second.scheduler).__module__ and "org--own" in type(first.scheduler).__module__

def check_trusted_pipeline_saves_a_folder_that_loads_everywhere():
    pipe = DiffusionPipeline.from_pretrained("org/own", custom_pipeline="org/own", **TRUST)
    pipe.save_pretrained("again")
    assert own_settings("again") == KEPT
    assert {"pipeline.py", "sampling_alpha_ddpm.py", "scheduling_alpha_ddpm.py", "stock_format.py"} <= set(os.listdir("again"))
    assert type(DiffusionPipeline.from_pretrained("again")) is DDPMPipeline
    same(DiffusionPipeline.from_pretrained("again", custom_pipeline="again", **TRUST), "own")

def check_stock_saves_our_settings_again():
    DiffusionPipeline.from_pretrained("org/own").save_pretrained("stock")
    assert own_settings("stock") == KEPT
    pipe = DiffusionPipeline.from_pretrained("stock", custom_pipeline="org/own", **TRUST)
    same(pipe, "own")

def check_trusted_pipeline_pushes():
    pipe = DiffusionPipeline.from_pretrained("org/ddpm", custom_pipeline="org/ddpm", **TRUST)
    pipe.push_to_hub("org/forked")
    same(DiffusionPipeline.from_pretrained("org/forked", custom_pipeline="org/forked", **TRUST))
"""
)

FRESH = (
    COMMON
    + """
def check_trusted_call_first_of_all():
    same(DiffusionPipeline.from_pretrained("org/ddpm", custom_pipeline="org/ddpm", trust_remote_code=True))
    same(DiffusionPipeline.from_pretrained("org/ddpm", custom_pipeline="org/ddpm", trust_remote_code=True))
    same(DiffusionPipeline.from_pretrained("org/ddpm"), within=1e-3)
"""
)

INSTALLED = (
    COMMON
    + """
import diffusers
from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler

def check_our_call():
    pipe = AlphaDDPMPipeline.from_pretrained("org/ddpm")
    assert type(pipe.scheduler) is AlphaDDPMScheduler
    same(pipe)

def check_loading_warns_of_nothing():
    import io, logging
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("diffusers").addHandler(handler)
    AlphaDDPMPipeline.from_pretrained("org/own")
    DiffusionPipeline.from_pretrained("org/own")
    logging.getLogger("diffusers").removeHandler(handler)
    assert "arn" not in stream.getvalue() and "ignored" not in stream.getvalue(), stream.getvalue()

def check_trusted_call_with_the_package_there():
    pipe = DiffusionPipeline.from_pretrained("org/ddpm", custom_pipeline="org/ddpm", trust_remote_code=True)
    assert type(pipe).__module__.startswith("diffusers_modules")
    same(pipe)

def check_our_settings_survive_a_stock_round_trip():
    AlphaDDPMPipeline.from_pretrained("org/own").save_pretrained("own")
    DDPMPipeline.from_pretrained("own").save_pretrained("stock")
    pipe = AlphaDDPMPipeline.from_pretrained("stock")
    pipe.save_pretrained("third")
    assert own_settings("stock") == own_settings("third") == KEPT
    same(pipe, "own")
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
    assert np.abs(draw(plain) - draw(pipe)).max() <= 1e-3

def check_scheduler_alone_and_its_compatibles():
    ours = AlphaDDPMScheduler.from_pretrained("org/own", subfolder="scheduler")
    assert ours.noise_second_moments == OWN["noise_second_moments"] and ours.inference_timesteps == OWN["inference_timesteps"]
    ours = AlphaDDPMScheduler.from_pretrained("org/ddpm", subfolder="scheduler")
    names = [name for name in AlphaDDPMScheduler._compatibles if hasattr(diffusers, name)]
    assert len(names) >= 10
    for name in names:
        try:
            other = getattr(diffusers, name).from_config(ours.config)
        except ImportError:
            continue  # needs a library that is not installed
        other.set_timesteps(5)
        assert other.config.num_train_timesteps == STEPS and other.config.beta_schedule == "squaredcos_cap_v2", name

def check_from_pipe():
    stock = DDPMPipeline.from_pretrained("org/ddpm")
    ours = AlphaDDPMPipeline.from_pipe(stock)
    assert type(ours.scheduler) is AlphaDDPMScheduler and ours.unet is stock.unet
    same(ours)
    same(DDPMPipeline.from_pipe(ours), within=1e-3)

def check_dtype():
    pipe = AlphaDDPMPipeline.from_pretrained("org/ddpm", torch_dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16 and np.isfinite(draw(pipe)).all()
    same(AlphaDDPMPipeline.from_pretrained("org/ddpm", torch_dtype=torch.float64), within=1)

def check_variant():
    pipe = AlphaDDPMPipeline.from_pretrained("org/ddpm", variant="fp16")
    same(pipe)
    pipe.save_pretrained("variant", variant="fp16")
    assert os.listdir("variant/unet") and Path("variant/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    same(AlphaDDPMPipeline.from_pretrained("variant", variant="fp16"))
    same(DiffusionPipeline.from_pretrained("org/ddpm", variant="fp16"), within=1e-3)

def check_revision():
    same(AlphaDDPMPipeline.from_pretrained("org/moved"))
    same(AlphaDDPMPipeline.from_pretrained("org/moved", revision="before"), "moved")

def check_saved_again_it_holds_no_local_path():
    AlphaDDPMPipeline.from_pretrained("org/ddpm").save_pretrained("clean")
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
    pipe = AlphaDDPMPipeline.from_pretrained("org/ddpm")
    raises(ValueError, lambda: pipe.save_pretrained("pickled", safe_serialization=False), "pickle")
    raises(ValueError, lambda: pipe.push_to_hub("org/p", safe_serialization=False), "pickle")

def check_push_to_hub_of_a_pipeline():
    pipe = AlphaDDPMPipeline.from_pretrained("org/own")
    pipe.push_to_hub("org/pushed", private=True)
    same(AlphaDDPMPipeline.from_pretrained("org/pushed"), "own")
    pipe.save_pretrained("saved-and-pushed", push_to_hub=True, repo_id="org/pushed-too")
    same(AlphaDDPMPipeline.from_pretrained("org/pushed-too"), "own")
    assert not Path("saved-and-pushed", "README.md").exists()

def check_examples_of_the_card_run():
    import re
    from huggingface_hub import hf_hub_download
    text = Path(hf_hub_download("org/ddpm", "README.md")).read_text()
    examples = re.findall(r"```python\\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        names = {}
        exec(example, names)
        assert names["image"].size == (8, 8)

def check_stock_pipeline_pushed_then_ours():
    DDPMPipeline.from_pretrained("org/own").push_to_hub("org/by-stock")
    same(AlphaDDPMPipeline.from_pretrained("org/by-stock"), "own")
    AlphaDDPMPipeline.from_pretrained("org/by-stock").push_to_hub("org/by-stock")
"""
)

OFFLINE = (
    COMMON
    + """
from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler

def check_our_call_offline():
    same(AlphaDDPMPipeline.from_pretrained("org/ddpm"))

def check_plain_call_offline():
    same(DiffusionPipeline.from_pretrained("org/ddpm"), within=1e-3)

def check_scheduler_offline():
    assert len(AlphaDDPMScheduler.from_pretrained("org/ddpm", subfolder="scheduler")) == STEPS
"""
)

GROUPS = {"stranger": STRANGER, "fresh": FRESH, "installed": INSTALLED, "offline": OFFLINE}
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
            warm = group == "offline"
            if warm:
                self["installed"]
            home = self.folder / ("installed" if warm else group) / "home"
            env = environment(
                self.hub, home, hub_server.WRITE_TOKEN, EXPECTED=str(self.published / "expected.npz"),
                **({"HF_HUB_OFFLINE": "1"} if warm else {}),
            )  # fmt: skip
            with_package = group in ("installed", "offline")
            self.outcomes[group] = run_checks(GROUPS[group], env, self.folder / group, with_package)
        return self.outcomes[group]


@pytest.fixture(scope="module")
def groups(hub: hub_server.Hub, published: Path, tmp_path_factory: pytest.TempPathFactory) -> Groups:
    return Groups(hub, published, tmp_path_factory.mktemp("groups"))


@pytest.mark.parametrize(("group", "check"), CHECKS, ids=[f"{group}-{check[6:]}" for group, check in CHECKS])
def test_loads(groups: Groups, group: str, check: str) -> None:
    outcome = groups[group][check]
    assert outcome == "passed", outcome


def test_shipped_code_is_the_package_s_own_byte_for_byte(hub: hub_server.Hub, published: Path) -> None:
    package = Path(hub_server.__file__).parent.parent / "src" / "ddpm_pipeline"
    sources = {
        "pipeline.py": "pipeline_alpha_ddpm.py",
        "sampling_alpha_ddpm.py": "sampling_alpha_ddpm.py",
        "scheduling_alpha_ddpm.py": "scheduling_alpha_ddpm.py",
        "stock_format.py": "stock_format.py",
    }
    assert {name for name in hub.files("org/ddpm") if name.endswith(".py")} == set(sources)
    for name, source in sources.items():
        assert hub.read("org/ddpm", name) == (package / source).read_bytes()


def test_repository_holds_the_stock_format_and_nothing_else(hub: hub_server.Hub, published: Path) -> None:
    assert hub.files("org/class") == {
        ".gitattributes", "README.md", "model_index.json", "pipeline.py", "sampling_alpha_ddpm.py",
        "scheduling_alpha_ddpm.py", "stock_format.py",
        "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
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
