"""What the main process looks at during a run: previews, evaluations of the EMA weights, and the final samples."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..data.mapped import ImageSet
from ..evaluation.features import real_features
from ..evaluation.figures import likelihood_of
from ..evaluation.quality import ImageQuality
from ..generation.drawing import sample_in_batches, sample_process, sample_uint8
from ..support.draws import RandomStream, seeds
from ..support.errors import ConfigError
from ..support.pictures import grid, save_picture
from .conditions import Condition
from .options import WatchingOptions

logger = logging.getLogger(__name__)

FIGURES = ("fid", "kid", "precision", "recall")


@dataclass(frozen=True)
class Samples:
    """Pictures of what the pipeline samples, in the output folder."""

    pipe: Any
    condition: Condition
    folder: Path
    options: WatchingOptions
    seed: int
    batch_size: int  # images per network call

    def preview(self, done: int) -> None:
        """samples/step-N.png, with fewer reverse steps."""
        self._grid(self.options.preview_images, self.options.preview_inference_steps, self.preview_path(done))

    def preview_path(self, done: int) -> Path:
        return self.folder / "samples" / f"step-{done:08d}.png"

    def final(self) -> None:
        """samples.png over the full chain, and process.png, the reverse process from noise to images."""
        logger.info("sampling %d images over %d steps", self.options.num_samples, len(self.pipe.scheduler))
        self._grid(self.options.num_samples, None, self.folder / "samples.png")
        request, _ = self.condition.preview(4)
        save_picture(sample_process(self.pipe, self.seed, request), self.folder / "process.png")

    def _grid(self, count: int, steps: int | None, path: Path) -> None:
        request, columns = self.condition.preview(count)
        count = len(request.values) or count  # equal rows, one per condition
        images = sample_in_batches(self.pipe, count, self.batch_size, self.seed, steps, request)
        save_picture(grid(images, columns), path)


@dataclass(frozen=True)
class Evaluation:
    """Bits per dimension of some images, and FID, KID, precision and recall of samples, with the same noise every time."""

    data: ImageSet
    options: WatchingOptions
    seed: int
    batch_size: int  # images per network call
    cache_dir: str | None  # of features
    extractor: nn.Module | None  # None for no samples

    def __call__(self, pipe: Any, scheduler: Any) -> dict[str, float]:
        """Figures of the pipeline's network: the bound over `scheduler`'s chain, and samples over the previews' steps."""
        return self._likelihood(pipe.unet, scheduler) | (self._quality(pipe) if self.extractor else {})

    def _likelihood(self, unet: nn.Module, scheduler: Any) -> dict[str, float]:
        """Estimated from a few timesteps of each image."""
        images = self.data.examples(self.options.eval_images, self.seed)
        count = len(images)
        noise_seeds = seeds(self.seed, RandomStream.NOISE, 0, count)
        calls = {"num_evaluated": self.options.eval_calls, "batch_size": self.batch_size, "progress": False}
        total = likelihood_of(unet, scheduler, images, noise_seeds, **calls).total
        error = {"eval_bits_per_dim_error": float(total.std() / count**0.5)} if count > 1 else {}
        return {"eval_bits_per_dim": float(total.mean()), **error}

    def _quality(self, pipe: Any) -> dict[str, float]:
        """Compared with all of the data, in this process alone."""
        options, extractor = self.options, self.extractor
        quality = ImageQuality(extractor, seed=self.seed, sync_on_compute=False).to(pipe.device)
        quality.add_real_features(real_features(self.data, extractor, self.cache_dir).to(pipe.device))
        for start in range(0, options.eval_samples, self.batch_size):
            batch = range(start, min(start + self.batch_size, options.eval_samples))
            try:
                images = sample_uint8(pipe, batch, self.seed, options.preview_inference_steps)
            except ConfigError as error:  # no reason to end the run
                logger.warning("samples cannot be evaluated: %s", error)
                return {}
            quality.update(images.to(pipe.device), real=False)
        figures = quality.compute()._asdict()
        return {f"eval_{name}": figures[name] for name in FIGURES if not math.isnan(figures[name])}
