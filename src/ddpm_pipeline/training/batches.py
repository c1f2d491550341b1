"""What each process feeds the network, forward pass by forward pass, be the data preprocessed or streamed.

Imports torch, the other parts of the training data and the package's timestep quantiles; called by train.py.
"""

import atexit
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import fsspec
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ..data.mapped import ImageData, images_of, load_images
from ..data.skipped import SHOWN, SkippedRow, check_bad_fraction
from ..data.streamed import JUDGED_ROWS, Cut, Position, StreamData, cut, open_stream, rows_of_part
from ..support.draws import Stream, image_indices, seeds, uniform
from ..support.errors import ConfigError, DataError
from .conditions import Conditions
from .objectives import timestep_quantiles
from .options import TrainingConfig
from .stop import ignore_signals_in_worker

FAILURE = "failure"  # what an item of a worker holds that cannot go on: the message


def open_data(config: TrainingConfig) -> ImageData | StreamData:
    """The data that the options name. Raises DataError where they cannot be used as asked."""
    options = {
        name: getattr(config, name)
        for name in (
            "dataset_config", "split", "image_column", "resolution", "channels", "cache_dir", "condition", "label_column",
            "text_column", "max_bad_fraction",
        )
    }  # fmt: skip
    if config.streaming:
        return open_stream(config.dataset, **options)
    return load_images(config.dataset, preprocessing_num_workers=config.preprocessing_num_workers, **options)


@dataclass(frozen=True)
class Share:
    """Which rows of which update's global batch a process's forward pass k is of: update k // accumulation of the run."""

    config: TrainingConfig
    rank: int
    world_size: int

    @property
    def size(self) -> int:
        """Images in a forward pass."""
        return self.config.batch_size // (self.world_size * self.config.gradient_accumulation_steps)

    def of(self, k: int) -> tuple[int, slice]:
        """(update, positions in its global batch)."""
        step, pass_index = divmod(k, self.config.gradient_accumulation_steps)
        start = (pass_index * self.world_size + self.rank) * self.size
        return step, slice(start, start + self.size)

    def flips(self, k: int) -> np.ndarray | None:
        """Which images are mirrored, bool [b]; None where none is."""
        step, mine = self.of(k)
        if not self.config.random_flip:
            return None
        return uniform(self.config.seed, Stream.FLIP, step, self.config.batch_size)[mine] < 0.5

    def draws(self, k: int, conditions: Conditions, values: Any) -> dict[str, Any]:
        """What a batch holds beside its images; functions of (seed, step, position), and conditions of the values too."""
        config, (step, mine) = self.config, self.of(k)
        drawn = uniform(config.seed, Stream.TIMESTEP, step, config.batch_size)
        noise_seeds = seeds(config.seed, Stream.NOISE, step, config.batch_size)[mine]
        condition = conditions.draw(values, step, mine)
        return {
            "quantiles": torch.from_numpy(timestep_quantiles(drawn, config.timestep_sampling)[mine]),
            "noise_seeds": torch.from_numpy(noise_seeds),
            **({} if condition is None else {"condition": condition}),
        }


class MicroBatches(Dataset):
    """What this process feeds the network: item k is forward pass k of the run.

    An item is a function of (seed, step, position in the global batch) alone, so it does not matter who asks for it, or
    whether anybody asked for the ones before.
    """

    def __init__(
        self, data: ImageData, config: TrainingConfig, rank: int, world_size: int, conditions: Conditions | None = None
    ):
        self.data, self.config, self.conditions = data, config, conditions or Conditions()
        self.share = Share(config, rank, world_size)

    def __getitem__(self, k: int) -> dict[str, Any]:
        """`pixels` uint8 [b, C, H, W], `indices` of their rows in the data int64 [b], `quantiles` of timesteps float64 [b],
        `noise_seeds` int64 [b] and their `condition`.
        """
        step, mine = self.share.of(k)
        indices = image_indices(self.config.seed, len(self.data), step, self.config.batch_size)[mine]
        column = self.conditions.column
        return {
            "pixels": self.data.pixels(indices, self.share.flips(k)),
            "indices": torch.from_numpy(self.data.rows_of(indices)),
            **self.share.draws(k, self.conditions, self.data.column(column, indices) if column else None),
        }


class StreamBatches(IterableDataset):
    """The same from a stream: in worker w of W, or in the process itself, the passes first_pass + w, + W, + 2 W, ...

    Pass k always takes the next rows of part k mod W of this process, so which worker reads it does not matter. Beside what
    `MicroBatches` gives, an item has the `part`, its `position` after the batch, and the rows `skipped` on the way.
    """

    def __init__(
        self,
        data: StreamData,
        config: TrainingConfig,
        share: Share,
        conditions: Conditions,
        parts: Cut,
        positions: Sequence[Position],
        passes: range,
    ):
        self.data, self.config, self.share, self.conditions = data, config, share, conditions
        self.parts, self.positions, self.passes = parts, positions, passes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        if info is not None:
            fsspec.asyn.reset_lock()  # of the process that this one was forked from
        part = (self.passes.start + worker) % workers
        try:
            rows = rows_of_part(
                self.data, self.parts, self.share.rank * workers + part, self.config.seed, self.config.shuffle_buffer,
                self.positions[part],
            )  # fmt: skip
            for k in self.passes[worker::workers]:
                images = list(islice(rows, self.share.size))
                pixels = np.stack([image.pixels.reshape(-1) for image in images])
                values = None if self.conditions.column is None else [image.value for image in images]
                yield {
                    "pixels": images_of(pixels, self.data.resolution, self.data.channels, self.share.flips(k)),
                    "indices": torch.tensor([image.number for image in images]),
                    **self.share.draws(k, self.conditions, values),
                    "part": part,
                    "position": images[-1].position.to_json(),
                    "skipped": [row for image in images for row in image.skipped],
                }
        except DataError as error:  # as an item, for torch would put a traceback of the worker into the message
            yield {FAILURE: str(error)}


