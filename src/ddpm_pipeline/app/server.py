"""The app served from this machine: nothing is shared, counted or readable unless asked for."""

import os
import re
import socket
from pathlib import Path

import torch
from PIL import Image

from ..data.images import MAX_PIXELS
from ..generation.pipelines import load_pipeline
from ..hub.card import ROWS
from ..support.errors import ConfigError
from .engine import Engine

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read as Gradio is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

from .screens import CSS, build

LARGEST_FILE = "16mb"  # to upload


def serve(
    model: str, host: str | None = None, port: int | None = None, share: bool = False, num_cpu_threads: int | None = None
) -> None:
    """Serve the app of a model, a folder or a Hub repository, until the process is interrupted.

    Without a host and a port, Gradio chooses them: 127.0.0.1 and the first free port from 7860 on, or as a Space demands.
    Raises ConfigError for what is no such model, and an address that cannot be served at.
    """
    if port is not None:
        _check_address(host or "127.0.0.1", port)
    if num_cpu_threads:
        torch.set_num_threads(num_cpu_threads)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses from twice as many on, also where Gradio opens a file
    app_of(model).launch(server_name=host, server_port=port, share=share, **SETTINGS)


SETTINGS = {
    "css": CSS, "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    "max_file_size": LARGEST_FILE, "allowed_paths": [], "show_error": False, "enable_monitoring": False, "run_history": False,
    "footer_links": ["api", "gradio"], "mcp_server": False, "pwa": False, "ssr_mode": False,
}  # fmt: skip


def app_of(model: str) -> gr.Blocks:
    """The app, not yet served. Raises ConfigError for what is no model of pictures."""
    pipe = load_pipeline(model, "MODEL").to("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(model)
    rows = (folder / ROWS).read_text("utf-8") if (folder / ROWS).is_file() else ""
    return build(Engine(pipe, folder.resolve().name), re.findall(r"(?m)^row \d+: (.*)$", rows))


def _check_address(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port} cannot be served at ({error.strerror}); choose others.") from error
