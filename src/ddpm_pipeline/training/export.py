"""The model in a checkpoint: what a checkpoint says of it beside its weights, how it is read back, and the command that makes a
pipeline folder of it:

    python -m ddpm_pipeline.training.export ddpm-digits/checkpoints/step-00001000 --output_dir ddpm-digits-1000
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn

from ..encoding_alpha_ddpm import WithConditionImage, image_condition
from ..hub import export
from ..pipeline_alpha_ddpm import AlphaDDPMPipeline
from ..pipeline_alpha_ddpm_image import AlphaDDPMImageToImagePipeline
from ..pipeline_alpha_ddpm_text import AlphaDDPMTextToImagePipeline
from ..scheduling_alpha_ddpm import AlphaDDPMScheduler
from ..stock_format import build_within
from ..support.errors import ConfigError, reported_errors
from ..support.exceptions import describe_exception
from ..support.extras import needs_extra
from ..support.provenance import weights_digest

with needs_extra("train", __package__):
    from .augmentation import AugmentedNetwork
    from .checkpoints import EMA_FILE, IDENTITY_FILE, STATE_FILE, WEIGHTS_FILE, damage_of, stored_options
    from .identity import identity_of
    from .output_folder import OPTIONS_FILE
    from .record import model_card
    from .text_encoders import load_text_encoder

if TYPE_CHECKING:
    from .jobs import Run

logger = logging.getLogger(__name__)

MOST_PARAMETERS, MOST_TENSORS = 2**33, 10_000  # of a network; the UNet of Stable Diffusion XL has 2.6e9 in 1,680
MODEL, CARD, ENCODER = "model", "README.md", "text_encoder"


def describe_run(run: "Run", done: int, folder: Path) -> None:
    """Write into a checkpoint's folder what the run is of and what its model is, all but the weights."""
    identity = identity_of(run.data, run.condition, run.state.unet, run.scheduler)
    (folder / IDENTITY_FILE).write_text(json.dumps(identity, indent=1), "utf-8")
    (folder / OPTIONS_FILE).write_text(run.options.to_yaml(), "utf-8")
    for name, part in run.pipe.components.items():
        if name == ENCODER:
            part.config.architectures = [type(part).__name__]  # as saving the encoder itself does
            part.config.save_pretrained(folder / MODEL / name)
        else:
            save = getattr(part, "save_config", None) or part.save_pretrained
            save(folder / MODEL / name)
    try:
        (folder / CARD).write_text(str(model_card(run, folder, done)), "utf-8")
    except Exception as error:  # whatever is wrong with the card is no reason to lose a checkpoint
        logger.warning("the checkpoint after update %d has no model card: %s", done, describe_exception(error))


def is_checkpoint(path: str | Path | None) -> bool:
    return path is not None and (Path(path) / STATE_FILE).is_file()


def pipeline_of(checkpoint: str | Path) -> DiffusionPipeline:
    """The pipeline of a checkpoint, with the EMA weights if the run has them. A frozen text encoder comes from where the run
    had it. Raises ConfigError if the checkpoint is damaged or of an earlier version, or if the text encoder is another now.
    """
    checkpoint = Path(checkpoint)
    if problem := damage_of(checkpoint):
        raise ConfigError(f"{checkpoint} is damaged: {problem}. Name another checkpoint.")
    if not (checkpoint / MODEL).is_dir():
        raise ConfigError(f"{checkpoint} is of an earlier version and does not describe its model; resume the run instead.")
    try:
        return _read_pipeline(checkpoint)
    except ConfigError:
        raise
    except Exception as error:  # safetensors, diffusers and transformers each have their own for what they cannot read
        raise ConfigError(f"{checkpoint} cannot be read: {describe_exception(error)}") from error


