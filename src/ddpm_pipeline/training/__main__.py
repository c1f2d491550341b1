"""Train a diffusion model: the command behind `accelerate launch training/train.py`."""

import sys

from ..support.errors import reported_errors
from .loop import train
from .options import parse_config


def main() -> None:
    with reported_errors():
        train(parse_config(sys.argv[1:]))


if __name__ == "__main__":
    main()
