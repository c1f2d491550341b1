"""Pipeline folders: what is saved loads again, over whatever lay there before, and what cannot be meant is refused at once."""

import inspect
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, SchedulerMixin

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler, AlphaDDPMTextToImagePipeline
from hub_models import images, scheduler, text_pipeline, tiny_unet

WEIGHTS = "diffusion_pytorch_model"


def pipeline(seed: int = 0, **config: Any) -> AlphaDDPMPipeline:
    unet = tiny_unet(**config)
    with torch.no_grad():
        unet.conv_out.bias.add_(seed)
    return AlphaDDPMPipeline(unet, scheduler())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {"image": tmp_path_factory.mktemp("image"), "text": tmp_path_factory.mktemp("text")}
    pipeline().save_pretrained(folders["image"])
    text_pipeline().save_pretrained(folders["text"])
    return folders


def changed(folder: Path, source: Path, file: str, **values: Any) -> Path:
    """A copy of a pipeline folder with other values in one of its JSON files."""
    shutil.copytree(source, folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    return folder


def pickle_that_makes(file: Path) -> bytes:
    return b"c__builtin__\nopen\n(V" + os.fsencode(file) + b"\nVw\ntR."


def schedulers() -> Iterator[str]:
    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name) if name.endswith("Scheduler") else None
        if isinstance(cls, type) and issubclass(cls, SchedulerMixin):
            required = [p for p in inspect.signature(cls.__init__).parameters.values() if p.default is p.empty]
            if len(required) == 1:  # self
                yield name


# ---- schedulers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(schedulers()))
@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_with_any_scheduler_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """With diffusers' own defaults, infinities among them."""
    cls = getattr(diffusers, name)
    original = cls.from_config(scheduler().config) if name in AlphaDDPMScheduler._compatibles else cls()
    AlphaDDPMPipeline(tiny_unet(), original).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", name]
    loaded = AlphaDDPMPipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is (AlphaDDPMScheduler if cls is DDPMScheduler else cls)
    expected, found = ({k: v for k, v in s.config.items() if not k.startswith("_")} for s in (original, loaded))
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(expected, default=np.ndarray.tolist))


