"""`python -m ddpm_pipeline.hub push FOLDER REPO` pushes a finished pipeline folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..support.errors import ConfigError, reported_errors
from .upload import ATTEMPTS, PushOptions, push


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ddpm_pipeline.hub", description="Push a finished pipeline folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("push", help="push FOLDER to the Hub repository REPO")
    command.add_argument("folder", metavar="FOLDER", type=Path)
    command.add_argument("repo", metavar="REPO", help="owner/name")
    command.add_argument(
        "--private", action="store_true", default=None, help="push to a private repository only, made if missing"
    )
    command.add_argument("--revision", help="branch to push to; default: main")
    command.add_argument("--message", help="commit message")
    command.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    command.add_argument("--include", action="append", default=[], metavar="PATTERN", help="more files to push")
    command.add_argument("--attempts", type=int, default=ATTEMPTS, help="how often to try; default: %(default)s")
    given = parser.parse_args(argv)
    if given.attempts < 1:
        parser.error(f"--attempts {given.attempts} must be at least 1.")
    options = PushOptions(given.private, given.revision, given.message, given.create_pr, given.include, given.attempts)
    with reported_errors():
        try:
            print(push(given.folder, given.repo, options))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    for pattern in given.include:  # which `push` has checked
        if not any(given.folder.glob(pattern)):
            print(f"--include {pattern} matches nothing in {given.folder}, to which patterns are relative.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
