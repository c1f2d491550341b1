"""Evaluate a model: the command behind `accelerate launch training/evaluate.py`."""

import json
import logging
import sys

from ..support.errors import reported_errors
from .options import parse_options


def main() -> None:
    with reported_errors():
        options = parse_options(sys.argv[1:])
        from . import evaluate  # after parsing, so that --help and mistakes take no seconds

        logging.getLogger("diffusers").setLevel(logging.ERROR)
        results = evaluate(options)
        from accelerate import PartialState

        if PartialState().is_main_process:
            print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
