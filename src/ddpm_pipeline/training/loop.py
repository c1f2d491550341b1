"""A training run, top to bottom: where it runs, what it learns from, what it learns, what happens along the way, the loop."""

import contextlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.held_out import open_training_data
from ..data.mapped import ImageSet
from ..data.options import parse_resolution
from ..ranges_alpha_ddpm import ValueRange
from ..scheduling_alpha_ddpm import AlphaDDPMScheduler
from ..support.draws import noise_of
from ..support.sharing import forgotten_accelerator
from .autotune import Subject, autotuned, tunable
from .batches import BatchLoader, BatchPlan, batch_loader, lost_workers
from .checkpoints import find_checkpoint, load_checkpoint, stored_options
from .conditions import Condition, build_condition
from .evaluations import eval_calls, evaluate_and_keep
from .forecast import Every
from .identity import identity_of
from .jobs import Run, begin, finish, preview, preview_calls, push_snapshot, report, save_checkpoint, stopped  # fmt: skip
from .models import build_model, objective_for
from .objectives import NoisedBatch, min_snr_weights, per_image_loss
from .options import TrainingOptions
from .output_folder import output_folder
from .processes import attention_on, enough_memory, seed_dropout, seed_weights, start_processes
from .pusher import Pusher
from .state import MAX_IN_A_ROW, build_state
from .stop import StopRequest
from .telemetry import logging_to


@forgotten_accelerator()
def train(options: TrainingOptions, on_preview: Callable[[Path], Any] | None = None) -> Path:
    """Train as the options say, and return the folder with the model. `on_preview` gets the path of each preview picture.

    Raises ConfigError or DataError before it begins; Stopped, CheckpointError or NumericalError; PushError if all else is done.
    """
    # Where it runs
    began = time.monotonic()
    stop, undecided = StopRequest(options.run.max_train_time, began), tunable(options)
    accelerator, options = start_processes(options)
    folder, main = Path(options.run.output_dir), accelerator.is_main_process
    holding = output_folder(folder, options.run) if main else contextlib.nullcontext()
    with holding as output, logging_to(folder, accelerator) as start_log, enough_memory(options):
        # What it learns from
        with accelerator.main_process_first():
            pusher = Pusher(options.hub, folder) if options.hub.push_to_hub and main else None
            data = open_training_data(options.data, options.condition.columns, options.watching.eval_images)
        seed_weights(options.run.seed)
        condition = build_condition(options.condition, data, options.model.init_from)

        # What it learns
        unet, scheduler = build_model(options.model, options.diffusion, data.size, data.channels, condition)
        options = resolved(options, data, scheduler)
        accelerator, options = tuned(accelerator, options, undecided, data, condition, unet, scheduler)
        checkpoint = find_checkpoint(folder, options, accelerator, partial(identity_of, data, condition, unet, scheduler))
        options = with_origin(options, checkpoint)
        state = build_state(accelerator, unet, condition.network(unet), options)
        first, position = load_checkpoint(accelerator, state, checkpoint) if checkpoint else (0, None)
        batches = open_batches(data, condition, options, accelerator, first, position)
        objective = partial(losses_of, scheduler=scheduler, condition=condition, value_range=data.value_range, options=options)

        # What happens along the way
        if output is not None:
            output.set_aside()  # not before all of the above has succeeded
        start_log()
        run = Run(options, accelerator, folder, output, data, condition, state, scheduler, batches, pusher, stop, first, began)
        run.on_preview = on_preview
        watching, in_main, at_end = options.watching, run.in_main_process, "always" if data.held_out else "if due"
        jobs = [
            Every(watching.log_every, partial(report, run), at_end="always"),
            previews := Every(watching.preview_every, partial(in_main, preview), "never", "never", calls=preview_calls(run)),
            Every(options.hub.push_every, partial(in_main, push_snapshot), at_end="never", on_stop="never"),
            Every(watching.eval_every, partial(evaluate_and_keep, run, objective), at_end, "never", calls=eval_calls(run)),
            Every(options.run.checkpoint_every, partial(save_checkpoint, run), at_end="always", on_stop="always"),
        ]

        # The loop
        try:
            with stop.listening(), lost_workers():
                begin(run, jobs, previews)
                for done in range(first + 1, run.total + 1):
                    stopping = update(run, objective, done - 1)
                    for job in jobs:
                        if job.is_due(done, run.total, stopping):
                            stopping = run.forecast.timed(job, done) or stopping
                    if stopping:
                        raise stopped(run, done)
                finish(run)
        finally:
            close(run)
    return folder


