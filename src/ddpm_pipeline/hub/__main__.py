"""`python -m ddpm_pipeline.hub push FOLDER REPO` pushes a finished pipeline folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..support.errors import PushError
from .upload import ATTEMPTS, push


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ddpm_pipeline.hub", description="Push a finished pipeline folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("push", help="push FOLDER to the repository REPO of the Hub")
    command.add_argument("folder", metavar="FOLDER", type=Path)
    command.add_argument("repo", metavar="REPO", help="owner/name")
    command.add_argument("--private", action="store_true", default=None, help="where the repository is made anew")
    command.add_argument("--revision", help="branch to push to; main if not given")
    command.add_argument("--message", help="of the commit")
    command.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    command.add_argument("--include", action="append", default=[], metavar="PATTERN", help="further files to push")
    command.add_argument("--attempts", type=int, default=ATTEMPTS)
    options = parser.parse_args(argv)
    if options.attempts < 1:
        parser.error(f"--attempts {options.attempts} must be at least 1.")
    try:
        print(
            push(
                options.folder, options.repo, private=options.private, revision=options.revision,
                commit_message=options.message, create_pr=options.create_pr, include=options.include,
                attempts=options.attempts,
            )
        )  # fmt: skip
    except (ValueError, PushError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