class BatchLoader(Iterator[dict[str, Any]]):
    """The batches of one process in their order, read ahead by its workers where it has some."""

    def __init__(self, loader: DataLoader):
        self._batches = iter(loader)
        atexit.register(self.close)  # before multiprocessing's own end, which waits for workers that ignore its signal

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)

    def state_dict(self) -> dict[str, Any] | None:
        """What the batches after those that were taken follow from, beside the number of the pass; nothing."""
        return None

    @property
    def skipped(self) -> list[SkippedRow]:
        """Rows left out on the way to the batches taken since this was last asked; none, `load_images` has named them."""
        return []

    def close(self) -> None:
        """End the workers; no batch can be taken afterwards. Called too when the process ends, however it does."""
        atexit.unregister(self.close)
        batches, self._batches = self._batches, iter(())
        if isinstance(
            batches, _MultiProcessingDataLoaderIter
        ):  # a traceback may hold it, so that dropping it is not enough
            batches._shutdown_workers()


class StreamLoader(BatchLoader):
    """The batches of one process from a stream; knows where it is. Raises DataError where too many rows are bad."""

    def __init__(self, loader: DataLoader, batches: StreamBatches):
        self._name, self._max_bad_fraction = batches.data.name, batches.data.max_bad_fraction
        self._state = {
            "next_pass": batches.passes.start,
            "world_size": batches.share.world_size,
            "rank": batches.share.rank,
            "shards": batches.parts.stream.num_shards,
        }
        self._positions = list(batches.positions)
        self._skipped: list[SkippedRow] = []
        self._first: list[SkippedRow] = []  # for the message
        super().__init__(loader)

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        if FAILURE in batch:
            raise DataError(batch[FAILURE])
        self._state["next_pass"] += 1
        self._positions[batch.pop("part")] = Position.from_json(batch.pop("position"))
        found = batch.pop("skipped")
        self._skipped += found
        self._first = (self._first + found)[:SHOWN]
        bad, seen = (sum(getattr(position, name) for position in self._positions) for name in ("bad", "seen"))
        judged = seen >= JUDGED_ROWS or any(position.epoch for position in self._positions)
        if judged or self._max_bad_fraction == 0:
            check_bad_fraction(repr(self._name), self._first, bad, seen, self._max_bad_fraction)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the parts of this process are after the batches that were taken; JSON can hold it."""
        return self._state | {"parts": [position.to_json() for position in self._positions]}

    @property
    def skipped(self) -> list[SkippedRow]:
        """Rows left out on the way to the batches taken since this was last asked."""
        found, self._skipped = self._skipped, []
        return found


def batch_loader(
    data: ImageData | StreamData,
    config: TrainingConfig,
    device_type: str,
    rank: int,
    world_size: int,
    conditions: Conditions | None,
    first_pass: int,
    last_pass: int,
    state: dict[str, Any] | None = None,
) -> BatchLoader:
    """The batches of passes `first_pass` to `last_pass` - 1 of the run, for process `rank` of `world_size`.

    `state` is what this process's `state_dict` gave after pass `first_pass` - 1; without it a stream starts at its beginning.
    Raises ConfigError where it is not of this run.
    """
    passes = range(first_pass, last_pass)
    options = {
        "batch_size": None,
        "num_workers": config.dataloader_num_workers,
        "worker_init_fn": partial(_begin_worker, os.getpid()),
        "pin_memory": device_type == "cuda",
    }
    if isinstance(data, ImageData):
        batches = MicroBatches(data, config, rank, world_size, conditions)
        return BatchLoader(DataLoader(batches, sampler=passes, **options))
    workers = max(1, config.dataloader_num_workers)
    parts = cut(data, world_size * workers)
    positions = [Position()] * workers
    if state is not None:
        _check_state(state, first_pass, world_size, rank, workers, parts)
        positions = [Position.from_json(values) for values in state["parts"]]
    elif first_pass:
        raise ConfigError(
            f"the checkpoint after pass {first_pass} does not say where in the stream it was; start anew."
        )
    share = Share(config, rank, world_size)
    streamed = StreamBatches(data, config, share, conditions or Conditions(), parts, positions, passes)
    return StreamLoader(DataLoader(streamed, **options), streamed)


def _begin_worker(parent: int, worker: int) -> None:
    """In a worker: it ends if its process did before it began, for torch looks only at what happens from then on."""
    ignore_signals_in_worker(worker)
    if multiprocessing.get_start_method() == "fork" and os.getppid() != parent:
        os._exit(1)


def _check_state(state: dict[str, Any], first_pass: int, world_size: int, rank: int, workers: int, parts: Cut) -> None:
    """Raises ConfigError where a stream cannot go on from there: its parts are shared out by processes and workers."""
    wanted = {
        "processes": (state["world_size"], world_size),
        "--dataloader_num_workers": (len(state["parts"]), workers),
        "shards of the data set": (state["shards"], parts.stream.num_shards),
        "rank": (state["rank"], rank),
        "forward passes": (state["next_pass"], first_pass),
    }
    changed = [f"{name} was {before} and is {now}" for name, (before, now) in wanted.items() if before != now]
    if changed:
        raise ConfigError(f"a stream goes on only as it was cut when the checkpoint was written: {'; '.join(changed)}.")
