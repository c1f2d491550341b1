"""Train a diffusion model: the command behind `accelerate launch training/train.py`."""

import sys

from ..support.errors import reported_errors
from .options import parse_options


def main() -> None:
    with reported_errors("interrupted before the first update"):
        options = parse_options(sys.argv[1:])
        from .loop import train  # after parsing, so that --help and mistakes take no seconds

        train(options)


if __name__ == "__main__":
    main()
