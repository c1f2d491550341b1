"""Train a diffusion model: `accelerate launch training/train.py` runs the digits recipe, `--help` lists the options.

Reads top to bottom: the configuration, the parts, the loop, what is left behind.
"""

import contextlib
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import ModelCard
from tqdm.auto import tqdm

from ..data.mapped import ImageData, to_model_range
from ..data.skipped import SkippedLog
from ..data.streamed import StreamData
from ..generation.drawing import UNCONDITIONAL, Request, sample_in_batches, sample_process
from ..hub import build_card, export
from ..scheduling_alpha_ddpm import AlphaDDPMScheduler
from ..support.draws import Stream, noise_of, seeds
from ..support.errors import ConfigError, NumericalError, Stopped
from ..support.pictures import grid, save_picture
from .batches import batch_loader, open_data
from .checkpoints import (
    CONFIG_FILE,
    Checkpoints,
    find_checkpoint,
    load_checkpoint,
    prepare_output_folder,
    write_atomically,
)
from .conditions import Conditions, build_conditions
from .models import build_model, objective_for
from .objectives import min_snr_weights, per_image_loss, timestep_sampler
from .options import TrainingConfig
from .pusher import Pusher, is_hub_dataset, public, recipe_command
from .stop import StopRequest, in_any_process
from .telemetry import MetricsLog, StepTimer, memory
from .update import Updater
from .watching import Evaluation

logger = logging.getLogger("train")

LONGEST_WAIT = timedelta(hours=12)  # for the main process as it preprocesses and draws; if it dies, that shows at once
REPLICATED = (
    DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU, DistributedType.MULTI_MLU, DistributedType.MULTI_HPU,
)  # fmt: skip


# ---- parts ----------------------------------------------------------------------------------------


def default_output_dir(dataset: str) -> str:
    """ddpm-NAME, from the last part of a data set's name or path."""
    name = re.sub(r"[^\w-]+", "-", Path(dataset.rstrip("/")).stem).strip("-")
    return f"ddpm-{name or 'model'}"


def share_out_batch(config: TrainingConfig, world_size: int) -> None:
    """Raise ConfigError where the batch cannot be split evenly."""
    parts = world_size * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise ConfigError(
            f"--batch_size {config.batch_size} cannot be split over {world_size} processes x "
            f"{config.gradient_accumulation_steps} accumulation steps; use a multiple of {parts}."
        )


def check_replicated(accelerator: Accelerator) -> None:
    """Raise ConfigError where a process would hold a part of the weights only: averages and samples are of whole ones."""
    if accelerator.distributed_type not in REPLICATED:
        raise ConfigError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which shards weights; use MULTI_GPU (every "
            "preset fits on one device), by `accelerate config` or --multi_gpu."
        )


