"""Train a diffusion model: `accelerate launch training/train.py` runs the digits recipe, `--help` lists the options.

Reads top to bottom: the configuration, the parts, the loop, what is left behind.
"""

import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import ModelCard
from tqdm.auto import tqdm

from ddpm_pipeline import AlphaDDPMScheduler
from ddpm_pipeline.hub import PushError, build_card, export
from ddpm_pipeline.likelihood import bits_per_dim
from ddpm_pipeline.objectives import min_snr_weights, per_image_loss, timestep_sampler
from train_batches import batch_loader, open_data
from train_checkpoint import CONFIG_FILE, find_checkpoint, load_checkpoint, prepare_output_folder, save_checkpoint
from train_conditions import Conditions, build_conditions
from train_config import ConfigError, TrainingConfig, parse_config
from train_data import DataError, ImageData, to_model_range
from train_model import build_model, objective_for
from train_push import EXIT_STATUS, Pusher, is_hub_dataset, public, recipe_command
from train_random import Stream, noise_of, seeds
from train_samples import draw, draw_process, grid, save_picture
from train_skipped import SkippedLog
from train_stream import StreamData

logger = logging.getLogger("train")


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
    guidance = config.preview_guidance if config.condition_dropout else 1.0
    save_picture(grid(draw(pipe, count, steps, config.seed, batch, condition, guidance), columns), path)


def evaluate_briefly(
    unet: torch.nn.Module, scheduler: AlphaDDPMScheduler, data: ImageData | StreamData, config: TrainingConfig
) -> dict[str, float]:
    """Bits per dimension of the same few images with the same noise every time, estimated from a few timesteps each."""
    images = data.examples(config.eval_images, config.seed)
    count = len(images)
    noise_seeds = seeds(config.seed, Stream.NOISE, 0, count).tolist()
    result = bits_per_dim(
        unet,
        scheduler,
        to_model_range(images),
        num_evaluated=config.eval_calls,
        batch_size=config.batch_size // config.gradient_accumulation_steps,
        generator=[torch.Generator().manual_seed(noise_seed) for noise_seed in noise_seeds],
        progress=False,
    ).total
    error = float(result.std() / count**0.5) if count > 1 else float("nan")
    return {"eval_bits_per_dim": float(result.mean()), "eval_bits_per_dim_error": error}


