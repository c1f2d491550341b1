"""Exports into a folder that holds a model already: the old one, none or the new one, and the user's own files in any case."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from ddpm_pipeline import AlphaDDPMPipeline
from ddpm_pipeline.hub import export
from hub_models import card_of, scheduler

MINE = ("mine.txt", "unet/notes.md", "unet/plots/loss.png", "scheduler/mine.json")
KILLED = 9


class Saved:
    """Stands for a pipeline: what it saves lies in a folder, so that a killed process needs no torch."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save_pretrained(self, folder: Path) -> None:
        shutil.copytree(self.folder, folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def models(pipe: AlphaDDPMPipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two saved models that differ in every component; the first one in shards."""
    folder = tmp_path_factory.mktemp("models")
    pipe.save_pretrained(folder / "old", max_shard_size="40KB")
    torch.manual_seed(1)
    other = AlphaDDPMPipeline(UNet2DModel.from_config(pipe.unet.config), scheduler(clip_sample=False))
    other.save_pretrained(folder / "new")
    return folder / "old", folder / "new"


def killed_after(steps: int, work: Callable[[], None]) -> bool:
    """Whether a process that does the work is killed: before its next change of a name, after this many."""
    process = os.fork()
    if process == 0:
        counter = itertools.count()

        def dies(function: Callable) -> Callable:
            def change(*arguments, **options):
                if next(counter) == steps:
                    os._exit(KILLED)
                return function(*arguments, **options)

            return change

        os.replace, os.unlink = dies(os.replace), dies(os.unlink)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


def test_killed_at_any_step_a_folder_never_holds_parts_of_two_models(models: tuple, tmp_path: Path, monkeypatch) -> None:
    """And the next export makes it whole, without a file of its own or of the user's too many or too few."""
    monkeypatch.setattr("ddpm_pipeline.hub.upload.sync_folder", lambda folder: None)  # as long as nobody pulls the plug
    monkeypatch.setattr("ddpm_pipeline.hub.upload.sync", lambda path: None)
    old, new = map(contents, models)
    states, killed = [], True
    while killed:
        folder = tmp_path / str(len(states))
        shutil.copytree(models[0], folder)
        for name in MINE:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("mine")
        killed = killed_after(len(states), lambda folder=folder: export(Saved(models[1]), folder))
        found = {name: content for name, content in contents(folder).items() if not name.startswith(".export.")}
        assert all(found.pop(name) == b"mine" for name in MINE)
        states.append("old" if found == old else "new" if found == new else "none")
        assert states[-1] != "none" or "model_index.json" not in found, f"{folder} loads parts of two models"
        export(Saved(models[1]), folder)
        assert contents(folder) == new | dict.fromkeys(MINE, b"mine"), folder
    assert sorted(set(states), key=states.index) == ["old", "none", "new"]
    AlphaDDPMPipeline.from_pretrained(folder)


def test_export_that_cannot_be_written_leaves_the_old_model(pipe, models: tuple[Path, Path], tmp_path: Path) -> None:
    export(pipe, tmp_path, card_of(pipe))
    before = contents(tmp_path)

    class Full(Saved):
        def save_pretrained(self, folder: Path) -> None:
            super().save_pretrained(folder)
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        export(Full(models[1]), tmp_path)
    assert contents(tmp_path) == before


def test_export_replaces_a_link_and_not_what_it_leads_to(models: tuple[Path, Path], tmp_path: Path) -> None:
    export(Saved(models[0]), tmp_path / "base")
    export(Saved(models[0]), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/unet")
    (tmp_path / "run/unet").symlink_to(tmp_path / "base/unet")
    (tmp_path / "run/README.md").symlink_to(tmp_path / "base/model_index.json")
    export(Saved(models[1]), tmp_path / "run")
    assert contents(tmp_path / "base") == contents(models[0])
    assert {**contents(models[1]), "README.md": contents(models[0])["model_index.json"]} == contents(tmp_path / "run")
    assert json.loads((tmp_path / "run/model_index.json").read_text())["_class_name"] == "DDPMPipeline"


@pytest.mark.parametrize("blocked", ["README.md", "unet/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_folder_in_the_place_of_a_file_costs_no_model(
    pipe: AlphaDDPMPipeline, models: tuple[Path, Path], tmp_path, blocked
) -> None:
    old = contents(shutil.copytree(models[0], tmp_path / "run"))
    (tmp_path / "run" / blocked).unlink(missing_ok=True)
    (tmp_path / "run" / blocked).mkdir()
    with pytest.raises(OSError, match="a folder in the place of"):
        export(pipe, tmp_path / "run", card_of(pipe))
    assert contents(tmp_path / "run") == {name: content for name, content in old.items() if name != blocked}
