"""`--autotune`: which precision, memory format, micro-batch and number of threads, and whether compilation, train this network
fastest on this machine. Each is tried on a copy of the network with a real batch before a run, which then begins as if what was
chosen had been given by hand. Called by the loop.
"""

import contextlib
import copy
import gc
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from ..data.sources import hash_of
from ..support.atomic import write_text
from ..support.exceptions import describe_exception
from ..support.provenance import provenance
from .batches import BatchLoader
from .checkpoints import options_to_resume
from .conditions import Condition
from .options import TrainingOptions
from .processes import attention_on, start_processes
from .state import TrainingState, build_state

logger = logging.getLogger(__name__)

TUNED = ("mixed_precision", "channels_last", "gradient_accumulation_steps", "num_cpu_threads", "compile")  # in this order
SHARE = 0.02  # of the expected time of the run, which trials may take
UPDATES = 5  # timed in a trial, after one that is not
FASTER = 0.97  # of the time of an update: what is not below it is taken for noise
COMPILATION = 120.0  # seconds, as a guess before it is tried


@dataclass(frozen=True)
class Subject:
    """What is tried."""

    unet: Any
    condition: Condition
    losses: Callable[..., torch.Tensor]  # losses(model, batch, timesteps, options=...)
    batches: Callable[..., BatchLoader]  # batches(options=..., accelerator=...), of the run from its beginning


@dataclass(frozen=True)
class Trial:
    """Seconds, of the slowest process."""

    update: float  # the fastest
    total: float

    @property
    def compilation(self) -> float:
        """What came on top of the updates."""
        return self.total - (UPDATES + 1) * self.update


def tunable(options: TrainingOptions) -> tuple[str, ...]:
    """The options that may be chosen: with --autotune those that have their default value, which nobody has set."""
    if not options.hardware.autotune:
        return ()
    told = {
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no",  # which `accelerate launch` sets
        "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in os.environ,
    }
    values, declared = options.flat(), options.declared()
    return tuple(name for name in TUNED if values[name] == declared[name].default and not told.get(name))


def autotuned(
    accelerator: Accelerator, options: TrainingOptions, names: tuple[str, ...], subject: Subject
) -> tuple[Accelerator, TrainingOptions]:
    """The accelerator and the resolved options with values chosen for `names`: those of the run that is resumed, those that
    were chosen before for the same, or the fastest in trials. All processes get the same.
    """
    key, chosen, why = _key(accelerator, options, names, subject), None, ""
    if accelerator.is_main_process:
        stored = options_to_resume(options.run, Path(options.run.output_dir))
        if stored is not None:
            chosen, why = {name: stored[name] for name in names if name in stored}, "as the run that is resumed has them"
        elif (known := _remembered().get(key)) is not None:
            chosen, why = known["chosen"], f"{known['why']}; remembered in {_memory()}"
    chosen, why = broadcast_object_list([chosen, why])
    if chosen is None:
        chosen, why = _by_trials(accelerator, options, names, subject)
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):  # of a cache folder that cannot be written; the next run tries again
                write_text(_memory(), json.dumps({**_remembered(), key: {"chosen": chosen, "why": why}}, indent=1) + "\n")
    logger.info("autotune: %s (%s)", ", ".join(f"--{name} {value}" for name, value in chosen.items()) or "defaults", why)
    return _restarted(options.with_values(**chosen, autotune=False))


# ---- trials -----------------------------------------------------------------------------------------


def _by_trials(
    accelerator: Accelerator, options: TrainingOptions, names: tuple[str, ...], subject: Subject
) -> tuple[dict[str, Any], str]:
    """The values that make updates faster by more than noise, one option after the other; and why."""
    updates = options.optimisation.max_train_steps
    default = fastest = _tried(options, subject)
    allowed, spent = SHARE * updates * default.update, default.total
    chosen: dict[str, Any] = {}
    said: list[str] = []
    for name in names:
        for value in _candidates(name, options, accelerator):
            expected = COMPILATION if name == "compile" else (UPDATES + 1) * fastest.update
            if spent + expected > allowed:
                said.append(f"{name} {value} not tried, as trials may take {SHARE:.0%} of the run")
                break
            trial = _tried(options.with_values(**chosen | {name: value}), subject)
            spent += trial.total
            said.append(f"{name} {value}: {_ratio(trial, fastest)}")
            repays = name != "compile" or (fastest.update - trial.update) * updates > trial.compilation
            if trial.update < FASTER * fastest.update and repays:
                chosen[name], fastest = value, trial
            elif fastest.update < math.inf:  # else something that fits in memory is still looked for
                break
    if chosen:
        again = _tried(options, subject)  # the machine may have been busy during the first trial
        spent += again.total
        if again.update <= fastest.update:
            chosen = {}
        said.append(f"all: {_ratio(fastest, again)}")
    return chosen, f"times of an update: {'; '.join(said)}; {spent:.1f} s of trials" if said else "nothing to try"


