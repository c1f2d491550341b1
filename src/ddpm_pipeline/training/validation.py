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

    @property
    def error(self) -> float:
        """Standard error of the mean; nan of one image."""
        return standard_error(self.held_out)

    def is_worse_than(self, best: "Evaluation") -> bool:
        """Whether the images became less likely, by SURE standard errors of the paired differences, while the training images
        became more likely.
        """
        differences = self.held_out - best.held_out  # the same images, noise and timesteps
        return self.train < best.train and differences.mean() > SURE * standard_error(differences)


class Validation:
    """The evaluations of a run so far."""

    def __init__(self, folder: Path, subject: str, first: int, can_be_best: Callable[[int], bool]):
        """Those of the same `subject` (images and how they are evaluated) in the folder, up to update `first`; the best one is
        among those whose update `can_be_best`.
        """
        self.path, self.subject = folder / FILE, subject
        self.best: Evaluation | None = None  # the lowest held-out figure
        self.last: Evaluation | None = None
        self._worse = self._told = False  # whether the last one is worse than the best; whether it was said since the best
        for line in keep_lines(self.path, first):
            stored = json.loads(line)
            if stored["subject"] == subject:
                held_out = np.array(stored["validation_bits_per_dim"])
                self._note(Evaluation(stored["step"], held_out, stored["eval_bits_per_dim"]), can_be_best(stored["step"]))

    def add(self, evaluation: Evaluation) -> bool:
        """Write it down; whether the model has begun to memorise: it is the second one in succession that is worse than the
        best. This is said once after each best one.
        """
        bits = {"validation_bits_per_dim": evaluation.held_out.tolist(), "eval_bits_per_dim": evaluation.train}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": evaluation.step, **bits, "subject": self.subject}) + "\n")
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
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
