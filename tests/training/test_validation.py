"""Held-out images in a run: their figures, the best checkpoint, and when the run says that the model memorises."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from ddpm_pipeline.data.held_out import open_training_data
from ddpm_pipeline.evaluation.figures import likelihood_of
from ddpm_pipeline.support.draws import RandomStream, image_indices, seeds
from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.training import TrainingOptions, checkpoints, evaluations, loop, train
from ddpm_pipeline.training.checkpoints import damage_of, list_checkpoints
from ddpm_pipeline.training.export import export_checkpoint
from ddpm_pipeline.training.validation import Evaluation, Validation
from helpers import killed_at
from training_helpers import metrics, quick_options

pytestmark = pytest.mark.usefixtures("no_final_pictures")

SPREAD = np.arange(16) / 7.5 - 1  # of the images' figures: their mean is 0
LIKELY = {1: 5.0, 2: 4.0, 3: 3.0, 4: 3.5, 5: 3.6, 6: 3.7, 7: 3.8, 8: 3.9}  # held-out bits/dim by update


# ---- the rule -----------------------------------------------------------------------------------------


def said_at(tmp_path: Path, held_out: list[float], train: list[float], noise: float = 0.01) -> list[int]:
    """The evaluations at which the run says that the model memorises. The file is read back before each, as on resuming."""
    found = []
    for step, (held, own) in enumerate(zip(held_out, train, strict=True)):
        figures = held + SPREAD + noise * np.random.default_rng(step).normal(size=16)
        if Validation(tmp_path, "these", step - 1, lambda _: True).add(Evaluation(step, figures, own)):
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("held_out", "train", "noise", "expected"),
    [
        ([5, 4, 3.5, 3.2], [5, 4, 3, 2], 0.01, []),
        ([5, 4, 4.2, 4.4, 4.6], [5, 4, 3, 2, 1], 0.01, [3]),
        ([5, 4, 4.2, 3.9, 4.2], [5, 4, 3, 2, 1], 0.01, []),
        ([5, 4, 4.2, 4.4, 4.6], [5, 4, 4.2, 4.4, 4.6], 0.01, []),
        ([5, 4, 4.2, 4.4, 4.6], [5, 4, 3, 2, 1], 2.0, []),
        ([5, 4, 4.2, 4.4, 3, 3.2, 3.4, 3.6], [8, 7, 6, 5, 4, 3, 2, 1], 0.01, [3, 6]),
    ],
    ids=["both fall", "the gap opens", "one evaluation alone", "training diverges", "within the error", "a better one later"],
)  # fmt: skip
def test_the_gap(held_out, train, noise, expected, tmp_path):
    assert said_at(tmp_path, held_out, train, noise) == expected


def test_evaluations_of_other_images_are_not_compared(tmp_path):
    said_at(tmp_path, [5, 4, 4.2], [5, 4, 3])
    other = Validation(tmp_path, "others", 2, lambda _: True)
    assert other.best is None and not other.add(Evaluation(3, np.array([9.0]), 1.0))
    assert Validation(tmp_path, "these", 9, lambda step: step != 1).best.step == 2  # that of 1 is gone
    assert Validation(tmp_path, "these", 0, lambda _: True).last.step == 0  # resumed from update 0


def picture(seed: int, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)).save(file)


# ---- runs ---------------------------------------------------------------------------------------------


def options_of(tmp_path: Path, **changed) -> dict:
    return quick_options(
        tmp_path, split="train[:100]", validation_split="20%", max_train_steps=8, eval_images=16, eval_calls=5, num_samples=1,
        output_dir=str(tmp_path / "model"), **changed,
    )  # fmt: skip


def test_held_out_images_are_evaluated_as_the_training_images_are(tmp_path):
    """By default about ten times; in the end with the figures of the saved model."""
    options = options_of(tmp_path, condition="class") | {"max_train_steps": 4}
    folder = train(TrainingOptions(**options))
    evaluated = [line for line in metrics(folder) if "validation_loss" in line]
    assert [line["step"] for line in evaluated] == [1, 2, 3, 4]
    last, pipe, given = evaluated[-1], DiffusionPipeline.from_pretrained(folder), TrainingOptions(**options)
    data = open_training_data(given.data, given.condition.columns, 16)
    assert len(data) + len(data.held_out) == 100
    for name, images in {"eval": data, "validation": data.held_out}.items():
        indices, noise_seeds = image_indices(0, len(images), 0, 16), seeds(0, RandomStream.NOISE, 0, 16)
        how = {"num_evaluated": 5, "progress": False, "model_kwargs": {"class_labels": images.column("label", indices)}}
        bits = likelihood_of(
            pipe.unet, pipe.scheduler, images.pixels(indices), images.value_range, noise_seeds, batch_size=8, **how
        ).total
        assert last[f"{name}_bits_per_dim"] == pytest.approx(float(bits.mean()), rel=1e-6)
        assert last[f"{name}_bits_per_dim_error"] == pytest.approx(float(bits.std() / 4), rel=1e-6)
        assert 0 < last[f"{name}_loss_error"] < last[f"{name}_loss"] < 2
    card = (folder / "README.md").read_text()
    assert f"| held out | {len(data.held_out)} images (20%), not trained on |" in card
    assert f"| held-out bits/dim | {last['validation_bits_per_dim']:.4f} ± " in card and "of 16 images after update 4 |" in card
    assert f"{len(data)} images of `digits`" in card and "--validation_split 20%" in card


@pytest.fixture
def likely(monkeypatch):
    """Evaluations give the figures of LIKELY, and those of training images fall."""

    def per_image(run, objective, data, count):
        done = run.state.ema.optimization_step
        bits = 5 - 0.1 * done if data.held_out else LIKELY[done]
        return {"loss": SPREAD, "bits_per_dim": bits + SPREAD}

    monkeypatch.setattr(evaluations, "per_image", per_image)


def killed_after(run, last: int) -> None:
    run.checkpoints.wait()
    if run.state.ema.optimization_step == last:
        raise KeyboardInterrupt


def test_the_best_checkpoint_is_kept_also_by_a_run_that_was_killed(likely, tmp_path, monkeypatch):
    options = options_of(tmp_path, keep_best=True, eval_every=1, checkpoint_every=5, checkpoints_total_limit=1)
    whole = train(TrainingOptions(**options | {"output_dir": str(tmp_path / "whole")}))
    names = [path.name for path in list_checkpoints(whole)]
    assert names == ["step-00000003", "step-00000008"]
    log = (whole / "train.log").read_text()
    best = str(whole / "checkpoints/step-00000003")
    gap = "held-out bits/dim rose from 3.0000 (update 3) to 3.6000, while those of training images fell from 4.7000 to 4.5000"
    assert log.count("begun to memorise") == 1 and f"{gap}; the best checkpoint is {best}: python -m" in log
    assert "the lowest held-out bits/dim were 3.0000" in log and "after update 3; the best checkpoint is" in log
    card = (export_checkpoint(best, tmp_path / "exported") / "README.md").read_text()
    lowest = "| lowest held-out bits/dim | 3.0000 ± 0.16, of 16 images after update 3 |"
    assert lowest in card and lowest in (whole / "README.md").read_text() and lowest.replace("lowest ", "") in card

    update = loop.update
    for last in (2, 4, 7):  # updates done before the kill
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(loop, "update", lambda run, *rest, last=last: killed_after(run, last) or update(run, *rest))
            train(TrainingOptions(**options, resume="latest"))
    killed = train(TrainingOptions(**options, resume="latest"))
    assert [path.name for path in list_checkpoints(killed)] == names
    assert (killed / "evaluations.jsonl").read_text() == (whole / "evaluations.jsonl").read_text()


@pytest.mark.parametrize("best", [1, 3])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_best(best, tmp_path):
    """That of update 1, or the new one of update 3, in whose place it was."""
    names = [f"step-0000000{step}" for step in (1, 2, 3)]
    for operation in range(1, 99):
        folder = tmp_path / f"{operation}/checkpoints"
        for name in (*names[:2], ".new"):
            (folder / name).mkdir(parents=True)
            (folder / name / "run_state.json").write_text("{}")
        died = killed_at(operation, folder, lambda at=folder: checkpoints._finish(at / ".new", at / names[2], 1, best))
        found = [path.name for path in list_checkpoints(folder.parent)]
        assert found == names[:2] if names[2] not in found else damage_of(folder / names[2]) is None
        assert best == 3 or names[0] in found
        if not died:
            break
    assert operation > 5 and found == ([names[0], names[2]] if best == 1 else names[1:])


def test_a_run_with_other_held_out_images_is_another(tmp_path):
    for seed in range(6):
        picture(seed, tmp_path / ("held" if seed > 3 else "photos") / f"{seed}.png")
    options = options_of(tmp_path, dataset=str(tmp_path / "photos"), checkpoint_every=1)
    options |= {"split": "train", "validation_split": str(tmp_path / "held"), "max_train_steps": 2, "lr_warmup_steps": 1}
    train(TrainingOptions(**options))
    picture(9, tmp_path / "held/5.png")
    with pytest.raises(
        ConfigError, match=r"the data were 4 images, \w+, and 2 held out, (\w+) and are 4 images, .*--accept_ch"
    ):
        train(TrainingOptions(**options, resume="latest"))
    (tmp_path / "held").rename(tmp_path / "others")
    with pytest.raises(ConfigError, match=r"--validation_split was .*held and is .*others"):
        train(TrainingOptions(**options | {"validation_split": str(tmp_path / "others")}, resume="latest"))
    with pytest.raises(ConfigError, match="--keep_best goes by held-out images"):
        TrainingOptions(keep_best=True)


@pytest.mark.slow
def test_a_model_that_memorises_is_told(tmp_path):
    """Eight images and four hundred updates of them."""
    options = options_of(tmp_path, ema_decay=0.9, learning_rate=3e-3, lr_scheduler="constant", lr_warmup_steps=0)
    options |= {"split": "train[:8]", "validation_split": "train[100:132]", "eval_images": 32, "eval_calls": 12}
    folder = train(TrainingOptions(**options | {"max_train_steps": 400, "eval_every": 50, "keep_best": True}))
    log = (folder / "train.log").read_text()
    assert log.count("the model has begun to memorise: held-out bits/dim rose") == 1
