"""What happens along the way of a run, and at its end: reports, previews, pushes, checkpoints, the finished model. Each job is
a function of the run and the number of updates done; the one that evaluates is in `evaluations`.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.mapped import ImageSet
from ..data.sources import hash_of
from ..evaluation.features import feature_extractor, try_extractor
from ..fitting.options import HELD_OUT_EVERY, LONG_STEPS
from ..fitting.samplers import fit_sampler, long_solver, sampled_by_fit
from ..generation.drawing import PROCESS_ROWS, sample_in_batches, sample_process
from ..hub import export
from ..samplers_alpha_ddpm import default_steps
from ..scheduling_alpha_ddpm import AlphaDDPMScheduler
from ..support.atomic import write_text
from ..support.errors import ConfigError, NumericalError, Stopped
from ..support.exceptions import describe_exception
from ..support.pictures import Display, grid, save_picture
from .batches import BatchLoader
from .checkpoints import Checkpoints, export_command
from .conditions import Condition
from .export import describe_run
from .forecast import Every, Forecast
from .models import preset_for_cpus
from .options import TrainingOptions
from .output_folder import OPTIONS_FILE, TRACKER_PROJECT, OutputFolder
from .processes import attention_on
from .pusher import Pusher
from .record import model_card, origin_of
from .state import TrainingState
from .stop import StopRequest, in_any_process
from .telemetry import Telemetry
from .trackers import settings
from .validation import Validation

logger = logging.getLogger(__name__)

FITTED_STEPS = (5, 10, 20)  # for which a finished model gets a sampler
FEW = 32  # images of a network call
MOST_FITTED_VALUES = 2**29  # of the long solutions, 2 GiB on the device


@dataclass
class Run:
    """The parts of a run, as one argument."""

    options: TrainingOptions
    accelerator: Accelerator
    folder: Path
    output: OutputFolder | None  # the same folder as the main process holds it
    data: ImageSet
    condition: Condition
    state: TrainingState
    scheduler: AlphaDDPMScheduler
    batches: BatchLoader
    pusher: Pusher | None
    stop: StopRequest
    first: int  # updates done before
    began: float  # reading of time.monotonic
    on_preview: Callable[[Path], Any] | None = None  # takes each preview's path
    forecast: Forecast = field(init=False)

    def __post_init__(self) -> None:
        options, watching, optimisation = self.options, self.options.watching, self.options.optimisation
        self.total = optimisation.max_train_steps  # updates in all
        self.origin = origin_of(options, self.data.name, self.data.num_images, self.accelerator.num_processes)
        self.batch_size = optimisation.batch_size // optimisation.gradient_accumulation_steps  # of images to sample
        self.preview_steps = min(watching.preview_inference_steps, len(self.scheduler))
        self.checkpoints = Checkpoints(self.accelerator, self.folder, options.run.checkpoints_total_limit)
        self.validation = self._earlier_evaluations() if self.data.held_out and self.output is not None else None
        # with schedulers of their own, since the bound is that of the full chain
        self.pipe = self.condition.pipeline(self.state.unet, AlphaDDPMScheduler.from_config(self.scheduler.config))
        self.preview_pipe = self.condition.pipeline(self.state.unet, long_solver(self.scheduler, self.preview_steps))
        for pipe in (self.pipe, self.preview_pipe):
            pipe.set_progress_bar_config(disable=True)
        try:
            self.display = Display.parse(watching.preview_channels, self.data.value_range.dtype != "uint8")
            self.shown = self.display.words(self.data.channels)
        except ValueError as error:
            raise ConfigError(f"--preview_channels {error}.") from error
        self.extractor = None
        if watching.eval_samples:
            name = watching.eval_features
            extractor = feature_extractor(name, options.data.dataset, None, "--eval_features", self.data.channels)
            self.extractor = extractor.to(self.accelerator.device)
            try_extractor(self.extractor, self.data, f"--eval_features {name}")
        self.telemetry = Telemetry(self.accelerator, self.folder, self.state.updater, self.first, self.total)

    def _earlier_evaluations(self) -> Validation:
        """Those before this attempt; with --keep_best the best one is among those whose checkpoint still exists."""
        watching, keep = self.options.watching, self.options.run.keep_best
        subject = hash_of(self.data.fingerprint, self.data.held_out.fingerprint, watching.eval_images, watching.eval_calls)
        validation = Validation(self.folder, subject, self.first, lambda step: not keep or self.checkpoints.path(step).is_dir())
        self.checkpoints.best = validation.best.step if keep and validation.best else None
        return validation

    def in_main_process(self, job: Callable[["Run", int], None], done: int) -> bool:
        """Do the job in the main process, with the EMA weights, while the others wait. Returns whether any process was asked to
        stop meanwhile; the job is then left where it is.
        """
        if self.output is not None:
            self.output.check()
            interrupts, precision = self.stop.interrupts(self.state.unet), attention_on(self.accelerator)
            with contextlib.suppress(Stopped), interrupts, self.state.ema_weights(), precision:
                job(self, done)
        (stopping,) = in_any_process(self.accelerator, self.stop.reason is not None)
        self.telemetry.restart_clock()
        return stopping

    def note_progress(self, done: int) -> None:
        """After every update."""
        self.telemetry.note_progress(done, self.forecast, self.options.optimisation.batch_size)
        if self.output is not None and done == self.first + 1:
            self.output.keep()

    def numerical_error(self, what: str) -> NumericalError:
        self.checkpoints.close()
        return NumericalError(
            f"{what} (train.log names the images). The last good checkpoint is {self.checkpoints.last}. Look at those images, "
            "or train again with a lower --learning_rate or without --mixed_precision."
        )


@contextlib.contextmanager
def not_essential(what: str) -> Iterator[None]:
    """Within, an error is logged: the model matters more than pictures and figures of it."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        logger.warning("%s failed, and the run goes on without: %s", what, describe_exception(error))


