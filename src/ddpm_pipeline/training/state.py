"""What is trained, and changes meanwhile: one object, which a checkpoint holds, and how an update changes it."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from .augmentation import AugmentedNetwork
from .objectives import ImportanceTimesteps, UniformTimesteps, timestep_sampler
from .options import TrainingOptions
from .stop import in_any_process

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 10  # skipped updates in succession, after which training is hopeless
SMALLEST_SCALE = 1.0  # of fp16 losses: if they overflow even below it, the scale is not what is wrong
INDICES_SHOWN = 20  # of images in a message
NORM_EPSILON = 1e-6  # which torch adds to the norm before it divides by it


class EMA(EMAModel):
    """diffusers' EMA, bit for bit, in one pass over the weights instead of two."""

    @torch.no_grad()
    def step(self, parameters: list[nn.Parameter]) -> None:
        decay = self.get_decay(self.optimization_step + 1)
        if decay <= 0.5:  # where lerp computes from the other end and rounds otherwise
            super().step(parameters)
            return
        self.optimization_step += 1
        self.cur_decay_value = decay
        torch._foreach_lerp_(self.shadow_params, parameters, 1 - decay)


@dataclass
class Updater:
    """Applies gradients: clipping, optimizer, learning rate, EMA. Skips an update whose loss or gradient is not finite, in all
    processes together, and counts it. If fp16 gradients overflow while the loss is finite, accelerate's scaler skips the
    update and lowers its scale; that is not counted.
    """

    accelerator: Accelerator
    parameters: list[nn.Parameter]
    optimizer: Any
    lr_scheduler: Any
    ema: EMA | None
    max_grad_norm: float
    skipped: int = 0  # updates in total
    in_a_row: int = 0

    def __call__(self, step: int, losses: torch.Tensor, indices: list[int], stop: bool) -> tuple[float | None, bool]:
        """Apply the gradients of update `step`; `losses` [b] are of this process's images, whose rows are `indices`. (The
        gradient norm before clipping, or None if the update was skipped; whether any process was asked to stop).
        """
        self.accelerator.unscale_gradients()
        total_norm = nn.utils.get_total_norm([each.grad for each in self.parameters if each.grad is not None])
        finite_losses, norm = torch.stack([losses.isfinite().all().float(), total_norm.float()]).tolist()  # waits for a GPU
        scaler = self.accelerator.scaler
        excused = scaler is not None and scaler.get_scale() >= SMALLEST_SCALE
        fault = not finite_losses or not (math.isfinite(norm) or excused)
        fault, stop = in_any_process(self.accelerator, fault, stop)
        if fault:
            self._skip(step, losses, indices, norm)
            return None, stop
        self.in_a_row = 0
        if not norm + NORM_EPSILON <= self.max_grad_norm:  # else gradients would be multiplied by 1
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, total_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.optimizer_step_was_skipped:
            return None, stop
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        return norm, stop

    def _skip(self, step: int, losses: torch.Tensor, indices: list[int], norm: float) -> None:
        self.optimizer.zero_grad()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # forgets that gradients were unscaled, and lowers the scale
        self.skipped += 1
        self.in_a_row += 1
        finite = losses.isfinite().tolist()
        culprits = gather_object([index for index, good in zip(indices, finite, strict=True) if not good])
        images = culprits or gather_object(indices)
        more = f" and {len(images) - INDICES_SHOWN} more" if len(images) > INDICES_SHOWN else ""
        shown = ", ".join(map(str, images[:INDICES_SHOWN])) + more
        loss = "the loss is not finite for the images"
        cause = loss if culprits else f"the gradient norm is {norm} although all losses are finite; the images are"
        if self.accelerator.is_main_process:
            logger.warning("update %d is skipped: %s %s (%d so far)", step, cause, shown, self.skipped)

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


@dataclass
class TrainingState:
    """The network in its three forms, and what belongs to its training."""

    unet: Any  # the noise predictor
    network: nn.Module  # the UNet, with what is trained with it: a text encoder, the map of augmentations
    model: nn.Module  # the network as it is called: compiled, distributed
    ema: EMA | None
    updater: Updater  # with optimizer and learning-rate schedule
    timestep_sampler: UniformTimesteps | ImportanceTimesteps

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights, their EMA and what accelerate saves: each has a state_dict."""
        sampler = {"timestep_sampler": self.timestep_sampler} if self.timestep_sampler.observes_losses else {}
        return {"lr_scheduler": self.updater.lr_scheduler, "updater": self.updater, **sampler}

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    def forward(
        self, objective: Callable[..., torch.Tensor], batch: dict[str, Any], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(Timesteps [b], the loss of each image [b], the mean that is minimised) of a micro-batch."""
        drawn = self.timestep_sampler.draw(batch["quantiles"])
        if device.type == "cuda":
            drawn = (each.pin_memory() for each in drawn)  # so that nothing waits for the copies
        timesteps, weights = (each.to(device, non_blocking=True) for each in drawn)
        losses = objective(self.model, batch, timesteps)
        return timesteps, losses, (weights * losses).mean()

    def weights_are_finite(self) -> bool:
        averages = [] if self.ema is None else self.ema.shadow_params
        return bool(torch.stack([weight.isfinite().all() for weight in (*self.network.parameters(), *averages)]).all())

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within, the network has its EMA weights and is in evaluation mode."""
        parameters = list(self.network.parameters())
        if self.ema is not None:
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
        was_training = self.network.training
        self.network.eval()
        try:
            yield
        finally:
            self.network.train(was_training)
            if self.ema is not None:
                self.ema.restore(parameters)


def build_state(accelerator: Accelerator, unet: Any, network: nn.Module, options: TrainingOptions) -> TrainingState:
    """Everything that is trained, on the device and prepared for it. `options` are the resolved ones."""
    optimisation, hardware = options.optimisation, options.hardware
    if hardware.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if hardware.channels_last:
        unet.to(memory_format=torch.channels_last)
    if options.data.augment:
        network = AugmentedNetwork(network, unet)
    network.to(accelerator.device)
    ema = None
    if optimisation.ema_decay:
        warmup = {"use_ema_warmup": True, "power": optimisation.ema_power}
        ema = EMA(network.parameters(), decay=optimisation.ema_decay, foreach=True, **warmup)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=optimisation.learning_rate,
        betas=(optimisation.adam_beta1, optimisation.adam_beta2),
        eps=optimisation.adam_epsilon,
        weight_decay=optimisation.weight_decay,
        fused=accelerator.device.type in ("cuda", "cpu"),
    )
    updates = {"num_warmup_steps": optimisation.warmup_steps, "num_training_steps": optimisation.max_train_steps}
    lr_scheduler = get_scheduler(optimisation.lr_scheduler, optimizer, **updates)  # not prepared: it counts updates
    model, optimizer = accelerator.prepare(torch.compile(network) if hardware.compile else network, optimizer)
    updater = Updater(accelerator, list(network.parameters()), optimizer, lr_scheduler, ema, optimisation.max_grad_norm)
    sampler = timestep_sampler(options.diffusion.timestep_sampling, options.diffusion.num_train_timesteps)
    return TrainingState(unet, network, model, ema, updater, sampler)
