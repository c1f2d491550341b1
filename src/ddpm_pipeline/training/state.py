"""What is trained, and changes meanwhile: one object, which a checkpoint holds."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from .objectives import TimestepSampler, timestep_sampler
from .options import TrainingOptions
from .update import Updater


@dataclass
class TrainingState:
    """The network in its three forms, and what belongs to its training."""

    unet: Any  # the noise predictor
    network: torch.nn.Module  # the UNet, with a text encoder that is trained with it
    model: torch.nn.Module  # the network as it is called: compiled, distributed
    ema: EMAModel | None
    updater: Updater  # with optimizer and learning-rate schedule
    timestep_sampler: TimestepSampler

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights, their EMA and what accelerate saves: each has a state_dict."""
        sampler = {"timestep_sampler": self.timestep_sampler} if self.timestep_sampler.observes_losses else {}
        return {"lr_scheduler": self.updater.lr_scheduler, "updater": self.updater, **sampler}

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    def weights_are_finite(self) -> bool:
        return bool(torch.stack([weight.isfinite().all() for weight in self.network.parameters()]).all())

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


def build_state(
    accelerator: Accelerator, unet: Any, network: torch.nn.Module, options: TrainingOptions
) -> TrainingState:
    """Everything that is trained, on the device and prepared for it. `options` are the resolved ones."""
    optimisation, hardware = options.optimisation, options.hardware
    if hardware.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if hardware.channels_last:
        unet.to(memory_format=torch.channels_last)
    network.to(accelerator.device)
    ema = None
    if optimisation.ema_decay:
        warmup = {"use_ema_warmup": True, "power": optimisation.ema_power}
        ema = EMAModel(network.parameters(), decay=optimisation.ema_decay, foreach=True, **warmup)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=optimisation.learning_rate,
        betas=(optimisation.adam_beta1, optimisation.adam_beta2),
        eps=optimisation.adam_epsilon,
        weight_decay=optimisation.weight_decay,
        fused=accelerator.device.type in ("cuda", "cpu"),
    )
    updates = {"num_warmup_steps": optimisation.lr_warmup_steps, "num_training_steps": optimisation.max_train_steps}
    # not prepared: it counts updates, whatever the number of processes
    lr_scheduler = get_scheduler(optimisation.lr_scheduler, optimizer, **updates)
    model, optimizer = accelerator.prepare(torch.compile(network) if hardware.compile else network, optimizer)
    updater = Updater(accelerator, network, optimizer, lr_scheduler, ema, optimisation.max_grad_norm)
    sampler = timestep_sampler(options.diffusion.timestep_sampling, options.diffusion.num_train_timesteps)
    return TrainingState(unet, network, model, ema, updater, sampler)
