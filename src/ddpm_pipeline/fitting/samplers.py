"""Samplers of few steps, fitted to a model: see docs/fitted_sampler.md for the maths.

Nothing here knows conditions, guidance or variances: the pipeline itself samples, from given noise, with the scheduler that is
put into it, and its callback shows the states. Forward passes only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor
from tqdm.auto import tqdm

from ..generation.drawing import UNCONDITIONAL, Request
from ..generation.pipelines import stock_scheduler
from ..likelihood.bound import own_scheduler
from ..scheduling_fitted_alpha_ddpm import AlphaDDPMFittedScheduler
from ..support.draws import RandomStream, seeds
from ..tables_alpha_ddpm import check_integer
from .chains import best_chains, least_squares, solver_coefficients, step_errors
from .options import HELD_OUT_EVERY, LENGTHS, LONG_STEPS, MOST_LONG_STEPS, NUM_NOISES, parse_lengths
from .stock import STOCK

HISTORY = 3  # predictions x̂_0 that a step combines
EXPONENTS = (0.25, 0.5, 1.0)  # γ in the weight ᾱ^γ of a squared error in x_t; which is best is measured
DIGITS = 8  # of a coefficient


@dataclass(frozen=True)
class FittedLength:
    """A sampler of n steps, and how near it comes to the long solution: RMSEs of held-out images in [-1, 1]."""

    sampler: dict[str, list]  # timesteps [n], and coefficients [n, HISTORY + 1] of x_t and of x̂_0, the newest first
    rmse: float
    stock: str  # diffusers' best in n steps
    stock_rmse: float

    @property
    def is_better(self) -> bool:
        return self.rmse < self.stock_rmse


@dataclass(frozen=True)
class SamplerFit:
    """`scheduler` has the samplers that are better than diffusers' best; `lengths` has all, by number of steps, ascending."""

    scheduler: AlphaDDPMFittedScheduler
    lengths: dict[int, FittedLength]

    def words(self) -> str:
        """The RMSEs in one line."""
        every = self.lengths.items()
        return "; ".join(f"{n} steps {found.rmse:.4f}, {found.stock} {found.stock_rmse:.4f}" for n, found in every)

    def table(self) -> str:
        """The RMSEs as a Markdown table."""
        lines = ["| steps | fitted | best of diffusers | | |", "|---|---|---|---|---|"]
        for steps, found in self.lengths.items():
            verdict = "" if found.is_better else "refused: not better"
            lines.append(f"| {steps} | {found.rmse:.4f} | {found.stock_rmse:.4f} | {found.stock} | {verdict} |")
        return "\n".join(lines)


def fit_sampler(
    pipe: Any,
    num_inference_steps: Sequence[int] = LENGTHS,
    request: Request = UNCONDITIONAL,
    *,
    num_noises: int = NUM_NOISES,
    long_steps: int = LONG_STEPS,
    batch_size: int = 64,
    seed: int = 0,
    alone: bool = False,
) -> SamplerFit:
    """Fit a sampler for each number of steps: `pipe.scheduler = fit_sampler(pipe).scheduler`. The pipeline stays as it is.

    Over several processes, each takes a share of the noises, and all get the same samplers. Memory: 2 `long_steps` + 1 float32
    images for each noise. Shows a bar unless the pipeline's own is disabled.

    Args:
        pipe: a pipeline of this package, on the device to compute on.
        num_inference_steps: the numbers of steps, each at most `long_steps`.
        request: the conditions and the guidance scale that the model will be sampled with; a text model needs prompts.
        num_noises: images to solve for, of which a third is held out; large images need fewer than small ones.
        long_steps: steps of the model's own solution, spaced as its config says, from 2 to 400; all T if there are fewer.
        batch_size: images per network call.
        seed: noise i depends on the seed and i alone.
        alone: fit in this process only, whatever the others do.

    Raises ValueError for numbers outside these ranges, FloatingPointError if the model's own solution is not finite.
    """
    check_integer("batch_size", batch_size, 1)
    check_integer("long_steps", long_steps, 2, MOST_LONG_STEPS)
    try:
        lengths = parse_lengths(num_inference_steps)
    except ValueError as error:
        raise ValueError(f"num_inference_steps={num_inference_steps!r} must be {error}.") from error
    fit = _Fit(pipe, request, num_noises, seed, alone)
    long_steps = min(long_steps, pipe.scheduler.config.num_train_timesteps)
    if lengths[-1] > long_steps:
        raise ValueError(f"num_inference_steps={lengths[-1]} exceeds the {long_steps} steps of the long solution.")
    total = long_steps + (len(EXPONENTS) + len(STOCK)) * sum(lengths)
    hidden = not fit.processes.is_main_process or getattr(pipe, "_progress_bar_config", {}).get("disable") or None
    with _borrowed(pipe, int(batch_size)), tqdm(total=total, desc="fitting samplers", disable=hidden, leave=False) as fit.bar:
        solution = fit.solve(long_steps)
        fitted = fit.best_samplers(solution, lengths)
        stock = {steps: fit.best_stock(steps, solution.states[-1]) for steps in lengths}
    found = {n: FittedLength(*fitted[n], *stock[n]) for n in lengths}
    own = own_scheduler(pipe.scheduler)
    kept = own.fitted_samplers
    for steps, length in found.items():
        kept.pop(str(steps), None)
        if length.is_better:
            reached = {"guidance_scale": request.guidance_scale, "rmse": float(f"{length.rmse:.4g}")}
            kept[str(steps)] = length.sampler | reached
    return SamplerFit(AlphaDDPMFittedScheduler.from_config(own.config, fitted_samplers=kept), found)


