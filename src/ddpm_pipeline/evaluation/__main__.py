"""Evaluate a model: the command behind `accelerate launch training/evaluate.py`."""

import logging
import sys

from ..support.errors import reported_errors
from .run import evaluate, parse


def main() -> None:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with reported_errors():
        evaluate(parse(sys.argv[1:]))


if __name__ == "__main__":
    main()
