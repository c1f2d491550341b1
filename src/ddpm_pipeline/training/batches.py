"""The micro-batches that each process feeds the network, from preprocessed or streamed images.

A global batch is divided over accumulation steps and processes. What stands at a position of it is a function of (seed, step,
position), whichever process asks for it.
"""

import atexit
import contextlib
import multiprocessing.connection
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import fsspec
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ..data.mapped import ImageData, ImageSet
from ..data.options import TrainingDataOptions
from ..data.skipped import SHOWN, SkippedRow
from ..data.streamed import JUDGED_ROWS, Partition, Position, StreamData, StreamedBatch, divide, rows_of_part
from ..data.views import Views
from ..support.draws import BatchSlice, RandomStream, image_indices, uniform
from ..support.errors import ConfigError, DataError
from .augmentation import draw_parameters, flips_of, motions_of
from .conditions import Condition
from .objectives import timestep_quantiles
from .stop import ignore_signals_in_worker

LOST_WORKER = "DataLoader worker"  # the beginning of what torch raises for one that was killed
NOTICED = 5.0  # seconds, at most, until the end of a worker shows; it may be a busy machine
FAILURE = "failure"  # the key under which a worker that cannot continue puts its message


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch of each update is divided among processes and accumulation steps."""

    seed: int
    batch_size: int  # of the global batch
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1
    random_flip: bool = False
    timestep_sampling: str = "uniform"
    window_share: float | None = None  # the smallest, of images stored larger than they are seen
    augment: float | None = None  # the probability of each augmentation

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // (self.world_size * self.accumulation_steps)

    def slice_of(self, k: int) -> BatchSlice:
        """Maps this process's k-th micro-batch to its update and its slice of the global batch."""
        step, accumulated = divmod(k, self.accumulation_steps)
        start = (accumulated * self.world_size + self.rank) * self.micro_batch_size
        return BatchSlice(self.seed, step, self.batch_size, slice(start, start + self.micro_batch_size))

    def views(self, where: BatchSlice, plain: Views) -> Views:
        """How the images of a slice are seen, whose plain view is `plain`."""
        windows, flips, motions = None, np.zeros((len(where.uniform(RandomStream.FLIP)), 2), bool), None
        if self.random_flip:
            flips[:, 1] = where.uniform(RandomStream.FLIP) < 0.5
        if self.window_share is not None:
            windows = where.uniforms(RandomStream.WINDOW, 3)
            windows[:, 0] = self.window_share + (1 - self.window_share) * windows[:, 0]
        if self.augment:
            parameters = draw_parameters(where, self.augment)
            flips, motions = flips ^ flips_of(parameters), motions_of(parameters)
        return replace(plain, windows=windows, flips=flips, motions=motions)

    def draws(self, where: BatchSlice, condition: Condition, values: Any) -> dict[str, Any]:
        """What a micro-batch holds beside its images: quantiles of timesteps, seeds of noise, and conditions of `values`."""
        drawn = uniform(self.seed, RandomStream.TIMESTEP, where.step, self.batch_size)  # strata are of the global batch
        drawn_condition = condition.draw(values, where)
        return {
            "quantiles": torch.from_numpy(timestep_quantiles(drawn, self.timestep_sampling)[where.positions]),
            "noise_seeds": torch.from_numpy(where.seeds(RandomStream.NOISE)),
            **({} if drawn_condition is None else {"condition": drawn_condition}),
            **({"augmentation": torch.from_numpy(draw_parameters(where, self.augment)).float()} if self.augment else {}),
        }


class MicroBatches(Dataset):
    """Item k is this process's k-th micro-batch of the run, from preprocessed images."""

    def __init__(self, data: ImageData, plan: BatchPlan, condition: Condition | None = None):
        self.data, self.plan, self.condition = data, plan, condition or Condition()

    def __getitem__(self, k: int) -> dict[str, Any]:
        """`pixels` uint8 [b, C, H, W], `indices` of their rows in the data int64 [b], `quantiles` of timesteps float64 [b],
        `noise_seeds` int64 [b], and their `condition` and the parameters of their `augmentation` float32 [b, 9], if any.
        """
        where = self.plan.slice_of(k)
        indices = image_indices(where.seed, len(self.data), where.step, where.batch_size)[where.positions]
        views = self.plan.views(where, self.data.view)
        return {
            "pixels": self.data.pixels(indices, views),
            "indices": torch.from_numpy(self.data.rows_of(indices)),
            **self.plan.draws(where, self.condition, self.condition.read(self.data, indices, views)),
        }


