"""Fit samplers of few steps to a model: the command behind `python training/fit_sampler.py`."""

import sys

from ..support.errors import only_errors_of, reported_errors
from .options import parse_options


def main() -> None:
    with reported_errors():
        options = parse_options(sys.argv[1:])
        from . import fit  # after parsing, so that --help and mistakes take no seconds

        only_errors_of("diffusers")
        fit(options)


if __name__ == "__main__":
    main()
