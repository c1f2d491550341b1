"""Sample many images: the command behind `accelerate launch training/generate.py`."""

import logging
import sys

from ..support.errors import reported_errors
from .run import generate, parse


def main() -> None:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with reported_errors():
        generate(parse(sys.argv[1:]))


if __name__ == "__main__":
    main()