@dataclass(frozen=True, eq=False)
class StreamBatches(IterableDataset):
    """The same from a stream. Worker w of W yields micro-batches w, w + W, w + 2 W, ... of `micro_batches`.

    Micro-batch k always takes the next rows of part k mod W of this process, whichever worker reads it. Beside what
    `MicroBatches` gives, an item has the `part`, its `position` after the batch, and the rows `skipped` on the way.
    """

    data: StreamData
    plan: BatchPlan
    condition: Condition
    partition: Partition
    positions: Sequence[Position]  # one per part of this process
    micro_batches: range
    shuffle_buffer: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        if info is not None:
            fsspec.asyn.reset_lock()  # the parent process held its own when this one was forked
        part = (self.micro_batches.start + worker) % workers
        try:
            reader, position = self.plan.rank * workers + part, self.positions[part]
            rows = rows_of_part(self.data, self.partition, reader, self.plan.seed, self.shuffle_buffer, position)
            for k in self.micro_batches[worker::workers]:
                yield self._micro_batch(k, list(islice(rows, self.plan.micro_batch_size))) | {"part": part}
        except DataError as error:  # as an item, since torch would put the worker's traceback into the message
            yield {FAILURE: str(error)}

    def _micro_batch(self, k: int, images: list[Any]) -> dict[str, Any]:
        where = self.plan.slice_of(k)
        views = self.plan.views(where, self.data.view)
        values = self.condition.read(StreamedBatch(self.data, images), range(len(images)), views)
        return {
            "pixels": views.apply([image.pixels for image in images]),
            "indices": torch.tensor([image.number for image in images]),
            **self.plan.draws(where, self.condition, values),
            "position": images[-1].position.to_json(),
            "skipped": [row for image in images for row in image.skipped],
        }


class BatchLoader(Iterator[dict[str, Any]]):
    """The micro-batches of one process in order, prepared in advance by its workers if it has any."""

    def __init__(self, loader: DataLoader):
        self._batches = iter(loader)
        atexit.register(self.close)  # before multiprocessing's own end, which waits for workers that ignore its signal

    def __next__(self) -> dict[str, Any]:
        try:
            return next(self._batches)
        except (OSError, EOFError) as error:  # perhaps of a connection that broke with its worker, which torch will say
            workers = {worker.sentinel: worker for worker in getattr(self._batches, "_workers", ())}
            for sentinel in multiprocessing.connection.wait(workers, timeout=NOTICED):  # of the first that ends
                workers[sentinel].join()  # so that torch's handler, should it come later, has nothing to say
                raise RuntimeError(f"{LOST_WORKER} ended") from error
            raise

    def state_dict(self) -> dict[str, Any] | None:
        """What later micro-batches depend on beside their number: nothing."""
        return None

    def close(self) -> None:
        """End the workers; no batch can be taken afterwards. Also called when the process ends."""
        atexit.unregister(self.close)
        batches, self._batches = self._batches, iter(())
        if isinstance(batches, _MultiProcessingDataLoaderIter):  # a traceback may hold it, so dropping it is not enough
            batches._shutdown_workers()


