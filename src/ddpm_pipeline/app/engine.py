"""What the screens compute, without a browser: pictures drawn step by step, noised, painted anew, mixed, and their bits/dim.

Knows the model and what can honestly be asked of it. Imports no gradio; called by `screens` from any number of threads.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.images import open_image, to_array
from ..editing_alpha_ddpm import Batch
from ..encoding_alpha_ddpm import own_settings, vector_condition
from ..generation.drawing import Request, sample
from ..generation.options import SCHEDULERS
from ..generation.pipelines import Pipeline, condition_of, scheduler_for, steps_of
from ..likelihood import BitsPerDim, bits_per_dim
from ..pictures_alpha_ddpm import PIL_MODES, BadImage
from ..sampling_alpha_ddpm import Guidance
from ..scheduling_alpha_ddpm import AlphaDDPMScheduler
from ..scheduling_fitted_alpha_ddpm import AlphaDDPMFittedScheduler
from ..support.draws import RandomStream, seeds
from ..support.errors import ConfigError
from ..support.pictures import GAP, Display, grid
from ..tables_alpha_ddpm import check_integer
from .worker import Worker

FITTED, ANCESTRAL = "fitted", "ancestral"
LABELS = {  # in the order of the screens
    "dpm-solver++": "DPM-Solver++",
    "sde-dpm-solver++": "SDE-DPM-Solver++",
    "unipc": "UniPC",
    "ddim": "DDIM",
    "ddpm": ANCESTRAL,
}
CALLS = (5, 10, 20, 50, 100, 250)  # to choose from, besides the full chain
FEW, MANY = 20, 100  # network calls by default: without a fitted sampler, and to edit a picture
MOST_IMAGES = 16
PREVIEWS = 6  # of a chain: to send one takes longer than a network call of a small model
SIDE, SMALLEST = 448, 96  # pixels that a picture or the width of a grid takes at least, and that each picture in it does
WEIGHTS = tuple(index / 6 for index in range(7))
COPIES, TERMS = 4, 64  # of a picture, each with noise of its own, in a round of the likelihood; of timesteps for each
COVERED = 0.25  # share of a pixel of the model that the brush must cover
TABS = ("Draw", "Forward process", "Inpaint", "Interpolate", "Likelihood")


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: the sampler by its name in `Engine.samplers`, network calls for each, and the seed."""

    sampler: str
    calls: int
    seed: int = 0


@dataclass(frozen=True)
class Noised:
    """x_t = signal x_0 + noise z̃ (report eq. 4.10), [1, C, H, W] in the model's [-1, 1]."""

    x: Tensor
    signal: float  # √ᾱ_t
    noise: float  # √(1-ᾱ_t)


