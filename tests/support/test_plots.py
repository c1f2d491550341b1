"""The figure of a schedule shows the schedule's numbers."""

import numpy as np
import pytest
from diffusers import DDIMScheduler

from ddpm_pipeline import AlphaDDPMScheduler, plot_schedule


def test_the_curves_are_the_tables(tmp_path):
    ours, stock = AlphaDDPMScheduler(), DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    ours.set_timesteps(10)
    figure = plot_schedule(ours, stock)
    for axes, names in zip(figure.axes, (["alphas_cumprod"], ["betas", "posterior_variance"], ["log_snr"]), strict=True):
        for line, name in zip(axes.lines, names, strict=False):
            skipped = name == "posterior_variance"  # its 0 has no logarithm
            assert np.array_equal(line.get_ydata(), getattr(ours.schedule, name)[int(skipped) :])
    shown = [line.get_label() for line in figure.axes[0].lines]
    assert shown == ["linear, 10 steps", "squaredcos_cap_v2"] and len(figure.axes[0].lines[1].get_ydata()) == 1000
    figure.savefig(tmp_path / "schedule.png")
    with pytest.raises(ValueError, match="at least one"):
        plot_schedule()