class MetricsLog:
    """Lines of metrics.jsonl, and the trackers'."""

    def __init__(self, accelerator: Accelerator, path: Path):
        self.accelerator, self.path = accelerator, path

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        self.accelerator.log(dict(metrics), step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")


# ---- the run --------------------------------------------------------------------------------------


def train(config: TrainingConfig) -> Path:
    """Run training as configured; the folder with what it left.

    Raises ConfigError or DataError before it starts, PushError where all is done but the last push.
    """
    began = time.monotonic()
    default_tracker = None if config.report_to == "none" else config.report_to
    folder = Path(config.output_dir or default_output_dir(config.dataset))
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=default_tracker,
        project_dir=str(folder),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    config = replace(config, output_dir=str(folder), mixed_precision=accelerator.mixed_precision)
    share_out_batch(config, accelerator.num_processes)
    use_all_cores(config, accelerator)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            prepare_output_folder(folder, config)
        pusher = Pusher(config, folder) if config.push_to_hub and accelerator.is_main_process else None
        data = open_data(config)
    set_up_logging(accelerator, folder)
    skipped_log = SkippedLog(folder) if accelerator.is_main_process else None
    if skipped_log is not None:
        skipped_log.add(data.skipped)
    torch.manual_seed(int(seeds(config.seed, Stream.MODEL, 0, 1)[0]))  # the initial weights
    conditions = build_conditions(config, data)
    unet, scheduler = build_model(config, data.resolution, data.channels, conditions)
    network = conditions.network(unet)
    max_train_steps = config.max_train_steps or -(-len(data) * config.num_train_epochs // config.batch_size)
    config = replace(
        config,
        resolution=data.resolution,
        channels=data.channels,
        max_train_steps=max_train_steps,
        num_train_timesteps=scheduler.config.num_train_timesteps,
        objective=objective_for(config, scheduler),
    )
    checkpoint = find_checkpoint(folder, config) if config.resume else None
    accelerator.wait_for_everyone()  # the others have read the folder before it is written to
    if accelerator.is_main_process:
        (folder / CONFIG_FILE).write_text(config.to_yaml(), "utf-8")
    accelerator.init_trackers("ddpm-pipeline", config={key: value for key, value in asdict(config).items() if value})

    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    ema = None
    if config.ema_decay:
        network.to(accelerator.device)
        ema = EMAModel(
            network.parameters(),
            decay=config.ema_decay,
            use_ema_warmup=True,
            power=config.ema_power,
            foreach=True,
        )
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=accelerator.device.type in ("cuda", "cpu"),
    )
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )
    model = torch.compile(network) if config.compile else network
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)  # not prepared: it counts updates, whatever the processes
    sampler = timestep_sampler(config.timestep_sampling, len(scheduler))
    if sampler.observes_losses:
        accelerator.register_for_checkpointing(sampler)
    first_step = load_checkpoint(accelerator, ema, checkpoint) if checkpoint else 0
    # with a scheduler of its own: previews choose shorter chains, and the bound is that of the full one
    pipe = conditions.pipeline(unet, AlphaDDPMScheduler.from_config(scheduler.config))
    pipe.set_progress_bar_config(disable=True)

    loader = batch_loader(
        data, config, accelerator.device.type, accelerator.process_index, accelerator.num_processes, conditions,
        first_step * config.gradient_accumulation_steps, max_train_steps * config.gradient_accumulation_steps,
    )  # fmt: skip
    parameters = sum(parameter.numel() for parameter in network.parameters())
    logger.info(
        "%s: %s of %dx%dx%d; %.2f M parameters; updates %d to %d of %d images; %s, %s, %d threads",
        data.name, f"{data.num_images} images" if data.num_images else "a stream", data.resolution, data.resolution,
        data.channels, parameters / 1e6, first_step,
        max_train_steps, config.batch_size, accelerator.device, accelerator.mixed_precision, torch.get_num_threads(),
    )  # fmt: skip

    def save_model(target: Path, done: int) -> None:
        """The pipeline, with its present weights, and its card."""
        facts = training_facts(config, parameters, first_step, done, time.monotonic() - began, accelerator)
        facts = conditions.facts() | facts
        name, example = folder.resolve().name, conditions.example()
        card = model_card(pipe, config, data, facts, target, name, accelerator.num_processes, example)
        export(pipe, target, card)

    def note_skipped() -> None:
        """Write down what all processes left out of a stream since the last time."""
        if config.streaming:
            found = gather_object(loader.skipped)
            if skipped_log is not None:
                skipped_log.add(found)

    log = MetricsLog(accelerator, folder / "metrics.jsonl")
    progress = tqdm(
        total=max_train_steps,
        initial=first_step,
        disable=not accelerator.is_main_process,
        desc="training",
        unit="update",
    )
    losses: list[torch.Tensor] = []
    window_began = time.monotonic()
    model.train()
    for step in range(first_step, max_train_steps):
        seed_dropout(config.seed, step, accelerator)
        observed: list[tuple[torch.Tensor, torch.Tensor]] = []  # of timesteps and losses
        for pass_index in range(config.gradient_accumulation_steps):
            last_pass = pass_index == config.gradient_accumulation_steps - 1
            with contextlib.nullcontext() if last_pass else accelerator.no_sync(model):
                batch = next(loader)
                timesteps, weights = (each.to(accelerator.device) for each in sampler.draw(batch["quantiles"]))
                image_losses = losses_of(model, scheduler, batch, timesteps, config, conditions)
                loss = (weights * image_losses).mean()
                accelerator.backward(loss / config.gradient_accumulation_steps)
            losses.append(loss.detach())
            if sampler.observes_losses:
                observed.append(accelerator.gather((timesteps, image_losses.detach())))
        for observation in observed:  # after the update's last draw, which so does not depend on how it was split
            sampler.observe(*observation)
        grad_norm = accelerator.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:  # as the fp16 scaler does where gradients overflow
            lr_scheduler.step()
            if ema is not None:
                ema.step(network.parameters())
        progress.update()

        done = step + 1
        if done % config.log_every == 0 or done == max_train_steps:
            mean_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            seconds = time.monotonic() - window_began
            images = len(losses) * config.batch_size // config.gradient_accumulation_steps
            metrics = {
                "loss": mean_loss,
                "grad_norm": float(grad_norm),
                "learning_rate": lr_scheduler.get_last_lr()[0],
                "images_per_second": images / seconds,
            }
            note_skipped()
            if skipped_log:
                metrics["skipped_rows"] = len(skipped_log)
            log(metrics, done)
            progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
            losses, window_began = [], time.monotonic()
        if config.preview_every and done % config.preview_every == 0 and done < max_train_steps:
            if accelerator.is_main_process:
                path = folder / "samples" / f"step-{done:08d}.png"
                with averaged_weights(network, ema):
                    draw_grid(pipe, conditions, config, config.preview_images, config.preview_inference_steps, path)
            accelerator.wait_for_everyone()
            window_began = time.monotonic()
        if pusher is not None and config.push_every and done % config.push_every == 0 and done < max_train_steps:
            with averaged_weights(network, ema):
                pusher.push_soon(done, lambda snapshot, done=done: save_model(snapshot, done))
            window_began = time.monotonic()
        if config.eval_every and done % config.eval_every == 0:
            if accelerator.is_main_process:
                with averaged_weights(network, ema):
                    log(evaluate_briefly(unet, scheduler, data, config), done)
            accelerator.wait_for_everyone()
            window_began = time.monotonic()
        if config.checkpoint_every and (done % config.checkpoint_every == 0 or done == max_train_steps):
            note_skipped()  # those before a checkpoint are not come by again
            save_checkpoint(accelerator, ema, folder, done, config.checkpoints_total_limit)
            window_began = time.monotonic()
    progress.close()
    loader.close()

    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # the samples are what the saved float32 weights draw
    if accelerator.is_main_process:
        with averaged_weights(network, ema):
            logger.info("drawing %d samples over %d steps", config.num_samples, len(scheduler))
            draw_grid(pipe, conditions, config, config.num_samples, None, folder / "samples.png")
            condition, guidance = conditions.preview(4)[0], config.preview_guidance if config.condition_dropout else 1.0
            save_picture(draw_process(pipe, config.seed, condition, guidance), folder / "process.png")
            save_model(folder, max_train_steps)
        logger.info("done in %.0f s: the model, its card and samples.png are in %s", time.monotonic() - began, folder)
        if pusher is not None:
            logger.info("pushed: %s", pusher.finish())
    accelerator.end_training()
    return folder


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


def main() -> None:
    try:
        train(parse_config(sys.argv[1:]))
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    except PushError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_STATUS)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command with --resume latest goes on from the last checkpoint")


if __name__ == "__main__":
    main()