def use_all_cores(config: TrainingConfig, accelerator: Accelerator) -> None:
    """`accelerate launch` sets one thread a process where it was told nothing; on the CPU that wastes the other cores."""
    if accelerator.device.type == "cpu":
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = min(available, psutil.cpu_count(logical=False) or available)
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(config.num_cpu_threads or max(1, cores // local_processes))


def seed_dropout(seed: int, step: int, accelerator: Accelerator) -> None:
    """Dropout draws from torch's global generator; make that a function of (seed, step, process) too."""
    torch.manual_seed(int(seeds(seed, Stream.DROPOUT, step, accelerator.num_processes)[accelerator.process_index]))


def set_up_logging(accelerator: Accelerator, folder: Path) -> None:
    """The main process logs to the console and to train.log; the others only what is wrong."""
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if accelerator.is_main_process:
        handlers.append(logging.FileHandler(folder / "train.log"))
    logging.basicConfig(
        level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers, force=True
    )
    for noisy in ("httpx", "datasets", "accelerate", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@contextlib.contextmanager
def averaged_weights(network: torch.nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """Within, the network has the averaged weights and is in evaluation mode."""
    parameters = list(network.parameters())
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
        if ema is not None:
            ema.restore(parameters)


def draw_grid(
    pipe: Any, conditions: Conditions, config: TrainingConfig, count: int, steps: int | None, path: Path
) -> None:
    batch = max(1, config.batch_size // config.gradient_accumulation_steps)
    condition, columns = conditions.preview(count)
    count = count if condition is None else len(condition[1])
    save_picture(
        grid(sample_in_batches(pipe, count, batch, config.seed, steps, request_for(condition, config)), columns), path
    )


def request_for(condition: tuple | None, config: TrainingConfig) -> Request:
    guidance = config.preview_guidance if config.condition_dropout else 1.0
    return UNCONDITIONAL if condition is None else Request(*condition, guidance)


# ---- the run --------------------------------------------------------------------------------------


class Run:
    """A training run: everything that it needs is made here, then `updates` and `finish` do the work.

    Raises ConfigError or DataError before it starts.
    """

    def __init__(self, config: TrainingConfig):
        self.began = time.monotonic()
        self.stop = StopRequest(config.max_train_time, self.began)
        folder = self.folder = Path(config.output_dir or default_output_dir(config.dataset))
        accelerator = self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=str(folder),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            ],
        )
        config = replace(config, output_dir=str(folder), mixed_precision=accelerator.mixed_precision)
        check_replicated(accelerator)
        share_out_batch(config, accelerator.num_processes)
        use_all_cores(config, accelerator)
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                prepare_output_folder(folder, config)
            self.pusher = Pusher(config, folder) if config.push_to_hub and accelerator.is_main_process else None
            data = self.data = open_data(config)
        set_up_logging(accelerator, folder)
        self.skipped = SkippedLog(folder) if accelerator.is_main_process else None
        if self.skipped is not None:
            self.skipped.add(data.skipped)
        torch.manual_seed(int(seeds(config.seed, Stream.MODEL, 0, 1)[0]))  # the initial weights
        conditions = self.conditions = build_conditions(config, data)
        self.unet, self.scheduler = build_model(config, data.resolution, data.channels, conditions)
        network = self.network = conditions.network(self.unet)
        self.max_train_steps = config.max_train_steps or -(-len(data) * config.num_train_epochs // config.batch_size)
        config = self.config = replace(
            config,
            resolution=data.resolution,
            channels=data.channels,
            max_train_steps=self.max_train_steps,
            num_train_timesteps=self.scheduler.config.num_train_timesteps,
            objective=objective_for(config, self.scheduler),
        )
        checkpoint = find_checkpoint(folder, config, accelerator) if config.resume else None
        if accelerator.is_main_process:
            write_atomically(folder / CONFIG_FILE, config.to_yaml())
        accelerator.init_trackers(
            "ddpm-pipeline", config={key: value for key, value in asdict(config).items() if value}
        )

        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if config.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        ema = self.ema = averaged(network.to(accelerator.device), config)
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=accelerator.device.type in ("cuda", "cpu"),
        )
        lr_scheduler = self.lr_scheduler = get_scheduler(  # not prepared: it counts updates, whatever the processes
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=self.max_train_steps,
        )
        model = torch.compile(network) if config.compile else network
        self.model, optimizer = accelerator.prepare(model, optimizer)
        self.updater = Updater(accelerator, network, optimizer, lr_scheduler, ema, config.max_grad_norm)
        self.sampler = timestep_sampler(config.timestep_sampling, len(self.scheduler))
        self.parts = {"lr_scheduler": lr_scheduler, "updater": self.updater}
        if self.sampler.observes_losses:
            self.parts["timestep_sampler"] = self.sampler
        self.checkpoints = Checkpoints(accelerator, folder, config.checkpoints_total_limit)
        self.first_step, position = (
            load_checkpoint(accelerator, ema, self.parts, checkpoint) if checkpoint else (0, None)
        )
        # with a scheduler of its own: previews choose shorter chains, and the bound is that of the full one
        self.pipe = conditions.pipeline(self.unet, AlphaDDPMScheduler.from_config(self.scheduler.config))
        self.pipe.set_progress_bar_config(disable=True)

        self.loader = batch_loader(
            data, config, accelerator.device.type, accelerator.process_index, accelerator.num_processes, conditions,
            self.first_step * config.gradient_accumulation_steps,
            self.max_train_steps * config.gradient_accumulation_steps,
            position,
        )  # fmt: skip
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        logger.info(
            "%s: %s of %dx%dx%d; %.2f M parameters; updates %d to %d of %d images; %s, %s, %d threads",
            data.name, f"{data.num_images} images" if data.num_images else "a stream", data.resolution, data.resolution,
            data.channels, self.parameters / 1e6, self.first_step, self.max_train_steps, config.batch_size,
            accelerator.device, accelerator.mixed_precision, torch.get_num_threads(),
        )  # fmt: skip
        self.evaluation = Evaluation(config, data, accelerator.device) if config.eval_every else None
        self.log = MetricsLog(accelerator, folder / "metrics.jsonl", self.first_step)
        self.timer = StepTimer(accelerator.device)
        self.spent: Counter[str] = Counter()  # seconds by part of an update
        self.losses: list[torch.Tensor] = []  # of the updates since the last line of the log
        self.grad_norm = float("nan")  # of the last update
        self.window_began = time.monotonic()

    def updates(self) -> None:
        """From the first update that is not done to the last. Raises Stopped, CheckpointError or NumericalError."""
        config = self.config
        bar = tqdm(
            total=self.max_train_steps,
            initial=self.first_step,
            disable=not self.accelerator.is_main_process,
            desc="training",
            unit="update",
        )
        self.model.train()
        if self.first_step and not (self.folder / preview_name(self.first_step)).is_file():
            self.preview(self.first_step)  # that was left out where the run was stopped
        self.window_began = time.monotonic()
        with bar:
            for done in range(self.first_step + 1, self.max_train_steps + 1):
                stopping = self.update(done - 1)
                bar.update()
                if done % config.log_every == 0 or done == self.max_train_steps:
                    bar.set_postfix(self.report(done), refresh=False)
                stopping = stopping or self.main_process_work(done)
                due = config.checkpoint_every and done % config.checkpoint_every == 0
                if stopping or due or (config.checkpoint_every and done == self.max_train_steps):
                    with self.timer("checkpoint", on_device=False):
                        self.save_checkpoint(done)
                    self.window_began = time.monotonic()
                if stopping:
                    self.checkpoints.close()
                    raise Stopped(f"stopped by {self.stop.reason or 'another process'} after update {done}")
        self.checkpoints.close()
        self.tell_costs()

    def tell_costs(self) -> None:
        total = self.spent.total() or 1.0
        parts = ", ".join(f"{part} {seconds / total:.1%}" for part, seconds in self.spent.most_common())
        used = ", ".join(f"{name} {gib:.2f}" for name, gib in memory(self.accelerator.device).items())
        left_out = f"{self.updater.skipped} updates and {len(self.skipped or ())} rows left out"
        logger.info("where the time of updates went: %s; %s; %s", parts, used, left_out)

    def update(self, step: int) -> bool:
        """Forward and backward passes and the optimiser's step; whether any process was asked to stop."""
        config, accelerator, timer = self.config, self.accelerator, self.timer
        seed_dropout(config.seed, step, accelerator)
        losses, indices = [], []
        observed: list[tuple[torch.Tensor, torch.Tensor]] = []  # of timesteps and losses
        for pass_index in range(config.gradient_accumulation_steps):
            last_pass = pass_index == config.gradient_accumulation_steps - 1
            with contextlib.nullcontext() if last_pass else accelerator.no_sync(self.model):
                with timer("data", on_device=False):
                    batch = next(self.loader)
                with timer("forward"):
                    timesteps, weights = (each.to(accelerator.device) for each in self.sampler.draw(batch["quantiles"]))
                    image_losses = losses_of(self.model, self.scheduler, batch, timesteps, config, self.conditions)
                    loss = (weights * image_losses).mean()
                with timer("backward"):
                    accelerator.backward(loss / config.gradient_accumulation_steps)
            losses.append(image_losses.detach())
            self.losses.append(loss.detach())
            indices += batch["indices"].tolist()
            if self.sampler.observes_losses:
                observed.append(accelerator.gather((timesteps, image_losses.detach())))
        with timer("optimizer"):
            norm, stopping = self.updater(step, torch.cat(losses), indices, stop=self.stop.reason is not None)
        if norm is None:
            del self.losses[-config.gradient_accumulation_steps :]
            if self.updater.hopeless:
                raise self.numerical_error(f"{self.updater.in_a_row} updates in a row had to be left out")
        else:
            self.grad_norm = norm
            for observation in observed:  # after the last draw, which so does not depend on how the update was split
                self.sampler.observe(*observation)
        return stopping

    def report(self, done: int) -> dict[str, float]:
        """Log the window of updates that ends here: losses are means over all processes, times over its updates."""
        updates = len(self.losses) // self.config.gradient_accumulation_steps  # but for those that were left out
        metrics: dict[str, float] = {}
        if self.losses:
            metrics["loss"] = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
            metrics["grad_norm"] = self.grad_norm
        shown = dict(metrics)
        metrics["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        metrics["images_per_second"] = updates * self.config.batch_size / (time.monotonic() - self.window_began)
        metrics["skipped_updates"] = self.updater.skipped
        for part, seconds in self.timer.take().items():
            metrics[f"{part}_seconds"] = seconds / max(updates, 1)
            self.spent[part] += seconds
        self.note_skipped()
        if self.skipped:
            metrics["skipped_rows"] = len(self.skipped)
        self.log(metrics | memory(self.accelerator.device), done)
        self.losses, self.window_began = [], time.monotonic()
        return shown

    def main_process_work(self, done: int) -> bool:
        """What is due between updates and is done by one process while the others wait: pictures, evaluation, a push.

        Whether any process was asked to stop meanwhile; the work is then left where it is.
        """
        config = self.config
        before_end = done < self.max_train_steps
        preview = config.preview_every and done % config.preview_every == 0 and before_end
        evaluation = self.evaluation is not None and done % config.eval_every == 0
        push = self.config.push_to_hub and config.push_every and done % config.push_every == 0 and before_end
        if not (preview or evaluation or push):
            return False
        if self.accelerator.is_main_process:
            with contextlib.suppress(Stopped), self.stop.interrupts(self.unet):
                if preview:
                    self.preview(done)
                with averaged_weights(self.network, self.ema):
                    if push:
                        self.pusher.push_soon(done, lambda snapshot: self.save_model(snapshot, done))
                    if evaluation:
                        self.log(self.evaluation(self.pipe, self.scheduler), done)
        (stopping,) = in_any_process(self.accelerator, self.stop.reason is not None)
        self.window_began = time.monotonic()
        return stopping

    def preview(self, done: int) -> None:
        """samples/step-N.png, in the main process; where one is due."""
        config = self.config
        due = config.preview_every and done % config.preview_every == 0 and done < self.max_train_steps
        if due and self.accelerator.is_main_process:
            with averaged_weights(self.network, self.ema):
                path = self.folder / preview_name(done)
                draw_grid(
                    self.pipe, self.conditions, config, config.preview_images, config.preview_inference_steps, path
                )

    def save_checkpoint(self, done: int) -> None:
        if not self.updater.weights_are_finite():
            raise self.numerical_error(f"the weights after {done} updates are not finite")
        self.note_skipped()  # those before a checkpoint are not come by again
        self.checkpoints.save(done, self.ema, self.parts, own=self.loader.state_dict())

    def note_skipped(self) -> None:
        """Write down what all processes left out of a stream since the last time."""
        if self.config.streaming:
            found = gather_object(self.loader.skipped)
            if self.skipped is not None:
                self.skipped.add(found)

    def numerical_error(self, what: str) -> NumericalError:
        self.checkpoints.close()
        return NumericalError(
            f"{what} (train.log names the images). The last good checkpoint is {self.checkpoints.last}. Look at those images, "
            "or train anew with a lower --learning_rate or without --mixed_precision."
        )

    def save_model(self, target: Path, done: int) -> None:
        """The pipeline, with its present weights, and its card."""
        seconds = time.monotonic() - self.began
        facts = training_facts(self.config, self.parameters, self.first_step, done, seconds, self.accelerator)
        facts = self.conditions.facts() | facts
        name, example = self.folder.resolve().name, self.conditions.example()
        processes = self.accelerator.num_processes
        export(
            self.pipe, target, model_card(self.pipe, self.config, self.data, facts, target, name, processes, example)
        )

    def finish(self) -> None:
        """Samples and the model, in the main process. Raises Stopped, or PushError where all is done but the last push."""
        config, conditions, folder = self.config, self.conditions, self.folder
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # samples are what the saved weights draw
        if self.accelerator.is_main_process:
            with averaged_weights(self.network, self.ema), self.stop.interrupts(self.unet):
                logger.info("drawing %d samples over %d steps", config.num_samples, len(self.scheduler))
                draw_grid(self.pipe, conditions, config, config.num_samples, None, folder / "samples.png")
                condition = conditions.preview(4)[0]
                process = sample_process(self.pipe, config.seed, request_for(condition, config))
                save_picture(process, folder / "process.png")
                self.save_model(folder, self.max_train_steps)
            seconds = time.monotonic() - self.began
            logger.info("done in %.0f s: the model, its card and samples.png are in %s", seconds, folder)
            if self.pusher is not None:
                logger.info("pushed: %s", self.pusher.finish())

    def close(self) -> None:
        """End workers, trackers and the process group. The distributed model goes before the group: were it the last to hold
        the group, its destructor would wait, with Python's lock held, for threads that wait for that lock.
        """
        self.loader.close()
        del self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()


def averaged(network: torch.nn.Module, config: TrainingConfig) -> EMAModel | None:
    """The moving average of the weights, if there shall be one."""
    if not config.ema_decay:
        return None
    return EMAModel(
        network.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=config.ema_power, foreach=True
    )


def preview_name(done: int) -> str:
    return f"samples/step-{done:08d}.png"


def train(config: TrainingConfig) -> Path:
    """Run training as configured; the folder with what it left.

    Raises ConfigError or DataError before it starts; Stopped where it was asked to end early; CheckpointError or
    NumericalError where it cannot go on; PushError where all is done but the last push.
    """
    run = Run(config)
    try:
        with run.stop.listening():
            run.updates()
            run.finish()
    except Stopped as stopped:
        raise Stopped(f"{stopped}; the same command with --resume latest goes on from there") from None
    finally:
        run.close()
    return run.folder


def losses_of(
    model: torch.nn.Module,
    scheduler: AlphaDDPMScheduler,
    batch: dict[str, Any],
    timesteps: torch.Tensor,
    config: TrainingConfig,
    conditions: Conditions | None = None,
) -> torch.Tensor:
    """Each image's loss in one forward pass, [B]: noise the images, predict, compare (report §6). Float32 but for the
    network.
    """
    original_samples = to_model_range(batch["pixels"].to(timesteps.device, non_blocking=True))
    noise = noise_of(batch["noise_seeds"], original_samples.shape[1:], timesteps.device)
    noisy = scheduler.add_noise(original_samples, noise, timesteps)
    if config.channels_last:
        noisy = noisy.contiguous(memory_format=torch.channels_last)
    condition = conditions.inputs(batch["condition"], timesteps.device) if "condition" in batch else {}
    prediction = model(noisy, timesteps, **condition).sample
    weights = 1.0 if config.snr_gamma is None else min_snr_weights(scheduler, timesteps, config.snr_gamma)
    return per_image_loss(
        config.objective, scheduler, prediction, original_samples, noisy, noise, timesteps, config.bound_weight, weights
    )


def model_card(
    pipe: Any,
    config: TrainingConfig,
    data: ImageData | StreamData,
    facts: dict[str, Any],
    target: Path,
    name: str,
    num_processes: int,
    example: str,
) -> ModelCard:
    """The card of this run, with the pictures that lie in the folder that it is for."""
    pictures = {"samples.png": "samples", "process.png": "from noise to images"}
    return build_card(
        pipe,
        name=(config.hub_model_id or name).split("/")[-1],
        repo_id=config.hub_model_id,
        dataset=public(data.name),
        num_images=data.num_images,
        hub_dataset=config.dataset if is_hub_dataset(config) else None,
        license=config.hub_license,
        training=facts,
        command=recipe_command(config, num_processes),
        evaluation=[],
        example=example,
        pictures={file: caption for file, caption in pictures.items() if (target / file).is_file()},
    )


def training_facts(
    config: TrainingConfig, parameters: int, first: int, done: int, seconds: float, accelerator: Accelerator
) -> dict[str, Any]:
    """What the model card says of the run; no path and no name of a machine or person."""
    device = accelerator.device.type
    return {
        "parameters": f"{parameters / 1e6:.2f} M",
        "objective": config.objective,
        "updates": done if done == config.max_train_steps else f"{done} of {config.max_train_steps} so far",
        "batch size": config.batch_size,
        "learning rate": f"{config.learning_rate} ({config.lr_scheduler}, {config.lr_warmup_steps} warm-up updates)",
        "moving average of weights": f"decay up to {config.ema_decay}" if config.ema_decay else "none",
        "precision": config.mixed_precision,
        "seed": config.seed,
        "hardware": f"{accelerator.num_processes} x {torch.cuda.get_device_name() if device == 'cuda' else device}",
        "time" if first == 0 else f"time from update {first} on, where it was resumed": f"{seconds / 60:.1f} minutes",
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
    }
