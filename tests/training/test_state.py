"""How an update changes what is trained: as diffusers and torch would, in fewer passes, and without waiting for a GPU."""

import warnings

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from ddpm_pipeline.training import TrainingOptions, loop, train
from ddpm_pipeline.training.state import EMA, Updater
from training_helpers import quick_options


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((33, 17), (7,), (64, 3, 3, 3), (1,))]


def test_the_ema_is_that_of_diffusers_bit_for_bit():
    trained, how = parameters(), {"decay": 0.99, "use_ema_warmup": True, "power": 0.75, "foreach": True}
    ours, theirs = EMA(trained, **how), EMAModel(trained, **how)
    for _ in range(50):
        with torch.no_grad():
            for each in trained:
                each.add_(torch.randn_like(each), alpha=0.1)
        ours.step(trained)
        theirs.step(trained)
    assert ours.state_dict().keys() == theirs.state_dict().keys() and ours.optimization_step == theirs.optimization_step
    assert ours.cur_decay_value == theirs.cur_decay_value
    assert all(map(torch.equal, ours.shadow_params, theirs.shadow_params))


@pytest.mark.parametrize("norm", [0.5, 1.0 - 5e-7, 1.0, 3.0])
def test_gradients_are_clipped_as_torch_clips_them_bit_for_bit(norm):
    ours, theirs = parameters(), parameters()
    for trained in (ours, theirs):
        whole = sum(each.detach().square().sum() for each in trained).sqrt()
        for each in trained:
            each.grad = each.detach() * norm / whole
    expected = nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.SGD(theirs, lr=0.1).step()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(ours, lr=0.1))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer, factor=1.0)
    found, _ = Updater(accelerator, ours, optimizer, schedule, None, 1.0)(0, torch.ones(2), [0, 1], stop=False)
    assert found == expected.item() and all(map(torch.equal, ours, theirs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_update_waits_for_the_gpu_once(tmp_path, monkeypatch):
    """To learn whether losses and gradients are finite; the first updates also allocate and compile."""
    whole, waits = loop.update, []

    def update(*arguments):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return whole(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits.append(sum("synchroniz" in str(each.message) for each in found))

    monkeypatch.setattr(loop, "update", update)
    train(TrainingOptions(**quick_options(tmp_path, log_every=100), output_dir=str(tmp_path / "model")))
    assert waits[3:] == [1] * (len(waits) - 3)
