"""One optimiser update after its forward and backward passes, and what to do where numbers are not finite.

Imports accelerate, diffusers' averaged weights and torch; nothing of the package.
"""

import logging
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel

from .stop import in_any_process

logger = logging.getLogger("train")

MAX_IN_A_ROW = 10  # updates left out one after another, after which nothing good is to be expected
SMALLEST_SCALE = 1.0  # of fp16 losses: a scaler that is below it and still overflows has a fault and not a wrong scale
INDICES_TOLD = 20  # of images in a message


class Updater:
    """Applies gradients: clipping, optimiser, learning rate, averaged weights. Leaves out an update whose loss or gradient is
    not finite, in all processes together, and counts it.

    Where fp16 gradients overflow while the loss is finite, the scaler of accelerate leaves the update out and lowers its scale;
    that is not counted.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        network: torch.nn.Module,
        optimizer: Any,
        lr_scheduler: Any,
        ema: EMAModel | None,
        max_grad_norm: float,
    ):
        self.accelerator, self.network, self.optimizer = accelerator, network, optimizer
        self.lr_scheduler, self.ema, self.max_grad_norm = lr_scheduler, ema, max_grad_norm
        self.skipped = 0  # updates in all
        self.in_a_row = 0

    def __call__(self, step: int, losses: torch.Tensor, indices: list[int], stop: bool) -> tuple[float | None, bool]:
        """Apply the gradients of update `step`. `losses` [b] are of this process's images, `indices` which those are.

        (The gradient's norm before clipping, or None where the update was left out; whether any process was asked to stop).
        Raises NumericalError after MAX_IN_A_ROW left out one after another.
        """
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
        finite_losses, finite_norm = torch.stack([losses.isfinite().all(), norm.isfinite()]).tolist()
        scaler = self.accelerator.scaler
        excused = scaler is not None and scaler.get_scale() >= SMALLEST_SCALE
        fault = not finite_losses or not (finite_norm or excused)
        fault, stop = in_any_process(self.accelerator, fault, stop)
        if fault:
            self._leave_out(step, losses, indices, float(norm))
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

    def _leave_out(self, step: int, losses: torch.Tensor, indices: list[int], norm: float) -> None:
        self.optimizer.zero_grad()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # forgets that gradients were unscaled, and lowers the scale
        self.skipped += 1
        self.in_a_row += 1
        finite = losses.isfinite().tolist()
        mine = [index for index, good in zip(indices, finite, strict=True) if not good]
        found = gather_object(mine)
        if found:
            cause = f"the loss is not finite for the images {', '.join(map(str, found[:INDICES_TOLD]))}"
            cause += f" and {len(found) - INDICES_TOLD} more" if len(found) > INDICES_TOLD else ""
        else:
            everything = gather_object(indices)
            cause = (
                f"the gradient's norm is {norm} and all losses are finite; the images are "
                f"{', '.join(map(str, everything[:INDICES_TOLD]))}{', ...' if len(everything) > INDICES_TOLD else ''}"
            )
        if self.accelerator.is_main_process:
            logger.warning("update %d is left out: %s (%d so far)", step, cause, self.skipped)

    @property
    def hopeless(self) -> bool:
        return self.in_a_row >= MAX_IN_A_ROW

    def weights_are_finite(self) -> bool:
        return bool(torch.stack([weight.isfinite().all() for weight in self.network.parameters()]).all())

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
