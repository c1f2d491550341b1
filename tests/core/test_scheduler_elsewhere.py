"""Our scheduler in the hands of other libraries, where those are installed."""

import functools

import pytest
import torch

from ddpm_pipeline import AlphaDDPMScheduler


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_it_drives_monai_s_inferer(dims: int) -> None:
    """On signals, images and volumes, and as MONAI's own scheduler does: both draw the same noise."""
    inferers = pytest.importorskip("monai.inferers")
    from monai.networks.schedulers import DDPMScheduler

    torch.manual_seed(0)
    convolution = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dims - 1](1, 1, 3, padding=1)

    def network(x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return torch.tanh(convolution(x)) + 0.01 * timesteps.float().view(-1, *[1] * (dims + 1))

    x, noise = torch.randn(2, 2, 1, *[8] * dims)
    ours = AlphaDDPMScheduler(100, beta_schedule="scaled_linear", beta_start=1e-3, beta_end=0.2)
    ours.step = functools.partial(ours.step, return_dict=False)  # MONAI wants a tuple
    theirs = DDPMScheduler(100, schedule="scaled_linear_beta", beta_start=1e-3, beta_end=0.2)
    predicted, drawn = [], []
    for scheduler in (ours, theirs):
        inferer = inferers.DiffusionInferer(scheduler)
        predicted.append(inferer(x, network, noise, torch.tensor([3, 90])))
        torch.manual_seed(0)
        drawn.append(inferer.sample(noise, network, verbose=False))
    assert drawn[0].shape == x.shape
    torch.testing.assert_close(*predicted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*drawn, atol=1e-3, rtol=1e-3)
