"""What happens along the way of a run, and at its end: reports, previews, pushes, evaluations, checkpoints, the finished model.

Each job is a function of the run and the number of updates done.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator

from ..data.mapped import ImageSet
from ..evaluation.features import feature_extractor
from ..hub import export
from ..scheduling_alpha_ddpm import AlphaDDPMScheduler
from ..support.atomic import write_text
from ..support.errors import NumericalError, Stopped
from .batches import BatchLoader
from .checkpoints import Checkpoints
from .conditions import Condition
from .options import TrainingOptions
from .output_folder import OPTIONS_FILE
from .pusher import Pusher
from .record import model_card
from .state import TrainingState
from .stop import StopRequest, in_any_process
from .telemetry import Telemetry
from .watching import Evaluation, Samples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Every:
    """A job that is due after every `updates` updates; 0 is never."""

    updates: int
    run: Callable[[int], bool | None]  # takes the number of updates done; returns whether the run shall stop
    at_end: Literal["if due", "always", "never"] = "if due"
    on_stop: Literal["if due", "always", "never"] = "if due"  # after the update in which the run was asked to stop

    def is_due(self, done: int, total: int, stopping: bool) -> bool:
        if stopping and self.on_stop != "if due":
            return self.on_stop == "always"
        if not self.updates or (done == total and self.at_end == "never"):
            return False
        return done % self.updates == 0 or (done == total and self.at_end == "always")


@dataclass
class Run:
    """The parts of a run, as one argument."""

    options: TrainingOptions
    accelerator: Accelerator
    folder: Path
    data: ImageSet
    condition: Condition
    state: TrainingState
    scheduler: AlphaDDPMScheduler
    batches: BatchLoader
    pusher: Pusher | None
    stop: StopRequest
    first: int  # updates done before
    began: float  # reading of time.monotonic

    def __post_init__(self) -> None:
        options, watching, seed = self.options, self.options.watching, self.options.run.seed
        self.total = options.optimisation.max_train_steps  # updates in all
        self.checkpoints = Checkpoints(self.accelerator, self.folder, options.run.checkpoints_total_limit)
        # with a scheduler of its own: previews choose shorter chains, and the bound is that of the full one
        self.pipe = self.condition.pipeline(self.state.unet, AlphaDDPMScheduler.from_config(self.scheduler.config))
        self.pipe.set_progress_bar_config(disable=True)
        batch_size = options.optimisation.batch_size // options.optimisation.gradient_accumulation_steps
        self.samples = Samples(self.pipe, self.condition, self.folder, watching, seed, batch_size)
        extractor = None
        if watching.eval_samples:
            extractor = feature_extractor(watching.eval_features, options.data.dataset, None, "--eval_features")
            extractor.to(self.accelerator.device)
        self.evaluation = Evaluation(self.data, watching, seed, batch_size, options.data.cache_dir, extractor)
        self.telemetry = Telemetry(self.accelerator, self.folder, self.state.updater, self.first, self.total)

    def in_main_process(self, job: Callable[["Run", int], None], done: int) -> bool:
        """Do the job in the main process, with the EMA weights, while the others wait.

        Returns whether any process was asked to stop meanwhile; the job is then left where it is.
        """
        if self.accelerator.is_main_process:
            with contextlib.suppress(Stopped), self.stop.interrupts(self.state.unet), self.state.ema_weights():
                job(self, done)
        (stopping,) = in_any_process(self.accelerator, self.stop.reason is not None)
        self.telemetry.restart_clock()
        return stopping

    def numerical_error(self, what: str) -> NumericalError:
        self.checkpoints.close()
        return NumericalError(
            f"{what} (train.log names the images). The last good checkpoint is {self.checkpoints.last}. Look at those images, "
            "or train again with a lower --learning_rate or without --mixed_precision."
        )


def report(run: Run, done: int) -> None:
    note_skipped_rows(run)
    run.telemetry.report(done, run.options.optimisation.batch_size)


def preview(run: Run, done: int) -> None:
    run.samples.preview(done)


def push_snapshot(run: Run, done: int) -> None:
    run.pusher.push_soon(done, lambda snapshot: save_model(run, snapshot, done))


def evaluate(run: Run, done: int) -> None:
    run.telemetry.log(run.evaluation(run.pipe, run.scheduler), done)


def save_checkpoint(run: Run, done: int) -> None:
    with run.telemetry.timer("checkpoint", on_device=False):
        if not run.state.weights_are_finite():
            raise run.numerical_error(f"the weights after {done} updates are not finite")
        note_skipped_rows(run)  # a resumed run does not meet those before a checkpoint again
        run.checkpoints.save(run.state, done, own=run.batches.state_dict())
    run.telemetry.restart_clock()


def note_skipped_rows(run: Run) -> None:
    if run.options.data.streaming:
        run.telemetry.note_skipped_rows(run.batches.take_skipped())


def save_model(run: Run, target: Path, done: int) -> None:
    """The pipeline with its present weights, and its card."""
    export(run.pipe, target, model_card(run, target, done))


def begin(run: Run, previews: Every) -> None:
    """Write down what the run is, and make the preview that an earlier attempt was stopped before, if it is missing."""
    data, accelerator, options = run.data, run.accelerator, run.options
    if accelerator.is_main_process:
        write_text(run.folder / OPTIONS_FILE, options.to_yaml())
        run.telemetry.skipped.add(data.skipped)
    accelerator.init_trackers("ddpm-pipeline", {name: value for name, value in options.flat().items() if value})
    images = f"{data.num_images} images" if data.num_images else "a stream"
    logger.info(
        "%s: %s of %dx%dx%d; %.2f M parameters; updates %d to %d of %d images; %s, %s, %d threads",
        data.name, images, data.resolution, data.resolution, data.channels, run.state.num_parameters / 1e6, run.first,
        run.total, options.optimisation.batch_size, accelerator.device, accelerator.mixed_precision,
        torch.get_num_threads(),
    )  # fmt: skip
    run.state.model.train()
    if run.first and previews.is_due(run.first, run.total, stopping=False):
        run.in_main_process(preview_if_missing, run.first)
    run.telemetry.restart_clock()


def preview_if_missing(run: Run, done: int) -> None:
    if not run.samples.preview_path(done).is_file():
        preview(run, done)


def finish(run: Run) -> None:
    """Samples and the model, in the main process. Raises Stopped, or PushError if all is done but the last push."""
    run.checkpoints.close()
    run.telemetry.summarize()
    run.accelerator.unwrap_model(run.state.model, keep_fp32_wrapper=False)  # samples show what the saved weights make
    if run.accelerator.is_main_process:
        with run.state.ema_weights(), run.stop.interrupts(run.state.unet):
            run.samples.final()
            save_model(run, run.folder, run.total)
        seconds = time.monotonic() - run.began
        logger.info("done in %.0f s: the model, its card and samples.png are in %s", seconds, run.folder)
        if run.pusher is not None:
            logger.info("pushed: %s", run.pusher.finish())