@pytest.mark.parametrize("name", ["beta_end", "clip_sample_range"])
@pytest.mark.parametrize("cls", ["DDPMScheduler", "DDIMScheduler"])
def test_infinities_of_ddpm_s_own_settings_are_refused(cls: str, name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(tmp_path / "model", saved["image"], "scheduler/scheduler_config.json", **{name: float("inf")})
    changed_index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": ["diffusers", cls]}
    (folder / "model_index.json").write_text(json.dumps(changed_index))
    with pytest.raises(ValueError, match=f"{name}=inf"):
        AlphaDDPMPipeline.from_pretrained(folder)


# ---- saving ---------------------------------------------------------------------------------------

SHARDED = {"max_shard_size": "15KB"}


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(("before", "after"), [({}, SHARDED), (SHARDED, {}), (SHARDED, {"max_shard_size": "8KB"})])
def test_saving_replaces_the_weights_of_the_same_variant(variant: str | None, before, after, tmp_path: Path) -> None:
    """And nothing else: the other variant, and what the user put there, stay as they are."""
    other_variant = "fp16" if variant is None else None
    text_pipeline(2).save_pretrained(tmp_path, variant=other_variant, **before)
    text_pipeline(1).save_pretrained(tmp_path, variant=variant, **before)
    other = {path: path.read_bytes() for path in tmp_path.glob("*/*.safetensors") if ("fp16" in path.name) != bool(variant)}
    (tmp_path / "unet" / "notes.safetensors").write_text("mine")
    text_pipeline(0).save_pretrained(tmp_path, variant=variant, **after)
    assert {path: path.read_bytes() for path in other} == other
    assert (tmp_path / "unet" / "notes.safetensors").read_text() == "mine"
    indices = [path for path in tmp_path.glob("*/*.index*.json") if ("fp16" in path.name) == bool(variant)]
    assert len(indices) == (2 if after else 0)
    for loader, name, seed in ((DiffusionPipeline, variant, 0), (AlphaDDPMTextToImagePipeline, other_variant, 2)):
        found, expected = loader.from_pretrained(tmp_path, variant=name), text_pipeline(seed)
        for part in ("unet", "text_encoder"):
            state = getattr(found, part).state_dict()
            assert all(torch.equal(state[key], value) for key, value in getattr(expected, part).state_dict().items())


def test_a_failed_save_leaves_the_folder_as_it_was(saved: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(saved["image"], tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(AlphaDDPMScheduler, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        pipeline(1).save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("what", ["file", "link", "dangling", "folder is a file"])
def test_saving_where_a_file_or_link_is_in_the_way_is_refused(what: str, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if what == "folder is a file":
        folder.write_text("mine")
    else:
        folder.mkdir()
    if what == "file":
        (folder / "unet").write_text("mine")
    elif what in ("link", "dangling"):
        (folder / "unet").symlink_to(elsewhere if what == "link" else tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="another folder"):
        pipeline().save_pretrained(folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_linked_files_are_replaced_and_not_written_through(saved: dict[str, Path], tmp_path: Path) -> None:
    """As in a snapshot of the Hub's cache, whose files are links into a store that others share."""
    folder, store = tmp_path / "snapshot", shutil.copytree(saved["image"], tmp_path / "store")
    for path in [path for path in store.rglob("*") if path.is_file()]:
        link = folder / path.relative_to(store)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    changed_pipe = AlphaDDPMPipeline.from_pretrained(folder)
    with torch.no_grad():
        changed_pipe.unet.conv_out.bias.add_(1)
    changed_pipe.save_pretrained(folder)
    assert {path: path.read_bytes() for path in before} == before
    assert torch.equal(AlphaDDPMPipeline.from_pretrained(folder).unet.conv_out.bias, changed_pipe.unet.conv_out.bias)


def test_pickles_are_neither_written_nor_read(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="safe_serialization=False"):
        pipeline().save_pretrained(tmp_path / "safe", safe_serialization=False)
    assert [path.name for path in (tmp_path / "safe" / "unet").glob(f"{WEIGHTS}*")] == [f"{WEIGHTS}.safetensors"]
    AlphaDDPMPipeline.from_pretrained(tmp_path / "safe", use_safetensors=None)
    DDPMPipeline(tiny_unet(), DDPMScheduler(20)).save_pretrained(tmp_path / "pickled", safe_serialization=False)
    for use_safetensors in (None, True):
        with pytest.raises(OSError, match=rf"unet/{WEIGHTS}.bin"):
            AlphaDDPMPipeline.from_pretrained(tmp_path / "pickled", use_safetensors=use_safetensors)


def test_a_pickled_text_encoder_is_not_opened(saved: dict[str, Path], tmp_path: Path) -> None:
    folder, trace = shutil.copytree(saved["text"], tmp_path / "model"), tmp_path / "executed"
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(pickle_that_makes(trace))
    with pytest.raises(OSError, match=r"text_encoder/pytorch_model\.bin"):
        AlphaDDPMTextToImagePipeline.from_pretrained(folder)
    assert not trace.exists()


@pytest.mark.parametrize("removed", [f"unet/{WEIGHTS}.safetensors", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_file_is_named_and_pickles_are_not(removed: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved["image"], tmp_path / "model")
    (folder / removed).unlink()
    (folder / "optimizer.bin").write_bytes(b"")  # beside a checkpoint, say
    with pytest.raises(OSError) as caught:
        AlphaDDPMPipeline.from_pretrained(folder)
    assert Path(removed).name in str(caught.value) and "pickle" not in str(caught.value)


# ---- sizes and depth ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "file", "values"),
    [
        ("image", "unet/config.json", {
            "block_out_channels": [4] * 40, "layers_per_block": 1_000, "norm_num_groups": 4,
            "down_block_types": ["DownBlock2D"] * 40, "up_block_types": ["UpBlock2D"] * 40,
        }),
        ("image", "unet/config.json", {"block_out_channels": [8_192, 16_384]}),
        ("text", "unet/config.json", {"cross_attention_dim": 65_000, "block_out_channels": [1_024, 2_048]}),
        ("text", "text_encoder/config.json", {"num_hidden_layers": 1_000}),
        ("text", "text_encoder/config.json", {"vocab_size": 2**24}),
    ],
)  # fmt: skip
def test_a_model_out_of_proportion_to_its_weights_is_refused_at_once(kind, file, values, saved, tmp_path: Path) -> None:
    folder = changed(tmp_path / "model", saved[kind], file, **values)
    cls = {"image": AlphaDDPMPipeline, "text": AlphaDDPMTextToImagePipeline}[kind]
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"{file}.*parameters in .* tensors, more than"):
        cls.from_pretrained(folder)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_every_precision_are_in_proportion(dtype: torch.dtype, tmp_path: Path) -> None:
    text_pipeline().to(dtype).save_pretrained(tmp_path, **SHARDED)
    AlphaDDPMTextToImagePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("unet", ["diffusers", "DDPMPipeline"]),
        ("unet", ["ddpm", "DDPMPipeline"]),
        ("scheduler", ["diffusers", "DiffusionPipeline"]),
        ("prior", ["diffusers", "DDPMPipeline"]),
    ],
)
def test_a_pipeline_as_a_component_is_refused(name: str, entry: list[str], saved: dict[str, Path], tmp_path: Path) -> None:
    """diffusers would load its parts unchecked, and open pickles among them."""
    folder = changed(tmp_path / "model", saved["image"], "model_index.json", **{name: entry})
    shutil.rmtree(folder / name, ignore_errors=True)
    trace = tmp_path / "executed"
    DDPMPipeline(tiny_unet(), DDPMScheduler(20)).save_pretrained(folder / name, safe_serialization=False)
    (folder / name / "unet" / f"{WEIGHTS}.bin").write_bytes(pickle_that_makes(trace))
    with pytest.raises(ValueError, match=f"{name} is a pipeline"):
        AlphaDDPMPipeline.from_pretrained(folder)
    assert not trace.exists()


def test_components_that_stock_has_and_ours_has_not_do_not_stand_in_the_way(saved: dict[str, Path], tmp_path: Path) -> None:
    """As in DeepFloyd's own repositories."""
    extra = {"watermarker": ["deepfloyd_if", "IFWatermarker"], "safety_checker": ["deepfloyd_if", "IFSafetyChecker"]}
    folder = changed(tmp_path / "model", saved["text"], "model_index.json", **extra)
    pipe = AlphaDDPMTextToImagePipeline.from_pretrained(folder)
    np.testing.assert_allclose(images(pipe, "text"), images(text_pipeline(), "text"), atol=1e-6)


@pytest.mark.parametrize(
    ("sample_size", "channels"), [(None, (1, 1)), ([8, 8], (2, 2)), ([8, 16], (3, 6)), (8, (5, 5))], ids=str
)
def test_unusual_shapes_are_kept(sample_size: Any, channels: tuple[int, int], tmp_path: Path) -> None:
    unet = type(tiny_unet()).from_config(
        tiny_unet().config, sample_size=sample_size, in_channels=channels[0], out_channels=channels[1]
    )
    AlphaDDPMPipeline(unet, scheduler()).save_pretrained(tmp_path)
    config = AlphaDDPMPipeline.from_pretrained(tmp_path).unet.config
    assert (config.sample_size, (config.in_channels, config.out_channels)) == (sample_size, channels)
