"""Rows of the data that cannot be used: how they are written down, and when there are too many of them.

A skipped row is a dict that JSON can hold: `row` (its number in the data set, or in a shard of a stream, whose number then
is `shard`), `file` where it has one, and `reason`. Imports nothing but the standard library.
"""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..support.errors import DataError

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.jsonl"
SHOWN = 5  # skipped rows that an error names

SkippedRow = dict[str, Any]


def skipped_row(row: int, reason: str, file: str | None = None, shard: int | None = None) -> SkippedRow:
    return {
        **({} if shard is None else {"shard": shard}),
        "row": row,
        **({} if file is None else {"file": file}),
        "reason": reason,
    }


def describe(skipped: SkippedRow) -> str:
    """Such as "row 7 (cat.png): the file is empty (0 bytes)"."""
    place = f"row {skipped['row']}" + (f" of shard {skipped['shard']}" if "shard" in skipped else "")
    return f"{place}{' (' + skipped['file'] + ')' if 'file' in skipped else ''}: {skipped['reason']}"


def check_bad_fraction(name: str, skipped: Sequence[SkippedRow], bad: int, total: int, max_bad_fraction: float) -> None:
    """Raises DataError if more than this share of the `total` rows that were looked at is bad, or all of them are.

    `skipped` are some or all of the bad ones, of which the message names the first few.
    """
    if bad < total and bad / total <= max_bad_fraction:  # a quotient is rounded as the number that was typed is
        return
    allowed = f"more than --max_bad_fraction {max_bad_fraction:g} allows" if bad < total else "and no row is left"
    fix = "repair or remove them"
    if bad < total:
        fix += f", or go on without them by a larger --max_bad_fraction ({SKIPPED_FILE} then lists them)"
    found = "".join(f"\n  {describe(one)}" for one in skipped[:SHOWN])
    more = f"\n  and {bad - SHOWN:,} more" if bad > SHOWN and skipped else ""
    raise DataError(f"{bad:,} of {total:,} rows of {name} cannot be used, {allowed}; {fix}.{found}{more}")


class SkippedLog:
    """`skipped.jsonl` of a run: a line for each row that was left out, once, however often the run comes by it."""

    def __init__(self, folder: Path):
        self.path = folder / SKIPPED_FILE
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        written = [one for one in map(_parsed, lines) if one is not None]
        self._known = {_key(one) for one in written}
        if len(written) < len(lines):  # a run was killed as it wrote
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text("".join(json.dumps(one) + "\n" for one in written), "utf-8")
            os.replace(temporary, self.path)

    def __len__(self) -> int:
        """Rows that are written down."""
        return len(self._known)

    def add(self, skipped: Iterable[SkippedRow]) -> None:
        """Writes down those that are not yet, and says so."""
        new = list({_key(one): one for one in skipped if _key(one) not in self._known}.values())
        if not new:
            return
        self._known.update(map(_key, new))
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in new)
        shown = "; ".join(map(describe, new[:SHOWN]))
        logger.warning("%d rows cannot be used and are left out (see %s): %s", len(new), SKIPPED_FILE, shown)


def _parsed(line: str) -> SkippedRow | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "row" in found else None


def _key(skipped: SkippedRow) -> tuple[int | None, int]:
    return skipped.get("shard"), skipped["row"]