def stopped(run: Run, done: int) -> Stopped:
    """What a run that was asked to stop raises, when its last checkpoint is on the disk and its push is done or given up."""
    run.checkpoints.close()
    if run.pusher is not None:
        run.pusher.abandon(run.stop, urgent=True)
    why, model = run.stop.reason or "another process", export_command(run.checkpoints.last)
    again = "repeat the command with --resume latest to continue from there"
    return Stopped(f"stopped by {why} after update {done}; for a model as of now, {model}; {again}")


def report(run: Run, done: int) -> None:
    note_skipped_rows(run)
    run.telemetry.report(done, run.options.optimisation.batch_size)


def sampling_calls(run: Run, *wanted: tuple[int, int]) -> int:
    """Network calls times images, to sample each of these (number of images, number of steps) with the guidance of previews. A
    call of few images takes about as long as one of FEW.
    """
    return sum(max(count, FEW) * steps for count, steps in wanted) * (1 + (run.condition.guidance != 1))


def preview_calls(run: Run) -> int:
    """`sampling_calls` of a preview."""
    return sampling_calls(run, (run.options.watching.preview_images, run.preview_steps))


def forecast_of(run: Run, jobs: Sequence[Every]) -> Forecast:
    """With the network calls of `finish`."""
    lengths, noises = _fit_plan(run)
    steps = _steps_of_samples(run, max(lengths, default=0))
    pictures = (run.options.watching.num_samples, steps), (PROCESS_ROWS, steps)
    at_end = sampling_calls(run, *pictures, *(sampled_by_fit(lengths, noises) if lengths else []))
    passes = run.options.optimisation.gradient_accumulation_steps
    images = max(run.batch_size // run.accelerator.num_processes, FEW) * passes
    return Forecast(jobs, run.total, images, at_end)


def preview(run: Run, done: int, only_if_missing: bool = False) -> None:
    """samples/step-N.png, by DPM-Solver++ in few steps."""
    watching, path = run.options.watching, run.folder / "samples" / f"step-{done:08d}.png"
    if not (only_if_missing and path.is_file()):
        with not_essential("a preview"):
            caption = save_grid(run, run.preview_pipe, watching.preview_images, run.preview_steps, path)
            run.telemetry.show("preview", path, caption, done)
            if run.on_preview is not None:
                run.on_preview(path)


def save_grid(run: Run, pipe: Any, count: int, steps: int, path: Path) -> str:
    """A picture of about `count` images, in equal rows, one per condition, whose name stands left of it. Returns its caption,
    which a text file beside it has: which row is what, and which channels are shown how.
    """
    request, columns = run.condition.preview(count)
    count = len(request) or count
    images = sample_in_batches(pipe, count, run.batch_size, run.options.run.seed, steps, request)
    left, names = run.condition.left(request, columns, run.display), run.condition.row_names(request, columns)
    save_picture(grid(images, columns, display=run.display, left=left, rows=names), path)
    shown = [f"shown: {run.shown}\n"] * bool(run.shown) + ["left: condition images\n"] * (left is not None)
    caption = "".join(shown) + _rows(names)
    if caption:
        write_text(path.with_suffix(".txt"), caption)
    return caption


def _rows(names: list[str]) -> str:
    return "".join(f"row {row}: {name}\n" for row, name in enumerate(names, start=1))


def push_snapshot(run: Run, done: int) -> None:
    run.pusher.push_soon(done, lambda snapshot: export(run.pipe, snapshot, model_card(run, snapshot, done)))


def save_checkpoint(run: Run, done: int) -> None:
    if run.output is not None:
        run.output.check()  # before a folder of that name is made anew
    if run.checkpoints.saved == done:  # as the best one
        return
    with run.telemetry.timer("checkpoint", on_device=False):
        if not run.state.weights_are_finite():
            raise run.numerical_error(f"the weights after {done} updates are not finite")
        note_skipped_rows(run)  # a resumed run does not meet those before a checkpoint again
        run.checkpoints.save(run.state, done, run.batches.state_dict(), partial(describe_run, run, done))
    run.telemetry.restart_clock()


def note_skipped_rows(run: Run) -> None:
    if run.options.data.streaming:
        run.telemetry.note_skipped_rows(run.batches.take_skipped())


def begin(run: Run, jobs: Sequence[Every], previews: Every) -> None:
    """Write down what the run is, and make the preview that an earlier attempt was stopped before, if it is missing."""
    data, accelerator, options = run.data, run.accelerator, run.options
    run.forecast = forecast_of(run, jobs)
    if accelerator.is_main_process:
        run.checkpoints.set_aside(run.first, options.run.resume)
        write_text(run.folder / OPTIONS_FILE, options.to_yaml())
        run.telemetry.skipped.add(data.skipped)
    start_tracker(run)
    images = f"{data.num_images} images" if data.num_images else "a stream"
    logger.info(
        "%s: %s of %dx%dx%d; %.2f M parameters; updates %d to %d of %d images; %s, %s, %d threads",
        data.name, images, *data.size, data.channels, run.state.num_parameters / 1e6, run.first,
        run.total, options.optimisation.batch_size, accelerator.device, accelerator.mixed_precision,
        torch.get_num_threads(),
    )  # fmt: skip
    if accelerator.device.type == "cpu" and (preset := preset_for_cpus(options.model, data.size)):
        logger.info("--model auto has taken a network for GPUs; on this CPU --model %s takes a fraction of the time", preset)
    for name in ("preview_every", "eval_every"):
        every = getattr(options.watching, name)
        if every > run.total and every != options.declared()[name].default:
            logger.warning(
                "--%s %d is more than the %d updates of this run, so that there will be none", name, every, run.total
            )
    run.state.model.train()
    if run.first and previews.is_due(run.first, run.total, stopping=False):
        run.in_main_process(partial(preview, only_if_missing=True), run.first)
    run.telemetry.restart_clock()


def start_tracker(run: Run) -> None:
    """Raises ConfigError if the tracker cannot be started, such as without an account."""
    options = {name: value for name, value in run.options.flat().items() if value}
    run.telemetry.bar.clear()  # some trackers print
    try:
        run.accelerator.init_trackers(TRACKER_PROJECT, options, init_kwargs=settings(run.folder, run.first))
    except Exception as error:  # each tracker has its own
        tracker, run.accelerator.trackers = run.options.watching.report_to, []  # there is none to end
        raise ConfigError(f"--report_to {tracker} cannot be started: {describe_exception(error)}") from error


def best_checkpoint(run: Run) -> str:
    """How to get the model with the lowest held-out figure."""
    step = run.validation.best.step
    path = run.checkpoints.path(step)
    if run.checkpoints.best == step or path.is_dir():  # the former may be being written
        return f"the best checkpoint is {path}: {export_command(path)}"
    return f"there is no checkpoint of update {step}, which --keep_best would have kept"


def finish(run: Run) -> None:
    """Samplers of few steps, samples.png, process.png from noise to images, and the model, in the main process. Raises Stopped,
    or PushError if all is done but the last push.
    """
    run.checkpoints.close()
    run.telemetry.close_bar()
    run.telemetry.summarize()
    if run.validation is not None and (best := run.validation.best):
        logger.info("the lowest held-out bits/dim were %s, after update %d; %s", best, best.step, best_checkpoint(run))
    run.accelerator.unwrap_model(run.state.model, keep_fp32_wrapper=False)  # samples show what the saved weights make
    if run.output is not None:
        run.output.check()
        with run.state.ema_weights():
            try:
                with run.stop.interrupts(run.state.unet):
                    fit_few_steps(run)
                    draw_samples(run)
            except Stopped as asked:
                again = "" if run.checkpoints.last == "none" else "; repeat the command with --resume latest for these"
                what = f"the model is in {run.folder}, without some of its samplers and pictures"
                raise Stopped(f"stopped by {asked} after the last update: {what}{again}") from None
            finally:  # there may be no checkpoint
                export(run.pipe, run.folder, model_card(run, run.folder, run.total))
        run.output.check()  # what was written before it was removed is gone
        seconds = time.monotonic() - run.began
        logger.info("done in %.0f s: the model and its card are in %s", seconds, run.folder)
        if run.pusher is not None:
            logger.info("pushed: %s", run.pusher.finish(run.stop))


def fit_few_steps(run: Run) -> None:
    """Give the model the samplers that a call of its pipeline takes by default, for the guidance of samples.png."""
    began, (steps, noises) = time.monotonic(), _fit_plan(run)
    if not steps:
        return
    with not_essential("fitting samplers of few steps"):
        request, _ = run.condition.preview(noises)
        how = {"num_noises": noises, "batch_size": run.batch_size, "seed": run.options.run.seed}
        run.pipe.set_progress_bar_config()
        found = fit_sampler(run.pipe, steps, request, **how, alone=True)
        if found.scheduler.fitted_samplers:
            run.pipe.scheduler = found.scheduler
        logger.info("samplers fitted in %.0f s, RMSE to the model's own solution: %s", time.monotonic() - began, found.words())


def _fit_plan(run: Run) -> tuple[list[int], int]:
    """The numbers of steps to fit samplers for, if any, and of noises."""
    steps = [n for n in FITTED_STEPS if n < len(run.scheduler)] if run.options.run.fit_noises else []
    fitting = MOST_FITTED_VALUES // ((2 * LONG_STEPS + 1) * math.prod((run.data.channels, *run.data.size)))
    return steps, max(HELD_OUT_EVERY, min(run.options.run.fit_noises, fitting))  # of large images fewer will do


def _steps_of_samples(run: Run, by_default: int) -> int:
    return min(run.options.watching.sample_inference_steps or by_default or math.inf, len(run.scheduler))


def draw_samples(run: Run) -> None:
    """samples.png, and process.png from noise to images."""
    watching, seed = run.options.watching, run.options.run.seed
    steps = _steps_of_samples(run, default_steps(run.pipe.scheduler))
    shown = f"; pictures show {run.shown}" if run.shown else ""
    logger.info("sampling %d images over %d steps%s", watching.num_samples, steps, shown)
    run.pipe.set_progress_bar_config(disable=True)  # one bar is shown for all batches
    with not_essential("samples.png"):
        path = run.folder / "samples.png"
        run.telemetry.show("samples", path, save_grid(run, run.pipe, watching.num_samples, steps, path), run.total)
    with not_essential("process.png"):
        request, _ = run.condition.preview(PROCESS_ROWS)
        path, names = run.folder / "process.png", run.condition.row_names(request, 1)  # each image has a row
        save_picture(sample_process(run.pipe, seed, request, run.display, names), path)
        run.telemetry.show("process", path, "from noise to images\n" + _rows(names), run.total)