@dataclass(frozen=True)
class Bound:
    """The bound on one picture's likelihood, from rounds of `COPIES` evaluations of it so far; in bits per dimension."""

    rounds: Sequence[BitsPerDim]

    @cached_property
    def totals(self) -> Tensor:  # [rounds * COPIES], estimates of the same number
        return torch.cat([each.total for each in self.rounds])

    @property
    def total(self) -> float:
        return self.totals.mean().item()

    @property
    def standard_error(self) -> float:
        return (self.totals.std() / len(self.totals) ** 0.5).item()

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and their terms of the bound, as far as they were evaluated."""
        return tuple(np.concatenate([getattr(each, name).flatten() for each in self.rounds]) for name in ("timesteps", "terms"))


class Engine:
    """A model with what it can be asked. Its network calls go through one thread.

    Args:
        pipe: any of our pipelines; it is used by no one else from then on.
        name: what the screens call it.
    """

    def __init__(self, pipe: Pipeline, name: str):
        self.pipe, self.name, self._worker, self._reading = pipe, name, Worker(), threading.Lock()
        self.kind, self.value_range = condition_of(pipe), pipe.value_range
        _, self.channels, *size = pipe._shape(1)
        self.size: tuple[int, int] = tuple(size)  # height, width
        self.total = pipe.scheduler.config.num_train_timesteps
        self.display = Display(stretch=self.value_range.dtype != "uint8")
        self.samplers = self._samplers()

    def _samplers(self) -> dict[str, tuple[Any, list[int]]]:
        """By the names on the screens: the scheduler, and the numbers of network calls that it takes."""
        own, found = self.pipe.scheduler, {}
        if isinstance(own, AlphaDDPMFittedScheduler):
            found[FITTED] = own, sorted(map(int, own.fitted_samplers))
        elif not isinstance(own, AlphaDDPMScheduler):
            found[type(own).__name__] = own, self._possible(own)
        for name, label in LABELS.items():
            class_name, options = SCHEDULERS[name]
            if options or class_name not in found:
                scheduler = scheduler_for(self.pipe, name)
                found[label] = scheduler, self._possible(scheduler)
        return {name: (scheduler, calls) for name, (scheduler, calls) in found.items() if calls}

    def _possible(self, scheduler: Any) -> list[int]:
        def can(calls: int) -> bool:
            try:
                return bool(steps_of(scheduler, calls))
            except ConfigError:
                return False

        return [calls for calls in sorted({*(calls for calls in CALLS if calls < self.total), self.total}) if can(calls)]

    @property
    def editing_samplers(self) -> list[str]:
        """Those that can begin in the middle of a chain, as mixtures of pictures do."""
        return [name for name in self.samplers if name != FITTED]

    def default_calls(self, sampler: str, wanted: int = FEW) -> int:
        """Of a fitted sampler the most; of another, the largest choice up to `wanted`."""
        calls = self.samplers[sampler][1]
        return calls[-1] if sampler == FITTED else max([each for each in calls if each <= wanted] or calls[:1])

    def why_not(self, tab: str) -> str | None:
        """Why this model cannot serve a tab; None if it can."""
        if tab != TABS[1] and "image" in self.kind.split("+"):
            return (
                "This model makes each picture from another one, its condition image, which this app cannot give it. Use "
                "`pipe(condition_image=...)`, or `generate.py` with `--condition_images`."
            )
        if tab != TABS[0] and self.channels not in PIL_MODES:
            return f"The images of this model have {self.channels} channels, and picture files to upload have 1, 3 or 4."
        return None

    @property
    def facts(self) -> str:
        """The model in one line."""
        colours = {1: "grey", 3: "colour", 4: "RGBA"}.get(self.channels, f"{self.channels}-channel")
        told = {"none": "without a condition", "text": "from words", "class": "by class", "vector": "from numbers"}
        height, width = self.size
        condition = told.get(self.kind, f"from {self.kind}")
        parts = [f"{colours} pictures of {width}x{height} pixels", condition, f"T = {self.total}"]
        if FITTED in self.samplers:
            parts.append(f"samplers fitted for {', '.join(map(str, self.samplers[FITTED][1]))} network calls")
        return ", ".join(parts) + (f"; shown: {words}" if (words := self.display.words(self.channels)) else "")

    # ---- what the model is asked for ------------------------------------------------------------------

    @property
    def classes(self) -> list[str | int]:
        """Names, or ids where classes have none; [] for other models."""
        return list(self.pipe.id2label.values()) or [*range(self.pipe._num_embeddings)] if self.kind == "class" else []

    @property
    def numbers(self) -> dict[str, float]:
        """The mean of each number that the model is conditioned on, by its name."""
        condition = vector_condition(self.pipe.unet) if self.kind == "vector" else None
        return dict(zip(condition.names, condition.mean, strict=True)) if condition else {}

    @property
    def goes_without(self) -> bool:
        """Whether the model was trained without its condition too, which guidance needs."""
        known = self.kind != "class" or self.pipe._null_label is not None
        return self.kind != "none" and known and own_settings(self.pipe.unet).get("condition_dropout") != 0

    def request(self, told: Sequence[Any], guidance: float) -> Request:
        """What the fields of the screens say: [prompt], [class or None], numbers in order with None where not told, or []."""
        arguments = {"text": "prompt", "class": "class_labels", "vector": "condition_vector"}
        if self.kind not in arguments:
            return Request()
        value = list(told) if self.kind == "vector" else told[0]
        return Request({arguments[self.kind]: [value]}, guidance)

    # ---- pictures -------------------------------------------------------------------------------------

    def read(self, path: str | Path | None, what: str = "picture") -> Tensor:
        """A picture file of any size as the model's x_0, [1, C, H, W] in [0, 1]: upright, cropped to the model's shape at its
        centre, in its channels. One that the app enlarged comes back pixel by pixel. Raises ValueError.
        """
        if path is None:
            raise ValueError(f"There is no {what} yet: upload one, or let the model draw it.")
        with self._reading:  # one at a time, since a large one takes memory
            try:
                image, (height, width) = open_image(path), self.size
                small = image.resize((width, height), Image.Resampling.NEAREST)
                if not (image.width % width or image.height % height):
                    again = small.resize(image.size, Image.Resampling.NEAREST)
                    image = small if np.array_equal(np.asarray(again), np.asarray(image)) else image
                values = to_array(image, self.size, self.channels, "float32" if self.display.stretch else "uint8")
            except BadImage as error:
                raise ValueError(f"The {what} cannot be read: {error}.") from error
        x = torch.from_numpy(values).permute(2, 0, 1)[None]  # [H, W, C] -> [1, C, H, W]
        return x if x.is_floating_point() else x / 255

    def show(self, x: Tensor, columns: int | None = None, labels: Sequence[Any] = ()) -> Image.Image:
        """Images [N, C, H, W] in [0, 1] side by side, each pixel enlarged by a whole factor."""
        columns = columns or int(np.ceil(len(x) ** 0.5))
        picture = grid(x.clamp(0, 1), columns, max(SMALLEST, SIDE // columns), labels, self.display)
        return picture if labels else picture.crop((GAP, GAP, picture.width - GAP, picture.height - GAP))

    def painted(self, layers: Sequence[np.ndarray]) -> Tensor:
        """Where the brush covers the model's pixels, bool [1, 1, H, W], from layers [h, w, 4]. Raises ValueError if nowhere."""
        alphas = [Image.fromarray(layer[..., 3]).resize(self.size[::-1], Image.Resampling.BOX) for layer in layers]
        covered = [np.asarray(alpha) >= 255 * COVERED for alpha in alphas]
        if not covered or not np.any(covered):
            raise ValueError("Nothing is painted: brush over what the model is to paint anew.")
        return torch.from_numpy(np.any(covered, axis=0))[None, None]

    # ---- the tabs -------------------------------------------------------------------------------------

    def draw(self, request: Request, sampling: Sampling, count: int = 1, **edit: Any) -> Iterator[tuple[int, Tensor]]:
        """The number of network calls so far and x_t, or at last the pictures, [count, C, H, W] in [0, 1]; picture i is that of
        `generate` for the same seed. `edit` are further arguments of the call, such as `image` and `mask_image`.
        """
        check_integer("the number of pictures", count, 1)
        if count > MOST_IMAGES:
            raise ValueError(f"{count} pictures are too many at once; ask for {MOST_IMAGES} at most.")
        return self._chain(
            sampling,
            lambda **watched: sample(self.pipe, range(count), sampling.seed, sampling.calls, request, **edit, **watched).images,
        )

    def inpaint(
        self, picture: Tensor, painted: Tensor, request: Request, sampling: Sampling, count: int
    ) -> Iterator[tuple[int, Tensor]]:
        """As `draw`, with the pixels of the picture [1, C, H, W] kept where nothing is painted."""
        return self.draw(request, sampling, count, image=picture, mask_image=painted)

    def interpolate(
        self, a: Tensor, b: Tensor, timestep: int, request: Request, sampling: Sampling
    ) -> Iterator[tuple[int, Tensor]]:
        """As `draw`, of a, mixtures with `WEIGHTS` of b that are denoised from `timestep` on, and b."""
        chain = self._chain(
            sampling,
            lambda **watched: self.pipe.interpolate(
                a, b, timestep, WEIGHTS, torch.Generator(self.pipe.device).manual_seed(sampling.seed), sampling.calls,
                output_type="pt", **request.call(range(len(WEIGHTS))), **watched,
            ).images,
        )  # fmt: skip
        return ((calls, torch.cat([a, mixtures, b])) for calls, mixtures in chain)

    def _chain(self, sampling: Sampling, call: Callable[..., Tensor]) -> Iterator[tuple[int, Tensor]]:
        if sampling.sampler not in self.samplers:
            raise ValueError(f"{sampling.sampler!r} is not one of the samplers: {', '.join(self.samplers)}.")
        scheduler, possible = self.samplers[sampling.sampler]
        if sampling.calls not in possible:
            choices = f"{sampling.sampler!r} takes {', '.join(map(str, possible))} network calls"
            raise ValueError(f"{choices}, not {sampling.calls!r}.")
        every = math.ceil(sampling.calls / PREVIEWS)

        def job(report: Callable[[Any], bool]) -> tuple[int, Tensor]:
            def shown(pipe: Any, index: int, _: Tensor, tensors: dict[str, Tensor]) -> dict:
                if (index + 1) % every == 0:
                    pipe._interrupt = report((index + 1, tensors["latents"].float().cpu() / 2 + 0.5))
                return {}

            self.pipe.scheduler = scheduler
            images = call(callback_on_step_end=shown).float().cpu()
            return self.pipe.num_timesteps, images

        return self._worker.watch(job)

    def noised(self, picture: Tensor, timestep: int, seed: int = 0) -> Noised:
        """x_t of a picture [1, C, H, W] in [0, 1]; timestep -1 is the picture. The same noise z̃ at every timestep."""
        check_integer("t", timestep, -1, self.total - 1)
        x_0 = picture * 2 - 1
        if timestep < 0:
            return Noised(x_0, 1.0, 0.0)
        scheduler = AlphaDDPMScheduler.from_config(self.pipe.scheduler.config)
        z = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
        signal = float(scheduler.alphas_cumprod[timestep]) ** 0.5
        variance = scheduler.q_mean_variance(x_0, timestep).variance
        return Noised(scheduler.add_noise(x_0, z, torch.tensor([timestep])), signal, float(variance.max()) ** 0.5)

    def likelihood(self, picture: Tensor, request: Request, rounds: int, seed: int = 0) -> Iterator[Bound]:
        """The bound (report §6, in the form with exact divergences) after each of some rounds; others have turns in between."""
        levels = self.value_range.normalize(torch.from_numpy(self.value_range.restore(picture * 2 - 1)))
        kwargs, done = self._worker.do(self._network_arguments, request), []
        for number in range(rounds):
            own = [torch.Generator().manual_seed(int(each)) for each in seeds(seed, RandomStream.NOISE, number, COPIES)]
            how = {"num_evaluated": TERMS, "num_bins": self.value_range.num_bins, "progress": False}
            images, model = levels.expand(COPIES, -1, -1, -1), (self.pipe.unet, self.pipe.scheduler)
            done.append(self._worker.do(bits_per_dim, *model, images, generator=own, model_kwargs=kwargs, **how))
            yield Bound(tuple(done))

    @torch.no_grad()
    def _network_arguments(self, request: Request) -> dict[str, Tensor]:
        """What the network is told, with a row for each of the copies."""
        told = {name: values[0] for name, values in request.arguments.items()}
        if self.kind == "text":
            states = self.pipe.encode_prompt(told["prompt"], do_classifier_free_guidance=False)[0]
            return {"encoder_hidden_states": states.expand(COPIES, -1, -1)}
        told = self.pipe._told(told.get("class_labels"), told.get("condition_vector"), None)
        return self.pipe._conditioning(told, Batch(COPIES), Guidance()).kwargs
