"""Fit samplers of few steps to a model: the command behind `python training/fit_sampler.py`."""

import logging
import sys

from ..support.errors import reported_errors
from .options import parse_options


def main() -> None:
    with reported_errors():
        options = parse_options(sys.argv[1:])
        from . import fit  # after parsing, so that --help and mistakes take no seconds

        logging.getLogger("diffusers").setLevel(logging.ERROR)
        fit(options)


if __name__ == "__main__":
    main()
