"""What the demo app is told. Imports the support of options alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..support.errors import ConfigError
from ..support.option_sets import OptionSet
from ..support.options import Allowed, OptionGroup, at_least, option

PORT = Allowed("from 1 to 65535", lambda value: 1 <= value <= 65535)


@dataclass(frozen=True)
class ModelOptions(OptionGroup):
    """The model, and what it may use."""

    title: ClassVar[str] = "model"

    model: str = option(help="Folder or Hub repository of a DDPM pipeline; it may stand first, without --model.")
    num_cpu_threads: int | None = option(None, "CPU threads of the network.", at_least(1))


@dataclass(frozen=True)
class ServerOptions(OptionGroup):
    """Where the app is served."""

    title: ClassVar[str] = "server"

    host: str = option("127.0.0.1", "Address to serve at; 0.0.0.0 lets other machines in.")
    port: int = option(7860, "Port to serve at.", PORT)
    share: bool = option(False, "Also open a public address, through a tunnel of Gradio's servers, for a week at most.")


@dataclass(frozen=True)
class SpaceOptions(OptionGroup):
    """The same app as a Hugging Face Space, in place of serving it."""

    title: ClassVar[str] = "space"

    space: str | None = option(
        None, "New folder to write the app to as a Space: with the model if that is a folder, else with its Hub name."
    )
    push_space: str | None = option(None, "Push the folder of --space to this Space on the Hub, owner/name.")
    private: bool = option(False, "Make the Space private if the push creates it.")

    def check(self) -> None:
        if self.space is None and (self.push_space is not None or self.private):
            raise ConfigError("--push_space and --private go with --space, the folder that is pushed; give it as well.")
        if self.private and self.push_space is None:
            raise ConfigError("--private goes with --push_space, since a folder is not public; drop it.")


@dataclass(frozen=True, init=False)
class AppOptions(OptionSet):
    """All options of the app: `AppOptions(model="ddpm-digits", port=8000)`."""

    source: ModelOptions
    server: ServerOptions
    publishing: SpaceOptions


def parse_options(argv: Sequence[str]) -> AppOptions:
    """The options that a command line asks for, MODEL first or as --model. Raises ConfigError if it cannot be understood."""
    words = ["--model", *argv] if argv and not argv[0].startswith("-") else argv
    return AppOptions.parse(words, "A model in the browser: drawing step by step, noising, inpainting, mixing, likelihood.")
