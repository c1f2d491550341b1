"""Pipelines on their way to the Hub: exported whole, described by a card that says only what is known, pushed in one commit.

Imports huggingface_hub alone; pipelines come in as arguments.
"""

from ..support.errors import PushError
from .card import Measurement, TrainingFacts, build_card, pictures_in, record_evaluation, refresh_card
from .upload import PushOptions, export, push, push_command, push_pipeline

__all__ = [
    "Measurement", "PushError", "PushOptions", "TrainingFacts", "build_card", "export", "pictures_in", "push",
    "push_command", "push_pipeline", "record_evaluation", "refresh_card",
]  # fmt: skip