def resolved(options: TrainingOptions, data: ImageSet, scheduler: AlphaDDPMScheduler) -> TrainingOptions:
    """The options with everything filled in that follows from the data and the model."""
    optimisation = options.optimisation
    steps = optimisation.max_train_steps or -(-len(data) * optimisation.num_train_epochs // optimisation.batch_size)
    images = {"resolution": parse_resolution(data.size), "channels": data.channels}
    objective = objective_for(options.diffusion.objective, scheduler)
    start = options.model.init_from
    start = os.path.abspath(start) if start and os.path.exists(start) else start  # a folder is no name, also when it is gone
    known = {"max_train_steps": steps, "num_train_timesteps": len(scheduler), "objective": objective, "init_from": start}
    if options.data.validation_split and not options.watching.eval_every:
        known["eval_every"] = max(1, steps // 10)
    return options.with_values(**images, **known)


def tuned(
    accelerator: Accelerator,
    options: TrainingOptions,
    undecided: tuple[str, ...],
    data: ImageSet,
    condition: Condition,
    unet: Any,
    scheduler: AlphaDDPMScheduler,
) -> tuple[Accelerator, TrainingOptions]:
    """The same with what `--autotune` chooses for the options that are undecided, if any."""
    if not undecided:
        return accelerator, options
    losses = partial(losses_of, scheduler=scheduler, condition=condition, value_range=data.value_range)
    batches = partial(open_batches, data, condition, first=0, position=None)
    return autotuned(accelerator, options, undecided, Subject(unet, condition, losses, batches))


def with_origin(options: TrainingOptions, checkpoint: Path | None) -> TrainingOptions:
    """The options with what the checkpoint's run started from, for the model card, where the one that resumes does not say."""
    if checkpoint is None or options.model.init_from is not None:
        return options
    return options.with_values(init_from=stored_options(checkpoint).get("init_from"))


def open_batches(
    data: ImageSet, condition: Condition, options: TrainingOptions, accelerator: Accelerator, first: int, position: Any
) -> BatchLoader:
    """This process's micro-batches from update `first` on; of a stream, from the `position` that a checkpoint holds."""
    optimisation, passes = options.optimisation, options.optimisation.gradient_accumulation_steps
    process = accelerator.process_index, accelerator.num_processes
    drawing = options.data.random_flip, options.diffusion.timestep_sampling, options.data.window_share, options.data.augment
    plan = BatchPlan(options.run.seed, optimisation.batch_size, passes, *process, *drawing)
    micro_batches = range(first * passes, optimisation.max_train_steps * passes)
    return batch_loader(data, plan, condition, micro_batches, options.data, accelerator.device.type, position)


# ---- one update -----------------------------------------------------------------------------------------


def update(run: Run, objective: Callable[..., torch.Tensor], step: int) -> bool:
    """Forward and backward passes and the optimizer's step; whether any process was asked to stop. Raises NumericalError if
    losses or gradients were not finite for many updates in succession.
    """
    accelerator, state, timer = run.accelerator, run.state, run.telemetry.timer
    passes = run.options.optimisation.gradient_accumulation_steps
    seed_dropout(run.options.run.seed, step, accelerator)
    mean_losses, image_losses, indices = [], [], []
    observed: list[tuple[torch.Tensor, torch.Tensor]] = []  # timesteps and losses
    for index in range(passes):
        one_of_several = contextlib.nullcontext() if index == passes - 1 else accelerator.no_sync(state.model)
        with one_of_several, attention_on(accelerator):
            with timer("data", on_device=False):
                batch = next(run.batches)
            with timer("forward"):
                timesteps, losses, loss = state.forward(objective, batch, accelerator.device)
            with timer("backward"):
                accelerator.backward(loss / passes)
        mean_losses.append(loss.detach())
        image_losses.append(losses.detach())
        indices += batch["indices"].tolist()
        if state.timestep_sampler.observes_losses:
            observed.append(accelerator.gather((timesteps, losses.detach())))
    with timer("optimizer"):
        grad_norm, stopping = state.updater(step, torch.cat(image_losses), indices, stop=run.stop.reason is not None)
    run.note_progress(step + 1)
    if grad_norm is not None:
        run.telemetry.note_update(torch.stack(mean_losses).mean(), grad_norm)
        for observation in observed:  # after the last draw, which so does not depend on how the update was divided
            state.timestep_sampler.observe(*observation)
    elif state.updater.in_a_row >= MAX_IN_A_ROW:
        raise run.numerical_error(f"{state.updater.in_a_row} updates in succession had to be skipped")
    return stopping


def losses_of(
    model: torch.nn.Module,
    batch: dict[str, Any],
    timesteps: torch.Tensor,
    scheduler: AlphaDDPMScheduler,
    condition: Condition,
    value_range: ValueRange,
    options: TrainingOptions,
) -> torch.Tensor:
    """The loss of each image of a micro-batch, [b]: noise the images, predict, compare (report §6). Float32 but for `model`."""
    original_samples = value_range.normalize(batch["pixels"].to(timesteps.device, non_blocking=True))
    noise = noise_of(batch["noise_seeds"], original_samples.shape[1:], timesteps.device)
    sample = scheduler.add_noise(original_samples, noise, timesteps)
    if options.hardware.channels_last:
        sample = sample.contiguous(memory_format=torch.channels_last)
    inputs = condition.inputs(batch["condition"], original_samples) if "condition" in batch else {}
    if "augmentation" in batch:
        inputs["augmentation"] = batch["augmentation"].to(timesteps.device, non_blocking=True)
    prediction = model(sample, timesteps, **inputs).sample
    diffusion, noised = options.diffusion, NoisedBatch(original_samples, noise, timesteps, sample, value_range.num_bins)
    weights = 1.0 if diffusion.snr_gamma is None else min_snr_weights(scheduler, timesteps, diffusion.snr_gamma)
    return per_image_loss(diffusion.objective, scheduler, prediction, noised, diffusion.bound_weight, weights)


def close(run: Run) -> None:
    """End workers, trackers and the process group. The distributed model goes before the group: were it the last to hold the
    group, its destructor would wait, with Python's lock held, for threads that wait for that lock.
    """
    run.batches.close()
    run.telemetry.bar.close()
    run.state.model = None
    run.accelerator.free_memory()
    run.telemetry.end_tracking()
