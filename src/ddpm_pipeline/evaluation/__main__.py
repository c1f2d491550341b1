"""Evaluate a model: the command behind `python training/evaluate.py`."""

import json
import logging
import sys

from ..support.errors import only_errors_of, reported_errors
from .options import parse_options


def main() -> None:
    with reported_errors():
        options = parse_options(sys.argv[1:])
        from . import evaluate  # after parsing, so that --help and mistakes take no seconds

        only_errors_of("diffusers")
        from accelerate import Accelerator  # after the above, which names the extra that brings it

        logging.basicConfig(format="%(message)s")
        if main_process := Accelerator().is_main_process:  # PartialState would miss the other processes on CPUs
            logging.getLogger("ddpm_pipeline").setLevel(logging.INFO)
        results = evaluate(options)
        if main_process:
            print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
