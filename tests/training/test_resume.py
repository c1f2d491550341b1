"""Going on with changed things: what a resumed run compares, checkpoints that do not fit, and models made of checkpoints."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMTextToImagePipeline
from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.tables_alpha_ddpm import OWN_KEY
from ddpm_pipeline.training import TrainingOptions, checkpoints, train
from ddpm_pipeline.training.checkpoints import list_checkpoints, load_checkpoint
from ddpm_pipeline.training.export import export_checkpoint, main, pipeline_of
from ddpm_pipeline.training.models import build_model
from ddpm_pipeline.training.state import build_state
from training_helpers import quick_options

CAPTIONS = ["a white square", "a black square", "grey", "grey", "grey", "grey"]


def picture(seed: int, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)).save(file)


def captions(folder: Path, *texts: str) -> None:
    lines = [f"{seed}.png,{text}\n" for seed, text in enumerate(texts)]
    (folder / "metadata.csv").write_text("".join(["file_name,text\n", *lines]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of six updates with checkpoints after two, four and six, each made once: by classes, by captions, by neither."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(6):
        picture(seed, folder / "classes" / ("cat" if seed % 2 else "dog") / f"{seed}.png")
        picture(seed, folder / "captioned" / f"{seed}.png")
    captions(folder / "captioned", *CAPTIONS)
    base = quick_options(
        folder, max_train_steps=6, checkpoint_every=2, checkpoints_total_limit=9, num_samples=1, lr_warmup_steps=1,
    )  # fmt: skip
    options = {
        "plain": {"dataset": "digits", "split": "train[:20]"},
        "class": {"dataset": str(folder / "classes"), "condition": "class"},
        "text": {"dataset": str(folder / "captioned"), "condition": "text", "text_column": "text", "model": "tiny"},
    }
    made: dict[str, Path] = {}

    def run(kind: str, tmp_path: Path) -> tuple[dict, Path]:
        """The options and copies of the folder and of the data, moved, as to the scratch space of a cluster's next job."""
        given = {**base, **options[kind]}
        if kind not in made:
            made[kind] = train(TrainingOptions(**given, output_dir=str(folder / kind)))
        if kind != "plain":
            given["dataset"] = str(shutil.copytree(given["dataset"], tmp_path / Path(given["dataset"]).name))
        copy = Path(shutil.copytree(made[kind], tmp_path / "model"))
        return {**given, "output_dir": str(copy), "resume": "latest"}, copy

    return run


