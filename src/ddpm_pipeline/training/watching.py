"""A small version of evaluate.py on the way: the averaged weights' bits per dimension, and how good some samples are.

Imports torch, the package and parts of evaluate.py. Called by train.py's main process.
"""

import logging
import math
from typing import Any

import torch
from torch import nn

from ..data.mapped import ImageData, to_model_range
from ..data.streamed import StreamData
from ..evaluation.features import feature_extractor, real_features
from ..evaluation.quality import ImageQuality
from ..generation.drawing import sample_uint8
from ..likelihood import bits_per_dim
from ..support.draws import Stream, seeds
from ..support.errors import ConfigError
from .options import TrainingConfig

logger = logging.getLogger("train")

FIGURES = ("fid", "kid", "precision", "recall")


class Evaluation:
    """What `--eval_every` asks for, on the same images with the same noise every time.

    Raises ConfigError for `--eval_features` that cannot be used.
    """

    def __init__(self, config: TrainingConfig, data: ImageData | StreamData, device: torch.device):
        self.config, self.data = config, data
        self.batch_size = config.batch_size // config.gradient_accumulation_steps
        self.judge: nn.Module | None = None
        if config.eval_samples:
            self.judge = feature_extractor(config.eval_features, config.dataset, None, "--eval_features").to(device)

    def __call__(self, pipe: Any, scheduler: Any) -> dict[str, float]:
        """Figures of the pipeline's network: the bound of `scheduler`'s chain, and samples over the previews' steps."""
        return self._likelihood(pipe.unet, scheduler) | (self._quality(pipe, self.judge) if self.judge else {})

    def _likelihood(self, unet: nn.Module, scheduler: Any) -> dict[str, float]:
        """Estimated from a few timesteps of each image."""
        images = self.data.examples(self.config.eval_images, self.config.seed)
        count = len(images)
        noise_seeds = seeds(self.config.seed, Stream.NOISE, 0, count).tolist()
        result = bits_per_dim(
            unet,
            scheduler,
            to_model_range(images),
            num_evaluated=self.config.eval_calls,
            batch_size=self.batch_size,
            generator=[torch.Generator().manual_seed(noise_seed) for noise_seed in noise_seeds],
            progress=False,
        ).total
        error = {"eval_bits_per_dim_error": float(result.std() / count**0.5)} if count > 1 else {}
        return {"eval_bits_per_dim": float(result.mean()), **error}

    def _quality(self, pipe: Any, judge: nn.Module) -> dict[str, float]:
        """Against all of the data, in one process alone."""
        config = self.config
        quality = ImageQuality(judge, seed=config.seed, sync_on_compute=False).to(pipe.device)
        quality.add_real_features(real_features(self.data, judge, config.cache_dir).to(pipe.device))
        for start in range(0, config.eval_samples, self.batch_size):
            batch = range(start, min(start + self.batch_size, config.eval_samples))
            try:
                images = sample_uint8(pipe, batch, config.seed, config.preview_inference_steps)
            except ConfigError as error:  # no reason to end the run
                logger.warning("samples cannot be judged: %s", error)
                return {}
            quality.update(images.to(pipe.device), real=False)
        figures = quality.compute()._asdict()
        return {f"eval_{name}": figures[name] for name in FIGURES if not math.isnan(figures[name])}