def sampled_by_fit(lengths: Sequence[int], num_noises: int) -> list[tuple[int, int]]:
    """Pairs of images and steps that `fit_sampler` samples: for the long solution and the fits, and by diffusers' solvers."""
    fitted = num_noises, LONG_STEPS + len(EXPONENTS) * sum(lengths)
    return [fitted, (num_noises // HELD_OUT_EVERY, len(STOCK) * sum(lengths))]


def long_solver(scheduler: Any, steps: int) -> AlphaDDPMFittedScheduler:
    """DPM-Solver++ (2M) for so many steps, spaced and with x̂_0 clipped as the scheduler's config says."""
    spaced = own_scheduler(scheduler, steps, inference_timesteps=None, fitted_samplers=None)
    log_snr = spaced.log_snr(spaced.timesteps).numpy()
    solver = {"timesteps": spaced.timesteps.tolist(), "coefficients": solver_coefficients(log_snr).tolist()}
    return AlphaDDPMFittedScheduler.from_config(spaced.config, fitted_samplers={str(steps): solver})


@dataclass(frozen=True)
class Solution:
    """The model's own solution in many steps, of this process's noises."""

    timesteps: list[int]
    alphas_cumprod: np.ndarray  # ᾱ at each timestep and of clean data, [N + 1]
    states: list[Tensor]  # x at each timestep and as clean data, N + 1 of [M, C, H, W]
    predictions: list[Tensor]  # x̂_0, N of the same


class _Fitting(AlphaDDPMFittedScheduler):
    """Fits the coefficients of each step when it is reached, from the state that the steps before have led to."""

    solve: Callable[[int, Tensor], list[float]]  # from the index of the step and its regressors [HISTORY + 1, M, C, H, W]

    def _coefficients(self, index: int, x_t: Tensor) -> list[float]:
        found = self.solve(index, torch.stack([x_t, *self._history]))
        self._fitted["coefficients"][index][: len(found)] = found
        return found


class _Fit:
    """This process's share of the noises, and what is computed over all processes."""

    bar: tqdm

    def __init__(self, pipe: Any, request: Request, num_noises: int, seed: int, alone: bool):
        # an accelerator would fix the precision of a later training run in this process
        self.processes = PartialState(parse_flag_from_env("ACCELERATE_USE_CPU"))
        self.shared = self.processes.num_processes > 1 and not alone
        rank, count = (self.processes.process_index, self.processes.num_processes) if self.shared else (0, 1)
        if num_noises < HELD_OUT_EVERY * count:
            raise ValueError(f"num_noises={num_noises} must be at least {HELD_OUT_EVERY} for each of {count} processes.")
        self.pipe, self.request, numbers = pipe, request, torch.arange(num_noises)
        self.numbers = numbers[numbers // HELD_OUT_EVERY % count == rank]
        self.held_out = self.numbers % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        own_seeds, shape = seeds(seed, RandomStream.NOISE, 0, num_noises)[self.numbers.numpy()].tolist(), pipe._shape(1)[1:]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(own)) for own in own_seeds])
        self.noise = noise.to(pipe.device, pipe._chain_dtype)
        self.base = own_scheduler(pipe.scheduler, inference_timesteps=None, fitted_samplers=None)

    def sample(self, scheduler: Any, steps: int, held_out: bool = False, watch: Callable = lambda tensors: None) -> Tensor:
        """x_0 of all noises, or of the held-out ones, by a scheduler in so many steps; `watch` sees the tensors of each."""

        def called_back(_pipe: Any, _index: int, _timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
            self.bar.update()
            watch(tensors)
            return {}

        rows = self.held_out if held_out else torch.ones_like(self.held_out)
        self.pipe.scheduler = scheduler
        return self.pipe(
            **self.request.call(self.numbers[rows].tolist()),
            latents=self.noise[rows],
            num_inference_steps=steps,
            output_type="latent",
            callback_on_step_end=called_back,
            callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
        ).images

    def summed(self, values: np.ndarray) -> np.ndarray:
        """Over all processes that fit."""
        if not self.shared:
            return values
        return reduce(torch.from_numpy(values).to(self.processes.device), "sum").cpu().numpy()

    def solve(self, steps: int) -> Solution:
        solver, states, predictions = long_solver(self.base, steps), [self.noise], []
        timesteps = solver.fitted_samplers[str(steps)]["timesteps"]

        def watch(tensors: dict[str, Tensor]) -> None:
            states.append(tensors["latents"])
            predictions.append(tensors["pred_original_sample"])

        self.sample(solver, steps, watch=watch)
        return Solution(timesteps, np.append(solver.alphas_cumprod[timesteps].numpy(), 1.0), states, predictions)

    def products(self, solution: Solution) -> np.ndarray:
        """Inner products per pixel of all states and predictions of the noises to fit, [2N + 1, 2N + 1]."""
        rows = torch.nonzero(~self.held_out).flatten().tolist()
        total = np.zeros((2 * len(solution.timesteps) + 1,) * 2)
        for row in rows:  # at a time, for the memory
            images = torch.stack([x[row] for x in (*solution.states, *solution.predictions)]).flatten(1)
            images = images.cpu().double()
            total += (images @ images.T).numpy() / images.shape[1]
        return self.summed(total) / self.summed(np.array([float(len(rows))]))

    def best_samplers(self, solution: Solution, lengths: Sequence[int]) -> dict[int, tuple[dict[str, list], float]]:
        """By number of steps the sampler that comes nearest on held-out noises, and its RMSE."""
        errors, start = step_errors(self.products(solution))
        best: dict[int, tuple[dict[str, list], float]] = {}
        for exponent in EXPONENTS:
            for steps, places in best_chains(errors, start, solution.alphas_cumprod**exponent, lengths).items():
                found = self.fitted(solution, places)
                best[steps] = min(best.get(steps, found), found, key=lambda pair: pair[1])
        return best

    def fitted(self, solution: Solution, places: list[int]) -> tuple[dict[str, list], float]:
        """The sampler at these places of the grid, and its RMSE."""
        targets = [solution.states[place] for place in (*places[1:], len(solution.timesteps))]

        def solve(index: int, regressors: Tensor) -> list[float]:
            used = torch.stack([x[~self.held_out].flatten().cpu().double() for x in (*regressors, targets[index])])
            products = self.summed((used @ used.T).numpy())
            return [float(f"{value:.{DIGITS}g}") for value in least_squares(products[:-1, :-1], products[:-1, -1])]

        steps, timesteps = len(places), [solution.timesteps[place] for place in places]
        sampler = {"timesteps": timesteps, "coefficients": np.zeros((steps, HISTORY + 1))}
        scheduler = _Fitting.from_config(self.base.config, fitted_samplers={str(steps): sampler})
        scheduler.solve = solve
        images = self.sample(scheduler, steps)
        return scheduler.fitted_samplers[str(steps)], self.rmse(images[self.held_out], solution.states[-1])

    def rmse(self, images: Tensor | None, solved: Tensor) -> float:
        """Of held-out images, as they are shown; infinite for none."""
        expected = solved[self.held_out].clamp(-1, 1)
        squares = np.inf if images is None else (images.clamp(-1, 1) - expected).cpu().double().square().sum().item()
        total, count = self.summed(np.array([squares, float(expected.numel())]))
        return float(np.sqrt(total / count))

    def best_stock(self, steps: int, solved: Tensor) -> tuple[str, float]:
        """The nearest of diffusers' solvers, and its RMSE, which is infinite for one that fails."""
        distances = {}
        for name, (kind, options) in STOCK.items():
            try:
                images = self.sample(stock_scheduler(kind, self.base, **options), steps, held_out=True)
            except (ValueError, FloatingPointError, IndexError):  # in some numbers of steps
                images = None
            distances[name] = self.rmse(images, solved)
        return min(distances.items(), key=lambda item: item[1])


@contextmanager
def _borrowed(pipe: Any, batch_size: int) -> Iterator[None]:
    """Within, the pipeline shows no progress, and its network takes `batch_size` images at a time; then it is as before."""
    scheduler, unet, shown = pipe.scheduler, pipe.unet, getattr(pipe, "_progress_bar_config", {})
    own, whole = vars(unet).get("forward"), unet.forward

    def forward(sample: Tensor, timestep: Tensor, **kwargs: Tensor) -> UNet2DOutput:
        batches = zip(*(values.split(batch_size) for values in (sample, *kwargs.values())), strict=True)
        outputs = [whole(x, timestep, **dict(zip(kwargs, given, strict=True))).sample for x, *given in batches]
        return UNet2DOutput(torch.cat(outputs))

    unet.forward = forward
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.scheduler, pipe._progress_bar_config = scheduler, shown
        if own is None:
            del unet.forward
        else:
            unet.forward = own