class StreamLoader(BatchLoader):
    """The micro-batches of one process from a stream; knows its position. Raises DataError if too many rows are bad."""

    def __init__(self, loader: DataLoader, batches: StreamBatches):
        self._data, plan, shards = batches.data, batches.plan, batches.partition.stream.num_shards
        division = {"world_size": plan.world_size, "rank": plan.rank, "shards": shards}
        self._state = {"next_pass": batches.micro_batches.start, **division}
        self._positions = list(batches.positions)
        self._skipped: list[SkippedRow] = []
        self._first: list[SkippedRow] = []  # for the message
        super().__init__(loader)

    def __next__(self) -> dict[str, Any]:
        batch = super().__next__()
        if FAILURE in batch:
            raise DataError(batch[FAILURE])
        self._state["next_pass"] += 1
        self._positions[batch.pop("part")] = Position.from_json(batch.pop("position"))
        found = batch.pop("skipped")
        self._skipped += found
        self._first = (self._first + found)[:SHOWN]
        bad, seen = (sum(getattr(position, name) for position in self._positions) for name in ("bad", "seen"))
        judged = seen >= JUDGED_ROWS or any(position.epoch for position in self._positions)
        if judged or self._data.max_bad_fraction == 0:
            self._data.check_bad_rows(self._first, bad, seen)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position of this process's parts after the batches taken so far, as JSON."""
        return self._state | {"parts": [position.to_json() for position in self._positions]}

    def take_skipped(self) -> list[SkippedRow]:
        """Rows skipped since the last call, on the way to the batches taken."""
        found, self._skipped = self._skipped, []
        return found


def batch_loader(
    data: ImageSet,
    plan: BatchPlan,
    condition: Condition | None,
    micro_batches: range,
    options: TrainingDataOptions,
    device_type: str = "cpu",
    state: dict[str, Any] | None = None,
) -> BatchLoader:
    """A loader of these micro-batches of the run.

    `state` is what this process's `state_dict` gave before the first of them; without it a stream starts at its beginning.
    Raises ConfigError if it belongs to a stream that was divided differently.
    """
    workers, begin = options.dataloader_num_workers, partial(_begin_worker, os.getpid())
    loading = {"batch_size": None, "num_workers": workers, "worker_init_fn": begin, "pin_memory": device_type == "cuda"}
    if isinstance(data, ImageData):
        return BatchLoader(DataLoader(MicroBatches(data, plan, condition), sampler=micro_batches, **loading))
    workers, first = max(1, workers), micro_batches.start
    partition = divide(data, plan.world_size * workers)
    positions = [Position()] * workers
    if state is not None:
        _check_state(state, first, plan, workers, partition)
        positions = [Position.from_json(values) for values in state["parts"]]
    elif first:
        raise ConfigError(f"the checkpoint after micro-batch {first} has no position in the stream; start a new run.")
    condition, buffer = condition or Condition(), options.shuffle_buffer
    batches = StreamBatches(data, plan, condition, partition, positions, micro_batches, buffer)
    return StreamLoader(DataLoader(batches, **loading), batches)


@contextlib.contextmanager
def lost_workers() -> Iterator[None]:
    """Within, a worker that was killed ends the run with a DataError: torch raises from a signal handler, wherever that is."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(LOST_WORKER):
            raise
        raise DataError(
            "A worker process that prepares batches was killed, perhaps because memory was short. Resume with --resume latest; "
            "fewer --dataloader_num_workers or a smaller --shuffle_buffer need less memory."
        ) from error


def _begin_worker(parent: int, worker: int) -> None:
    """In a worker: end if the parent process ended before this one began, since torch only watches from then on."""
    ignore_signals_in_worker()
    if multiprocessing.get_start_method() == "fork" and os.getppid() != parent:
        os._exit(1)


def _check_state(state: dict[str, Any], first: int, plan: BatchPlan, workers: int, partition: Partition) -> None:
    """Raises ConfigError if a stream cannot resume there: its parts depend on the numbers of processes and workers."""
    compared = {
        "processes": (state["world_size"], plan.world_size),
        "--dataloader_num_workers": (len(state["parts"]), workers),
        "shards of the data set": (state["shards"], partition.stream.num_shards),
        "rank": (state["rank"], plan.rank),
        "micro-batches": (state["next_pass"], first),
    }
    if changed := [f"{name} was {before} and is {now}" for name, (before, now) in compared.items() if before != now]:
        raise ConfigError(
            f"a stream can resume only if it is divided as before: {'; '.join(changed)}. Restore the earlier numbers."
        )
