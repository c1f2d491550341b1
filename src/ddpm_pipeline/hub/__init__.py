"""Pipelines on their way to the Hub: exported whole, described by a card that says only what is known, pushed in one commit.

`python -m ddpm_pipeline.hub push FOLDER REPO` pushes a finished folder. Imports huggingface_hub alone, so that this takes no
seconds to start; pipelines come in as arguments.
"""

from ..support.errors import PushError
from .card import Measurement, build_card, record_evaluation, refresh_card
from .upload import export, push, push_command, push_pipeline, summary

__all__ = [
    "Measurement",
    "PushError",
    "build_card",
    "export",
    "push",
    "push_command",
    "push_pipeline",
    "record_evaluation",
    "refresh_card",
    "summary",
]
