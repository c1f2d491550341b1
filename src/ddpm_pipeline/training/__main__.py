"""Train a diffusion model: the command behind `python training/train.py`."""

import sys

from ..support.errors import PUSH_FAILED_STATUS, STOPPED_STATUS, PushError, Stopped, reported_errors
from .options import parse_options


def main() -> None:
    with reported_errors("interrupted before the first update"):
        options = parse_options(sys.argv[1:])
        from . import train  # after parsing, so that --help and mistakes take no seconds
        from .stop import end_soon

        try:
            train(options)
        except (Stopped, PushError) as ended:
            end_soon(STOPPED_STATUS if isinstance(ended, Stopped) else PUSH_FAILED_STATUS)
            raise


if __name__ == "__main__":
    main()
