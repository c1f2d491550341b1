"""Every option of training does what it says: it changes the weights, or it must not."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddpm_pipeline.training import TrainingOptions, evaluations, loop, train
from ddpm_pipeline.training.objectives import UniformTimesteps
from training_helpers import metrics, quick_options, weights

pytestmark = pytest.mark.usefixtures("no_final_pictures")

BASE = {"batch_size": 16, "max_train_steps": 4, "num_samples": 1, "checkpoint_every": 0, "lr_warmup_steps": 1}
ACCUMULATED = {"gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains with changed options, each set of them once; the saved weights as one vector."""
    folder = tmp_path_factory.mktemp("effects")
    options = quick_options(folder, **BASE)
    known: dict[tuple, torch.Tensor] = {}

    def run(**changed) -> torch.Tensor:
        key = tuple(sorted(changed.items()))
        if key not in known:
            model = train(TrainingOptions(**options | changed, output_dir=str(folder / str(len(known)))))
            known[key] = torch.cat([tensor.flatten().double() for tensor in weights(model).values()])
            run.norms[key] = [line["grad_norm"] for line in metrics(model) if "grad_norm" in line]
        return known[key]

    run.norms = {}
    return run


@pytest.mark.parametrize(
    "option",
    [
        {"seed": 1}, {"random_flip": True}, {"batch_size": 8}, {"learning_rate": 2e-3},
        {"lr_scheduler": "constant_with_warmup"},
        {"lr_warmup_steps": 3}, {"adam_beta1": 0.5}, {"adam_beta2": 0.9}, {"adam_epsilon": 1e-3}, {"weight_decay": 0.5},
        {"max_grad_norm": 0.01}, {"ema_decay": 0.0}, {"ema_decay": 0.3}, {"ema_power": 0.2}, {"dropout": 0.0},
        {"snr_gamma": 1.0}, {"prediction_type": "v_prediction"}, {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 30},
        {"timestep_sampling": "stratified"}, {"objective": "bound"}, {"mixed_precision": "bf16"}, {"condition": "class"},
    ],
    ids=lambda option: "".join(option),
)  # fmt: skip
def test_an_option_changes_what_is_learned(trained, option):
    changed = trained(**option)
    before = trained()
    assert changed.isfinite().all()
    if len(changed) == len(before):
        assert (changed - before).abs().max() > 1e-7


def test_it_is_the_value_of_gamma_that_counts(trained):
    assert (trained(snr_gamma=1.0) - trained(snr_gamma=5.0)).abs().max() > 1e-7


def test_weights_of_the_bound_and_the_error_both_count(trained):
    hybrid = {"variance_type": "learned_range", "model": "tiny"}
    base = trained(**hybrid)
    for option in ({"bound_weight": 1.0}, {"snr_gamma": 1.0}):
        assert (trained(**hybrid, **option) - base).abs().max() > 1e-7, option


def test_what_must_not_matter_does_not(trained):
    """Watching, checkpoints and workers; and accumulation, but for the order of sums, without dropout."""
    same = {"preview_every": 2, "preview_images": 1, "preview_inference_steps": 2, "checkpoint_every": 3, "eval_every": 2,
            "eval_images": 2, "eval_calls": 3, "dataloader_num_workers": 1, "gradient_checkpointing": True}  # fmt: skip
    assert torch.equal(trained(**same), trained())
    whole = trained(dropout=0.0)
    split = trained(dropout=0.0, **ACCUMULATED)
    assert (split - whole).abs().max() < 1e-4 * whole.abs().max()
    norms = [trained.norms[("dropout", 0.0), *more.items()] for more in ({}, ACCUMULATED)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)  # AdamW and clipping would hide a factor
    assert (trained(gradient_accumulation_steps=2) - trained()).abs().max() > 1e-7  # dropout masks differ


