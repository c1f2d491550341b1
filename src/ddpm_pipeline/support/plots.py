"""Schedules as a figure. Needs matplotlib (extra `eval`), which is imported on first use."""

from typing import TYPE_CHECKING, Any

from ..scheduling_alpha_ddpm import AlphaDDPMScheduler
from .extras import needs_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_schedule(*schedulers: Any) -> "Figure":
    """The schedules of DDPM schedulers by timestep, side by side: ᾱ_t, the signal's share (report 4.10); β̃_t beside
    β_t = 1 - α_t (5.7); log SNR_t = log(ᾱ_t/(1-ᾱ_t)).

    A scheduler of this package shows the chain in use, any other one its whole schedule. As a notebook cell's last line the
    figure is shown; elsewhere, `plot_schedule(scheduler).savefig("schedule.png")`. Raises ValueError if none is given.
    """
    if not schedulers:
        raise ValueError("plot_schedule needs at least one scheduler.")
    with needs_extra("eval", "plot_schedule"):
        from matplotlib import pyplot as plt
    figure, (share, variance, ratio) = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
    plt.close(figure)  # it is returned, and pyplot would show it a second time
    for number, scheduler in enumerate(schedulers):
        ours = scheduler if isinstance(scheduler, AlphaDDPMScheduler) else AlphaDDPMScheduler.from_config(scheduler.config)
        found, name, color = ours.schedule, _name(ours), f"C{number}"
        share.plot(found.timesteps, found.alphas_cumprod, color, label=name)
        variance.semilogy(found.timesteps, found.betas, color, label=rf"$\beta$, {name}")
        variance.semilogy(found.timesteps[1:], found.posterior_variance[1:], f"{color}--", label=rf"$\tilde\beta$, {name}")
        ratio.plot(found.timesteps, found.log_snr, color, label=name)
    titles = {
        share: r"share of $x_0$ left: $\bar\alpha$",
        variance: r"variance of a step: $\beta$, and $\tilde\beta$ dashed",
        ratio: "log SNR",
    }
    for axes, title in titles.items():
        axes.set(title=title, xlabel="timestep")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right" if axes is variance else "best")
    return figure


def _name(scheduler: AlphaDDPMScheduler) -> str:
    name = "given constants" if scheduler.config.trained_betas else scheduler.config.beta_schedule
    return name if len(scheduler.schedule.timesteps) == len(scheduler) else f"{name}, {len(scheduler.timesteps)} steps"