def _ratio(trial: Trial, other: Trial) -> str:
    if math.inf in (trial.update, other.update):
        return "impossible" if trial.update == math.inf else "possible"
    return f"x {trial.update / other.update:.2f}"


def _candidates(name: str, options: TrainingOptions, accelerator: Accelerator) -> Iterator[Any]:
    """Values of an option worth trying here; after one that is not faster, the next are not tried."""
    device, threads = accelerator.device.type, torch.get_num_threads()
    if name == "mixed_precision" and _has_bf16(device):
        yield "bf16"
    elif name in ("channels_last", "compile"):
        yield True
    elif name == "gradient_accumulation_steps":
        images = options.optimisation.batch_size // accelerator.num_processes
        yield from (2**power for power in range(1, images.bit_length()) if images % 2**power == 0)
    elif name == "num_cpu_threads" and device == "cpu":
        yield from (threads // 2**power for power in range(1, threads.bit_length()))


def _has_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)


def _restarted(options: TrainingOptions) -> tuple[Accelerator, TrainingOptions]:
    """As at the beginning of a run, with the same process group."""
    AcceleratorState._reset_state()
    return start_processes(options)


def _tried(options: TrainingOptions, subject: Subject) -> Trial:
    """Some updates with these options; they are infinitely slow if they are not possible, such as for want of memory."""
    began, (accelerator, options) = time.perf_counter(), _restarted(options)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            fastest = min(_seconds_of_updates(accelerator, options, subject)[1:])
    except Exception as error:
        if accelerator.num_processes > 1:  # the others may be waiting
            raise
        logger.debug("autotune: %s", describe_exception(error))
        fastest = math.inf
    accelerator.free_memory()
    gc.collect()
    if devices:
        torch.cuda.empty_cache()
    here = torch.tensor([[fastest, time.perf_counter() - began]], device=accelerator.device)
    return Trial(*accelerator.gather(here).amax(dim=0).tolist())


def _seconds_of_updates(accelerator: Accelerator, options: TrainingOptions, subject: Subject) -> list[float]:
    unet, network = copy.deepcopy((subject.unet, subject.condition.network(subject.unet)))
    state = build_state(accelerator, unet, network, options)
    state.model.train()
    loader = subject.batches(options=options.with_values(dataloader_num_workers=0), accelerator=accelerator)
    batches = [next(loader) for _ in range(options.optimisation.gradient_accumulation_steps)]
    loader.close()
    objective, taken = lambda *given: subject.losses(*given, options=options), []
    for _ in range(UPDATES + 1):
        _wait(accelerator)
        began = time.perf_counter()
        _update(accelerator, state, objective, batches)
        _wait(accelerator)
        taken.append(time.perf_counter() - began)
    return taken


def _update(
    accelerator: Accelerator, state: TrainingState, objective: Callable[..., torch.Tensor], batches: list[dict[str, Any]]
) -> None:
    """The work of `loop.update`."""
    for index, batch in enumerate(batches):
        one_of_several = contextlib.nullcontext() if index == len(batches) - 1 else accelerator.no_sync(state.model)
        with one_of_several, attention_on(accelerator):
            _, losses, loss = state.forward(objective, batch, accelerator.device)
            accelerator.backward(loss / len(batches))
    state.updater(0, losses.detach(), batch["indices"].tolist(), stop=False)


def _wait(accelerator: Accelerator) -> None:
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()


# ---- what was chosen before ------------------------------------------------------------------------


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ddpm-pipeline" / "autotune.json"


def _remembered() -> dict[str, Any]:
    """By key. Nothing if there is no such file, or if it is not ours."""
    try:
        known = json.loads(_memory().read_text("utf-8"))
        return {key: value for key, value in known.items() if value["chosen"].keys() <= {*TUNED} and "why" in value}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return {}


def _key(accelerator: Accelerator, options: TrainingOptions, names: tuple[str, ...], subject: Subject) -> str:
    """Of what a choice depends on: machine, versions, network, batch, length of the run, and what else is given."""
    config = {name: str(value) for name, value in subject.unet.config.items() if not name.startswith("_")}
    made_on = {name: value for name, value in provenance(accelerator.device).items() if name != "date"}
    given = {name: value for name, value in vars(options.hardware).items() if name not in names}
    optimisation, processes = options.optimisation, accelerator.num_processes
    sizes = optimisation.batch_size, optimisation.gradient_accumulation_steps, optimisation.max_train_steps, processes
    return hash_of(made_on, config, given, sizes, names, options.condition.condition, options.data.augment)