def _read_pipeline(checkpoint: Path) -> DiffusionPipeline:
    model = checkpoint / MODEL
    scheduler = AlphaDDPMScheduler.from_config(AlphaDDPMScheduler.load_config(model / "scheduler"))
    unet_class = UNet2DConditionModel if (model / ENCODER).is_dir() else UNet2DModel
    unet = built(partial(unet_class.from_config, unet_class.load_config(model / "unet")))
    if unet_class is UNet2DModel:
        of_images = image_condition(unet) is not None
        _load_weights(checkpoint, unet, WithConditionImage(unet) if of_images else unet)
        kind = AlphaDDPMImageToImagePipeline if of_images else AlphaDDPMPipeline
        return kind(unet=unet.eval(), scheduler=scheduler)
    frozen = json.loads((checkpoint / IDENTITY_FILE).read_text("utf-8"))["frozen text encoder"]
    if frozen:
        encoder = _frozen_encoder(checkpoint, frozen)
        _load_weights(checkpoint, unet, unet)
    else:
        config = transformers.AutoConfig.from_pretrained(model / ENCODER, trust_remote_code=False)
        encoder_class = getattr(transformers, config.architectures[0])
        if not issubclass(encoder_class, transformers.PreTrainedModel):
            raise ValueError(f"{config.architectures[0]} is not a model of transformers")
        encoder = built(partial(encoder_class, config))
        _load_weights(checkpoint, unet, nn.ModuleDict({"unet": unet, ENCODER: encoder}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model / "tokenizer", trust_remote_code=False)
    parts = {ENCODER: encoder.eval(), "tokenizer": tokenizer}
    return AlphaDDPMTextToImagePipeline(unet=unet.eval(), scheduler=scheduler, **parts)


def built(build: Callable[[], Any]) -> Any:
    """What `build` makes, unless it is too large to be a model of ours."""
    build_within(build, MOST_PARAMETERS, MOST_TENSORS, "training takes")
    return build()


def _frozen_encoder(checkpoint: Path, digest: str) -> Any:
    options = stored_options(checkpoint)
    source, init_from = options["text_encoder"], options["init_from"]
    if source is None and is_checkpoint(init_from):
        encoder = pipeline_of(init_from).text_encoder
    else:
        encoder = load_text_encoder(source, init_from)[1]
    if weights_digest(encoder) != digest:
        raise ConfigError(f"the text encoder of {source or init_from} is not the one that {checkpoint} was trained with.")
    return encoder


def _load_weights(checkpoint: Path, unet: Any, network: nn.Module) -> None:
    """Into the network as it was trained, which is or holds the UNet. Raises ValueError or RuntimeError if they do not fit."""
    if stored_options(checkpoint).get("augment"):
        network = AugmentedNetwork(network, unet)
    if (checkpoint / EMA_FILE).is_file():
        shadows, parameters = load_file(checkpoint / EMA_FILE), list(network.named_parameters())
        stored = {name: shadows[str(index)] for index, (name, _) in enumerate(parameters)}
        if len(shadows) != len(parameters):
            raise ValueError(f"{EMA_FILE} has {len(shadows)} tensors, and the network {len(parameters)}")
    else:
        wrapped = load_file(checkpoint / WEIGHTS_FILE)
        stored = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in wrapped.items()}
    missing, known = network.load_state_dict(stored, strict=False).missing_keys, dict(network.named_parameters())
    if lacking := [name for name in missing if name in known]:
        raise ValueError(f"there are no weights for {', '.join(lacking[:3])}")
    if bad := [name for name, value in stored.items() if not value.isfinite().all()]:
        raise ConfigError(f"{checkpoint} has weights that are not finite, in {', '.join(bad[:3])}; use another checkpoint.")


def export_checkpoint(checkpoint: str | Path, output_dir: str | Path) -> Path:
    """Make a pipeline folder of a checkpoint: EMA weights, scheduler and model card, which says how many updates were done.
    Returns the folder, which has to be new or empty. Raises ConfigError if that cannot be.
    """
    checkpoint, folder = Path(checkpoint), Path(output_dir)
    if not is_checkpoint(checkpoint):
        raise ConfigError(f"{checkpoint} is not a checkpoint: it has no {STATE_FILE}. They are in a run's folder checkpoints.")
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ConfigError(f"--output_dir {folder} exists already; name a new or empty folder.")
    pipe, card = pipeline_of(checkpoint), checkpoint / CARD
    export(pipe, folder, ModelCard(card.read_text("utf-8")) if card.is_file() else None)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    program, description = "python -m ddpm_pipeline.training.export", "Make a model of a checkpoint."
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="such as ddpm-digits/checkpoints/step-00001000")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for the model, new or empty")
    given = parser.parse_args(argv)
    with reported_errors():
        folder = export_checkpoint(given.checkpoint, given.output_dir)
        step = json.loads((given.checkpoint / STATE_FILE).read_text("utf-8"))["step"]
        print(f"{folder}: the model after {step} updates")
    return 0


if __name__ == "__main__":
    sys.exit(main())
