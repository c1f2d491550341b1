"""One optimizer update after its backward passes, and what happens if numbers are not finite."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel

from .stop import in_any_process

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 10  # skipped updates in succession, after which training is hopeless
SMALLEST_SCALE = 1.0  # of fp16 losses: if they overflow even below it, the scale is not what is wrong
INDICES_SHOWN = 20  # of images in a message


@dataclass
class Updater:
    """Applies gradients: clipping, optimizer, learning rate, EMA. Skips an update whose loss or gradient is not finite, in all
    processes together, and counts it.

    If fp16 gradients overflow while the loss is finite, accelerate's scaler skips the update and lowers its scale; that is
    not counted.
    """

    accelerator: Accelerator
    network: torch.nn.Module
    optimizer: Any
    lr_scheduler: Any
    ema: EMAModel | None
    max_grad_norm: float
    skipped: int = 0  # updates in total
    in_a_row: int = 0

    def __call__(self, step: int, losses: torch.Tensor, indices: list[int], stop: bool) -> tuple[float | None, bool]:
        """Apply the gradients of update `step`; `losses` [b] are of this process's images, whose rows are `indices`.

        (The gradient norm before clipping, or None if the update was skipped; whether any process was asked to stop).
        """
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
        finite_losses, finite_norm = torch.stack([losses.isfinite().all(), norm.isfinite()]).tolist()
        scaler = self.accelerator.scaler
        excused = scaler is not None and scaler.get_scale() >= SMALLEST_SCALE
        fault = not finite_losses or not (finite_norm or excused)
        fault, stop = in_any_process(self.accelerator, fault, stop)
        if fault:
            self._skip(step, losses, indices, float(norm))
            return None, stop
        self.in_a_row = 0
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.optimizer_step_was_skipped:
            return None, stop
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.network.parameters())
        return float(norm), stop

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

    @property
    def hopeless(self) -> bool:
        return self.in_a_row >= MAX_IN_A_ROW

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
