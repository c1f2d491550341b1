"""Work shared out over the processes of a launch. Imports accelerate."""

import contextlib
from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from .errors import ConfigError


@contextlib.contextmanager
def forgotten_accelerator() -> Iterator[None]:
    """Afterwards the next run of this process may choose another precision, however this one ended."""
    try:
        yield
    finally:
        AcceleratorState._reset_state()


def my_batches(count: int, batch_size: int, accelerator: Accelerator) -> list[range]:
    """This process's contiguous share of the batches of 0..count-1, which are the same for any number of processes. Raises
    ConfigError if a process would have nothing to do.
    """
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    if len(batches) < accelerator.num_processes:
        raise ConfigError(
            f"{count} images in batches of {batch_size} are {len(batches)} batches for {accelerator.num_processes} "
            "processes; use a smaller --batch_size or fewer processes."
        )
    bounds = [len(batches) * rank // accelerator.num_processes for rank in range(accelerator.num_processes + 1)]
    return batches[bounds[accelerator.process_index] : bounds[accelerator.process_index + 1]]