def sign(checkpoint: Path) -> None:
    """Write the manifest anew, as somebody who edits a checkpoint by hand might."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name, listed in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        listed |= {"size": len(content), "blake2b": hashlib.blake2b(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def refused(options: dict, *named: str, **changed) -> None:
    with pytest.raises(ConfigError) as error:
        train(TrainingOptions(**{**options, **changed}))
    for word in named:
        assert word in str(error.value)


def test_a_model_of_two_classes_has_its_pictures(runs, tmp_path):
    assert {"samples.png", "process.png"} <= {path.name for path in runs("class", tmp_path)[1].iterdir()}


# ---- data, names, words, models ---------------------------------------------------------------------


def test_changed_classes_are_refused_by_name(runs, tmp_path):
    options, folder = runs("class", tmp_path)
    data = Path(options["dataset"])
    (data / "dog").rename(data / "ant")
    refused(options, "class names 0 was 'cat' and is 'ant'", "--init_from", accept_changed_data=True)
    (data / "ant").rename(data / "dog")
    picture(7, data / "elk/7.png")
    refused(options, "class names was 2 values (cat, dog) and is 3 values (cat, dog, elk)")
    assert list_checkpoints(folder)[-1].name == "step-00000006"


@pytest.mark.parametrize("change", ["removed", "replaced", "added", "relabelled"])
def test_changed_images_are_refused_until_they_are_accepted(change, runs, tmp_path):
    options, folder = runs("class", tmp_path)
    data = Path(options["dataset"])
    if change == "removed":
        (data / "cat/5.png").unlink()
    elif change == "relabelled":
        (data / "cat/5.png").rename(data / "dog/5.png")
    else:
        picture(8, data / f"cat/{5 if change == 'replaced' else 8}.png")
    refused(options, "data were 6 images", "--accept_changed_data", "--init_from")
    if change == "added":
        train(TrainingOptions(**{**options, "max_train_steps": 7}, accept_changed_data=True))
        assert list_checkpoints(folder)[-1].name == "step-00000007"
        log = (folder / "train.log").read_text()
        assert "changed data: the data were 6 images" in log and f"and is {data}" in log
        other = str(data.rename(tmp_path / "others"))
        refused({**options, "dataset": other}, f"--dataset was {data} and is {other}")


def test_another_column_is_refused_by_name(runs, tmp_path):
    options, folder = runs("class", tmp_path)
    (folder / "checkpoints/step-00000006/identity.json").write_text(
        json.dumps(
            json.loads((folder / "checkpoints/step-00000006/identity.json").read_text()) | {"condition's column": "kind"}
        )
    )
    sign(folder / "checkpoints/step-00000006")
    refused(options, "condition's column was 'kind' and is 'label'", accept_changed_data=True)


def test_changed_captions_and_words_are_refused_by_name(runs, tmp_path):
    options, _ = runs("text", tmp_path)
    captions(Path(options["dataset"]), *CAPTIONS[:5], "a blue square")
    refused(options, "tokenizer was", "tokens", accept_changed_data=True)
    captions(Path(options["dataset"]), *reversed(CAPTIONS))  # the same words, of other images
    refused(options, "data were 6 images")


def test_another_model_to_start_from_is_another_run(runs, tmp_path):
    """Its schedule, target and network are compared; the same model in another place is the same."""
    options, folder = runs("plain", tmp_path)
    start = {name: value for name, value in options.items() if name not in ("model", "num_train_timesteps", "beta_end")}
    first = start | {"output_dir": str(tmp_path / "tuned"), "max_train_steps": 2, "resume": None, "init_from": str(folder)}
    train(TrainingOptions(**first))
    other = tmp_path / "other"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("checkpoints"))
    again = first | {"resume": "latest", "init_from": str(other)}
    train(TrainingOptions(**again))
    config = other / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction", "beta_end": 0.3}))
    refused(again, "prediction_type was 'epsilon' and is 'v_prediction'", "beta_end was 0.4 and is 0.3")


def test_fewer_updates_than_are_done_are_refused(runs, tmp_path):
    options, folder = runs("plain", tmp_path)
    refused(options, "has done 6 updates, more than the 4", "ddpm_pipeline.training.export", max_train_steps=4)
    assert list_checkpoints(folder)[-1].name == "step-00000006"


def test_a_checkpoint_of_an_earlier_version_resumes(runs, tmp_path):
    options, folder = runs("plain", tmp_path)
    checkpoint = folder / "checkpoints/step-00000006"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    known = ("model.safetensors", "ema.safetensors", "optimizer.bin", "parts.pt", "run_state.json", "random_states_0.pkl")
    for name in set(manifest["files"]) - set(known):
        del manifest["files"][name]
        (checkpoint / name).unlink()
    shutil.rmtree(checkpoint / "model")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="earlier version"):
        export_checkpoint(checkpoint, tmp_path / "exported")
    refused(options, "--seed was 0 and is 9", seed=9)
    train(TrainingOptions(**options | {"max_train_steps": 7}))
    assert "does not say what it was trained on" in (folder / "train.log").read_text()


# ---- one course -------------------------------------------------------------------------------------


def test_going_back_sets_the_later_checkpoints_aside(runs, tmp_path, caplog):
    options, folder = runs("plain", tmp_path)
    later = (folder / "checkpoints/step-00000006/model.safetensors").read_bytes()
    back = options | {"resume": str(folder / "checkpoints/step-00000002"), "max_train_steps": 3, "checkpoint_every": 1}
    train(TrainingOptions(**back))
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000003"]
    aside = folder / "checkpoints/step-00000006-set-aside-1"
    assert (aside / "model.safetensors").read_bytes() == later
    assert "step-00000006 is now step-00000006-set-aside-1" in (folder / "train.log").read_text()
    train(TrainingOptions(**options | {"max_train_steps": 5}))
    assert list_checkpoints(folder)[-1].name == "step-00000005" and aside.is_dir()
    assert checkpoints.damage_of(aside) is None


@pytest.mark.parametrize("obstacle", ["file", "link", "permission"])
def test_old_checkpoints_that_cannot_be_removed_do_not_end_a_run(obstacle, runs, tmp_path, monkeypatch, caplog):
    options, folder = runs("plain", tmp_path)
    old = folder / "checkpoints/step-00000001"
    if obstacle == "file":
        old.write_text("mine")
        (folder / "checkpoints/step-00000008").write_text("mine too")
    elif obstacle == "link":
        kept = Path(shutil.copytree(folder / "checkpoints/step-00000002", tmp_path / "kept"))
        old.symlink_to(kept)
    else:
        whole = shutil.rmtree

        def rmtree(path, *arguments, **options):
            if "step-00000002" in str(path) and not (arguments or options):
                raise PermissionError(13, "Permission denied", str(path))
            return whole(path, *arguments, **options)

        monkeypatch.setattr(shutil, "rmtree", rmtree)
    with caplog.at_level(logging.WARNING):
        train(TrainingOptions(**options | {"max_train_steps": 8, "checkpoints_total_limit": 1}))
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000008"]
    if obstacle == "file":
        assert old.read_text() == "mine"
    elif obstacle == "link":
        assert (kept / "model.safetensors").is_file()
    else:
        assert "step-00000002 cannot be removed" in caplog.text and "Permission denied" in caplog.text


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_older_ones_go(runs, tmp_path, monkeypatch):
    options, folder = runs("plain", tmp_path)
    synced, whole, fsync = set(), checkpoints.replace_folder, os.fsync

    def note(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def replace(temporary, final):
        assert {str(path.resolve()) for path in (temporary, *temporary.rglob("*"))} <= synced
        assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000004", "step-00000006"]
        whole(temporary, final)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(checkpoints, "replace_folder", replace)
    train(TrainingOptions(**options | {"max_train_steps": 7, "checkpoints_total_limit": 1}))
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000007"]


# ---- checkpoints that do not fit --------------------------------------------------------------------


def edit_optimizer(checkpoint: Path, change) -> None:
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    change(state)
    torch.save(state, checkpoint / "optimizer.bin")


def edit_tensors(file: Path, name: str, change) -> None:
    tensors = load_file(file)
    name = name if name in tensors else next(key for key in tensors if name in key)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file)


def edit_json(file: Path, **changed) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def edit_parts(checkpoint: Path, part: str, **changed) -> None:
    parts = torch.load(checkpoint / "parts.pt", weights_only=True)
    parts[part] |= changed
    torch.save(parts, checkpoint / "parts.pt")


def smaller(moments: dict) -> None:
    moments["exp_avg"] = moments["exp_avg"].flatten()[:1]


EDITS = {
    "moments of another shape": lambda at: edit_optimizer(at, lambda state: smaller(state["state"][0])),
    "moments of another type": lambda at: edit_optimizer(
        at, lambda state: state["state"][0].update(exp_avg_sq=state["state"][0]["exp_avg_sq"].half())
    ),
    "a parameter too many": lambda at: edit_optimizer(at, lambda state: state["state"].update({999: state["state"][0]})),
    "another group": lambda at: edit_optimizer(at, lambda state: state["param_groups"].append(state["param_groups"][0])),
    "no groups": lambda at: edit_optimizer(at, lambda state: state.pop("param_groups")),
    "no pickle": lambda at: (at / "optimizer.bin").write_bytes(b"something else"),
    "weights of another shape": lambda at: edit_tensors(at / "model.safetensors", "conv_in.bias", lambda value: value[:1]),
    "weights of another type": lambda at: edit_tensors(at / "model.safetensors", "conv_in.bias", torch.Tensor.half),
    "weights that are missing": lambda at: save_file({}, at / "model.safetensors"),
    "averages of another shape": lambda at: edit_tensors(at / "ema.safetensors", "0", lambda value: value[:1]),
    "averages that are missing": lambda at: save_file({"0": torch.zeros(1)}, at / "ema.safetensors"),
    "averages that are NaN": lambda at: edit_tensors(at / "ema.safetensors", "1", lambda value: value * torch.nan),
    "no number of updates": lambda at: edit_json(at / "run_state.json", step="6"),
    "a negative number of updates": lambda at: edit_json(at / "run_state.json", step=-6),
    "no number of averages": lambda at: edit_json(at / "run_state.json", ema_step=1.5),
    "no processes": lambda at: edit_json(at / "run_state.json", processes=None),
    "a state that is no object": lambda at: (at / "run_state.json").write_text("[]"),
    "a counter that is no number": lambda at: edit_parts(at, "updater", skipped="none"),
    "a schedule that is no schedule": lambda at: edit_parts(at, "lr_scheduler", base_lrs="high"),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """An accelerator and the state of a run of 'plain', to load checkpoints into."""
    options = TrainingOptions(**quick_options(tmp_path_factory.mktemp("state"), mixed_precision="no"))
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    unet, _ = build_model(options.model, options.diffusion, (8, 8), 1)
    return accelerator, build_state(accelerator, unet, unet, options)


@pytest.mark.parametrize("edit", EDITS)
def test_a_checkpoint_edited_by_hand_is_refused_in_one_line(edit, runs, loaded, tmp_path):
    checkpoint = runs("plain", tmp_path)[1] / "checkpoints/step-00000006"
    assert load_checkpoint(*loaded, checkpoint)[0] == 6
    EDITS[edit](checkpoint)
    with pytest.raises(ConfigError) as error:
        load_checkpoint(*loaded, checkpoint)
    assert checkpoint.name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/etc/hostname", "../../train.log", "link"])
def test_a_manifest_leads_nowhere_else(name, runs, tmp_path, caplog):
    checkpoint = runs("plain", tmp_path)[1] / "checkpoints/step-00000006"
    if name == "link":
        (checkpoint / name).symlink_to("/etc/hostname")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"size": os.stat("/etc/hostname").st_size, "blake2b": ""}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert "lies outside" in checkpoints.damage_of(checkpoint)


# ---- models of checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "class", "text"])
def test_a_checkpoint_becomes_the_model_that_the_run_would_leave(kind, runs, tmp_path, capsys):
    _, folder = runs(kind, tmp_path)
    exported = tmp_path / "exported"
    assert main([str(folder / "checkpoints/step-00000006"), "--output_dir", str(exported)]) == 0
    assert "after 6 updates" in capsys.readouterr().out
    pipeline_class = AlphaDDPMTextToImagePipeline if kind == "text" else AlphaDDPMPipeline
    one, other = pipeline_class.from_pretrained(folder), pipeline_class.from_pretrained(exported)
    for name in ("unet", *(["text_encoder"] if kind == "text" else [])):
        pairs = zip(getattr(one, name).parameters(), getattr(other, name).parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    for file in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "pipeline.py"):
        assert (exported / file).read_text() == (folder / file).read_text(), file
    early = export_checkpoint(folder / "checkpoints/step-00000002", tmp_path / "early")
    assert "| updates | 2 of 6" in (early / "README.md").read_text()
    assert "| updates | 6 |" in (exported / "README.md").read_text()
    with pytest.raises(SystemExit, match="exists already"):
        main([str(folder / "checkpoints/step-00000006"), "--output_dir", str(exported)])
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        export_checkpoint(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_fine_tune_starts_from_a_checkpoint(runs, tmp_path):
    """The EMA weights and the schedule are those of the model made of it; so are the classes, by their names."""
    options, folder = runs("class", tmp_path)
    checkpoint = folder / "checkpoints/step-00000004"
    picture(9, Path(options["dataset"]) / "bee/9.png")
    base = {
        name: value for name, value in options.items() if name not in ("model", "num_train_timesteps", "beta_end", "resume")
    }
    still = base | {
        "learning_rate": 1e-12,
        "lr_warmup_steps": 0,
        "ema_decay": 0.0,
        "max_train_steps": 1,
        "output_dir": str(tmp_path / "tuned"),
    }
    tuned = train(TrainingOptions(**still, init_from=str(checkpoint)))
    assert "fine-tuned from `model`" in (tuned / "README.md").read_text()
    for start in (checkpoint, folder):
        refused(still | {"condition": "text"}, f"--init_from {start} has no text encoder", init_from=str(start), overwrite=True)
    before, after = pipeline_of(checkpoint), AlphaDDPMPipeline.from_pretrained(tuned)
    assert after.scheduler.config.beta_end == 0.4 and len(after.scheduler) == 20
    assert after.unet.config[OWN_KEY]["class_names"] == ["bee", "cat", "dog"]
    weights_of = lambda pipe: pipe.unet.class_embedding.weight  # noqa: E731
    torch.testing.assert_close(weights_of(after)[1:], weights_of(before), atol=1e-9, rtol=0)
    for name, value in before.unet.state_dict().items():
        if "class_embedding" not in name:
            torch.testing.assert_close(after.unet.state_dict()[name], value, atol=1e-9, rtol=0)
    assert "new: ['bee']; left out: []" in (tuned / "train.log").read_text()


def test_a_fine_tune_that_is_resumed_without_naming_its_start_says_where_it_came_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {
        name: value
        for name, value in quick_options(tmp_path).items()
        if name not in ("model", "num_train_timesteps", "beta_end")
    }
    base |= {"max_train_steps": 1, "lr_warmup_steps": 0, "num_samples": 1, "sample_inference_steps": 2}
    train(TrainingOptions(**base, output_dir="first"))
    tuned = base | {"output_dir": "tuned"}
    train(TrainingOptions(**tuned, init_from="first/checkpoints/step-00000001"))
    Path("first").rename("elsewhere")
    card = (train(TrainingOptions(**tuned | {"max_train_steps": 2, "resume": "latest"})) / "README.md").read_text()
    assert "fine-tuned from `first`" in card and "--init_from first" in card and "base_model" not in card
