"""What the evaluations of held-out images say of a run: which update was best, and whether the model memorises.

They are kept in evaluations.jsonl with the figure of every image, so that a resumed run knows those before. Main process only.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .telemetry import keep_lines

FILE = "evaluations.jsonl"
SURE = 2.0  # standard errors by which the held-out figure has to have risen


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Bits per dimension under the EMA weights after `step` updates."""

    step: int
    held_out: np.ndarray  # float64 [n], of each held-out image
    train: float  # the mean of as many training images

    @property
    def mean(self) -> float:
        return float(self.held_out.mean())

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {standard_error(self.held_out):.2g}" if len(self.held_out) > 1 else "")

    def is_worse_than(self, best: "Evaluation") -> bool:
        """Whether the held-out images became less likely, by SURE standard errors of the differences image by image, while the
        training images became more likely.
        """
        rise = self.held_out - best.held_out
        return self.train < best.train and rise.mean() > SURE * standard_error(rise)


class Validation:
    """The evaluations of a run so far: those of the same `subject` (images, and how they are evaluated) in its folder, up to
    update `first`. The best one is among those whose update `can_be_best`.
    """

    def __init__(self, folder: Path, subject: str, first: int, can_be_best: Callable[[int], bool]):
        self.path, self.subject = folder / FILE, subject
        self.best: Evaluation | None = None  # the lowest held-out figure
        self.last: Evaluation | None = None
        self._worse = self._told = False  # whether the last one is worse than the best; whether it was said since the best
        for line in keep_lines(self.path, first):
            step, held_out, train, of = json.loads(line).values()
            if of == subject:
                self._note(Evaluation(step, np.array(held_out), train), can_be_best(step))

    def add(self, evaluation: Evaluation) -> bool:
        """Write it down; whether the model has begun to memorise: it is the second one in succession that is worse than the
        best. This is said once after each best one.
        """
        held_out, train = evaluation.held_out.tolist(), evaluation.train
        line = {"step": evaluation.step, "validation_bits_per_dim": held_out, "eval_bits_per_dim": train, "of": self.subject}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return self._note(evaluation)

    def _note(self, evaluation: Evaluation, can_be_best: bool = True) -> bool:
        self.last = evaluation
        if can_be_best and (self.best is None or evaluation.mean < self.best.mean):
            self.best, self._told = evaluation, False
        worse = self.best is not None and evaluation.is_worse_than(self.best)
        begun, self._worse = worse and self._worse and not self._told, worse
        self._told |= begun
        return begun


def standard_error(values: np.ndarray) -> float:
    """Of the mean; NaN of a single value."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