def test_the_weights_of_timesteps_count(tmp_path, monkeypatch):
    losses, whole = [], UniformTimesteps.draw
    for factor in (1.0, 2.0):
        monkeypatch.setattr(
            UniformTimesteps, "draw", lambda *given, factor=factor: (whole(*given)[0], torch.full((16,), factor))
        )
        options = quick_options(tmp_path, **BASE | {"max_train_steps": 2})
        losses.append(metrics(train(TrainingOptions(**options, output_dir=str(tmp_path / str(factor)))))[0]["loss"])
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-4)


def test_importance_sampling_warms_up_changes_the_course_and_resumes(tmp_path):
    """With three timesteps it has seen each ten times after a few updates; its memory is part of a checkpoint."""
    options = quick_options(
        tmp_path, num_train_timesteps=3, batch_size=16, objective="bound", timestep_sampling="importance",
        max_train_steps=10, checkpoint_every=5, num_samples=1, preview_every=0,
    )  # fmt: skip
    whole = train(TrainingOptions(**options, output_dir=str(tmp_path / "whole")))
    uniform = train(TrainingOptions(**options | {"timestep_sampling": "uniform"}, output_dir=str(tmp_path / "uniform")))
    losses = [[line["loss"] for line in metrics(folder)] for folder in (whole, uniform)]
    assert losses[0][0] == losses[1][0] and losses[0][-1] != losses[1][-1]
    sampler = torch.load(whole / "checkpoints/step-00000010/parts.pt", weights_only=True)["timestep_sampler"]
    assert sampler["counts"].sum() == 160 and (sampler["losses"] != 0).all()
    resumed = Path(shutil.copytree(whole, tmp_path / "resumed"))
    shutil.rmtree(resumed / "checkpoints/step-00000010")
    train(TrainingOptions(**options, output_dir=str(resumed), resume="latest"))
    for name in ("parts.pt", "model.safetensors"):
        last = Path("checkpoints/step-00000010") / name
        assert (resumed / last).read_bytes() == (whole / last).read_bytes()


def test_each_update_has_a_dropout_mask_of_its_own(tmp_path, monkeypatch):
    masks = []
    whole = loop.losses_of

    def look(*arguments, **options):
        state = torch.random.get_rng_state()
        masks.append(torch.rand(8))
        torch.random.set_rng_state(state)
        return whole(*arguments, **options)

    monkeypatch.setattr(loop, "losses_of", look)
    train(TrainingOptions(**quick_options(tmp_path, **BASE), output_dir=str(tmp_path / "model")))
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) == 4


def test_previews_and_evaluations_are_of_the_ema_weights(tmp_path, monkeypatch):
    """With an EMA that hardly moves, what is looked at on the way is near the start, whatever the weights became."""
    seen = {}

    def looked_at(job):
        def look(run, done, **options):
            unet = run.pipe.unet
            seen[job.__name__] = torch.cat([value.detach().flatten().clone() for value in unet.parameters()])
            assert not unet.training
            job(run, done, **options)

        return look

    for module, name in ((loop, "preview"), (evaluations, "evaluate")):
        monkeypatch.setattr(module, name, looked_at(getattr(module, name)))
    options = quick_options(
        tmp_path, **BASE | {"checkpoint_every": 4}, preview_every=2, preview_images=1, preview_inference_steps=2,
        eval_every=4, eval_images=2, eval_calls=3, ema_decay=0.9, learning_rate=0.05,
    )  # fmt: skip
    model = train(TrainingOptions(**options, output_dir=str(tmp_path / "model")))
    ema = load_file(model / "checkpoints/step-00000004/ema.safetensors")
    at_end = torch.cat([ema[str(index)].flatten() for index in range(len(ema))])
    raw = load_file(model / "checkpoints/step-00000004/model.safetensors")
    assert torch.equal(seen["evaluate"], at_end)
    assert not torch.equal(seen["preview"], at_end)
    assert sorted(tensor.sum().item() for tensor in raw.values()) != sorted(tensor.sum().item() for tensor in ema.values())
